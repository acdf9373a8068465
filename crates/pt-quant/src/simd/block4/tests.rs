use alloc::vec;
use alloc::vec::Vec;
use core::fmt::Debug;

use super::{Dequantize, Kernels, Quantize, kernels};
use crate::codebook::Search;
use crate::{Bf16, Codebook, Element, F16, Isa};

const BOOKS: [Codebook; 4] = [Codebook::nf4(), Codebook::fp4(), Codebook::iq4_nl(), Codebook::mxfp4()];

fn quantized<T: Element>(kernel: Quantize<T>, book: &Codebook, block_size: usize, input: &[T]) -> (Vec<u8>, Vec<u32>) {
    let mut packed = vec![0xee; input.len().div_ceil(2)];
    let mut absmax = vec![-1.0; input.len().div_ceil(block_size)];
    kernel(&Search::new(book), block_size, input, &mut packed, &mut absmax);
    (packed, absmax.into_iter().map(f32::to_bits).collect())
}

/// Every available instruction set against the scalar one, which `pick` takes from its kernels.
fn check_quantize<T: Element>(pick: impl Fn(&Kernels) -> Quantize<T>, book: &Codebook, block_size: usize, input: &[T]) {
    let expected = quantized(pick(kernels(Isa::Scalar)), book, block_size, input);
    for isa in Isa::available() {
        let got = quantized(pick(kernels(isa)), book, block_size, input);
        if got != expected {
            let wrong = (0..input.len()).find(|index| got.0[index / 2] != expected.0[index / 2]);
            let near = wrong
                .map(|index| (index, input[index & !1].to_f32(), input[(index | 1).min(input.len() - 1)].to_f32()));
            panic!("{isa}, blocks of {block_size}, {} weights: codes differ at {near:?}", input.len());
        }
    }
}

/// Numbers within a few units in the last place of every border, in blocks whose scale is `scale`.
fn around_borders(book: &Codebook, block_size: usize, scale: f32) -> Vec<f32> {
    let mut numbers = vec![];
    for border in book.thresholds.into_iter().filter(|border| border.is_finite()) {
        for ulps in -6i32..=6 {
            let bits = (border * scale).to_bits().wrapping_add_signed(ulps);
            if f32::from_bits(bits).abs() <= scale {
                numbers.push(f32::from_bits(bits));
            }
        }
    }
    numbers
        .chunks(block_size - 1)
        .flat_map(|chunk| [&[scale], chunk, &vec![0.25 * scale; block_size - 1 - chunk.len()]].concat())
        .collect()
}

#[test]
#[cfg_attr(miri, ignore = "takes too long")]
fn numbers_next_to_a_border_get_the_same_code_everywhere() {
    for book in &BOOKS {
        for block_size in [32, 64, 128, 4096] {
            for scale in [1.0, 0.7, 3e-3, 1.1e-38, 2e-39, 1e-45, 1e30, f32::MAX] {
                let numbers = around_borders(book, block_size, scale);
                check_quantize(|kernels| kernels.quantize_f32, book, block_size, &numbers);
                // Short last blocks of any length, among them odd ones.
                for cut in 0..block_size.min(70) {
                    check_quantize(|kernels| kernels.quantize_f32, book, block_size, &numbers[..numbers.len() - cut]);
                }
            }
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes too long")]
fn every_16_bit_number_gets_the_same_code_everywhere() {
    let all = |scale: u16| -> Vec<u16> {
        (0..=u16::MAX).flat_map(|bits| if bits % 31 == 0 { vec![scale, bits] } else { vec![bits] }).collect()
    };
    for book in &BOOKS {
        for block_size in [32, 64, 256] {
            // In order, so that neighbours share a block; and dealt out, so that blocks mix all sizes.
            for order in [1, 4099] {
                let numbers: Vec<u16> = all(0x3f80);
                let numbers: Vec<u16> =
                    (0..numbers.len()).map(|index| numbers[index * order % numbers.len()]).collect();
                let bf16: Vec<Bf16> = numbers.iter().map(|&bits| Bf16(bits)).collect();
                check_quantize(|kernels| kernels.quantize_bf16, book, block_size, &bf16);
                let f16: Vec<F16> = numbers.iter().map(|&bits| F16(bits)).collect();
                check_quantize(|kernels| kernels.quantize_f16, book, block_size, &f16);
                let f32s: Vec<f32> = bf16.iter().map(|value| value.to_f32()).collect();
                check_quantize(|kernels| kernels.quantize_f32, book, block_size, &f32s);
            }
        }
        // Finite ones alone, within 1: each block finds codes rather than the plain path.
        let small: Vec<Bf16> = all(0x3f80).into_iter().filter(|bits| bits & 0x7fff <= 0x3f80).map(Bf16).collect();
        check_quantize(|kernels| kernels.quantize_bf16, book, 64, &small);
        let small: Vec<F16> = all(0x3c00).into_iter().filter(|bits| bits & 0x7fff <= 0x3c00).map(F16).collect();
        check_quantize(|kernels| kernels.quantize_f16, book, 64, &small);
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes too long")]
fn zeros_and_numbers_that_are_not_finite_get_the_same_codes_everywhere() {
    for block_size in [32, 64, 128] {
        for special in [0.0, -0.0, f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0x7f80_0001)] {
            for place in [0, 1, 31, 32, 63, block_size - 1, block_size, 3 * block_size + 5] {
                let mut numbers: Vec<f32> = (0..4 * block_size + 7).map(|index| (index as f32 * 0.7).sin()).collect();
                numbers[block_size..2 * block_size].fill(0.0);
                numbers[place] = special;
                for book in &BOOKS {
                    check_quantize(|kernels| kernels.quantize_f32, book, block_size, &numbers);
                }
            }
        }
    }
}

fn bits<T: Element + Debug>(numbers: &[T]) -> Vec<u32> {
    numbers.iter().map(|value| value.to_f32().to_bits()).collect()
}

fn check_dequantize<T: Element + Debug>(pick: impl Fn(&Kernels) -> Dequantize<T>, fill: T) {
    // All bytes, at every place of a vector.
    let packed: Vec<u8> = (0..=255u8).chain((0..=255).map(|byte: u8| byte.wrapping_mul(37))).chain(0..=255).collect();
    let scales = [
        1.0,
        0.0,
        -0.0,
        f32::MIN_POSITIVE,
        1e-45,
        f32::MAX,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        f32::from_bits(0x7f80_0001),
        f32::from_bits(0xffc1_2345),
        0.061_3,
        6e-5,
        3e-8,
        65504.0,
        7e4,
    ];
    for book in &BOOKS {
        for block_size in [32usize, 64, 128] {
            let absmax: Vec<f32> =
                scales.iter().cycle().copied().take((2 * packed.len()).div_ceil(block_size)).collect();
            for len in (0..300).chain([2 * packed.len() - 1, 2 * packed.len()]) {
                let run = |isa: Isa, stream: bool, offset: usize| {
                    let mut out = vec![fill; len + offset + 1];
                    pick(kernels(isa))(
                        book.values(),
                        &packed,
                        &absmax,
                        block_size,
                        &mut out[offset..offset + len],
                        stream,
                    );
                    assert!(
                        bits(&out[..offset]) == bits(&vec![fill; offset])
                            && bits(&out[offset + len..]) == bits(&[fill])
                    );
                    bits(&out[offset..offset + len])
                };
                let expected = run(Isa::Scalar, false, 0);
                for isa in Isa::available() {
                    assert_eq!(run(isa, false, len % 5), expected, "{isa}");
                    for offset in [0, len % 33] {
                        assert_eq!(run(isa, true, offset), expected, "{isa}, streamed");
                    }
                }
            }
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes too long")]
fn every_byte_decodes_to_the_same_bits_everywhere() {
    check_dequantize(|kernels| kernels.dequantize_f32, 9.0);
    check_dequantize(|kernels| kernels.dequantize_bf16, Bf16(0x4110));
    check_dequantize(|kernels| kernels.dequantize_f16, F16(0x4880));
}

/// For Miri above all: few lengths, all kernels, buffers that end where the weights do.
#[test]
fn few_lengths_stay_within_their_buffers() {
    let numbers: Vec<f32> = (0..165).map(|index| (index as f32 * 0.7).sin()).collect();
    let narrow: Vec<Bf16> = numbers.iter().map(|&number| Bf16::from_f32(number)).collect();
    let half: Vec<F16> = numbers.iter().map(|&number| F16::from_f32(number)).collect();
    for len in [0, 1, 31, 64, 97, 128, 165] {
        check_quantize(|kernels| kernels.quantize_f32, &BOOKS[0], 64, &numbers[..len]);
        check_quantize(|kernels| kernels.quantize_bf16, &BOOKS[1], 32, &narrow[..len]);
        // Miri has no conversions of f16 in vectors.
        if !cfg!(miri) {
            check_quantize(|kernels| kernels.quantize_f16, &BOOKS[2], 128, &half[..len]);
        }
        let (packed, absmax) = quantized(kernels(Isa::Scalar).quantize_f32, &BOOKS[0], 64, &numbers[..len]);
        let absmax: Vec<f32> = absmax.into_iter().map(f32::from_bits).collect();
        for isa in Isa::available() {
            // Nor has it the fence after streamed stores.
            for stream in if cfg!(miri) { vec![false] } else { vec![false, true] } {
                let kernels = kernels(isa);
                let (mut f32s, mut bf16s, mut f16s) = (vec![0f32; len], vec![Bf16(0); len], vec![F16(0); len]);
                (kernels.dequantize_f32)(BOOKS[0].values(), &packed, &absmax, 64, &mut f32s, stream);
                (kernels.dequantize_bf16)(BOOKS[0].values(), &packed, &absmax, 64, &mut bf16s, stream);
                let dequantize_f16 =
                    if cfg!(miri) { super::kernels(Isa::Scalar).dequantize_f16 } else { kernels.dequantize_f16 };
                dequantize_f16(BOOKS[0].values(), &packed, &absmax, 64, &mut f16s, stream);
                for ((f32, bf16), f16) in f32s.iter().zip(bf16s).zip(f16s) {
                    assert_eq!((Bf16::from_f32(*f32), F16::from_f32(*f32)), (bf16, f16), "{isa}");
                }
            }
        }
    }
}

/// Rounding from the table's products to bf16 and f16: every upper half of an `f32` with the lower halves that decide.
#[test]
#[cfg_attr(miri, ignore = "takes too long")]
fn every_rounding_is_the_same_everywhere() {
    let packed: Vec<u8> = (0..16u8).map(|code| code << 4 | (15 - code)).collect();
    for high in 0..=0xffffu32 {
        for low in [0u32, 1, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001, 0xffff] {
            let scale = f32::from_bits(high << 16 | low);
            let book = Codebook::mxfp4();
            let run = |isa: Isa| {
                let (mut bf16, mut f16) = ([Bf16(0); 32], [F16(0); 32]);
                (kernels(isa).dequantize_bf16)(book.values(), &packed, &[scale], 32, &mut bf16, false);
                (kernels(isa).dequantize_f16)(book.values(), &packed, &[scale], 32, &mut f16, false);
                (bf16, f16)
            };
            let expected = run(Isa::Scalar);
            for isa in Isa::available() {
                assert_eq!(run(isa), expected, "{isa}: {scale}");
            }
        }
    }
}
