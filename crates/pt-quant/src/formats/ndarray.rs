//! Arrays of ndarray in and out.

use alloc::vec;

use ndarray::{ArrayView, ArrayViewMut, Axis, Dimension};

use crate::error::check_len;
use crate::{Block4, Block4Ref, BlockSize, Codebook, Element, Exec, QuantError, Stores};

impl Block4 {
    /// Quantizes an array, flat in row-major order whatever its layout in memory; one of another layout is copied first.
    ///
    /// # Errors
    /// As [`Block4::quantize`].
    ///
    /// # Example
    /// ```
    /// use ndarray::Array2;
    /// use pt_quant::{Block4, BlockSize, Codebook, Exec};
    ///
    /// let exec = Exec::new();
    /// let weight = Array2::from_shape_fn((4, 48), |(row, column)| row as f32 - column as f32);
    /// let weights = Block4::quantize_array(&weight.view(), BlockSize::B64, Codebook::nf4(), &exec)?;
    /// let mut back = Array2::<f32>::zeros((4, 48));
    /// weights.as_ref().dequantize_into_array(&mut back.view_mut(), &exec)?;
    /// assert!((&weight - &back).iter().all(|error| error.abs() < 8.0));
    /// # Ok::<(), pt_quant::QuantError>(())
    /// ```
    pub fn quantize_array<T: Element, D: Dimension>(
        input: &ArrayView<'_, T, D>,
        block_size: BlockSize,
        codebook: Codebook,
        exec: &Exec<'_>,
    ) -> Result<Self, QuantError> {
        match input.as_slice() {
            Some(input) => Self::quantize(input, block_size, codebook, exec),
            None => {
                let flat: vec::Vec<T> = input.iter().copied().collect();
                Self::quantize(&flat, block_size, codebook, exec)
            }
        }
    }
}

impl Block4Ref<'_> {
    /// All the weights into an array of any layout, in row-major order.
    ///
    /// # Errors
    /// [`QuantError::Length`] unless `out` has [`len`](Block4Ref::len) elements.
    pub fn dequantize_into_array<T: Element, D: Dimension>(
        &self,
        out: &mut ArrayViewMut<'_, T, D>,
        exec: &Exec<'_>,
    ) -> Result<(), QuantError> {
        check_len("out", out.len(), self.len())?;
        if let Some(out) = out.as_slice_mut() {
            return self.dequantize_into(out, exec);
        }
        // Row by row; rows in the order of the axes before.
        let row_len = out.shape().last().copied().unwrap_or(1);
        let mut row = vec![T::from_f32(0.0); row_len];
        for (index, mut lane) in out.lanes_mut(Axis(out.ndim().saturating_sub(1))).into_iter().enumerate() {
            match lane.as_slice_mut() {
                Some(lane) => self.dequantize_range_into(index * row_len, lane, Stores::Cached, exec)?,
                None => {
                    self.dequantize_range_into(index * row_len, &mut row, Stores::Cached, exec)?;
                    lane.iter_mut().zip(&row).for_each(|(to, from)| *to = *from);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, Array3, s};

    use super::*;

    #[test]
    fn any_layout_holds_the_same_weights() {
        let exec = Exec::single();
        let weight = Array2::from_shape_fn((5, 70), |(row, column)| (row as f32 * 1.3 + column as f32).sin());
        let new = |view: &ArrayView<'_, f32, ndarray::Ix2>| {
            Block4::quantize_array(view, BlockSize::B64, Codebook::nf4(), &exec).unwrap()
        };
        let expected = new(&weight.view());
        // The same matrix stored by columns.
        let by_columns = weight.t().as_standard_layout().into_owned();
        assert_eq!(new(&by_columns.t()), expected);

        let mut plain = Array2::<f32>::zeros((5, 70));
        expected.as_ref().dequantize_into_array(&mut plain.view_mut(), &exec).unwrap();
        let mut columns = Array2::<f32>::zeros((70, 5));
        expected.as_ref().dequantize_into_array(&mut columns.view_mut().reversed_axes(), &exec).unwrap();
        assert_eq!(columns.t(), plain);
        let mut padded = Array3::<f32>::zeros((5, 2, 40));
        expected.as_ref().dequantize_into_array(&mut padded.slice_mut(s![.., .., ..35]), &exec).unwrap();
        assert_eq!(padded.slice(s![.., .., ..35]).to_shape((5, 70)).unwrap(), plain);
    }

    #[test]
    fn an_array_of_another_size_is_refused() {
        let weights = Block4::quantize(&[1.0f32; 6], BlockSize::B64, Codebook::nf4(), &Exec::single()).unwrap();
        let mut out = Array2::<f32>::zeros((2, 2));
        let error = weights.as_ref().dequantize_into_array(&mut out.view_mut(), &Exec::single());
        assert_eq!(error, Err(QuantError::Length { what: "out", found: 4, expected: 6 }));
    }
}
