//! The products against f64, on every instruction set.

use alloc::vec;
use alloc::vec::Vec;

use super::*;
use crate::dense::Output;
use crate::{Bf16, Element, Exec, F16, Isa};

/// Numbers between -1 and 1.
fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// A delta with random signs and scales.
fn delta(out_features: usize, in_features: usize, axis: ScaleAxis, seed: u64) -> BitDelta {
    let zeros = vec![0.0f32; out_features * in_features];
    let tuned = numbers(zeros.len(), seed);
    let mut delta = BitDelta::fit(&zeros, &tuned, out_features, in_features, axis, &Exec::single()).unwrap();
    let scales = numbers(delta.scale().values().len(), seed + 1);
    delta.scale_mut().copy_from_slice(&scales);
    delta
}

const AXES: [ScaleAxis; 3] = [ScaleAxis::Matrix, ScaleAxis::Row, ScaleAxis::Group128];
const ARITHMETICS: [DeltaArithmetic; 4] =
    [DeltaArithmetic::F32, DeltaArithmetic::Table14, DeltaArithmetic::Int8, DeltaArithmetic::Table7];
const SHAPES: [(usize, usize, usize); 9] = [
    (1, 1, 1),
    (1, 64, 64),
    (2, 65, 63),
    (3, 7, 129),
    (5, 130, 100),
    (1, 192, 576),
    (9, 64, 1536),
    (17, 129, 257),
    (131, 66, 70),
];

/// The weight `s · ±1` in f64.
fn weight(delta: BitDeltaRef<'_>, row: usize, column: usize) -> f64 {
    let scale = f64::from(delta.scale().at(row, column, delta.signs().in_features()));
    if delta.signs().is_positive(row, column) { scale } else { -scale }
}

/// The bound that [`DeltaArithmetic`] states for a product of `x` (scales included) summed in groups of 128; `scale` of a group outside the sum.
fn bound(arithmetic: DeltaArithmetic, x: &[f64], scale: impl Fn(usize) -> f64) -> f64 {
    let unit = 2f64.powi(-24);
    let mut total = 0.0;
    for (group, x) in x.chunks(128).enumerate() {
        let sums = x.chunks(4).map(|x| x.iter().map(|x| x.abs()).sum::<f64>());
        let (count, largest) = (x.len().div_ceil(4) as f64, sums.fold(0.0, f64::max));
        let largest_one = x.iter().map(|x| x.abs()).fold(0.0, f64::max);
        total += scale(group).abs()
            * match arithmetic {
                DeltaArithmetic::F32 => 0.0,
                DeltaArithmetic::Table14 => count * largest / (2.0 * 8190.0),
                DeltaArithmetic::Int8 => count * 4.0 * largest_one / (2.0 * 127.0),
                DeltaArithmetic::Table7 => count * largest / (2.0 * 63.0),
            };
    }
    let magnitude: f64 = x.iter().enumerate().map(|(k, x)| scale(k / 128).abs() * x.abs()).sum();
    // Rounding in f32 comes on top for all of them: of tables, units and sums.
    total * 1.0001 + (x.len() as f64 + 12.0) * unit * magnitude
}

#[test]
fn a_product_by_hand() {
    for isa in Isa::available() {
        let exec = Exec::single().with_isa(isa).unwrap();
        let signs = BitMatrix::new(vec![0b101, 0b010], 2, 3).unwrap();
        let delta = BitDelta::new(signs, DeltaScaleBuf::Row(vec![0.5, 2.0])).unwrap();
        let matrix = DeltaMatrix::new(delta.as_ref(), &exec).unwrap();
        for arithmetic in ARITHMETICS {
            let mut y = [100.0f32; 2];
            let options = DeltaOptions { arithmetic, output: Output::Add };
            matrix.forward(&[1.0f32, 0.0, 3.0], &mut y, 1, options, &mut DeltaWorkspace::new(), &exec).unwrap();
            let error = (y[0] - 102.0).abs().max((y[1] - 92.0).abs());
            assert!(error < 0.07, "{isa} {arithmetic:?}: {y:?}");
        }
        let mut dx = [0.0f32; 3];
        let options = DeltaOptions::default();
        matrix.backward(&[10.0f32, 1.0], &mut dx, 1, options, &mut DeltaWorkspace::new(), &exec).unwrap();
        assert_eq!(dx, [3.0, -3.0, 3.0]);
    }
}

#[test]
fn forward_is_within_its_bound_of_f64() {
    let mut workspace = DeltaWorkspace::new();
    for (rows, out_features, in_features) in SHAPES {
        for axis in AXES {
            let delta = delta(out_features, in_features, axis, 3);
            let x = numbers(rows * in_features, 5);
            for arithmetic in ARITHMETICS {
                let mut first: Option<Vec<f32>> = None;
                for isa in Isa::available() {
                    let exec = Exec::single().with_isa(isa).unwrap();
                    let matrix = DeltaMatrix::new(delta.as_ref(), &exec).unwrap();
                    let mut y = vec![f32::NAN; rows * out_features];
                    let options = DeltaOptions { arithmetic, output: Output::Replace };
                    matrix.forward(&x, &mut y, rows, options, &mut workspace, &exec).unwrap();
                    for row in 0..rows {
                        let x: Vec<f64> = x[row * in_features..][..in_features].iter().map(|x| f64::from(*x)).collect();
                        for output in 0..out_features {
                            let exact: f64 =
                                x.iter().enumerate().map(|(k, x)| x * weight(delta.as_ref(), output, k)).sum();
                            let scale = |group| f64::from(delta.scale().at(output, group * 128, in_features));
                            let bound = bound(arithmetic, &x, scale);
                            let got = f64::from(y[row * out_features + output]);
                            assert!(
                                (got - exact).abs() <= bound,
                                "{isa} {arithmetic:?} {axis:?} [{rows}, {out_features}, {in_features}] at {row}, {output}: {got} {exact} {bound}"
                            );
                        }
                    }
                    if arithmetic != DeltaArithmetic::F32 {
                        assert_eq!(&y, first.get_or_insert(y.clone()), "{isa} {arithmetic:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn backward_is_within_its_bound_of_f64() {
    let mut workspace = DeltaWorkspace::new();
    for (rows, out_features, in_features) in SHAPES {
        for axis in AXES {
            let delta = delta(out_features, in_features, axis, 7);
            let dy = numbers(rows * out_features, 11);
            for arithmetic in ARITHMETICS {
                for isa in Isa::available() {
                    let exec = Exec::single().with_isa(isa).unwrap();
                    let matrix = DeltaMatrix::new(delta.as_ref(), &exec).unwrap();
                    let mut dx = numbers(rows * in_features, 12);
                    let before = dx.clone();
                    let options = DeltaOptions { arithmetic, output: Output::Add };
                    matrix.backward(&dy, &mut dx, rows, options, &mut workspace, &exec).unwrap();
                    for row in 0..rows {
                        for input in 0..in_features {
                            let scaled = |n: usize| {
                                f64::from(dy[row * out_features + n])
                                    * f64::from(delta.scale().at(n, input, in_features)).abs()
                            };
                            let exact: f64 = (0..out_features)
                                .map(|n| f64::from(dy[row * out_features + n]) * weight(delta.as_ref(), n, input))
                                .sum();
                            // Sums of 4 are of outputs 16 apart, so the largest sum of 4 neighbours is no bound: 4 times the largest is.
                            let largest = (0..out_features).map(|n| scaled(n).abs()).fold(0.0, f64::max);
                            let dys: Vec<f64> = (0..out_features.next_multiple_of(64)).map(|_| largest).collect();
                            let bound = bound(arithmetic, &dys, |_| 1.0);
                            let at = row * in_features + input;
                            let got = f64::from(dx[at]) - f64::from(before[at]);
                            assert!(
                                (got - exact).abs() <= bound + 1e-6 * (exact.abs() + 1.0),
                                "{isa} {arithmetic:?} {axis:?} [{rows}, {out_features}, {in_features}] at {row}, {input}: {got} {exact} {bound}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn the_scale_gradient_is_that_of_f64() {
    let mut workspace = DeltaWorkspace::new();
    for (rows, out_features, in_features) in SHAPES {
        for axis in AXES {
            let delta = delta(out_features, in_features, axis, 13);
            let (x, dy) = (numbers(rows * in_features, 17), numbers(rows * out_features, 19));
            let groups = in_features.div_ceil(128);
            let index = |n: usize, k: usize| match axis {
                ScaleAxis::Matrix => 0,
                ScaleAxis::Row => n,
                ScaleAxis::Group128 => n * groups + k / 128,
            };
            let mut exact = vec![0.0; delta.scale().values().len()];
            let mut magnitude = exact.clone();
            for m in 0..rows {
                for n in 0..out_features {
                    for k in 0..in_features {
                        let sign = if delta.signs().is_positive(n, k) { 1.0 } else { -1.0 };
                        let product = f64::from(dy[m * out_features + n]) * f64::from(x[m * in_features + k]);
                        exact[index(n, k)] += sign * product;
                        magnitude[index(n, k)] += product.abs();
                    }
                }
            }
            for isa in Isa::available() {
                let exec = Exec::single().with_isa(isa).unwrap();
                let matrix = DeltaMatrix::new(delta.as_ref(), &exec).unwrap();
                let mut gradient = vec![f32::NAN; exact.len()];
                matrix
                    .scale_gradient(&x, &dy, &mut gradient, rows, DeltaArithmetic::F32, &mut workspace, &exec)
                    .unwrap();
                for ((got, exact), magnitude) in gradient.iter().zip(&exact).zip(&magnitude) {
                    let bound = (in_features as f64 + 14.0) * 2f64.powi(-24) * magnitude;
                    assert!((f64::from(*got) - exact).abs() <= bound, "{isa} {axis:?}: {got} {exact}");
                }
            }
        }
    }
}

#[test]
fn the_scale_gradient_is_what_a_step_of_the_scale_does() {
    let exec = Exec::single();
    let mut workspace = DeltaWorkspace::new();
    let (rows, out_features, in_features) = (3, 70, 200);
    for axis in AXES {
        let mut delta = delta(out_features, in_features, axis, 23);
        let (x, dy) = (numbers(rows * in_features, 29), numbers(rows * out_features, 31));
        let mut matrix = DeltaMatrix::new(delta.as_ref(), &exec).unwrap();
        let mut gradient = vec![0.0; delta.scale().values().len()];
        matrix.scale_gradient(&x, &dy, &mut gradient, rows, DeltaArithmetic::F32, &mut workspace, &exec).unwrap();
        let mut loss = |delta: &BitDelta| {
            matrix.set_scale(delta.scale()).unwrap();
            let mut y = vec![0.0f32; rows * out_features];
            matrix.forward(&x, &mut y, rows, DeltaOptions::default(), &mut workspace, &exec).unwrap();
            y.iter().zip(&dy).map(|(y, dy)| f64::from(*y) * f64::from(*dy)).sum::<f64>()
        };
        for index in [0, gradient.len() / 2, gradient.len() - 1] {
            // The product is linear in its scales, so the step may be large.
            let start = delta.scale().values()[index];
            delta.scale_mut()[index] = start + 1.0;
            let above = loss(&delta);
            delta.scale_mut()[index] = start - 1.0;
            let below = loss(&delta);
            delta.scale_mut()[index] = start;
            let slope = (above - below) / 2.0;
            assert!((slope - f64::from(gradient[index])).abs() < 2e-3, "{axis:?}: {slope} {}", gradient[index]);
        }
    }
}

#[test]
fn a_matrix_gives_its_delta_back_on_every_instruction_set() {
    for (_, out_features, in_features) in SHAPES {
        for axis in AXES {
            let delta = delta(out_features, in_features, axis, 37);
            for isa in Isa::available() {
                let exec = Exec::single().with_isa(isa).unwrap();
                let matrix = DeltaMatrix::new(delta.as_ref(), &exec).unwrap();
                assert_eq!(matrix.to_delta(), delta);
            }
        }
    }
}

#[test]
fn rows_get_the_same_bits_alone_and_among_tenants() {
    let (out_features, in_features) = (200, 150);
    let deltas: Vec<BitDelta> =
        AXES.iter().enumerate().map(|(seed, axis)| delta(out_features, in_features, *axis, 41 + seed as u64)).collect();
    let tenants = [Some(2), Some(0), None, Some(2), Some(2), Some(1), Some(2), Some(2), Some(0), Some(2)];
    let x: Vec<Bf16> = numbers(tenants.len() * in_features, 43).into_iter().map(Bf16::from_f32).collect();
    let base: Vec<Bf16> = numbers(tenants.len() * out_features, 47).into_iter().map(Bf16::from_f32).collect();
    for isa in Isa::available() {
        let exec = Exec::single().with_isa(isa).unwrap();
        let matrices: Vec<DeltaMatrix> =
            deltas.iter().map(|delta| DeltaMatrix::new(delta.as_ref(), &exec).unwrap()).collect();
        let matrices: Vec<&DeltaMatrix> = matrices.iter().collect();
        let mut workspace = DeltaWorkspace::new();
        for arithmetic in ARITHMETICS {
            let mut y = base.clone();
            add_tenants(&matrices, &tenants, &x, &mut y, arithmetic, &mut workspace, &exec).unwrap();
            for (row, tenant) in tenants.iter().enumerate() {
                let mut alone = base[row * out_features..][..out_features].to_vec();
                if let Some(tenant) = tenant {
                    let options = DeltaOptions { arithmetic, output: Output::Add };
                    let x = &x[row * in_features..][..in_features];
                    matrices[*tenant].forward(x, &mut alone, 1, options, &mut workspace, &exec).unwrap();
                }
                assert_eq!(&y[row * out_features..][..out_features], &alone, "{isa} {arithmetic:?} row {row}");
            }
        }
    }
}

/// Packing and merging of one format, every instruction set against scalar.
fn check_isas<T: Element + PartialEq + core::fmt::Debug>() {
    let bits = |values: &[T]| values.iter().map(|value| value.to_f32().to_bits()).collect::<Vec<u32>>();
    let special = [0.0, -0.0, f32::MIN_POSITIVE, 1e-42, 6e4, -6e4, 1.0, 1.0 + f32::EPSILON];
    for in_features in (1..140).chain([255, 256, 300, 576, 1025]) {
        let out_features = 3;
        let numbers = |seed| {
            let mut numbers = numbers(out_features * in_features, seed);
            for (index, value) in special.iter().enumerate() {
                let at = index * 7 + seed as usize % 5;
                if at < numbers.len() {
                    numbers[at] = *value;
                }
            }
            numbers.into_iter().map(T::from_f32).collect::<Vec<T>>()
        };
        let (base, tuned) = (numbers(53), numbers(54));
        for axis in AXES {
            let mut first = None;
            for isa in Isa::available() {
                let exec = Exec::single().with_isa(isa).unwrap();
                let delta = BitDelta::fit(&base, &tuned, out_features, in_features, axis, &exec).unwrap();
                let mut merged = vec![T::from_f32(0.0); base.len()];
                delta.as_ref().merge_into(&base, &mut merged, &exec).unwrap();
                let mut in_place = base.clone();
                delta.as_ref().merge(&mut in_place, &exec).unwrap();
                assert_eq!(bits(&merged), bits(&in_place), "{isa}");
                let mut kept = base.clone();
                let backup = delta.as_ref().merge_with_backup(&mut kept, &exec).unwrap();
                assert_eq!(bits(&merged), bits(&kept), "{isa}");
                backup.toggle(&mut kept, &exec).unwrap();
                assert_eq!(bits(&base), bits(&kept), "{isa}");
                let result = (delta, bits(&merged));
                let first = first.get_or_insert(result.clone());
                assert_eq!(&result, first, "{isa} {axis:?} {in_features}");
            }
        }
    }
}

#[test]
fn packing_and_merging_give_the_same_bits_on_every_instruction_set() {
    check_isas::<f32>();
    check_isas::<Bf16>();
    check_isas::<F16>();
}

#[test]
fn activations_that_are_not_finite_spoil_their_row_alone() {
    let delta = delta(70, 130, ScaleAxis::Row, 61);
    for isa in Isa::available() {
        let exec = Exec::single().with_isa(isa).unwrap();
        let matrix = DeltaMatrix::new(delta.as_ref(), &exec).unwrap();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for arithmetic in ARITHMETICS {
                let mut x = numbers(3 * 130, 67);
                x[130 + 40] = bad;
                let mut y = vec![0.0f32; 3 * 70];
                let options = DeltaOptions { arithmetic, output: Output::Replace };
                matrix.forward(&x, &mut y, 3, options, &mut DeltaWorkspace::new(), &exec).unwrap();
                assert!(y[..70].iter().chain(&y[140..]).all(|y| y.is_finite()), "{isa} {arithmetic:?}");
                assert!(y[70..140].iter().all(|y| !y.is_finite()), "{isa} {arithmetic:?}");
                assert!(arithmetic == DeltaArithmetic::F32 || y[70..140].iter().all(|y| y.is_nan()));
            }
        }
        // So small that no reciprocal holds them, and so large that their sums just fit.
        for (x, expected) in [(1e-44f32, 0.0), (1e36, f32::INFINITY)] {
            for arithmetic in ARITHMETICS {
                let mut y = vec![0.0f32; 70];
                let options = DeltaOptions { arithmetic, output: Output::Replace };
                matrix.forward(&[x; 130], &mut y, 1, options, &mut DeltaWorkspace::new(), &exec).unwrap();
                assert!(y.iter().all(|y| y.abs() <= expected.max(1e-40)), "{isa} {arithmetic:?} {y:?}");
            }
        }
    }
}
