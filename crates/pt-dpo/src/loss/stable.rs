//! Functions that keep their digits, and finite gradients, at the ends of their ranges.

use pt_tensor::{Kind, Tensor};
use std::f64::consts::LN_2;

/// −log σ(z), element by element: ≈ −z far to the left, exp(−z) far to the right.
pub(super) fn neg_log_sigmoid(z: &Tensor) -> Tensor {
    -z.log_sigmoid()
}

/// log(1 − exp(x)) of x ≤ 0.
///
/// Mächler 2012, "Accurately computing log(1 − exp(−|a|))": expm1 above −ln 2, log1p below. x is kept a rounding error below 0, where
/// the logarithm and its slope would be infinite: a completion of probability one in the numbers at hand.
pub(super) fn log1mexp(x: &Tensor) -> Tensor {
    let nearest = if x.kind() == Kind::Double { f64::EPSILON } else { f64::from(f32::EPSILON) };
    let x = x.clamp_max(-nearest);
    let is_near = x.gt(-LN_2);
    // Each branch sees only what it is good for: the gradient of the other one may be NaN, and 0 · NaN is.
    let near = x.clamp_min(-LN_2).expm1().neg().log();
    let far = x.clamp_max(-LN_2).exp().neg().log1p();
    near.where_self(&is_near, &far)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log1mexp_keeps_its_digits_and_its_slope_is_finite() {
        // log(1 − exp(−1e-5)) = log(1e-5 − 5e-11), log(1 − 1/2), exp(−50) below one; the slope is −1 / (exp(−x) − 1).
        for (x, expected, slope) in [
            (-1e-5, (1e-5f64 - 5e-11).ln(), -1e5),
            (-2f64.ln(), 0.5f64.ln(), -1.0),
            (-50.0, -(-50f64).exp(), -(-50f64).exp()),
            (-1e4, 0.0, 0.0),
        ] {
            let leaf = Tensor::from_slice(&[x]).set_requires_grad(true);
            let value = log1mexp(&leaf);
            value.sum(Kind::Double).backward();
            let near = |found: f64, expected: f64| (found - expected).abs() <= 1e-5 * expected.abs();
            assert!(near(value.double_value(&[0]), expected), "{x}: {value}");
            assert!(near(leaf.grad().double_value(&[0]), slope), "{x}: {}", leaf.grad());
        }
        for kind in [Kind::Float, Kind::Double] {
            let leaf = Tensor::from_slice(&[0f64, 1e-9, -1e4]).to_kind(kind).set_requires_grad(true);
            let value = log1mexp(&leaf);
            value.sum(kind).backward();
            assert!(value.isfinite().all().int64_value(&[]) == 1 && leaf.grad().isfinite().all().int64_value(&[]) == 1);
        }
    }
}
