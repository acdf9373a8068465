//! AdamW and gradient clipping.

use crate::autograd::{check, raw};
use crate::{Result, TensorError};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, no_grad};

/// Settings of [`AdamW`]; the defaults are PyTorch's, with no weight decay as in the trainers people come from.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay, applied as `p ← p · (1 − lr · weight_decay)`.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// One trained tensor and its moments.
#[derive(Debug)]
struct Slot {
    name: String,
    parameter: Tensor,
    first: Tensor,
    second: Tensor,
    is_decayed: bool,
    /// Its learning rate is this many times that of a step.
    lr_factor: f64,
}

impl Slot {
    /// Whether libtorch's fused kernel takes it: f32, like its moments.
    fn is_fusable(&self) -> bool {
        self.parameter.kind() == Kind::Float
            && matches!(self.parameter.device(), tch::Device::Cpu | tch::Device::Cuda(_))
            && self.parameter.is_contiguous()
    }
}

unsafe extern "C" {
    fn pt_fused_adamw(
        parameters: *const *mut std::ffi::c_void,
        grads: *const *mut std::ffi::c_void,
        firsts: *const *mut std::ffi::c_void,
        seconds: *const *mut std::ffi::c_void,
        count: usize,
        step: f64,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
    ) -> *mut std::ffi::c_char;
}

/// AdamW (Loshchilov and Hutter 2019, <https://arxiv.org/abs/1711.05101>) with f32 moments.
///
/// Updates are in place: of f32 tensors by libtorch's fused kernel, of others in the arithmetic order of `torch.optim.AdamW`.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    slots: Vec<Slot>,
    step: i64,
}

impl AdamW {
    /// An optimizer of named leaf tensors. Tensors with one axis (norms, biases) get no weight decay.
    pub fn new(parameters: Vec<(String, Tensor)>, config: AdamWConfig) -> Self {
        let slots = parameters
            .into_iter()
            .map(|(name, parameter)| {
                let zeros = || Tensor::zeros(parameter.size(), (Kind::Float, parameter.device()));
                let (first, second) = (zeros(), zeros());
                Slot { name, is_decayed: parameter.dim() > 1, lr_factor: 1.0, first, second, parameter }
            })
            .collect();
        Self { config, slots, step: 0 }
    }

    /// Gives tensors learning rates of their own: `factor` says, by name, how many times that of a step.
    #[must_use]
    pub fn with_lr_factors(mut self, factor: impl Fn(&str) -> f64) -> Self {
        self.slots.iter_mut().for_each(|slot| slot.lr_factor = factor(&slot.name));
        self
    }

    /// The trained tensors.
    pub fn parameters(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.slots.iter().map(|slot| (slot.name.as_str(), &slot.parameter))
    }

    /// Updates taken so far.
    pub fn num_steps(&self) -> i64 {
        self.step
    }

    /// One update with learning rate `lr`; tensors without a gradient stay as they are.
    ///
    /// # Errors
    /// [`TensorError::Torch`] when libtorch refuses an operation.
    pub fn step(&mut self, lr: f64) -> Result<()> {
        self.step += 1;
        let AdamWConfig { beta1, beta2, eps, weight_decay } = self.config;
        let correction1 = 1.0 - beta1.powi(self.step as i32);
        let correction2 = 1.0 - beta2.powi(self.step as i32);
        let mut lr_factors: Vec<f64> = self.slots.iter().map(|slot| slot.lr_factor).collect();
        lr_factors.sort_by(f64::total_cmp);
        lr_factors.dedup();
        for lr_factor in lr_factors {
            for is_decayed in [true, false] {
                let weight_decay = if is_decayed { weight_decay } else { 0.0 };
                self.fused_step((is_decayed, lr_factor), lr * lr_factor, weight_decay)?;
            }
        }
        no_grad(|| {
            for slot in self.slots.iter_mut().filter(|slot| !slot.is_fusable()) {
                let grad = slot.parameter.grad();
                if !grad.defined() {
                    continue;
                }
                let grad = grad.to_kind(Kind::Float);
                let lr = lr * slot.lr_factor;
                if weight_decay != 0.0 && slot.is_decayed {
                    let _ = slot.parameter.f_mul_scalar_(1.0 - lr * weight_decay)?;
                }
                let _ = slot.first.f_lerp_(&grad, 1.0 - beta1)?;
                let _ = slot.second.f_mul_scalar_(beta2)?.f_addcmul_(&(&grad * (1.0 - beta2)), &grad)?;
                let denominator = slot.second.sqrt() / correction2.sqrt() + eps;
                let update = (&slot.first / denominator) * (-lr / correction1);
                let _ = slot.parameter.f_add_(&update.to_kind(slot.parameter.kind()))?;
            }
            Ok(())
        })
    }

    /// The update of the tensors of a group (whether decayed, and factor of the learning rate) that libtorch's fused kernel takes.
    fn fused_step(&self, group: (bool, f64), lr: f64, weight_decay: f64) -> Result<()> {
        let grads: Vec<(&Slot, Tensor)> = self
            .slots
            .iter()
            .filter(|slot| (slot.is_decayed, slot.lr_factor) == group && slot.is_fusable())
            .map(|slot| (slot, slot.parameter.grad()))
            .map(|(slot, grad)| if grad.defined() { (slot, grad.contiguous()) } else { (slot, grad) })
            .filter(|(_, grad)| grad.defined() && grad.kind() == Kind::Float)
            .collect();
        if grads.is_empty() {
            return Ok(());
        }
        let all = |of: &dyn Fn(&(&Slot, Tensor)) -> *mut std::ffi::c_void| grads.iter().map(of).collect::<Vec<_>>();
        let parameters = all(&|(slot, _)| raw(&slot.parameter));
        let gradients = all(&|(_, grad)| raw(grad));
        let (firsts, seconds) = (all(&|(slot, _)| raw(&slot.first)), all(&|(slot, _)| raw(&slot.second)));
        let AdamWConfig { beta1, beta2, eps, .. } = self.config;
        // SAFETY: four lists of as many live tensors, which the call updates in place and keeps no pointer to; it catches what libtorch throws.
        check(unsafe {
            pt_fused_adamw(
                parameters.as_ptr(),
                gradients.as_ptr(),
                firsts.as_ptr(),
                seconds.as_ptr(),
                grads.len(),
                self.step as f64,
                lr,
                beta1,
                beta2,
                weight_decay,
                eps,
            )
        })
    }

    /// Drops all gradients.
    pub fn zero_grad(&mut self) {
        for slot in &mut self.slots {
            slot.parameter.zero_grad();
        }
    }

    /// The state by name: `step` (`[1]`, i64) and, for each parameter, `NAME.exp_avg` and `NAME.exp_avg_sq` (f32).
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let mut state = vec![("step".to_string(), Tensor::from_slice(&[self.step]))];
        for slot in &self.slots {
            state.push((format!("{}.exp_avg", slot.name), slot.first.shallow_clone()));
            state.push((format!("{}.exp_avg_sq", slot.name), slot.second.shallow_clone()));
        }
        state
    }

    /// Restores a state from [`state`](Self::state); `get` finds a tensor by name.
    ///
    /// # Errors
    /// Those of `get`; [`TensorError::Shape`] when a moment has another shape than its parameter.
    pub fn load_state(&mut self, get: impl Fn(&str) -> Result<Tensor>) -> Result<()> {
        self.step = get("step")?.int64_value(&[0]);
        for slot in &mut self.slots {
            for (suffix, target) in [("exp_avg", &mut slot.first), ("exp_avg_sq", &mut slot.second)] {
                let name = format!("{}.{suffix}", slot.name);
                let value = get(&name)?;
                if value.size() != target.size() {
                    return Err(TensorError::shape(name, &value, format!("{:?}", target.size())));
                }
                target.copy_(&value);
            }
        }
        Ok(())
    }
}

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

    fn parameter(values: &[f32], grad: &[f32]) -> Tensor {
        let p = Tensor::from_slice(values).set_requires_grad(true);
        (&p * Tensor::from_slice(grad)).sum(Kind::Float).backward();
        p
    }

    #[test]
    fn the_first_step_moves_by_the_learning_rate_against_the_sign() {
        let p = parameter(&[1.0, -1.0], &[0.5, -2.0]);
        let mut adam = AdamW::new(vec![("p".into(), p.shallow_clone())], AdamWConfig::default());
        adam.step(0.1).unwrap();
        let values = Vec::<f32>::try_from(p.detach()).unwrap();
        assert!((values[0] - 0.9).abs() < 1e-6 && (values[1] + 0.9).abs() < 1e-6, "{values:?}");
    }

    #[test]
    fn a_tensor_may_have_a_learning_rate_of_its_own() {
        let (a, b) = (parameter(&[1.0], &[0.5]), parameter(&[1.0], &[0.5]));
        let half = parameter(&[1.0], &[0.5]).to_kind(Kind::Double).detach().set_requires_grad(true);
        (&half * 0.5).sum(None).backward();
        let named = [("a", &a), ("b", &b), ("b of another kind", &half)];
        let named = named.map(|(name, tensor)| (name.to_string(), tensor.shallow_clone())).into();
        let mut adam = AdamW::new(named, AdamWConfig::default())
            .with_lr_factors(|name| if name.starts_with('b') { 4.0 } else { 1.0 });
        adam.step(0.01).unwrap();
        for (tensor, want) in [(&a, 0.99), (&b, 0.96), (&half, 0.96)] {
            assert!((tensor.double_value(&[0]) - want).abs() < 1e-6, "{tensor:?}");
        }
    }

    #[test]
    fn matrices_decay_and_vectors_do_not() {
        let config = AdamWConfig { weight_decay: 0.5, ..Default::default() };
        let vector = parameter(&[2.0], &[0.0]);
        let matrix = Tensor::from_slice(&[2f32]).view([1, 1]).set_requires_grad(true);
        (&matrix * 0.0).sum(Kind::Float).backward();
        let mut adam =
            AdamW::new(vec![("v".into(), vector.shallow_clone()), ("m".into(), matrix.shallow_clone())], config);
        adam.step(0.1).unwrap();
        assert_eq!(vector.double_value(&[0]), 2.0);
        assert!((matrix.double_value(&[0, 0]) - 1.9).abs() < 1e-6);
    }

    #[test]
    fn a_restored_state_continues_equally() {
        let run = |restore: bool| {
            let p = Tensor::from_slice(&[1f32, 2., 3.]).set_requires_grad(true);
            let mut adam = AdamW::new(vec![("p".into(), p.shallow_clone())], AdamWConfig::default());
            for step in 0..4 {
                adam.zero_grad();
                (p.square() * f64::from(step + 1)).sum(Kind::Float).backward();
                adam.step(0.01).unwrap();
                if restore && step == 1 {
                    let state: std::collections::HashMap<_, _> =
                        adam.state().into_iter().map(|(n, t)| (n, t.copy())).collect();
                    adam = AdamW::new(vec![("p".into(), p.shallow_clone())], AdamWConfig::default());
                    adam.load_state(|name| Ok(state[name].shallow_clone())).unwrap();
                }
            }
            Vec::<f32>::try_from(p.detach()).unwrap()
        };
        assert_eq!(run(false), run(true));
    }

    #[test]
    fn clipping_scales_to_the_norm_and_reports_the_one_before() {
        let p = parameter(&[0., 0.], &[3., 4.]);
        assert!((clip_grad_norm_([&p], 1.0) - 5.0).abs() < 1e-6);
        assert!((global_grad_norm([&p]) - 1.0).abs() < 1e-6);
        assert!((clip_grad_norm_([&p], 10.0) - 1.0).abs() < 1e-6);
    }
}
