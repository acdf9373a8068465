//! From 4-bit codes to numbers.

use alloc::vec;
use alloc::vec::Vec;

use super::{Absmax, Block4Ref};
use crate::error::check_len;
use crate::simd::block4::{Kernels, kernels};
use crate::simd::view::ViewMut;
use crate::{Element, Exec, QuantError};

/// How outputs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Stores {
    /// Past the caches where the output is larger than [`STREAM_BYTES`], into them otherwise.
    #[default]
    Auto,
    /// Into the caches: for an output that is used at once.
    Cached,
    /// Past the caches, where the processor has instructions for it: a large output then costs no reads of memory, a third less traffic.
    Streamed,
}

/// Outputs of more bytes than this go past the caches, with [`Stores::Auto`].
pub const STREAM_BYTES: usize = 4 << 20;

/// Weights that a thread takes at a time.
const CHUNK: usize = 1 << 16;

/// Scales decoded at a time, on the stack.
const SCALES: usize = 512;

impl Block4Ref<'_> {
    /// All the weights, in `f32`, bf16 or f16: `codebook[code] · absmax`, rounded to nearest even in `f32` and again in a narrower format. Bit for
    /// bit as bitsandbytes' `dequantize_4bit` (0.50.2, `default` operation: blocks run over the flat tensor), but for the bits of NaN.
    ///
    /// # Errors
    /// [`QuantError::Length`] unless `out` is `[len]`.
    ///
    /// # Example
    /// ```
    /// use pt_quant::{Absmax, Bf16, Block4Ref, BlockSize, Codebook, Exec};
    ///
    /// let weights = Block4Ref::new(&[0x0f, 0x80], Absmax::F32(&[2.0]), 3, BlockSize::B64, Codebook::nf4())?;
    /// let mut out = [Bf16(0); 3];
    /// weights.dequantize_into(&mut out, &Exec::new())?;
    /// assert_eq!(out.map(Bf16::to_f32), [-2.0, 2.0, 0.15917969]);
    /// # Ok::<(), pt_quant::QuantError>(())
    /// ```
    pub fn dequantize_into<T: Element>(&self, out: &mut [T], exec: &Exec<'_>) -> Result<(), QuantError> {
        check_len("out", out.len(), self.len())?;
        self.dequantize_range_into(0, out, Stores::Auto, exec)
    }

    /// As [`dequantize_into`](Self::dequantize_into), into a new buffer.
    #[must_use]
    pub fn dequantize<T: Element>(&self, exec: &Exec<'_>) -> Vec<T> {
        let mut out = vec![T::from_f32(0.0); self.len()];
        self.decode(0, &mut out, Stores::Auto, exec);
        out
    }

    /// Weights `start .. start + out.len()`, so that a part of a tensor can be decoded where it is needed. Any start will do; an even one,
    /// better still one where a block begins, is fastest.
    ///
    /// # Errors
    /// [`QuantError::Range`] when it goes beyond the last weight.
    pub fn dequantize_range_into<T: Element>(
        &self,
        start: usize,
        out: &mut [T],
        stores: Stores,
        exec: &Exec<'_>,
    ) -> Result<(), QuantError> {
        match start.checked_add(out.len()) {
            Some(end) if end <= self.len() => {}
            _ => return Err(QuantError::Range { what: "out", start, len: out.len(), available: self.len() }),
        }
        self.decode(start, out, stores, exec);
        Ok(())
    }

    /// The range lies in the tensor.
    fn decode<T: Element>(&self, start: usize, out: &mut [T], stores: Stores, exec: &Exec<'_>) {
        let stream = match stores {
            Stores::Auto => size_of_val(out) > STREAM_BYTES,
            Stores::Cached => false,
            Stores::Streamed => true,
        };
        let kernels = kernels(exec.isa());
        exec.for_each_chunk(out, CHUNK, |index, out| {
            self.decode_chunk(start + index * CHUNK, out, stream, kernels, exec)
        });
    }

    fn decode_chunk<T: Element>(&self, start: usize, out: &mut [T], stream: bool, kernels: &Kernels, exec: &Exec<'_>) {
        let block_size = self.block_size().get();
        let run = |absmax: &[f32], start: usize, out: &mut [T]| {
            let packed = &self.packed()[start / 2..];
            let values = self.codebook().values();
            match ViewMut::of(out) {
                ViewMut::F32(out) => (kernels.dequantize_f32)(values, packed, absmax, block_size, out, stream),
                ViewMut::Bf16(out) => (kernels.dequantize_bf16)(values, packed, absmax, block_size, out, stream),
                ViewMut::F16(out) => (kernels.dequantize_f16)(values, packed, absmax, block_size, out, stream),
            }
        };
        let scale = |index: usize| self.absmax().get(index).unwrap_or(f32::NAN);
        let (mut start, mut out) = (start, out);
        // 1. A first weight in the low half of its byte.
        if start % 2 == 1
            && let Some((first, rest)) = core::mem::take(&mut out).split_first_mut()
        {
            let code = self.packed()[start / 2] & 15;
            *first = T::from_f32(self.codebook().values()[usize::from(code)] * scale(start / block_size));
            (start, out) = (start + 1, rest);
        }
        // 2. The rest of a block.
        let (head, rest) = out.split_at_mut((start.next_multiple_of(block_size) - start).min(out.len()));
        if !head.is_empty() {
            run(&[scale(start / block_size)], start, head);
            start += head.len();
        }
        // 3. From the start of a block on.
        if rest.is_empty() {
            return;
        }
        let first = start / block_size;
        match self.absmax() {
            Absmax::F32(absmax) => run(&absmax[first..], start, rest),
            Absmax::Nested(nested) => {
                let mut scales = [0.0; SCALES];
                for (index, out) in rest.chunks_mut(SCALES * block_size).enumerate() {
                    let scales = &mut scales[..out.len().div_ceil(block_size)];
                    nested.decode(first + index * SCALES, scales, exec.isa());
                    run(scales, start + index * SCALES * block_size, out);
                }
            }
        }
    }
}
