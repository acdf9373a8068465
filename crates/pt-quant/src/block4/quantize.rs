//! From numbers to 4-bit codes.

use alloc::vec;

use super::{AbsmaxBuf, Block4, BlockSize, NestedAbsmaxBuf, packed_len};
use crate::codebook::Search;
use crate::error::check_len;
use crate::simd::block4::kernels;
use crate::simd::view::View;
use crate::{Codebook, Element, Exec, QuantError};

/// Quantizes `input`, a flat tensor, into buffers of the caller's: for each block `absmax = max |x| / codebook.max_magnitude()`, and for each
/// number the code whose value is nearest to `x / absmax`, halfway between two the lower value's.
///
/// Bit for bit bitsandbytes 0.50.2 on the CPU, whatever the instruction set and the number of threads:
/// - A whole block is multiplied by the reciprocal of its scale, rounded to `f32`; a short last block is divided by its scale.
/// - A block of zeros has scale 0 and the code of 0 (7 in NF4). Dividing, a scale counts as 1e-38 at least; a short last block also keeps that.
/// - An odd number of weights leaves the code of 0 in the low half of the last byte.
/// - NaN makes its block's scale NaN, and every code that of the largest value. Infinity makes it infinite, its own code that of the largest value
///   whatever its sign, and the other codes that of 0; such blocks dequantize to NaN and infinities. Nothing else is touched. Look for scales that
///   are not finite if the input may not be.
///
/// # Shapes
/// `packed`: `[ceil(input.len() / 2)]` bytes; `absmax`: `[ceil(input.len() / block_size)]`.
///
/// # Errors
/// [`QuantError::Length`] for a buffer of another length.
///
/// # Example
/// ```
/// use pt_quant::{BlockSize, Codebook, Exec, quantize_into};
///
/// let (mut packed, mut absmax) = ([0; 2], [0.0]);
/// quantize_into(&[0.5f32, -2.0, 0.9], BlockSize::B64, &Codebook::nf4(), &mut packed, &mut absmax, &Exec::new())?;
/// // Codes 11 (0.338), 0 (-1), 12 (0.441), and the 7 that fills up.
/// assert_eq!((packed, absmax), ([0xa0, 0xc7], [2.0]));
/// # Ok::<(), pt_quant::QuantError>(())
/// ```
pub fn quantize_into<T: Element>(
    input: &[T],
    block_size: BlockSize,
    codebook: &Codebook,
    packed: &mut [u8],
    absmax: &mut [f32],
    exec: &Exec<'_>,
) -> Result<(), QuantError> {
    check_len("packed", packed.len(), packed_len(input.len()))?;
    check_len("absmax", absmax.len(), block_size.num_blocks(input.len()))?;
    let search = Search::new(codebook);
    let (kernels, block_size) = (kernels(exec.isa()), block_size.get());
    exec.for_each_chunk_pair((packed, CHUNK / 2), (absmax, CHUNK / block_size), |index, packed, absmax| {
        let start = index * CHUNK;
        match View::of(&input[start..input.len().min(start + CHUNK)]) {
            View::F32(input) => (kernels.quantize_f32)(&search, block_size, input, packed, absmax),
            View::Bf16(input) => (kernels.quantize_bf16)(&search, block_size, input, packed, absmax),
            View::F16(input) => (kernels.quantize_f16)(&search, block_size, input, packed, absmax),
        }
        if codebook.max_magnitude() != 1.0 {
            absmax.iter_mut().for_each(|absmax| *absmax /= codebook.max_magnitude());
        }
    });
    Ok(())
}

/// Weights that a thread takes at a time; a number of blocks of any size.
const CHUNK: usize = 1 << 16;

impl Block4 {
    /// Quantizes `input`, a flat tensor; see [`quantize_into`].
    ///
    /// # Errors
    /// None today: every length is taken. A `Result` so that limits can be added.
    ///
    /// # Example
    /// ```
    /// use pt_quant::{Block4, BlockSize, Codebook, Exec};
    ///
    /// let exec = Exec::new();
    /// let weights = Block4::quantize(&[1.0f32, -0.5, 0.0, 0.25], BlockSize::B64, Codebook::nf4(), &exec)?;
    /// let mut back = [0.0f32; 4];
    /// weights.as_ref().dequantize_into(&mut back, &exec)?;
    /// assert_eq!(back, [1.0, -0.52507305, 0.0, 0.2461123]);
    /// # Ok::<(), pt_quant::QuantError>(())
    /// ```
    pub fn quantize<T: Element>(
        input: &[T],
        block_size: BlockSize,
        codebook: Codebook,
        exec: &Exec<'_>,
    ) -> Result<Self, QuantError> {
        let mut packed = vec![0; packed_len(input.len())];
        let mut absmax = vec![0.0; block_size.num_blocks(input.len())];
        quantize_into(input, block_size, &codebook, &mut packed, &mut absmax, exec)?;
        Ok(Self { packed, absmax: AbsmaxBuf::F32(absmax), len: input.len(), block_size, codebook })
    }

    /// With its scales quantized to 8 bits ("double quantization", QLoRA): 4.127 bits a weight instead of 4.5 with blocks of 64. Scales that are so
    /// already stay as they are. See [`NestedAbsmaxBuf::quantize`].
    ///
    /// # Errors
    /// As [`NestedAbsmaxBuf::quantize`].
    pub fn double_quantize(self, exec: &Exec<'_>) -> Result<Self, QuantError> {
        let absmax = match self.absmax {
            AbsmaxBuf::F32(absmax) => AbsmaxBuf::Nested(NestedAbsmaxBuf::quantize(&absmax, exec)?),
            nested @ AbsmaxBuf::Nested(_) => nested,
        };
        Ok(Self { absmax, ..self })
    }
}
