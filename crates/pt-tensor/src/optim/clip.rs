//! The norm of gradients, and holding it down.

use tch::{Kind, Tensor};

/// The 2-norm of all gradients together; non-finite when any of them is.
pub fn global_grad_norm<'a>(parameters: impl IntoIterator<Item = &'a Tensor>) -> f64 {
    let norms: Vec<Tensor> = parameters
        .into_iter()
        .map(Tensor::grad)
        .filter(Tensor::defined)
        .map(|grad| grad.to_kind(Kind::Float).norm())
        .collect();
    if norms.is_empty() { 0.0 } else { Tensor::stack(&norms, 0).norm().double_value(&[]) }
}

/// Scales all gradients so that their joint 2-norm is at most `max_norm`; returns the norm before.
///
/// As `torch.nn.utils.clip_grad_norm_`: the factor is `max_norm / (norm + 1e-6)`, at most 1.
pub fn clip_grad_norm_<'a>(parameters: impl IntoIterator<Item = &'a Tensor> + Clone, max_norm: f64) -> f64 {
    let norm = global_grad_norm(parameters.clone());
    let factor = max_norm / (norm + 1e-6);
    if factor < 1.0 {
        for parameter in parameters {
            let mut grad = parameter.grad();
            if grad.defined() {
                let _ = grad.g_mul_scalar_(factor);
            }
        }
    }
    norm
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clipping_scales_to_the_norm_and_reports_the_one_before() {
        let p = Tensor::from_slice(&[0f32, 0.]).set_requires_grad(true);
        (&p * Tensor::from_slice(&[3f32, 4.])).sum(Kind::Float).backward();
        assert!((clip_grad_norm_([&p], 1.0) - 5.0).abs() < 1e-6);
        assert!((global_grad_norm([&p]) - 1.0).abs() < 1e-6);
        assert!((clip_grad_norm_([&p], 10.0) - 1.0).abs() < 1e-6);
    }
}
