//! The scales of a 4-bit tensor: plain, or themselves quantized to 8 bits ("double quantization").

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use super::BlockSize;
use crate::error::check_len;
use crate::simd::dynamic8::kernels;
use crate::{DynamicMap, Exec, Isa, QuantError};

/// One scale a block, borrowed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Absmax<'a> {
    /// As they are.
    F32(&'a [f32]),
    /// Quantized to 8 bits.
    Nested(NestedAbsmax<'a>),
}

impl Absmax<'_> {
    /// Scales in it.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::F32(absmax) => absmax.len(),
            Self::Nested(nested) => nested.codes.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Scale `index`, or `None` past the end.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<f32> {
        match self {
            Self::F32(absmax) => absmax.get(index).copied(),
            Self::Nested(nested) => {
                let &code = nested.codes.get(index)?;
                // Two roundings, as bitsandbytes: no fused multiply-add.
                let scaled = nested.map[usize::from(code)] * nested.absmax[index / nested.block_size.get()];
                Some(scaled + nested.offset)
            }
        }
    }

    /// Scales `start .. start + out.len()`, decoded if they are nested.
    ///
    /// # Errors
    /// [`QuantError::Range`] when it goes beyond the last scale.
    pub fn decode_into(&self, start: usize, out: &mut [f32], exec: &Exec<'_>) -> Result<(), QuantError> {
        match start.checked_add(out.len()) {
            Some(end) if end <= self.len() => {}
            _ => return Err(QuantError::Range { what: "out", start, len: out.len(), available: self.len() }),
        }
        match self {
            Self::F32(absmax) => out.copy_from_slice(&absmax[start..start + out.len()]),
            Self::Nested(nested) => {
                exec.for_each_chunk(out, CHUNK, |index, out| nested.decode(start + index * CHUNK, out, exec.isa()));
            }
        }
        Ok(())
    }

    /// A copy that owns its memory.
    #[must_use]
    pub fn to_owned(&self) -> AbsmaxBuf {
        match self {
            Self::F32(absmax) => AbsmaxBuf::F32(absmax.to_vec()),
            Self::Nested(nested) => AbsmaxBuf::Nested(nested.to_owned()),
        }
    }
}

/// Scales that a thread takes at a time; a number of blocks of any size.
const CHUNK: usize = 1 << 16;

/// Scales quantized to 8 bits: scale `i` is `map[codes[i]] · absmax[i / block_size] + offset`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NestedAbsmax<'a> {
    codes: &'a [u8],
    absmax: &'a [f32],
    map: &'a [f32; 256],
    offset: f32,
    block_size: BlockSize,
}

impl<'a> NestedAbsmax<'a> {
    /// One code a scale, and one `absmax` for each `block_size` codes (bitsandbytes: 256).
    ///
    /// # Errors
    /// [`QuantError::Length`] when `absmax` is not `[ceil(codes.len() / block_size)]`.
    pub fn new(
        codes: &'a [u8],
        absmax: &'a [f32],
        map: &'a [f32; 256],
        offset: f32,
        block_size: BlockSize,
    ) -> Result<Self, QuantError> {
        check_len("nested_absmax", absmax.len(), block_size.num_blocks(codes.len()))?;
        Ok(Self { codes, absmax, map, offset, block_size })
    }

    /// A copy that owns its memory.
    #[must_use]
    pub fn to_owned(&self) -> NestedAbsmaxBuf {
        NestedAbsmaxBuf {
            codes: self.codes.to_vec(),
            absmax: self.absmax.to_vec(),
            map: Box::new(*self.map),
            offset: self.offset,
            block_size: self.block_size,
        }
    }

    /// Scales `start .. start + out.len()`, which lie in it: `map[code] · absmax + offset`, each operation rounded, as bitsandbytes does it.
    pub(crate) fn decode(&self, start: usize, out: &mut [f32], isa: Isa) {
        let kernel = kernels(isa).dequantize;
        let block_size = self.block_size.get();
        let codes = &self.codes[start..start + out.len()];
        let head = (start.next_multiple_of(block_size) - start).min(out.len());
        if head > 0 {
            let absmax = &self.absmax[start / block_size..];
            kernel(self.map, &codes[..head], absmax, block_size, self.offset, &mut out[..head]);
        }
        if head < out.len() {
            let absmax = &self.absmax[(start + head) / block_size..];
            kernel(self.map, &codes[head..], absmax, block_size, self.offset, &mut out[head..]);
        }
    }

    /// One code a scale.
    #[must_use]
    pub const fn codes(&self) -> &'a [u8] {
        self.codes
    }

    /// One scale for each block of codes.
    #[must_use]
    pub const fn absmax(&self) -> &'a [f32] {
        self.absmax
    }

    /// What the codes stand for.
    #[must_use]
    pub const fn map(&self) -> &'a [f32; 256] {
        self.map
    }

    /// Added to every scale.
    #[must_use]
    pub const fn offset(&self) -> f32 {
        self.offset
    }

    /// Codes that share a scale.
    #[must_use]
    pub const fn block_size(&self) -> BlockSize {
        self.block_size
    }
}

/// One scale a block, owned.
#[derive(Debug, Clone, PartialEq)]
pub enum AbsmaxBuf {
    /// As they are.
    F32(Vec<f32>),
    /// Quantized to 8 bits.
    Nested(NestedAbsmaxBuf),
}

impl AbsmaxBuf {
    /// Borrowed.
    #[must_use]
    #[allow(clippy::should_implement_trait)]
    pub fn as_ref(&self) -> Absmax<'_> {
        match self {
            Self::F32(absmax) => Absmax::F32(absmax),
            Self::Nested(nested) => Absmax::Nested(nested.as_ref()),
        }
    }
}

/// [`NestedAbsmax`], owned.
#[derive(Debug, Clone, PartialEq)]
pub struct NestedAbsmaxBuf {
    codes: Vec<u8>,
    absmax: Vec<f32>,
    map: Box<[f32; 256]>,
    offset: f32,
    block_size: BlockSize,
}

impl NestedAbsmaxBuf {
    /// As [`NestedAbsmax::new`], of buffers that it keeps.
    ///
    /// # Errors
    /// [`QuantError::Length`] when `absmax` is not `[ceil(codes.len() / block_size)]`.
    pub fn new(
        codes: Vec<u8>,
        absmax: Vec<f32>,
        map: Box<[f32; 256]>,
        offset: f32,
        block_size: BlockSize,
    ) -> Result<Self, QuantError> {
        NestedAbsmax::new(&codes, &absmax, &map, offset, block_size)?;
        Ok(Self { codes, absmax, map, offset, block_size })
    }

    /// Quantizes scales as bitsandbytes' `compress_statistics` does: their mean is taken off, what is left goes into the signed
    /// [`DynamicMap`] in blocks of 256. The scales come back with a relative error of 0.25 % in the root mean square.
    ///
    /// The mean is summed in f64, in an order that does not depend on the processor, and may differ from bitsandbytes' in the last bits: torch's sum
    /// in f32 depends on the processor's vectors. [`quantize_with_offset`](Self::quantize_with_offset) gives its bits for its mean.
    ///
    /// # Errors
    /// None today. A `Result` so that limits can be added.
    ///
    /// # Example
    /// ```
    /// use pt_quant::{Exec, NestedAbsmaxBuf};
    ///
    /// let nested = NestedAbsmaxBuf::quantize(&[0.5, 0.75, 1.0], &Exec::new())?;
    /// assert_eq!(nested.as_ref().offset(), 0.75);
    /// # Ok::<(), pt_quant::QuantError>(())
    /// ```
    pub fn quantize(absmax: &[f32], exec: &Exec<'_>) -> Result<Self, QuantError> {
        // Eight sums side by side: an order of its own, the same everywhere.
        let mut sums = [0.0f64; 8];
        let (eights, rest) = absmax.as_chunks::<8>();
        for eight in eights {
            for lane in 0..8 {
                sums[lane] += f64::from(eight[lane]);
            }
        }
        sums.iter_mut().zip(rest).for_each(|(sum, &value)| *sum += f64::from(value));
        let mean = if absmax.is_empty() { 0.0 } else { sums.iter().sum::<f64>() / absmax.len() as f64 };
        Self::quantize_with_offset(absmax, mean as f32, exec)
    }

    /// As [`quantize`](Self::quantize), with an offset of one's own instead of the mean.
    ///
    /// # Errors
    /// None today. A `Result` so that limits can be added.
    pub fn quantize_with_offset(absmax: &[f32], offset: f32, exec: &Exec<'_>) -> Result<Self, QuantError> {
        let (map, block_size) = (DynamicMap::signed(), BlockSize::B256);
        let (mut codes, mut nested) = (vec![0; absmax.len()], vec![0.0; block_size.num_blocks(absmax.len())]);
        let (kernel, block_len) = (kernels(exec.isa()).quantize, block_size.get());
        exec.for_each_chunk_pair((&mut codes, CHUNK), (&mut nested, CHUNK / block_len), |index, codes, nested| {
            let absmax = &absmax[index * CHUNK..][..codes.len()];
            kernel(map, block_len, absmax, offset, codes, nested);
        });
        Ok(Self { codes, absmax: nested, map: Box::new(*map.values()), offset, block_size })
    }

    /// Borrowed.
    #[must_use]
    #[allow(clippy::should_implement_trait)]
    pub fn as_ref(&self) -> NestedAbsmax<'_> {
        NestedAbsmax {
            codes: &self.codes,
            absmax: &self.absmax,
            map: &self.map,
            offset: self.offset,
            block_size: self.block_size,
        }
    }
}
