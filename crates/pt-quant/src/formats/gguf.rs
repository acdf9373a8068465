//! 4-bit blocks of GGUF files: IQ4_NL and MXFP4.
//!
//! A block is 32 weights: their scale, then 16 bytes of codes, weights 0 to 15 in the low halves and 16 to 31 in the high ones. The tables of
//! these formats are not NF4's: a tensor goes from one to the other by its numbers only, with a new rounding.

use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

use crate::error::check_len;
use crate::{AbsmaxBuf, Block4, Block4Ref, BlockSize, Codebook, Element, F16, QuantError};

/// Weights in a block.
const BLOCK: usize = 32;

/// Bytes of codes in a block.
const CODES: usize = BLOCK / 2;

/// A format of 4-bit blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GgufType {
    /// [`Codebook::iq4_nl`] with a scale in f16.
    Iq4Nl,
    /// [`Codebook::mxfp4`] with a power of two as scale (E8M0 of the OCP Microscaling formats).
    Mxfp4,
}

impl GgufType {
    /// Bytes of a block of 32 weights.
    #[must_use]
    pub const fn block_bytes(self) -> usize {
        self.scale_bytes() + CODES
    }

    const fn scale_bytes(self) -> usize {
        match self {
            Self::Iq4Nl => 2,
            Self::Mxfp4 => 1,
        }
    }

    /// Its values.
    #[must_use]
    pub const fn codebook(self) -> Codebook {
        match self {
            Self::Iq4Nl => Codebook::iq4_nl(),
            Self::Mxfp4 => Codebook::mxfp4(),
        }
    }

    fn scale(self, bytes: &[u8]) -> f32 {
        match self {
            Self::Iq4Nl => F16(u16::from_le_bytes([bytes[0], bytes[1]])).to_f32(),
            // 2^(byte - 127), the lowest of which is subnormal; 255 is NaN.
            Self::Mxfp4 => match bytes[0] {
                0 => f32::from_bits(1 << 22),
                255 => f32::NAN,
                exponent => f32::from_bits(u32::from(exponent) << 23),
            },
        }
    }

    /// The blocks of a tensor as a [`Block4`] with blocks of 32: the same codes in bitsandbytes' order, the scales as `f32`. Exact: its weights are
    /// those of llama.cpp, but for MXFP4's scale 255, which is NaN here as OCP has it, and for zeros with a sign.
    ///
    /// # Errors
    /// [`QuantError::Length`] unless `blocks` is a number of whole blocks.
    ///
    /// # Example
    /// ```
    /// use pt_quant::Exec;
    /// use pt_quant::formats::gguf::GgufType;
    ///
    /// let exec = Exec::new();
    /// let numbers: Vec<f32> = (0..32).map(|index| index as f32 / 4.0).collect();
    /// let blocks = GgufType::Mxfp4.quantize(&numbers)?;
    /// assert_eq!(blocks.len(), 17);
    /// let back: Vec<f32> = GgufType::Mxfp4.decode(&blocks)?.as_ref().dequantize(&exec);
    /// assert_eq!(back[8..12], [2.0, 2.0, 2.0, 3.0]);
    /// # Ok::<(), pt_quant::QuantError>(())
    /// ```
    pub fn decode(self, blocks: &[u8]) -> Result<Block4, QuantError> {
        let num_blocks = blocks.len() / self.block_bytes();
        check_len("blocks", blocks.len(), num_blocks * self.block_bytes())?;
        let mut packed = vec![0; num_blocks * CODES];
        let mut absmax = Vec::with_capacity(num_blocks);
        for (block, packed) in blocks.chunks_exact(self.block_bytes()).zip(packed.chunks_exact_mut(CODES)) {
            let (scale, codes) = block.split_at(self.scale_bytes());
            absmax.push(self.scale(scale));
            let (first, second) = packed.split_at_mut(CODES / 2);
            for ((first, second), pair) in first.iter_mut().zip(second).zip(codes.chunks_exact(2)) {
                *first = pair[0] << 4 | pair[1] & 15;
                *second = pair[0] & 0xf0 | pair[1] >> 4;
            }
        }
        Block4::new(packed, AbsmaxBuf::F32(absmax), num_blocks * BLOCK, BlockSize::new(BLOCK)?, self.codebook())
    }

    /// The inverse of [`decode`](Self::decode): the codes as they are. The scales must be numbers of the format already.
    ///
    /// # Errors
    /// [`QuantError::BlockSize`] and [`QuantError::Length`] unless `weights` is whole blocks of 32; [`QuantError::Value`] for another codebook or a
    /// scale that the format does not have. [`quantize`](Self::quantize) chooses scales that it has.
    pub fn encode(self, weights: &Block4Ref<'_>) -> Result<Vec<u8>, QuantError> {
        if weights.block_size().get() != BLOCK {
            return Err(QuantError::BlockSize { found: weights.block_size().get() });
        }
        check_len("weights", weights.len(), weights.len() / BLOCK * BLOCK)?;
        if *weights.codebook() != self.codebook() {
            return Err(QuantError::Value {
                what: "weights.codebook",
                found: format!("{:?}", weights.codebook().values()),
                expected: "the codebook of the format",
            });
        }
        let mut blocks = Vec::with_capacity(weights.packed().len() / CODES * self.block_bytes());
        for (block, packed) in weights.packed().chunks_exact(CODES).enumerate() {
            let scale = weights.absmax().get(block).unwrap_or(f32::NAN);
            let start = blocks.len();
            match self {
                Self::Iq4Nl => blocks.extend(F16::from_f32(scale).0.to_le_bytes()),
                Self::Mxfp4 => blocks.push(exponent_byte(scale)),
            }
            if self.scale(&blocks[start..]).to_bits() != scale.to_bits() {
                return Err(QuantError::Value {
                    what: "weights.absmax",
                    found: format!("{scale} for block {block}"),
                    expected: match self {
                        Self::Iq4Nl => "numbers that f16 has",
                        Self::Mxfp4 => "powers of two",
                    },
                });
            }
            let (first, second) = packed.split_at(CODES / 2);
            blocks.extend(
                first
                    .iter()
                    .zip(second)
                    .flat_map(|(first, second)| [first >> 4 | second & 0xf0, first & 15 | second << 4]),
            );
        }
        Ok(blocks)
    }

    /// Quantizes numbers to blocks.
    ///
    /// MXFP4 takes the scale 2^(floor(log2 max |x|) - 2) and the nearest values, as OCP proposes and llama.cpp does; so a block's largest numbers
    /// may be cut to 6 scales. IQ4_NL takes the scale at which the largest number is -127, then once the one of least squares (weights x²) for the
    /// codes found so: llama.cpp's plain quantizer; its search with an importance matrix is better by some percent.
    ///
    /// # Errors
    /// [`QuantError::Length`] unless `input` is whole blocks of 32; [`QuantError::Value`] when a number is not finite.
    pub fn quantize<T: Element>(self, input: &[T]) -> Result<Vec<u8>, QuantError> {
        check_len("input", input.len(), input.len() / BLOCK * BLOCK)?;
        let book = self.codebook();
        let mut blocks = Vec::with_capacity(input.len() / BLOCK * self.block_bytes());
        for (index, block) in input.chunks_exact(BLOCK).enumerate() {
            let numbers: [f32; BLOCK] = core::array::from_fn(|index| block[index].to_f32());
            if let Some(place) = numbers.iter().position(|number| !number.is_finite()) {
                let found = format!("{} at {}", numbers[place], index * BLOCK + place);
                return Err(QuantError::Value { what: "input", found, expected: "finite numbers" });
            }
            let codes = match self {
                Self::Iq4Nl => {
                    let (scale, codes) = quantize_iq4_nl(&book, &numbers);
                    blocks.extend(scale.0.to_le_bytes());
                    codes
                }
                Self::Mxfp4 => {
                    let (exponent, codes) = quantize_mxfp4(&book, &numbers);
                    blocks.push(exponent);
                    codes
                }
            };
            let (first, second) = codes.split_at(CODES);
            blocks.extend(first.iter().zip(second).map(|(first, second)| first | second << 4));
        }
        Ok(blocks)
    }
}

/// The byte of the power of two at `scale` or below.
fn exponent_byte(scale: f32) -> u8 {
    if scale.is_nan() { 255 } else { (scale.to_bits() >> 23) as u8 }
}

fn quantize_mxfp4(book: &Codebook, numbers: &[f32; BLOCK]) -> (u8, [u8; BLOCK]) {
    let largest = numbers.iter().fold(0.0f32, |largest, number| largest.max(number.abs()));
    // The exponent of `largest`, without that of 4 to 6; 0 stands for 2^-127, the lowest.
    let exponent = ((largest.to_bits() >> 23) as u8).saturating_sub(2);
    let scale = GgufType::Mxfp4.scale(&[exponent]);
    let codes = numbers.map(|number| {
        // The first of the nearest: of two that are as near, the smaller one; and +0 for what rounds to zero.
        let error = |code: u8| (book.values()[usize::from(code)] * scale - number).abs();
        (1..16).fold(0, |best, code| if error(code) < error(best) { code } else { best })
    });
    (exponent, codes)
}

fn quantize_iq4_nl(book: &Codebook, numbers: &[f32; BLOCK]) -> (F16, [u8; BLOCK]) {
    let largest =
        numbers.iter().fold(0.0f32, |largest, &number| if number.abs() > largest.abs() { number } else { largest });
    let scale = largest / book.values()[0];
    if scale == 0.0 {
        // Every code stands for something; times a scale of 0 it is 0.
        return (F16(0), [8; BLOCK]);
    }
    let codes = |scale: f32| numbers.map(|number| book.nearest(number / scale / book.max_magnitude()));
    let found = codes(scale);
    let (mut products, mut squares) = (0.0, 0.0);
    for (&number, code) in numbers.iter().zip(found) {
        let (number, value) = (f64::from(number), f64::from(book.values()[usize::from(code)]));
        products += number * number * value * number;
        squares += number * number * value * value;
    }
    let best = (products / squares) as f32;
    let best = if best.is_finite() && best != 0.0 { best } else { scale };
    // f16 ends at 65504; and a scale that rounds to 0 leaves the codes nothing to say.
    let rounded = F16::from_f32(best.clamp(-65504.0, 65504.0));
    if rounded.to_f32() == 0.0 { (F16(0), [8; BLOCK]) } else { (rounded, codes(rounded.to_f32())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Exec;

    fn numbers(count: usize) -> Vec<f32> {
        (0..count).map(|index| ((index * index) as f32 * 0.37).sin() * (1.0 + (index / 32) as f32)).collect()
    }

    #[test]
    fn blocks_survive_decoding_and_encoding() {
        for kind in [GgufType::Iq4Nl, GgufType::Mxfp4] {
            let blocks = kind.quantize(&numbers(256)).unwrap();
            assert_eq!(blocks.len(), 8 * kind.block_bytes());
            let weights = kind.decode(&blocks).unwrap();
            assert_eq!(kind.encode(&weights.as_ref()).unwrap(), blocks);
        }
    }

    #[test]
    fn weights_come_back_within_half_a_step() {
        for (kind, bound) in [(GgufType::Iq4Nl, 0.13), (GgufType::Mxfp4, 0.26)] {
            let numbers = numbers(256);
            let weights = kind.decode(&kind.quantize(&numbers).unwrap()).unwrap();
            let back: Vec<f32> = weights.as_ref().dequantize(&Exec::single());
            for (block, back) in numbers.chunks(32).zip(back.chunks(32)) {
                let largest = block.iter().fold(0.0f32, |largest, number| largest.max(number.abs()));
                for (number, back) in block.iter().zip(back) {
                    assert!((number - back).abs() <= bound * largest, "{kind:?}: {number} {back}");
                }
            }
        }
    }

    #[test]
    fn zeros_stay_zeros_and_tiny_numbers_do_no_harm() {
        for kind in [GgufType::Iq4Nl, GgufType::Mxfp4] {
            for value in [0.0f32, -0.0, 1e-45, 1e-40, -1e-9, f32::MAX] {
                let weights = kind.decode(&kind.quantize(&[value; 32]).unwrap()).unwrap();
                let back: Vec<f32> = weights.as_ref().dequantize(&Exec::single());
                assert!(
                    back.iter().all(|back| back.abs() <= value.abs().max(1e-6) * 1.01),
                    "{kind:?} {value}: {back:?}"
                );
            }
        }
    }

    #[test]
    fn wrong_input_is_named() {
        let exec = Exec::single();
        let kind = GgufType::Iq4Nl;
        assert!(matches!(kind.decode(&[0; 19]), Err(QuantError::Length { what: "blocks", .. })));
        assert!(matches!(kind.quantize(&[0.0; 31]), Err(QuantError::Length { what: "input", .. })));
        assert!(matches!(kind.quantize(&[f32::NAN; 32]), Err(QuantError::Value { what: "input", .. })));
        let quantize =
            |book, size| Block4::quantize(&[0.3f32; 96], BlockSize::new(size).unwrap(), book, &exec).unwrap();
        let wrong = quantize(Codebook::iq4_nl(), 64);
        assert!(matches!(kind.encode(&wrong.as_ref()), Err(QuantError::BlockSize { found: 64 })));
        let wrong = quantize(Codebook::nf4(), 32);
        assert!(matches!(kind.encode(&wrong.as_ref()), Err(QuantError::Value { what: "weights.codebook", .. })));
        let wrong = quantize(Codebook::iq4_nl(), 32);
        assert!(matches!(kind.encode(&wrong.as_ref()), Err(QuantError::Value { what: "weights.absmax", .. })));
    }
}
