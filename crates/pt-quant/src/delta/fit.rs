//! From two matrices to the signs and the scale of their difference.

use alloc::vec;
use alloc::vec::Vec;

use super::{BitDelta, BitMatrix, DeltaScaleBuf, SCALE_GROUP, ScaleAxis};
use crate::error::check_len;
use crate::simd::delta;
use crate::simd::view::View;
use crate::{Element, Exec, QuantError};

/// Weights that a task takes at least: below it, handing out a task costs more than the task.
const MIN_TASK: usize = 16 * 1024;

impl BitDelta {
    /// The 1-bit delta between two matrices, in one pass over both: the signs of `fine_tuned - base`, where no difference counts as +1, and the mean of its
    /// magnitudes as scale, which is the scale that is nearest in the sense of least squares (BitDelta, section 3.1).
    ///
    /// # Shapes
    /// - `base`, `fine_tuned`: `[out_features, in_features]`, row-major; f32, bf16 or f16.
    ///
    /// Differences are taken in f32; BitDelta's script rounds them to the weights' format first, so its scale may differ by that rounding (the signs
    /// cannot). The signs are those of any other instruction set, and so is the scale, bit for bit, whatever the threads: with u = 2^-24 it is within 10·u of
    /// the mean of the differences, relatively. A mean over no weights is 0.
    ///
    /// # Errors
    /// [`QuantError::Length`] when a matrix has another size; [`QuantError::NonFinite`] when a difference is infinite or no number, with its row.
    ///
    /// # Example
    /// ```
    /// use pt_quant::delta::{BitDelta, DeltaScale, ScaleAxis};
    /// use pt_quant::Exec;
    ///
    /// let (base, fine_tuned) = ([1.0f32, 2.0, 3.0, 4.0], [1.5f32, 1.5, 3.5, 3.5]); // [2, 2]
    /// let delta = BitDelta::fit(&base, &fine_tuned, 2, 2, ScaleAxis::Matrix, &Exec::new())?;
    /// assert_eq!(delta.scale(), DeltaScale::Matrix(0.5));
    /// assert_eq!(delta.signs().words(), [0b01, 0b01]);
    /// # Ok::<(), pt_quant::QuantError>(())
    /// ```
    pub fn fit<T: Element>(
        base: &[T],
        fine_tuned: &[T],
        out_features: usize,
        in_features: usize,
        axis: ScaleAxis,
        exec: &Exec<'_>,
    ) -> Result<Self, QuantError> {
        let len = out_features.checked_mul(in_features).ok_or(QuantError::Overflow { what: "out_features" })?;
        check_len("base", base.len(), len)?;
        check_len("fine_tuned", fine_tuned.len(), len)?;
        let num_scales = axis.num_scales(out_features, in_features)?;
        let mut signs = BitMatrix::cleared(out_features, in_features)?;
        if len == 0 {
            return Ok(Self { signs, scale: DeltaScaleBuf::from_values(axis, vec![0.0; num_scales]) });
        }
        // Sums of |Δ| for each group: where the scale wants fewer they are added up afterwards, in the same order always.
        let groups = in_features.div_ceil(SCALE_GROUP);
        let mut sums = vec![0.0f64; out_features * groups];
        let words_per_row = in_features.div_ceil(64);
        let rows = (MIN_TASK / in_features).max(1);
        let kernels = delta::kernels(exec.isa());
        let (words, sums_out) = (signs.words_mut(), sums.as_mut_slice());
        exec.for_each_chunk_pair((words, rows * words_per_row), (sums_out, rows * groups), |index, words, sums| {
            let first = index * rows;
            for (row, (words, sums)) in words.chunks_mut(words_per_row).zip(sums.chunks_mut(groups)).enumerate() {
                let range = (first + row) * in_features..(first + row + 1) * in_features;
                match (View::of(&base[range.clone()]), View::of(&fine_tuned[range])) {
                    (View::F32(base), View::F32(tuned)) => (kernels.pack_f32)(base, tuned, words, sums),
                    (View::Bf16(base), View::Bf16(tuned)) => (kernels.pack_bf16)(base, tuned, words, sums),
                    (View::F16(base), View::F16(tuned)) => (kernels.pack_f16)(base, tuned, words, sums),
                    _ => unreachable!("both have the type T"),
                }
            }
        });
        if let Some(group) = sums.iter().position(|sum| !sum.is_finite()) {
            return Err(QuantError::NonFinite { what: "fine_tuned - base", row: group / groups });
        }
        let row_sums = sums.chunks(groups).map(|row| row.iter().sum::<f64>());
        let scales: Vec<f32> = match axis {
            ScaleAxis::Matrix => vec![(row_sums.sum::<f64>() / len as f64) as f32],
            ScaleAxis::Row => row_sums.map(|sum| (sum / in_features as f64) as f32).collect(),
            ScaleAxis::Group128 => sums
                .iter()
                .enumerate()
                .map(|(index, sum)| {
                    let count = SCALE_GROUP.min(in_features - index % groups * SCALE_GROUP);
                    (sum / count as f64) as f32
                })
                .collect(),
        };
        Ok(Self { signs, scale: DeltaScaleBuf::from_values(axis, scales) })
    }
}
