//! 4-bit blocks: every instruction set, length, place in memory and number of threads gives the same bits.

use proptest::prelude::*;
use pt_quant::{
    Absmax, AbsmaxBuf, Bf16, Block4, Block4Ref, BlockSize, Codebook, DynamicMap, Element, Exec, F16, Isa, NestedAbsmax,
    NestedAbsmaxBuf, Pool, QuantError, Stores, packed_len, quantize_into,
};

use crate::guard::{Guarded, Side};

pub(crate) struct Threads(pub(crate) usize);

impl Pool for Threads {
    fn num_threads(&self) -> usize {
        self.0
    }

    fn run(&self, task: &(dyn Fn() + Sync)) {
        std::thread::scope(|scope| {
            for _ in 0..self.0 {
                scope.spawn(task);
            }
        });
    }
}

/// Numbers that look like weights, the same every time.
fn weights<T: Element>(len: usize, seed: u64) -> Vec<T> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..len).map(|_| T::from_f32((next() + next() + next()) * 0.05)).collect()
}

fn bits<T: Element>(numbers: &[T]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_f32().to_bits()).collect()
}

fn books() -> [Codebook; 4] {
    [Codebook::nf4(), Codebook::fp4(), Codebook::iq4_nl(), Codebook::mxfp4()]
}

fn with_isa(isa: Isa) -> Exec<'static> {
    Exec::single().with_isa(isa).unwrap()
}

fn check_lengths<T: Element>() {
    for len in 0..300 {
        // Every length at the end of a page; the start of one moved on by up to 63 elements.
        for side in
            [Side::End, Side::Start(len % 64 * size_of::<T>()), Side::Start((len * 7 + 3) % 64 * size_of::<T>())]
        {
            let numbers = weights::<T>(len, len as u64);
            for size in [32, 64, 256] {
                let block_size = BlockSize::new(size).unwrap();
                let num_blocks = block_size.num_blocks(len);
                let expected = Block4::quantize(&numbers, block_size, Codebook::nf4(), &with_isa(Isa::Scalar)).unwrap();
                let back: Vec<T> = expected.as_ref().dequantize(&with_isa(Isa::Scalar));
                let input = Guarded::new(&numbers, side);
                for isa in Isa::available() {
                    let exec = with_isa(isa);
                    let mut packed = Guarded::new(&vec![0u8; packed_len(len)], Side::End);
                    let mut absmax = Guarded::new(&vec![0f32; num_blocks], Side::End);
                    quantize_into(&input, block_size, &Codebook::nf4(), &mut packed, &mut absmax, &exec).unwrap();
                    assert_eq!(packed[..], *expected.as_ref().packed(), "{isa}, {len} weights");
                    let scales = expected.as_ref().absmax();
                    assert_eq!(scales, Absmax::F32(&absmax), "{isa}, {len} weights");
                    let stored =
                        Block4Ref::new(&packed, Absmax::F32(&absmax), len, block_size, Codebook::nf4()).unwrap();
                    for stores in [Stores::Cached, Stores::Streamed] {
                        let mut out = Guarded::new(&vec![T::from_f32(9.0); len], side);
                        stored.dequantize_range_into(0, &mut out, stores, &exec).unwrap();
                        assert_eq!(bits(&out), bits(&back), "{isa}, {len} weights, {stores:?}, {side:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn every_length_stays_within_its_buffers() {
    check_lengths::<f32>();
    check_lengths::<Bf16>();
    check_lengths::<F16>();
}

#[test]
fn every_place_in_memory_gives_the_same_bits() {
    // 3 blocks and a piece, at each of 64 offsets.
    let len = 3 * 64 + 21;
    for offset in 0..64 {
        for isa in Isa::available() {
            let exec = with_isa(isa);
            let numbers = weights::<f32>(len, 3);
            let input = Guarded::new(&numbers, Side::Start(4 * offset));
            let expected = Block4::quantize(&numbers, BlockSize::B64, Codebook::nf4(), &with_isa(Isa::Scalar)).unwrap();
            let mut packed = Guarded::new(&vec![0u8; packed_len(len)], Side::Start(offset));
            let mut absmax = Guarded::new(&[0f32; 4], Side::Start(4 * offset));
            quantize_into(&input, BlockSize::B64, &Codebook::nf4(), &mut packed, &mut absmax, &exec).unwrap();
            assert_eq!(packed[..], *expected.as_ref().packed());
            let mut out = Guarded::new(&vec![0f32; len], Side::Start(4 * (63 - offset)));
            let stored = Block4Ref::new(&packed, Absmax::F32(&absmax), len, BlockSize::B64, Codebook::nf4()).unwrap();
            stored.dequantize_range_into(0, &mut out, Stores::Streamed, &exec).unwrap();
            assert_eq!(bits(&out), bits(&expected.as_ref().dequantize::<f32>(&with_isa(Isa::Scalar))));
        }
    }
}

#[test]
fn any_range_is_a_part_of_the_whole() {
    let exec = Exec::single();
    let len = 1037;
    let numbers = weights::<f32>(len, 5);
    let plain = Block4::quantize(&numbers, BlockSize::new(32).unwrap(), Codebook::nf4(), &exec).unwrap();
    let nested = plain.clone().double_quantize(&exec).unwrap();
    for stored in [&plain, &nested] {
        let whole: Vec<Bf16> = stored.as_ref().dequantize(&exec);
        for isa in Isa::available() {
            for start in (0..len).step_by(7).chain([0, 1, 31, 32, 33, len - 1, len]) {
                for count in [0, 1, 2, 15, 31, 32, 33, 64, 100, 500] {
                    if start + count <= len {
                        let mut out = vec![Bf16(0); count];
                        let exec = with_isa(isa);
                        stored.as_ref().dequantize_range_into(start, &mut out, Stores::Auto, &exec).unwrap();
                        assert_eq!(out, whole[start..start + count], "{isa}: {count} from {start}");
                    }
                }
            }
        }
    }
}

#[test]
fn threads_change_nothing() {
    let len = 5 * 65536 + 333;
    let numbers = weights::<f32>(len, 6);
    let block_size = BlockSize::B64;
    let make = |exec: &Exec<'_>| {
        let stored =
            Block4::quantize(&numbers, block_size, Codebook::nf4(), exec).unwrap().double_quantize(exec).unwrap();
        let f32s: Vec<f32> = stored.as_ref().dequantize(exec);
        let mut f16s = vec![F16(0); len - 77];
        stored.as_ref().dequantize_range_into(77, &mut f16s, Stores::Streamed, exec).unwrap();
        let (mut codes, mut absmax) = (vec![0; len], vec![0.0; BlockSize::B256.num_blocks(len)]);
        DynamicMap::signed().quantize_into(&numbers, BlockSize::B256, &mut codes, &mut absmax, exec).unwrap();
        let mut moments = vec![0f32; len];
        DynamicMap::signed().dequantize_into(&codes, &absmax, BlockSize::B256, &mut moments, exec).unwrap();
        (stored, bits(&f32s), f16s, codes, absmax, bits(&moments))
    };
    let expected = make(&Exec::single());
    for threads in [1, 2, 3, 8] {
        let pool = Threads(threads);
        assert!(make(&Exec::single().with_pool(&pool)) == expected, "{threads} threads");
    }
    assert!(make(&Exec::new()) == expected, "the default pool");
}

#[test]
fn blocks_whose_largest_code_is_an_end_of_the_table_quantize_to_themselves() {
    for book in books() {
        let ends: Vec<u8> =
            (0..16).filter(|&code| book.values()[usize::from(code)].abs() == book.max_magnitude()).collect();
        for seed in 0..40u64 {
            for isa in Isa::available() {
                let exec = with_isa(isa);
                let block_size = BlockSize::new(32 << (seed % 3)).unwrap();
                let len = block_size.get() * 3;
                let mut codes: Vec<u8> =
                    weights::<f32>(len, seed + 1).iter().map(|value| (value.to_bits() >> 9 & 15) as u8).collect();
                codes.iter_mut().step_by(block_size.get()).for_each(|code| *code = ends[0]);
                let packed: Vec<u8> = codes.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect();
                let scales = vec![0.07, 1.3e-5, 8.0];
                let stored = Block4::new(packed, AbsmaxBuf::F32(scales), len, block_size, book).unwrap();
                let once: Vec<f32> = stored.as_ref().dequantize(&exec);
                let again = Block4::quantize(&once, block_size, book, &exec).unwrap();
                assert_eq!(
                    bits(&again.as_ref().dequantize::<f32>(&exec)),
                    bits(&once).iter().map(|&bits| if bits == 1 << 31 { 0 } else { bits }).collect::<Vec<_>>()
                );
            }
        }
    }
}

proptest! {
    #[test]
    fn weights_come_back_within_half_a_gap(
        numbers in prop::collection::vec(-1e3f32..1e3, 1..700),
        size in 5u32..13,
        kind in 0usize..4,
    ) {
        let (book, exec) = (books()[kind], Exec::single());
        let block_size = BlockSize::new(1 << size).unwrap();
        let stored = Block4::quantize(&numbers, block_size, book, &exec).unwrap();
        let back: Vec<f32> = stored.as_ref().dequantize(&exec);
        let mut values = *book.values();
        values.sort_by(f32::total_cmp);
        let gap = values.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f32::max) / book.max_magnitude();
        // IQ4_NL ends before the largest magnitude on the positive side.
        let beyond = 1.0 - values[15] / book.max_magnitude();
        for (index, (number, back)) in numbers.iter().zip(&back).enumerate() {
            let scale = stored.as_ref().absmax().get(index / block_size.get()).unwrap() * book.max_magnitude();
            prop_assert!((number - back).abs() <= scale * (gap / 2.0).max(beyond) * 1.0001, "{number} {back}");
        }
    }

    #[test]
    fn scales_come_back_within_a_percent_of_their_spread(scales in prop::collection::vec(0.01f32..0.2, 1..900)) {
        let exec = Exec::single();
        let nested = NestedAbsmaxBuf::quantize(&scales, &exec).unwrap();
        let mut back = vec![0.0; scales.len()];
        Absmax::Nested(nested.as_ref()).decode_into(0, &mut back, &exec).unwrap();
        let offset = nested.as_ref().offset();
        for (index, (scale, back)) in scales.iter().zip(&back).enumerate() {
            let spread = scales[index / 256 * 256..].iter().take(256).fold(0.0f32, |most, scale| most.max((scale - offset).abs()));
            prop_assert!((scale - back).abs() <= 0.008 * spread + 1e-7, "{scale} {back}");
        }
    }

    #[test]
    fn dynamic_numbers_come_back_within_a_step(numbers in prop::collection::vec(-10f32..10.0, 1..900), narrow in any::<bool>()) {
        let exec = Exec::single();
        let map = if narrow { DynamicMap::unsigned() } else { DynamicMap::signed() };
        let numbers: Vec<f32> = if narrow { numbers.iter().map(|number| number.abs()).collect() } else { numbers };
        let block_size = BlockSize::B64;
        let (mut codes, mut absmax) = (vec![0; numbers.len()], vec![0.0; block_size.num_blocks(numbers.len())]);
        map.quantize_into(&numbers, block_size, &mut codes, &mut absmax, &exec).unwrap();
        let mut back = vec![0f32; numbers.len()];
        map.dequantize_into(&codes, &absmax, block_size, &mut back, &exec).unwrap();
        for (index, (number, back)) in numbers.iter().zip(&back).enumerate() {
            prop_assert!((number - back).abs() <= 0.0071 * absmax[index / 64] * 1.001, "{number} {back}");
        }
    }
}

#[test]
fn every_wrong_length_is_named() {
    let exec = Exec::single();
    let length = |what: &'static str, found: usize, expected: usize| Err(QuantError::Length { what, found, expected });
    let book = Codebook::nf4();
    let run = |packed: usize, absmax: usize| {
        quantize_into(&[1.0f32; 65], BlockSize::B64, &book, &mut vec![0; packed], &mut vec![0.0; absmax], &exec)
    };
    assert_eq!(run(33, 2), Ok(()));
    assert_eq!(run(32, 2), length("packed", 32, 33));
    assert_eq!(run(34, 2), length("packed", 34, 33));
    assert_eq!(run(33, 1), length("absmax", 1, 2));
    assert_eq!(run(0, 0), length("packed", 0, 33));

    let empty = Block4::quantize::<f32>(&[], BlockSize::B64, book, &exec).unwrap().double_quantize(&exec).unwrap();
    assert!(empty.as_ref().is_empty() && empty.as_ref().dequantize::<Bf16>(&exec).is_empty());

    let stored = Block4::quantize(&[1.0f32; 65], BlockSize::B64, book, &exec).unwrap();
    assert_eq!(stored.as_ref().dequantize_into(&mut [0f32; 64], &exec), length("out", 64, 65));
    let range = |start: usize, len: usize| {
        stored.as_ref().dequantize_range_into(start, &mut vec![F16(0); len], Stores::Auto, &exec)
    };
    assert_eq!(range(65, 0), Ok(()));
    for (start, len) in [(65, 1), (0, 66), (usize::MAX, 1), (usize::MAX, 0), (66, 0)] {
        assert_eq!(range(start, len), Err(QuantError::Range { what: "out", start, len, available: 65 }));
    }
    let decode = |start: usize, len: usize| stored.as_ref().absmax().decode_into(start, &mut vec![0.0; len], &exec);
    assert_eq!(decode(1, 1), Ok(()));
    assert_eq!(decode(1, 2), Err(QuantError::Range { what: "out", start: 1, len: 2, available: 2 }));

    let map = DynamicMap::signed().values();
    let nested = |codes: usize, absmax: usize| {
        NestedAbsmax::new(&vec![0; codes], &vec![0.0; absmax], map, 0.0, BlockSize::B256).map(|_| ())
    };
    assert_eq!(nested(257, 2), Ok(()));
    assert_eq!(nested(257, 1), length("nested_absmax", 1, 2));

    let map = DynamicMap::unsigned();
    let quantize = |codes: usize, absmax: usize| {
        map.quantize_into(&[1.0f32; 257], BlockSize::B256, &mut vec![0; codes], &mut vec![0.0; absmax], &exec)
    };
    assert_eq!(quantize(256, 2), length("codes", 256, 257));
    assert_eq!(quantize(257, 3), length("absmax", 3, 2));
    let dequantize = |absmax: usize, out: usize| {
        map.dequantize_into(&[0; 257], &vec![0.0; absmax], BlockSize::B256, &mut vec![0f32; out], &exec)
    };
    assert_eq!(dequantize(2, 256), length("out", 256, 257));
    assert_eq!(dequantize(1, 257), length("absmax", 1, 2));

    for size in [0, 1, 16, 48, 8192, usize::MAX] {
        assert_eq!(BlockSize::new(size), Err(QuantError::BlockSize { found: size }));
    }
}
