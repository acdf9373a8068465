//! LoRA's two products beside a frozen one, as one node of the graph.

use crate::Result;
use pt_model::Linear;
use pt_tensor::autograd::attach_backward;
use pt_tensor::{Kind, Tensor, Weight, no_grad, random};
use std::rc::Rc;

/// A linear layer with a low-rank update: y = x·Wᵀ + bias + scaling · dropout(x)·Aᵀ·Bᵀ.
///
/// One node of the graph with its own backward pass. It keeps `hidden_states` (which its sibling layers share),
/// x·Aᵀ, and with dropout the mask as bytes. Where the base weight is trained too, plain operations are used.
///
/// # Shapes
/// - `hidden_states`: `[.., in_features]`, the kind to compute in
/// - `a`: `[rank, in_features]`, `b`: `[out_features, rank]`, any float kind; gradients have theirs
/// - returns `[.., out_features]`
///
/// `dropout` is the chance that an input of the update is dropped; 0 when not training.
///
/// # Errors
/// When the shapes do not fit.
pub fn lora_linear(
    layer: &Linear,
    hidden_states: &Tensor,
    a: &Tensor,
    b: &Tensor,
    scaling: f64,
    dropout: f64,
) -> Result<Tensor> {
    let kind = hidden_states.kind();
    let (in_compute_a, in_compute_b) = no_grad(|| (a.detach().to_kind(kind), b.detach().to_kind(kind)));
    let bias = layer.bias.as_ref();
    lora_linear_cast((&layer.weight, bias), hidden_states, (a, &in_compute_a), (b, &in_compute_b), scaling, dropout)
}

/// As [`lora_linear`], over a weight and a bias; `a` and `b` come with their detached copies in the compute kind.
pub(super) fn lora_linear_cast(
    (weight, bias): (&Rc<dyn Weight>, Option<&Tensor>),
    hidden_states: &Tensor,
    (a, a_cast): (&Tensor, &Tensor),
    (b, b_cast): (&Tensor, &Tensor),
    scaling: f64,
    dropout: f64,
) -> Result<Tensor> {
    let is_base_trained =
        weight.parameter().is_some_and(Tensor::requires_grad) || bias.is_some_and(Tensor::requires_grad);
    if is_base_trained {
        return Ok(weight.project(hidden_states, bias)? + lora_delta(hidden_states, a, b, scaling, dropout)?);
    }
    let (out_features, in_features) = weight.size();
    // x, flat: [tokens, in]; the closure keeps it, so it must not carry the graph behind it.
    let flat = hidden_states.detach().f_reshape([-1, in_features])?;
    let keep = 1.0 - dropout;
    let (output, low, mask) = no_grad(|| -> Result<_> {
        let output = weight.project(&hidden_states.detach(), bias)?;
        let draw = || flat.empty_like().to_kind(Kind::Bool).bernoulli_float_(keep);
        let mask = (dropout > 0.0).then(|| random::led_by_cpu(flat.device(), draw)).transpose()?;
        let mut low = dropped(&flat, mask.as_ref(), keep).f_mm(&a_cast.tr())?; // [tokens, rank]
        let _ = low.g_mul_scalar_(scaling);
        let _ = output.f_view([-1, out_features])?.f_addmm_(&low, &b_cast.tr())?;
        Ok((output, low, mask))
    })?;
    let weight = weight.clone();
    let (a_kind, b_kind) = (a.kind(), b.kind());
    let (needs_x, needs_a, needs_b) = (hidden_states.requires_grad(), a.requires_grad(), b.requires_grad());
    let (a_cast, b_cast) = (a_cast.shallow_clone(), b_cast.shallow_clone());
    let x_size = hidden_states.size();
    attach_backward("lora_linear", &[hidden_states, a, b], &[&output], move |grads| {
        let Some(grad) = grads.into_iter().next().flatten() else { return Ok(vec![None, None, None]) };
        let grad = grad.f_reshape([-1, out_features])?; // [tokens, out]
        let mut grad_low = grad.f_mm(&b_cast)?; // [tokens, rank]
        let _ = grad_low.g_mul_scalar_(scaling);
        let grad_x = match (needs_x, &mask) {
            (false, _) => None,
            (true, None) => {
                let mut grad_x = weight.project_backward(&grad)?;
                let _ = grad_x.f_addmm_(&grad_low, &a_cast)?;
                Some(grad_x.f_view(x_size.as_slice())?)
            }
            (true, mask) => {
                let through = dropped(&grad_low.f_mm(&a_cast)?, mask.as_ref(), keep);
                Some((through + weight.project_backward(&grad)?).f_view(x_size.as_slice())?)
            }
        };
        let grad_a = match needs_a {
            true => Some(grad_low.tr().f_mm(&dropped(&flat, mask.as_ref(), keep))?.to_kind(a_kind)),
            false => None,
        };
        let grad_b = if needs_b { Some(grad.tr().f_mm(&low)?.to_kind(b_kind)) } else { None };
        Ok(vec![grad_x, grad_a, grad_b])
    })?;
    Ok(output)
}

/// x where the mask is set, divided by the chance to be kept; x itself without a mask.
fn dropped(x: &Tensor, mask: Option<&Tensor>, keep: f64) -> Tensor {
    match mask {
        None => x.shallow_clone(),
        Some(mask) => (x * mask).g_mul_scalar_(1.0 / keep),
    }
}

/// The update alone, in plain operations: scaling · dropout(x)·Aᵀ·Bᵀ.
pub(super) fn lora_delta(hidden_states: &Tensor, a: &Tensor, b: &Tensor, scaling: f64, dropout: f64) -> Result<Tensor> {
    let low = lora_low(hidden_states, a, scaling, dropout)?; // [.., rank]
    Ok(low.f_linear(&b.to_kind(hidden_states.kind()), None::<Tensor>)?)
}

/// Its first half, `[.., rank]`: scaling · dropout(x)·Aᵀ.
pub(super) fn lora_low(hidden_states: &Tensor, a: &Tensor, scaling: f64, dropout: f64) -> Result<Tensor> {
    let x = dropped_at_random(hidden_states, dropout)?;
    Ok(x.f_linear(&a.to_kind(hidden_states.kind()), None::<Tensor>)? * scaling)
}

/// dropout(x), in plain operations.
pub(super) fn dropped_at_random(hidden_states: &Tensor, dropout: f64) -> Result<Tensor> {
    Ok(match dropout > 0.0 {
        true => random::led_by_cpu(hidden_states.device(), || hidden_states.f_dropout(dropout, true))??,
        false => hidden_states.shallow_clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::init::uniform;
    use pt_tensor::{DenseWeight, Device};
    use std::rc::Rc;

    fn layer(weight: Tensor, bias: Option<Tensor>) -> Linear {
        let weight = Rc::new(DenseWeight::new(weight).unwrap());
        Linear { index: 0, path: "q_proj".into(), weight, bias, is_transposed_in_file: false }
    }

    fn random(size: &[i64]) -> Tensor {
        let len = size.iter().product::<i64>() as usize;
        let values: Vec<f64> = uniform(7, &format!("{size:?}"), len, 1.0).into_iter().map(f64::from).collect();
        Tensor::from_slice(&values).view(size)
    }

    fn inputs() -> (Linear, Tensor, Tensor, Tensor) {
        let leaf = |size: &[i64]| random(size).set_requires_grad(true);
        (layer(random(&[5, 4]), Some(random(&[5]))), leaf(&[2, 3, 4]), leaf(&[2, 4]), leaf(&[5, 2]))
    }

    fn close(a: &Tensor, b: &Tensor) -> bool {
        a.size() == b.size() && (a - b).abs().max().double_value(&[]) < 1e-12
    }

    #[test]
    fn values_and_gradients_equal_those_of_plain_operations() {
        let (layer, x, a, b) = inputs();
        let upstream = random(&[2, 3, 5]);
        let run = |y: Tensor| {
            (&y * &upstream).sum(None).backward();
            let mut out = vec![y.detach()];
            for t in [&x, &a, &b] {
                out.push(t.grad().copy());
                let _ = t.grad().zero_();
            }
            out
        };
        let fused = run(lora_linear(&layer, &x, &a, &b, 1.5, 0.0).unwrap());
        let plain = run(layer.forward(&x).unwrap() + lora_delta(&x, &a, &b, 1.5, 0.0).unwrap());
        assert!(fused.iter().zip(&plain).all(|(f, p)| close(f, p)), "{fused:?} {plain:?}");
    }

    #[test]
    fn gradients_agree_with_finite_differences() {
        let (layer, x, a, b) = inputs();
        let upstream = random(&[2, 3, 5]);
        let loss = || (lora_linear(&layer, &x, &a, &b, 1.5, 0.0).unwrap() * &upstream).sum(None);
        loss().backward();
        for t in [&x, &a, &b] {
            let flat = t.detach().view(-1);
            for i in 0..flat.numel() as i64 {
                let at = |delta: f64| {
                    no_grad(|| {
                        let _ = flat.get(i).g_add_scalar_(delta);
                        let value = loss().double_value(&[]);
                        let _ = flat.get(i).g_add_scalar_(-delta);
                        value
                    })
                };
                let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
                let analytic = t.grad().view(-1).double_value(&[i]);
                assert!((numeric - analytic).abs() < 1e-8, "{numeric} {analytic}");
            }
        }
    }

    #[test]
    fn dropout_drops_the_update_alone_and_its_gradient_has_the_same_mask() {
        let (rows, width) = (2000, 4);
        let frozen = layer(Tensor::zeros([width, width], (Kind::Double, Device::Cpu)), None);
        let eye = || Tensor::eye(width, (Kind::Double, Device::Cpu)).set_requires_grad(true);
        let (a, b) = (eye(), eye());
        let x = Tensor::ones([rows, width], (Kind::Double, Device::Cpu)).set_requires_grad(true);
        let y = lora_linear(&frozen, &x, &a, &b, 1.0, 0.25).unwrap();
        // With A = B = 1 the output is the dropped input itself: 0, or 1 / 0.75.
        let kept = y.detach().ne(0.0).to_kind(Kind::Double);
        assert!(close(&y.detach(), &(&kept / 0.75)));
        assert!((kept.mean(None).double_value(&[]) - 0.75).abs() < 0.02);
        y.sum(None).backward();
        assert!(close(&x.grad(), &(&kept / 0.75)));
        let want = (kept.mean_dim([0i64].as_slice(), false, None) / 0.75).expand([width, width], false);
        assert!(close(&(a.grad() / rows as f64), &want));
    }

    #[test]
    fn f32_factors_over_a_bf16_layer_get_f32_gradients() {
        let (double, x, a, b) = inputs();
        let bf16 = |t: &Tensor| t.detach().to_kind(Kind::BFloat16);
        let half = layer(bf16(&double.weight.dense().unwrap()), double.bias.as_ref().map(bf16));
        let x = bf16(&x).set_requires_grad(true);
        let single = |t: &Tensor| t.detach().to_kind(Kind::Float).set_requires_grad(true);
        let (a, b) = (single(&a), single(&b));
        let y = lora_linear(&half, &x, &a, &b, 1.0, 0.0).unwrap();
        assert_eq!(y.kind(), Kind::BFloat16);
        y.sum(Kind::Float).backward();
        assert_eq!((x.grad().kind(), a.grad().kind(), b.grad().kind()), (Kind::BFloat16, Kind::Float, Kind::Float));
    }

    #[test]
    fn a_base_weight_that_is_trained_gets_its_gradient() {
        let (frozen, x, a, b) = inputs();
        let weight = frozen.weight.dense().unwrap().detach().set_requires_grad(true);
        let trained = layer(weight.shallow_clone(), None);
        lora_linear(&trained, &x, &a, &b, 1.0, 0.0).unwrap().sum(None).backward();
        assert!(weight.grad().defined() && a.grad().defined());
    }
}
