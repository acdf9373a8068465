//! 8-bit dynamic numbers, by instruction set. All of them give the bits of `scalar.rs`.
//!
//! AVX2 and NEON have no lookup in a table of 256 that beats loading its entries one by one, so they share plain code that finds codes by cells.

mod cells;
mod scalar;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use crate::{DynamicMap, Isa};

/// `(map, block_size, input, offset, codes, absmax)`: of `input - offset`. The last block may be short.
pub(crate) type Quantize = fn(&DynamicMap, usize, &[f32], f32, &mut [u8], &mut [f32]);

/// `(values, codes, absmax, block_size, offset, out)`: `values[code] · absmax + offset`, rounded twice. The last block may be short.
pub(crate) type Dequantize = fn(&[f32; 256], &[u8], &[f32], usize, f32, &mut [f32]);

/// An offset that changes no number when it is taken off: x - 0 = x also for x = -0.
pub(crate) const NOTHING_OFF: f32 = 0.0;

/// An offset that changes no number when it is added: x + -0 = x also for x = -0.
pub(crate) const NOTHING_ADDED: f32 = -0.0;

pub(crate) struct Kernels {
    pub(crate) quantize: Quantize,
    pub(crate) dequantize: Dequantize,
}

pub(crate) fn kernels(isa: Isa) -> &'static Kernels {
    match isa {
        Isa::Scalar => &scalar::KERNELS,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => &avx2::KERNELS,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => &avx512::KERNELS,
        _ => &cells::KERNELS,
    }
}

/// bitsandbytes keeps a scale from going below this before it divides by it.
const MIN_ABSMAX: f32 = 1e-38;

/// Magnitudes are ordered as their bits are, infinity and NaN on top.
const INFINITE: u32 = 0x7f80_0000;

#[cfg(test)]
mod tests {
    use alloc::vec;
    use alloc::vec::Vec;

    use super::*;

    /// Numbers round every threshold of a map and across the decades, one block of them at a time, led by 1 so that they are their own scale.
    fn around_thresholds(map: &DynamicMap) -> Vec<f32> {
        let mut numbers = vec![];
        for pair in map.values().windows(2) {
            let middle = f32::midpoint(pair[0], pair[1]);
            for ulps in -4i32..=4 {
                let bits = middle.to_bits().wrapping_add_signed(ulps);
                numbers.extend([f32::from_bits(bits), -f32::from_bits(bits)]);
            }
        }
        for exponent in 0..=126u32 {
            for mantissa in [0, 1, 0x40_0000, 0x7f_ffff] {
                numbers.push(f32::from_bits(exponent << 23 | mantissa));
                numbers.push(-f32::from_bits(exponent << 23 | mantissa));
            }
        }
        // Ends of decades and of octaves, and a sweep of all exponents that matter.
        for end in (0..8).map(|power| 10f32.powi(-power)) {
            for ulps in -4i32..=4 {
                let number = f32::from_bits(end.to_bits().wrapping_add_signed(ulps)).min(1.0);
                numbers.extend([number, -number]);
            }
        }
        for bits in (100 << 23..=127 << 23).step_by(if cfg!(miri) { 1 << 20 } else { 1009 }) {
            numbers.extend([f32::from_bits(bits), -f32::from_bits(bits)]);
        }
        numbers.chunks(255).flat_map(|chunk| [&[1.0], chunk].concat()).collect()
    }

    #[test]
    fn every_instruction_set_finds_the_nearest_code() {
        for map in [DynamicMap::signed(), DynamicMap::unsigned()] {
            let numbers = around_thresholds(map);
            for offset in [NOTHING_OFF, 0.3] {
                let run = |isa: Isa| {
                    let (mut codes, mut absmax) = (vec![0; numbers.len()], vec![0.0; numbers.len().div_ceil(256)]);
                    (kernels(isa).quantize)(map, 256, &numbers, offset, &mut codes, &mut absmax);
                    (codes, absmax)
                };
                let expected = run(Isa::Scalar);
                for (number, code) in numbers.iter().zip(&expected.0).filter(|_| offset == NOTHING_OFF) {
                    assert_eq!(*code, map.nearest(*number), "{number}");
                }
                for isa in Isa::available() {
                    assert_eq!(run(isa), expected, "{isa}");
                }
                // The portable one, whatever the processor.
                let (mut codes, mut absmax) = (vec![0; numbers.len()], vec![0.0; numbers.len().div_ceil(256)]);
                (cells::KERNELS.quantize)(map, 256, &numbers, offset, &mut codes, &mut absmax);
                assert_eq!((codes, absmax), expected);
            }
        }
    }

    #[test]
    fn every_instruction_set_decodes_every_code() {
        let codes: Vec<u8> = (0..=255).chain((0..=255).rev()).chain(0..77).collect();
        let scales = [[1.0, 0.3, 7.0], [0.0, f32::INFINITY, f32::NAN], [f32::MIN_POSITIVE, 1e-45, f32::MAX]];
        for (absmax, offset) in scales.iter().flat_map(|absmax| [(absmax, NOTHING_ADDED), (absmax, 0.04)]) {
            let run = |isa: Isa| {
                let mut out = vec![9.0; codes.len()];
                (kernels(isa).dequantize)(DynamicMap::signed().values(), &codes, absmax, 256, offset, &mut out);
                // Miri gives NaN any bits, as the language allows.
                let is_any = |value: f32| cfg!(miri) && value.is_nan();
                out.into_iter().map(|value| if is_any(value) { 1 } else { value.to_bits() }).collect::<Vec<_>>()
            };
            for isa in Isa::available() {
                assert_eq!(run(isa), run(Isa::Scalar), "{isa}");
            }
        }
    }
}
