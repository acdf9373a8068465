//! Products against sums in f64, for every instruction set.

use alloc::vec;
use alloc::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::dense::{Output, Workspace};
use crate::simd::product::GROUP;
use crate::{AbsmaxBuf, Block4, BlockSize, Codebook, Exec, Isa, Pool, QuantError, packed_len};

struct Threads(usize);

impl Pool for Threads {
    fn num_threads(&self) -> usize {
        self.0
    }

    fn run(&self, task: &(dyn Fn() + Sync)) {
        std::thread::scope(|scope| (0..self.0).for_each(|_| drop(scope.spawn(task))));
    }
}

/// Numbers that look random.
struct Numbers(u32);

impl Numbers {
    fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.0 ^ self.0 >> 15
    }

    /// In -1..1.
    fn next(&mut self) -> f32 {
        (self.bits() >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    fn vec(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next()).collect()
    }
}

fn random(len: usize, block_size: BlockSize, numbers: &mut Numbers) -> Block4 {
    let packed = (0..packed_len(len)).map(|_| numbers.bits() as u8).collect();
    let absmax = (0..block_size.num_blocks(len)).map(|_| 0.02 + numbers.next().abs()).collect();
    Block4::new(packed, AbsmaxBuf::F32(absmax), len, block_size, Codebook::nf4()).unwrap()
}

/// The weights in f32, by the definition.
fn decode(block4: &Block4) -> Vec<f32> {
    let block4 = block4.as_ref();
    let weight = |index| {
        let code = usize::from(block4.code(index).unwrap());
        block4.codebook().values()[code] * block4.absmax().get(index / block4.block_size().get()).unwrap()
    };
    (0..block4.len()).map(weight).collect()
}

/// What an arithmetic makes of numbers before it multiplies.
fn rounded(values: &[f32], arithmetic: Arithmetic) -> Vec<f32> {
    let round = |value: &f32| match arithmetic {
        Arithmetic::Bf16 => Bf16::from_f32(*value).to_f32(),
        _ => *value,
    };
    values.iter().map(round).collect()
}

/// `Σ_k x[m, k] · w(n, k)` and `Σ_k |x[m, k] · w(n, k)|`.
fn oracle(x: &[f32], w: impl Fn(usize, usize) -> f32, rows: usize, columns: usize, depth: usize) -> Vec<(f64, f64)> {
    let sum = |m: usize, n: usize| {
        (0..depth).fold((0.0, 0.0), |(sum, size), k| {
            let product = f64::from(x[m * depth + k]) * f64::from(w(n, k));
            (sum + product, size + product.abs())
        })
    };
    (0..rows * columns).map(|index| sum(index / columns, index % columns)).collect()
}

const UNIT: f64 = 1.0 / (1 << 24) as f64;

/// What W4A8 may add to the error of output `n` of one row: see [`Arithmetic::Int8`].
fn int8_bound(block4: &Block4, x: &[f32], n: usize) -> f64 {
    let block4 = block4.as_ref();
    let values = block4.codebook().values();
    let table = super::matrix::int8_table(values);
    let error =
        |code: usize| f64::from(values[code]) - (f64::from(table.codes[code]) - 128.0) * f64::from(table.inverse_scale);
    let code_error = (0..16).map(|code| error(code).abs()).fold(0.0, f64::max);
    let largest = values.iter().fold(0.0, |a: f64, b| a.max(f64::from(b.abs())));
    let group = |(index, group): (usize, &[f32])| {
        let absmax = block4.absmax().get((n * x.len() + index * GROUP) / block4.block_size().get()).unwrap();
        let scale = f64::from(group.iter().fold(0f32, |a, b| a.max(b.abs()))) / 127.0;
        let size: f64 = group.iter().map(|x| f64::from(x.abs())).sum();
        f64::from(absmax) * (code_error * size + GROUP as f64 * (largest + code_error) * scale * 0.5001)
    };
    x.chunks(GROUP).enumerate().map(group).sum()
}

const ALL: [Arithmetic; 3] = [Arithmetic::F32, Arithmetic::Bf16, Arithmetic::Int8];

fn check(rows: usize, columns: usize, depth: usize, block_size: usize, seed: u32) {
    let mut numbers = Numbers(seed);
    let block_size = BlockSize::new(block_size).unwrap();
    let block4 = random(columns * depth, block_size, &mut numbers);
    let weights = decode(&block4);
    let (x, dy) = (numbers.vec(rows * depth), numbers.vec(rows * columns));
    let bias = numbers.vec(columns);
    let start = 0.25f32;
    let mut workspace = Workspace::new();
    for isa in Isa::available() {
        let exec = Exec::single().with_isa(isa).unwrap();
        let matrix = Block4Matrix::from_block4(block4.as_ref(), columns, depth, ScaleFormat::F32, &exec).unwrap();
        let whole = depth.is_multiple_of(64) && block_size.get().is_multiple_of(64);
        assert_eq!(matrix.is_tiled(), columns * depth > 0 && whole);
        assert_eq!(matrix.to_block4(&exec), block4, "{isa}: the codes and scales are those that were put in");
        for arithmetic in ALL {
            let what = alloc::format!("{isa} {arithmetic:?} {rows}x{columns}x{depth} block {block_size}");
            let options = ProductOptions { arithmetic, bias: Some(&bias), output: Output::Add };
            let (w, x_used) = (rounded(&weights, arithmetic), rounded(&x, arithmetic));
            let exact = oracle(&x_used, |n, k| w[n * depth + k], rows, columns, depth);
            let mut y = vec![start; rows * columns];
            matrix.forward(&x, &mut y, rows, &options, &mut workspace, &exec).unwrap();
            for (index, (got, (exact, size))) in y.iter().zip(&exact).enumerate() {
                let (m, n) = (index / columns, index % columns);
                let (bias, start) = (f64::from(bias[n]), f64::from(start));
                // K products and their sums, then the bias and what was there.
                let mut bound = 2.0 * (depth as f64 + 4.0) * UNIT * (size + bias.abs() + start);
                if arithmetic == Arithmetic::Int8 && matrix.is_tiled() {
                    bound += int8_bound(&block4, &x[m * depth..][..depth], n) * (1.0 + 1e-5);
                }
                let error = (f64::from(*got) - exact - bias - start).abs();
                assert!(error <= bound, "{what}: y[{m}, {n}] is {got}, exactly {}", exact + bias + start);
            }
            for threads in [2, 5] {
                let mut again = vec![start; rows * columns];
                let pool = Threads(threads);
                let exec = exec.with_pool(&pool);
                matrix.forward(&x, &mut again, rows, &options, &mut workspace, &exec).unwrap();
                assert_eq!(again, y, "{what}: threads change nothing");
            }
            if arithmetic == Arithmetic::Int8 {
                continue;
            }
            let options = ProductOptions { arithmetic, bias: None, output: Output::Add };
            let dy_used = rounded(&dy, arithmetic);
            let exact = oracle(&dy_used, |k, n| w[n * depth + k], rows, depth, columns);
            let mut dx = vec![start; rows * depth];
            matrix.backward(&dy, &mut dx, rows, &options, &mut workspace, &exec).unwrap();
            for (index, (got, (exact, size))) in dx.iter().zip(&exact).enumerate() {
                let bound = 2.0 * (columns as f64 + 4.0) * UNIT * (size + f64::from(start));
                let exact = exact + f64::from(start);
                assert!((f64::from(*got) - exact).abs() <= bound, "{what}: dx[{index}] is {got}, exactly {exact}");
            }
            for threads in [2, 5] {
                let mut again = vec![start; rows * depth];
                let pool = Threads(threads);
                let exec = exec.with_pool(&pool);
                matrix.backward(&dy, &mut again, rows, &options, &mut workspace, &exec).unwrap();
                assert_eq!(again, dx, "{what} backward: threads change nothing");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn products_of_tiles_are_within_the_bound_of_f64(
        rows in prop_oneof![0usize..20, 60usize..75],
        columns in 0usize..75,
        groups in 1usize..10,
        block_size in prop::sample::select(vec![64usize, 128, 512]),
        seed in any::<u32>(),
    ) {
        check(rows, columns, groups * 64, block_size, seed);
    }

    #[test]
    fn products_of_any_shape_are_within_the_bound_of_f64(
        rows in 0usize..8,
        columns in 0usize..40,
        depth in prop_oneof![0usize..100, 250usize..330],
        block_size in prop::sample::select(vec![32usize, 64, 128]),
        seed in any::<u32>(),
    ) {
        check(rows, columns, depth, block_size, seed);
    }
}

#[test]
fn products_of_every_number_of_rows() {
    for rows in 0..=26 {
        check(rows, 9, 192, 64, rows as u32);
    }
}

#[test]
fn larger_products() {
    check(130, 196, 640, 64, 1);
    check(3, 576, 576, 64, 2);
    // Shared among threads although a single row.
    check(1, 1030, 576, 64, 3);
}

/// An input with a single 1 gives a column of the weight.
#[test]
fn bf16_weights_are_those_that_dequantizing_to_bf16_gives() {
    let (columns, depth) = (13, 128);
    let mut numbers = Numbers(7);
    let block4 = random(columns * depth, BlockSize::B64, &mut numbers);
    let want = rounded(&decode(&block4), Arithmetic::Bf16);
    let options = ProductOptions { arithmetic: Arithmetic::Bf16, ..ProductOptions::default() };
    for isa in Isa::available() {
        let exec = Exec::single().with_isa(isa).unwrap();
        let matrix = Block4Matrix::from_block4(block4.as_ref(), columns, depth, ScaleFormat::F32, &exec).unwrap();
        // A few rows at once, and all.
        for rows in [1, 3, 8, depth] {
            for first in (0..depth).step_by(rows) {
                let taken = rows.min(depth - first);
                let mut x = vec![Bf16(0); taken * depth];
                (0..taken).for_each(|m| x[m * depth + first + m] = Bf16::from_f32(1.0));
                let mut y = vec![Bf16(0); taken * columns];
                matrix.forward(&x, &mut y, taken, &options, &mut Workspace::new(), &exec).unwrap();
                for (index, y) in y.iter().enumerate() {
                    let want = want[index % columns * depth + first + index / columns];
                    assert_eq!(y.to_f32(), want, "{isa}: {rows} rows");
                }
            }
        }
        // And backward, a row of the weight.
        let mut dy = vec![Bf16(0); columns * columns];
        (0..columns).for_each(|n| dy[n * columns + n] = Bf16::from_f32(1.0));
        let mut dx = vec![0f32; columns * depth];
        matrix.backward(&dy, &mut dx, columns, &options, &mut Workspace::new(), &exec).unwrap();
        assert_eq!(dx, want, "{isa}: backward");
    }
}

/// d/dx of Σ dy · forward(x), by central differences: exact but for rounding, since the product is linear.
#[test]
fn the_backward_product_is_the_gradient_of_the_forward_product() {
    let (rows, columns, depth) = (2, 10, 128);
    let mut numbers = Numbers(11);
    let block4 = random(columns * depth, BlockSize::B64, &mut numbers);
    let (x, dy) = (numbers.vec(rows * depth), numbers.vec(rows * columns));
    let options = ProductOptions::default();
    for isa in Isa::available() {
        let exec = Exec::single().with_isa(isa).unwrap();
        let matrix = Block4Matrix::from_block4(block4.as_ref(), columns, depth, ScaleFormat::F32, &exec).unwrap();
        let mut workspace = Workspace::new();
        let mut dx = vec![0f32; rows * depth];
        matrix.backward(&dy, &mut dx, rows, &options, &mut workspace, &exec).unwrap();
        let mut loss = |x: &[f32]| -> f64 {
            let mut y = vec![0f32; rows * columns];
            matrix.forward(x, &mut y, rows, &options, &mut workspace, &exec).unwrap();
            y.iter().zip(&dy).map(|(y, dy)| f64::from(*y) * f64::from(*dy)).sum()
        };
        for (index, dx) in dx.iter().enumerate() {
            let (mut above, mut below) = (x.clone(), x.clone());
            above[index] += 1.0;
            below[index] -= 1.0;
            let step = f64::from(above[index]) - f64::from(below[index]);
            let slope = (loss(&above) - loss(&below)) / step;
            assert!((slope - f64::from(*dx)).abs() < 1e-4, "{isa}: {slope} {dx}");
        }
    }
}

#[test]
fn every_instruction_set_decodes_the_same_weights() {
    let (columns, depth) = (12, 256);
    let block4 = random(columns * depth, BlockSize::B64, &mut Numbers(3));
    let exec = Exec::single();
    let matrix = Block4Matrix::from_block4(block4.as_ref(), columns, depth, ScaleFormat::F32, &exec).unwrap();
    let super::matrix::Storage::Tiled(tiled) = matrix.storage() else { panic!("tiled") };
    let weights = decode(&block4);
    for isa in Isa::available() {
        let kernels = crate::simd::product::kernels(isa);
        for groups in [0..4, 1..3, 2..3] {
            let mut buffer = Vec::new();
            let tiles = tiled.tiles(4..12, groups.clone(), &mut buffer);
            let at = |row: usize, column: usize| weights[(4 + row) * depth + groups.start * GROUP + column];
            let bits = |row, column| u32::from(Bf16::from_f32(at(row, column)).0);
            let width = groups.len() * GROUP;
            let mut panel = vec![0f32; 8 * width];
            (kernels.panel_f32)(&tiles, &matrix.table(false), &mut panel);
            assert!(panel.iter().enumerate().all(|(i, w)| *w == at(i / width, i % width)), "{isa}");
            (kernels.panel_f32)(&tiles, &matrix.table(true), &mut panel);
            assert!(panel.iter().enumerate().all(|(i, w)| w.to_bits() == bits(i / width, i % width) << 16), "{isa}");
            let mut pairs = vec![0u32; 8 * width / 2];
            (kernels.panel_bf16)(&tiles, &matrix.table(true), &mut pairs);
            for (index, pair) in pairs.iter().enumerate() {
                let (row, column) = (index / (width / 2), 2 * (index % (width / 2)));
                assert_eq!(*pair, bits(row, column) | bits(row, column + 1) << 16, "{isa}");
            }
            if groups.len() == 1 {
                let mut pairs = vec![[0u32; GROUP]; 4];
                (kernels.panel_row_pairs)(&tiles, &matrix.table(true), &mut pairs);
                for (index, pair) in pairs.as_flattened().iter().enumerate() {
                    let (row, column) = (2 * (index / GROUP), index % GROUP);
                    assert_eq!(*pair, bits(row, column) | bits(row + 1, column) << 16, "{isa}");
                }
            }
        }
    }
}

#[test]
fn scales_in_bf16_are_rounded_and_smaller() {
    let (columns, depth) = (6, 192);
    let block4 = random(columns * depth, BlockSize::B64, &mut Numbers(5));
    let (packed, AbsmaxBuf::F32(absmax)) = block4.clone().into_parts() else { panic!("plain scales") };
    let absmax = absmax.iter().map(|scale| Bf16::from_f32(*scale).to_f32()).collect();
    let rounded =
        Block4::new(packed, AbsmaxBuf::F32(absmax), columns * depth, BlockSize::B64, Codebook::nf4()).unwrap();
    let x = Numbers(6).vec(70 * depth);
    for isa in Isa::available() {
        let exec = Exec::single().with_isa(isa).unwrap();
        let build = |block4: &Block4, format| Block4Matrix::from_block4(block4.as_ref(), columns, depth, format, &exec);
        let small = build(&block4, ScaleFormat::Bf16).unwrap();
        let large = build(&rounded, ScaleFormat::F32).unwrap();
        assert_eq!(small.to_block4(&exec), rounded);
        assert!(small.num_bytes() < large.num_bytes());
        for arithmetic in ALL {
            for rows in [1, 70] {
                let options = ProductOptions { arithmetic, ..ProductOptions::default() };
                let x = &x[..rows * depth];
                let run = |matrix: &Block4Matrix| {
                    let (mut y, mut workspace) = (vec![0f32; rows * columns], Workspace::new());
                    matrix.forward(x, &mut y, rows, &options, &mut workspace, &exec).unwrap();
                    let mut dx = vec![0f32; rows * depth];
                    if arithmetic != Arithmetic::Int8 {
                        matrix.backward(&y, &mut dx, rows, &options, &mut workspace, &exec).unwrap();
                    }
                    (y, dx)
                };
                assert_eq!(run(&small), run(&large), "{isa} {arithmetic:?}");
            }
        }
    }
}

/// A tensor with scales in 8 bits, and the same with what those mean in f32.
fn doubly_quantized(len: usize, block_size: BlockSize, numbers: &mut Numbers) -> (Block4, Block4) {
    let exec = Exec::single();
    let nested = random(len, block_size, numbers).double_quantize(&exec).unwrap();
    let mut absmax = vec![0.0; block_size.num_blocks(len)];
    nested.as_ref().absmax().decode_into(0, &mut absmax, &exec).unwrap();
    let (packed, _) = nested.clone().into_parts();
    let plain = Block4::new(packed, AbsmaxBuf::F32(absmax), len, block_size, Codebook::nf4()).unwrap();
    (nested, plain)
}

/// Matrices with scales in 8 bits give the bits of those with scales in f32, and give back what they were made of.
fn check_nested(rows: usize, columns: usize, depth: usize, block_size: usize, seed: u32) {
    let mut numbers = Numbers(seed);
    let (nested, plain) = doubly_quantized(columns * depth, BlockSize::new(block_size).unwrap(), &mut numbers);
    let (x, dy) = (numbers.vec(rows * depth), numbers.vec(rows * columns));
    let mut workspace = Workspace::new();
    for isa in Isa::available() {
        let exec = Exec::single().with_isa(isa).unwrap();
        let build = |block4: &Block4, format| {
            Block4Matrix::from_block4(block4.as_ref(), columns, depth, format, &exec).unwrap()
        };
        let mut stored = build(&nested, ScaleFormat::AsStored);
        assert_eq!(stored.to_block4(&exec), nested, "{isa}");
        let decoded = build(&nested, ScaleFormat::F32);
        assert_eq!(decoded.to_block4(&exec), plain, "{isa}");
        let (mut packed, mut absmax) = (vec![0; packed_len(columns * depth)], vec![0.0; plain.as_ref().absmax().len()]);
        stored.to_block4_into(&mut packed, &mut absmax, &exec).unwrap();
        assert_eq!((packed, AbsmaxBuf::F32(absmax)), plain.clone().into_parts(), "{isa}");
        for arithmetic in ALL {
            let options = ProductOptions { arithmetic, ..ProductOptions::default() };
            let mut run = |matrix: &Block4Matrix| {
                let (mut y, mut dx) = (vec![0f32; rows * columns], vec![0f32; rows * depth]);
                matrix.forward(&x, &mut y, rows, &options, &mut workspace, &exec).unwrap();
                if arithmetic != Arithmetic::Int8 {
                    matrix.backward(&dy, &mut dx, rows, &options, &mut workspace, &exec).unwrap();
                }
                (y, dx)
            };
            assert_eq!(run(&stored), run(&decoded), "{isa} {arithmetic:?} {rows}x{columns}x{depth} block {block_size}");
        }
        // Its memory takes scales of either format.
        for block4 in [&plain, &nested] {
            stored.repack(block4.as_ref(), &exec).unwrap();
            assert_eq!(stored.to_block4(&exec), *block4, "{isa}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn scales_in_8_bits_give_the_bits_of_their_f32(
        rows in prop_oneof![1usize..20, 60usize..75],
        columns in 1usize..75,
        depth in prop_oneof![(1usize..10).prop_map(|groups| groups * 64), 1usize..100],
        block_size in prop::sample::select(vec![32usize, 64, 128, 512]),
        seed in any::<u32>(),
    ) {
        check_nested(rows, columns, depth, block_size, seed);
    }
}

/// 576 to 1536 features and back, as a layer of SmolLM2-135M has them.
#[test]
fn scales_in_8_bits_take_no_more_than_0_52_bytes_a_weight() {
    let exec = Exec::single();
    for (columns, depth) in [(1536, 576), (576, 1536), (192, 576)] {
        let (nested, _) = doubly_quantized(columns * depth, BlockSize::B64, &mut Numbers(8));
        let bytes_per_weight = |format| {
            let matrix = Block4Matrix::from_block4(nested.as_ref(), columns, depth, format, &exec).unwrap();
            matrix.num_bytes() as f64 / (columns * depth) as f64
        };
        assert!(bytes_per_weight(ScaleFormat::AsStored) < 0.516);
        assert_eq!(bytes_per_weight(ScaleFormat::F32), 0.5625);
    }
    check_nested(3, 192, 576, 64, 12);
}

#[test]
fn the_integers_of_a_codebook_are_near_its_values() {
    let largest_error = |values: &[f32; 16]| {
        let table = super::matrix::int8_table(values);
        let value = |code: u8| (f32::from(code) - 128.0) * table.inverse_scale;
        values.iter().zip(table.codes).map(|(want, code)| (want - value(code)).abs()).fold(0.0, f32::max)
    };
    assert!(largest_error(Codebook::nf4().values()) < 0.0045);
    // Integers up to 12 are met exactly.
    let exact = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];
    assert!(largest_error(&exact) < 1e-6);
    assert_eq!(super::matrix::int8_table(&[0.0; 16]).codes, [128; 16]);
}

#[test]
fn activations_that_are_not_finite_give_nan_in_their_row_alone() {
    let (columns, depth) = (5, 128);
    let block4 = random(columns * depth, BlockSize::B64, &mut Numbers(9));
    let options = ProductOptions { arithmetic: Arithmetic::Int8, ..ProductOptions::default() };
    for isa in Isa::available() {
        let exec = Exec::single().with_isa(isa).unwrap();
        let matrix = Block4Matrix::from_block4(block4.as_ref(), columns, depth, ScaleFormat::F32, &exec).unwrap();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![1f32; 2 * depth];
            x[70] = bad;
            // The smallest numbers count as zero.
            x[depth..depth + 64].fill(1e-40);
            let mut y = vec![0f32; 2 * columns];
            matrix.forward(&x, &mut y, 2, &options, &mut Workspace::new(), &exec).unwrap();
            assert!(y[..columns].iter().all(|y| y.is_nan()) && y[columns..].iter().all(|y| y.is_finite()), "{isa}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let block4 = random(4 * 64, BlockSize::B64, &mut Numbers(1));
    let exec = Exec::single();
    let build = |rows, columns| Block4Matrix::from_block4(block4.as_ref(), rows, columns, ScaleFormat::F32, &exec);
    assert!(matches!(build(4, 63), Err(QuantError::Length { what: "source", found: 256, expected: 252 })));
    assert!(matches!(build(usize::MAX, 64), Err(QuantError::Overflow { .. })));
    let mut matrix = build(4, 64).unwrap();
    let mut workspace = Workspace::new();
    let bias = [0.0; 3];
    let mut forward = |x: usize, y: usize, rows: usize, options: &ProductOptions<'_>| {
        matrix.forward(&vec![0f32; x], &mut vec![0f32; y], rows, options, &mut workspace, &exec)
    };
    let plain = ProductOptions::default();
    assert_eq!(forward(128, 8, 2, &plain), Ok(()));
    assert!(matches!(forward(127, 8, 2, &plain), Err(QuantError::Length { what: "x", .. })));
    assert!(matches!(forward(128, 9, 2, &plain), Err(QuantError::Length { what: "y", .. })));
    assert!(matches!(forward(0, 0, usize::MAX, &plain), Err(QuantError::Overflow { .. })));
    let with_bias = ProductOptions { bias: Some(&bias), ..plain };
    assert!(matches!(forward(128, 8, 2, &with_bias), Err(QuantError::Length { what: "bias", .. })));
    let mut backward = |dy: usize, dx: usize, options: &ProductOptions<'_>| {
        matrix.backward(&vec![0f32; dy], &mut vec![0f32; dx], 2, options, &mut workspace, &exec)
    };
    assert_eq!(backward(8, 128, &plain), Ok(()));
    assert!(matches!(backward(7, 128, &plain), Err(QuantError::Length { what: "dy", .. })));
    assert!(matches!(backward(8, 129, &plain), Err(QuantError::Length { what: "dx", .. })));
    let integers = ProductOptions { arithmetic: Arithmetic::Int8, ..plain };
    assert!(matches!(backward(8, 128, &integers), Err(QuantError::Value { what: "arithmetic", .. })));
    assert!(matches!(backward(8, 128, &with_bias), Err(QuantError::Value { what: "bias", .. })));
    let other = random(4 * 64, BlockSize::new(32).unwrap(), &mut Numbers(1));
    assert!(matches!(matrix.repack(other.as_ref(), &exec), Err(QuantError::Value { what: "block_size", .. })));
    let other = random(5 * 64, BlockSize::B64, &mut Numbers(1));
    assert!(matches!(matrix.repack(other.as_ref(), &exec), Err(QuantError::Length { what: "source", .. })));
    let other = random(4 * 64, BlockSize::B64, &mut Numbers(2));
    matrix.repack(other.as_ref(), &exec).unwrap();
    assert_eq!(matrix.to_block4(&exec), other);
    let mut packed = [0; 128];
    assert!(matches!(
        matrix.to_block4_into(&mut packed, &mut [0.0; 3], &exec),
        Err(QuantError::Length { what: "absmax", .. })
    ));
}
