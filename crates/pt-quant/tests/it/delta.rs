//! 1-bit deltas: operands on guard pages, random shapes, thread counts, bad input.

use proptest::prelude::*;
use pt_quant::delta::{
    BitDelta, BitDeltaRef, BitMatrix, BitMatrixRef, DeltaArithmetic, DeltaMatrix, DeltaOptions, DeltaScale,
    DeltaScaleBuf, DeltaWorkspace, ScaleAxis, add_tenants, q1_0_len,
};
use pt_quant::dense::Output;
use pt_quant::{Bf16, Element, Exec, F16, Isa, Pool, QuantError};

use crate::guard::{Guarded, Side};

const AXES: [ScaleAxis; 3] = [ScaleAxis::Matrix, ScaleAxis::Row, ScaleAxis::Group128];
const ARITHMETICS: [DeltaArithmetic; 4] =
    [DeltaArithmetic::F32, DeltaArithmetic::Table14, DeltaArithmetic::Int8, DeltaArithmetic::Table7];

/// Numbers that differ and are not small.
fn numbers(len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|index| ((index * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0).collect()
}

fn convert<T: Element>(numbers: &[f32]) -> Vec<T> {
    numbers.iter().map(|number| T::from_f32(*number)).collect()
}

struct Threads(usize);

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

fn touches_nothing_else<T: Element + PartialEq + std::fmt::Debug>(out_features: usize, in_features: usize, side: Side) {
    let len = out_features * in_features;
    let (base, tuned) = (convert::<T>(&numbers(len, 1)), convert::<T>(&numbers(len, 2)));
    let (base, tuned) = (Guarded::new(&base, side), Guarded::new(&tuned, side));
    let mut out = Guarded::new(&base, side);
    let mut merged = Guarded::new(&base, side);
    for isa in Isa::available() {
        let exec = Exec::single().with_isa(isa).unwrap();
        for axis in AXES {
            let delta = BitDelta::fit(&base, &tuned, out_features, in_features, axis, &exec).unwrap();
            let words_side = if let Side::Start(moved) = side { Side::Start(moved / 4 * 8) } else { side };
            let words = Guarded::new(delta.signs().words(), words_side);
            let signs = BitMatrixRef::new(&words, out_features, in_features).unwrap();
            let guarded = BitDeltaRef::new(signs, delta.scale()).unwrap();
            guarded.merge_into(&base, &mut out, &exec).unwrap();
            merged.copy_from_slice(&base);
            let backup = guarded.merge_with_backup(&mut merged, &exec).unwrap();
            assert_eq!(&*merged, &*out, "{isa}");
            backup.toggle(&mut merged, &exec).unwrap();
            assert_eq!(&*merged, &*base, "{isa}");
            guarded.write_dense(&mut out, &exec).unwrap();
        }
    }
}

#[test]
fn packing_and_merging_touch_nothing_past_their_operands() {
    for in_features in (1..=140).chain([192, 255, 256, 257, 300]) {
        for side in [Side::Start(0), Side::Start(4), Side::Start(20), Side::End] {
            touches_nothing_else::<f32>(2, in_features, side);
            touches_nothing_else::<Bf16>(2, in_features, side);
            touches_nothing_else::<F16>(2, in_features, side);
        }
    }
}

#[test]
fn products_and_conversions_touch_nothing_past_their_operands() {
    for (rows, out_features, in_features) in [(1, 1, 32), (2, 64, 128), (5, 65, 96), (9, 130, 576), (3, 7, 160)] {
        let len = out_features * in_features;
        for side in [Side::Start(0), Side::Start(4), Side::End] {
            let exec = Exec::single();
            let delta =
                BitDelta::fit(&vec![0.0; len], &numbers(len, 3), out_features, in_features, ScaleAxis::Group128, &exec)
                    .unwrap();
            let (x, dy) = (numbers(rows * in_features, 4), numbers(rows * out_features, 5));
            let (x, dy) = (Guarded::new(&convert::<Bf16>(&x), side), Guarded::new(&dy, side));
            let mut y = Guarded::new(&convert::<F16>(&dy), side);
            let mut dx = Guarded::new(&numbers(rows * in_features, 6), side);
            let mut gradient = Guarded::new(&vec![0.0; delta.scale().values().len()], side);
            let mut mask = Guarded::new(&vec![0i32; len / 32], side);
            for isa in Isa::available() {
                let exec = Exec::single().with_isa(isa).unwrap();
                let matrix = DeltaMatrix::new(delta.as_ref(), &exec).unwrap();
                let mut workspace = DeltaWorkspace::new();
                for arithmetic in ARITHMETICS {
                    let options = DeltaOptions { arithmetic, output: Output::Replace };
                    matrix.forward(&x, &mut y, rows, options, &mut workspace, &exec).unwrap();
                    matrix.backward(&dy, &mut dx, rows, options, &mut workspace, &exec).unwrap();
                    matrix.scale_gradient(&x, &dy, &mut gradient, rows, arithmetic, &mut workspace, &exec).unwrap();
                }
                delta.signs().to_bitdelta(&mut mask, &exec).unwrap();
                let back = BitMatrix::from_bitdelta(&mask, out_features, in_features, &exec).unwrap();
                assert_eq!(back.as_ref(), delta.signs(), "{isa}");
            }
        }
    }
}

#[test]
fn results_do_not_depend_on_the_threads() {
    let (rows, out_features, in_features) = (13, 700, 400);
    let len = out_features * in_features;
    let (base, tuned) = (convert::<Bf16>(&numbers(len, 7)), convert::<Bf16>(&numbers(len, 8)));
    let (x, dy) = (numbers(rows * in_features, 9), numbers(rows * out_features, 10));
    for isa in Isa::available() {
        for axis in AXES {
            let mut first = None;
            for threads in [1, 2, 3, 8] {
                let pool = Threads(threads);
                let exec = Exec::single().with_isa(isa).unwrap().with_pool(&pool);
                let delta = BitDelta::fit(&base, &tuned, out_features, in_features, axis, &exec).unwrap();
                let mut merged = base.clone();
                delta.as_ref().merge(&mut merged, &exec).unwrap();
                let matrix = DeltaMatrix::new(delta.as_ref(), &exec).unwrap();
                let mut workspace = DeltaWorkspace::new();
                let mut products = Vec::new();
                for arithmetic in ARITHMETICS {
                    let options = DeltaOptions { arithmetic, output: Output::Replace };
                    let mut y = vec![0.0f32; rows * out_features];
                    matrix.forward(&x, &mut y, rows, options, &mut workspace, &exec).unwrap();
                    let mut dx = vec![0.0f32; rows * in_features];
                    matrix.backward(&dy, &mut dx, rows, options, &mut workspace, &exec).unwrap();
                    let mut gradient = vec![0.0f32; delta.scale().values().len()];
                    matrix.scale_gradient(&x, &dy, &mut gradient, rows, arithmetic, &mut workspace, &exec).unwrap();
                    products.extend([y, dx, gradient]);
                }
                let result = (delta, merged, products);
                let first = first.get_or_insert(result.clone());
                assert!(&result == first, "{isa} {axis:?} with {threads} threads");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn random_shapes_agree_with_f64(
        rows in 1usize..12,
        out_features in 1usize..150,
        in_features in 1usize..400,
        seed in 0usize..1000,
        axis in 0usize..3,
    ) {
        let len = out_features * in_features;
        let exec = Exec::single();
        let delta =
            BitDelta::fit(&vec![0.0; len], &numbers(len, seed), out_features, in_features, AXES[axis], &exec).unwrap();
        let mut dense = vec![0.0f32; len];
        delta.as_ref().write_dense(&mut dense, &exec).unwrap();
        let (x, dy) = (numbers(rows * in_features, seed + 1), numbers(rows * out_features, seed + 2));
        for isa in Isa::available() {
            let exec = exec.with_isa(isa).unwrap();
            let matrix = DeltaMatrix::new(delta.as_ref(), &exec).unwrap();
            prop_assert_eq!(&matrix.to_delta(), &delta);
            let (mut y, mut dx) = (vec![0.0f32; rows * out_features], vec![0.0f32; rows * in_features]);
            let mut workspace = DeltaWorkspace::new();
            matrix.forward(&x, &mut y, rows, DeltaOptions::default(), &mut workspace, &exec).unwrap();
            matrix.backward(&dy, &mut dx, rows, DeltaOptions::default(), &mut workspace, &exec).unwrap();
            for row in 0..rows {
                for n in 0..out_features {
                    let products = (0..in_features)
                        .map(|k| f64::from(x[row * in_features + k]) * f64::from(dense[n * in_features + k]));
                    let bound = (in_features as f64 + 12.0) * 2f64.powi(-24) * products.clone().map(f64::abs).sum::<f64>();
                    let exact: f64 = products.sum();
                    prop_assert!((f64::from(y[row * out_features + n]) - exact).abs() <= bound);
                }
                for k in 0..in_features {
                    let products = (0..out_features)
                        .map(|n| f64::from(dy[row * out_features + n]) * f64::from(dense[n * in_features + k]));
                    let bound = (out_features as f64 + 14.0) * 2f64.powi(-24) * products.clone().map(f64::abs).sum::<f64>();
                    let exact: f64 = products.sum();
                    prop_assert!((f64::from(dx[row * in_features + k]) - exact).abs() <= bound);
                }
            }
        }
    }

    #[test]
    fn conversions_give_back_what_they_took(
        out_features in 0usize..70,
        words in 0usize..9,
        blocks in 0usize..4,
        bytes in proptest::collection::vec(any::<u8>(), 18 * 3 * 70),
    ) {
        let exec = Exec::single();
        let mask: Vec<i32> = bytes
            .chunks_exact(4)
            .cycle()
            .take(out_features * words)
            .map(|four| i32::from_le_bytes(four.try_into().unwrap()))
            .collect();
        let signs = BitMatrix::from_bitdelta(&mask, out_features, 32 * words, &exec).unwrap();
        prop_assert!(BitMatrixRef::new(signs.as_ref().words(), out_features, 32 * words).is_ok());
        let mut back = vec![0; mask.len()];
        signs.as_ref().to_bitdelta(&mut back, &exec).unwrap();
        prop_assert_eq!(back, mask);

        let mut stored = bytes[..q1_0_len(out_features, 128 * blocks).unwrap()].to_vec();
        for block in stored.chunks_exact_mut(18) {
            // A finite scale.
            block[1] &= 0x7b;
        }
        let delta = BitDelta::from_q1_0(&stored, out_features, 128 * blocks, &exec).unwrap();
        prop_assert_eq!(delta.as_ref().to_q1_0().unwrap(), stored);
    }
}

#[test]
fn matrices_without_weights_are_fine() {
    let exec = Exec::single();
    for (out_features, in_features) in [(0, 5), (5, 0), (0, 0)] {
        for axis in AXES {
            let delta = BitDelta::fit::<f32>(&[], &[], out_features, in_features, axis, &exec).unwrap();
            delta.as_ref().merge::<f32>(&mut [], &exec).unwrap();
            let backup = delta.as_ref().merge_with_backup::<f32>(&mut [], &exec).unwrap();
            backup.toggle(&mut [], &exec).unwrap();
            let matrix = DeltaMatrix::new(delta.as_ref(), &exec).unwrap();
            assert_eq!(matrix.to_delta(), delta);
            let mut workspace = DeltaWorkspace::new();
            for rows in [0, 2] {
                let (x, dy) = (vec![1.0f32; rows * in_features], vec![1.0f32; rows * out_features]);
                for arithmetic in ARITHMETICS {
                    let options = DeltaOptions { arithmetic, output: Output::Replace };
                    let mut y = vec![7.0f32; rows * out_features];
                    matrix.forward(&x, &mut y, rows, options, &mut workspace, &exec).unwrap();
                    assert!(y.iter().all(|y| *y == 0.0), "a sum over nothing is 0");
                    let mut dx = vec![7.0f32; rows * in_features];
                    matrix.backward(&dy, &mut dx, rows, options, &mut workspace, &exec).unwrap();
                    assert!(dx.iter().all(|dx| *dx == 0.0));
                    let mut gradient = vec![7.0f32; delta.scale().values().len()];
                    matrix.scale_gradient(&x, &dy, &mut gradient, rows, arithmetic, &mut workspace, &exec).unwrap();
                    assert!(gradient.iter().all(|gradient| *gradient == 0.0));
                }
            }
        }
    }
}

#[test]
fn bad_input_is_a_named_error() {
    let exec = Exec::single();
    let is_length = |error: QuantError, name: &str| matches!(error, QuantError::Length { what, .. } if what == name);
    let is_value = |error: QuantError, name: &str| matches!(error, QuantError::Value { what, .. } if what == name);
    let four = [1.0f32; 4];
    let fit = |base: &[f32], tuned: &[f32], n, k| BitDelta::fit(base, tuned, n, k, ScaleAxis::Row, &exec);
    assert!(is_length(fit(&four[..3], &four, 2, 2).unwrap_err(), "base"));
    assert!(is_length(fit(&four, &four[..3], 2, 2).unwrap_err(), "fine_tuned"));
    assert!(matches!(fit(&four, &four, usize::MAX, 2), Err(QuantError::Overflow { .. })));
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let broken = [1.0, 1.0, bad, 1.0];
        for (base, tuned) in [(four, broken), (broken, four), (broken, broken)] {
            assert!(matches!(fit(&base, &tuned, 2, 2), Err(QuantError::NonFinite { row: 1, .. })));
        }
    }
    let delta = fit(&[0.0; 4], &four, 2, 2).unwrap();
    assert!(is_length(BitDeltaRef::new(delta.signs(), DeltaScale::Row(&[1.0])).unwrap_err(), "scale"));
    assert!(is_length(BitDelta::new(delta.signs().to_owned(), DeltaScaleBuf::Group128(vec![])).unwrap_err(), "scale"));
    let mut three = [0.0f32; 3];
    assert!(is_length(delta.as_ref().merge(&mut three, &exec).unwrap_err(), "weights"));
    assert!(is_length(delta.as_ref().merge_with_backup(&mut three, &exec).unwrap_err(), "weights"));
    assert!(is_length(delta.as_ref().merge_into(&four, &mut three, &exec).unwrap_err(), "out"));
    assert!(is_length(delta.as_ref().merge_into(&three, &mut [0.0; 4], &exec).unwrap_err(), "base"));
    assert!(is_length(delta.as_ref().write_dense(&mut three, &exec).unwrap_err(), "out"));
    let backup = delta.as_ref().merge_with_backup(&mut [0.0f32; 4], &exec).unwrap();
    assert!(is_length(backup.toggle(&mut three, &exec).unwrap_err(), "weights"));

    assert!(is_value(BitMatrix::from_bitdelta(&[0], 1, 33, &exec).unwrap_err(), "in_features"));
    assert!(is_length(BitMatrix::from_bitdelta(&[0], 2, 32, &exec).unwrap_err(), "mask"));
    assert!(is_value(delta.signs().to_bitdelta(&mut [], &exec).unwrap_err(), "in_features"));
    assert!(is_value(BitDelta::from_q1_0(&[], 1, 100, &exec).unwrap_err(), "in_features"));
    assert!(is_length(BitDelta::from_q1_0(&[0; 17], 1, 128, &exec).unwrap_err(), "blocks"));
    assert!(matches!(q1_0_len(usize::MAX / 2, 128), Err(QuantError::Overflow { .. })));
    let large = BitDelta::new(BitMatrix::new(vec![0; 2], 1, 128).unwrap(), DeltaScaleBuf::Matrix(1e6)).unwrap();
    assert!(is_value(large.as_ref().to_q1_0().unwrap_err(), "scale"));

    let mut matrix = DeltaMatrix::new(delta.as_ref(), &exec).unwrap();
    assert!(is_length(matrix.set_scale(DeltaScale::Row(&[1.0; 3])).unwrap_err(), "scale"));
    let (mut workspace, options) = (DeltaWorkspace::new(), DeltaOptions::default());
    let mut y = [0.0f32; 4];
    assert!(is_length(matrix.forward(&three, &mut y, 2, options, &mut workspace, &exec).unwrap_err(), "x"));
    assert!(is_length(matrix.forward(&four, &mut three, 2, options, &mut workspace, &exec).unwrap_err(), "y"));
    assert!(matches!(
        matrix.forward(&four, &mut y, usize::MAX, options, &mut workspace, &exec),
        Err(QuantError::Overflow { .. })
    ));
    assert!(is_length(matrix.backward(&three, &mut y, 2, options, &mut workspace, &exec).unwrap_err(), "dy"));
    assert!(is_length(matrix.backward(&four, &mut three, 2, options, &mut workspace, &exec).unwrap_err(), "dx"));
    let mut gradient = |gradient: &mut [f32], x: &[f32], dy: &[f32]| {
        matrix.scale_gradient(x, dy, gradient, 2, DeltaArithmetic::F32, &mut workspace, &exec).unwrap_err()
    };
    assert!(is_length(gradient(&mut [0.0; 3], &four, &four), "gradient"));
    assert!(is_length(gradient(&mut [0.0; 2], &four[..3], &four), "x"));
    assert!(is_length(gradient(&mut [0.0; 2], &four, &four[..3]), "dy"));
    let other = DeltaMatrix::new(fit(&[0.0; 6], &[1.0; 6], 2, 3).unwrap().as_ref(), &exec).unwrap();
    let mut add = |deltas: &[&DeltaMatrix], tenants: &[Option<usize>], x: &[f32], y: &mut [f32]| {
        add_tenants(deltas, tenants, x, y, DeltaArithmetic::F32, &mut workspace, &exec)
    };
    assert!(is_value(add(&[&matrix], &[Some(0), Some(1)], &four, &mut y).unwrap_err(), "tenants"));
    assert!(is_value(add(&[&matrix, &other], &[None, None], &four, &mut y).unwrap_err(), "deltas"));
    assert!(is_length(add(&[&matrix], &[None, None], &three, &mut y).unwrap_err(), "x"));
    assert!(is_length(add(&[&matrix], &[None, Some(0)], &four, &mut three).unwrap_err(), "y"));
    assert!(add(&[], &[None], &four, &mut y).is_ok());
}
