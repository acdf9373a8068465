//! AdamW with its moments in 32 or 8 bits, in memory or paged, and gradient clipping.

mod clip;
mod moments;
mod place;

pub use clip::{clip_grad_norm_, global_grad_norm};

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Cuda, Device, Kind, Tensor, no_grad};

use crate::Result;
use crate::autograd::{check, raw};
use moments::{Moments, Update, check_state};
use place::{PagedFile, Place};

/// In how many bits AdamW keeps its moments, and where; named as in bitsandbytes and transformers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AdamWVariant {
    /// 32 bits in memory: 8 bytes a trained value.
    #[default]
    #[serde(rename = "adamw")]
    Adamw,
    /// 8 bits in memory: 2 bytes a trained value; tensors under 4096 values keep 32.
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
    /// 32 bits that the system pages: in a file in the run's folder (pinned memory of the host for CUDA).
    #[serde(rename = "paged_adamw", alias = "paged_adamw_32bit")]
    PagedAdamw,
    /// 8 bits that the system pages.
    #[serde(rename = "paged_adamw_8bit")]
    PagedAdamw8bit,
}

impl AdamWVariant {
    /// Its name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::Adamw => "adamw",
            Self::Adamw8bit => "adamw_8bit",
            Self::PagedAdamw => "paged_adamw",
            Self::PagedAdamw8bit => "paged_adamw_8bit",
        }
    }

    /// Whether moments of 4096 values and more are kept in 8 bits.
    pub fn is_8bit(self) -> bool {
        matches!(self, Self::Adamw8bit | Self::PagedAdamw8bit)
    }

    /// Whether moments live where the system can take their memory for something else.
    pub fn is_paged(self) -> bool {
        matches!(self, Self::PagedAdamw | Self::PagedAdamw8bit)
    }

    /// Bytes of the moments of trained tensors with so many values each.
    pub fn num_state_bytes(self, numels: impl IntoIterator<Item = usize>) -> usize {
        numels.into_iter().flat_map(|numel| Moments::sizes(numel, self.is_8bit())).sum()
    }
}

/// Settings of [`AdamW`]; the defaults are PyTorch's, with no weight decay as in the trainers people come from.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWConfig {
    /// Bits and place of the moments: `adamw` (32 bits, in memory), `adamw_8bit` (bitsandbytes' block-wise 8 bits), `paged_adamw` and
    /// `paged_adamw_8bit` (in a file in the run's folder that the system pages out when memory is short).
    pub variant: AdamWVariant,
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
        Self { variant: AdamWVariant::default(), beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// One trained tensor and its moments.
#[derive(Debug)]
struct Slot {
    name: String,
    parameter: Tensor,
    moments: Moments,
    is_decayed: bool,
    /// Its learning rate is this many times that of a step.
    lr_factor: f64,
}

/// What libtorch's fused kernel takes: a parameter and its gradient, both f32 like the moments.
struct Fused<'a> {
    parameter: &'a Tensor,
    grad: Tensor,
    first: &'a Tensor,
    second: &'a Tensor,
}

impl Slot {
    /// The gradient, where there is one.
    fn grad(&self) -> Option<Tensor> {
        Some(self.parameter.grad()).filter(Tensor::defined)
    }

    fn fused<'a>(&'a self, moments: &'a Moments) -> Option<Fused<'a>> {
        let Moments::Full { first, second } = moments else { return None };
        let is_fusable = self.parameter.kind() == Kind::Float
            && matches!(self.parameter.device(), Device::Cpu | Device::Cuda(_))
            && self.parameter.is_contiguous();
        let grad = self.grad().filter(|grad| is_fusable && grad.kind() == Kind::Float)?;
        Some(Fused { parameter: &self.parameter, grad: grad.contiguous(), first, second })
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

/// AdamW (Loshchilov and Hutter 2019, <https://arxiv.org/abs/1711.05101>) with moments in f32 or in 8 bits, in memory or paged.
///
/// Updates are in place. Over f32 moments those of f32 tensors are libtorch's fused kernel, of others in the arithmetic order of
/// `torch.optim.AdamW`; over 8-bit moments they are bitsandbytes' `AdamW8bit` (0.50.2). Paging changes no bit.
///
/// Paged moments of tensors on the CPU lie in a file without a name that is mapped into memory: the system writes out and drops what is not in
/// use when memory is short, without swap space. Those of tensors on CUDA lie in pinned memory of the host and are fetched a tensor ahead.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    slots: Vec<Slot>,
    place: Place,
    step: i64,
}

impl AdamW {
    /// An optimizer of named leaf tensors, with paged moments in the system's folder for temporary files. Tensors with one axis (norms, biases)
    /// get no weight decay.
    ///
    /// # Errors
    /// As [`new_in`](Self::new_in).
    pub fn new(parameters: Vec<(String, Tensor)>, config: AdamWConfig) -> Result<Self> {
        Self::new_in(&std::env::temp_dir(), parameters, config)
    }

    /// As [`new`](Self::new), with the file of paged moments in `folder`.
    ///
    /// # Errors
    /// [`OutOfMemory`](crate::TensorError::OutOfMemory) where there is no memory for the moments, [`Write`](crate::TensorError::Write) where there is no room for the file.
    pub fn new_in(folder: &Path, parameters: Vec<(String, Tensor)>, config: AdamWConfig) -> Result<Self> {
        let is_on_cpu = parameters.iter().all(|(_, parameter)| parameter.device() == Device::Cpu);
        let numels = parameters.iter().map(|(_, parameter)| parameter.numel());
        let place = match config.variant.is_paged() {
            false => Place::Device,
            true if is_on_cpu => Place::File(PagedFile::new(
                folder,
                numels.flat_map(|numel| Moments::sizes(numel, config.variant.is_8bit())),
            )?),
            true => Place::Pinned,
        };
        Self::made_in(place, parameters, config)
    }

    fn made_in(mut place: Place, parameters: Vec<(String, Tensor)>, config: AdamWConfig) -> Result<Self> {
        let slots = parameters.into_iter().map(|(name, parameter)| {
            let moments = Moments::new(&name, &parameter, config.variant.is_8bit(), &mut place)?;
            Ok(Slot { name, is_decayed: parameter.dim() > 1, lr_factor: 1.0, moments, parameter })
        });
        let slots = slots.collect::<Result<_>>()?;
        Ok(Self { config, slots, place, step: 0 })
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

    /// Bytes of the moments.
    pub fn num_state_bytes(&self) -> usize {
        self.config.variant.num_state_bytes(self.slots.iter().map(|slot| slot.parameter.numel()))
    }

    /// One update with learning rate `lr`; tensors without a gradient stay as they are.
    ///
    /// # Errors
    /// [`Torch`](crate::TensorError::Torch) when libtorch refuses an operation.
    pub fn step(&mut self, lr: f64) -> Result<()> {
        self.step += 1;
        no_grad(|| match self.place {
            Place::Pinned => self.pinned_step(lr),
            Place::Device | Place::File(_) => self.local_step(lr),
        })
    }

    fn numbers(&self, slot: &Slot, lr: f64) -> Update {
        let AdamWConfig { beta1, beta2, eps, weight_decay, .. } = self.config;
        let weight_decay = if slot.is_decayed { weight_decay } else { 0.0 };
        Update { step: self.step, lr: lr * slot.lr_factor, beta1, beta2, eps, weight_decay }
    }

    /// The update of moments that lie beside their parameters.
    fn local_step(&mut self, lr: f64) -> Result<()> {
        // One call for all tensors with the same weight decay and learning rate.
        let mut groups: Vec<(Update, Vec<Fused<'_>>)> = Vec::new();
        let mut others = Vec::new();
        for (index, slot) in self.slots.iter().enumerate() {
            let numbers = self.numbers(slot, lr);
            match slot.fused(&slot.moments) {
                Some(fused) => match groups.iter_mut().find(|(known, _)| *known == numbers) {
                    Some((_, group)) => group.push(fused),
                    None => groups.push((numbers, vec![fused])),
                },
                None => others.extend(slot.grad().map(|grad| (index, grad, numbers))),
            }
        }
        groups.iter().try_for_each(|(numbers, group)| fused_step(group, numbers))?;
        drop(groups);
        for (index, grad, numbers) in others {
            let slot = &mut self.slots[index];
            slot.moments.update(&mut slot.parameter, &grad, &numbers)?;
        }
        Ok(())
    }

    /// The update of moments that lie in pinned memory: while one tensor's are worked on, the next one's are on their way to the device and the
    /// last one's on their way back.
    fn pinned_step(&mut self, lr: f64) -> Result<()> {
        let with_grad: Vec<usize> = (0..self.slots.len()).filter(|&i| self.slots[i].grad().is_some()).collect();
        let fetch = |slots: &[Slot], index: usize| slots[index].moments.fetch(slots[index].parameter.device());
        let mut next = with_grad.first().map(|&index| fetch(&self.slots, index)).transpose()?;
        for (position, &index) in with_grad.iter().enumerate() {
            let Some(mut moments) = next.take() else { break };
            next = with_grad.get(position + 1).map(|&index| fetch(&self.slots, index)).transpose()?;
            let numbers = self.numbers(&self.slots[index], lr);
            let slot = &mut self.slots[index];
            match slot.fused(&moments) {
                Some(fused) => fused_step(&[fused], &numbers)?,
                None => {
                    let grad = slot.parameter.grad();
                    moments.update(&mut slot.parameter, &grad, &numbers)?;
                }
            }
            slot.moments.store(&moments)?;
        }
        // The copies back have arrived before anyone reads them.
        for slot in &self.slots {
            if let Device::Cuda(index) = slot.parameter.device() {
                Cuda::synchronize(index as i64);
                break;
            }
        }
        Ok(())
    }

    /// Drops all gradients.
    pub fn zero_grad(&mut self) {
        for slot in &mut self.slots {
            slot.parameter.zero_grad();
        }
    }

    /// The state by name: `step` (`[1]`, i64) and, for each parameter, `NAME.exp_avg` and `NAME.exp_avg_sq` (f32), or in 8 bits for each of the
    /// two `.codes` (u8) and `.absmax` (f32, one for 256 values). Paged or not, the names are the same.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let mut state = vec![("step".to_string(), Tensor::from_slice(&[self.step]))];
        for slot in &self.slots {
            let tensors = slot.moments.tensors().into_iter();
            state.extend(tensors.map(|(suffix, tensor)| (format!("{}.{suffix}", slot.name), tensor.shallow_clone())));
        }
        state
    }

    /// Restores a state from [`state`](Self::state); `get` finds a tensor by name.
    ///
    /// # Errors
    /// Those of `get`; [`Shape`](crate::TensorError::Shape) and [`Argument`](crate::TensorError::Argument) when a moment has another shape or kind than it would have here.
    pub fn load_state(&mut self, get: impl Fn(&str) -> Result<Tensor>) -> Result<()> {
        self.step = get("step")?.int64_value(&[0]);
        for slot in &self.slots {
            for (suffix, target) in slot.moments.tensors() {
                let name = format!("{}.{suffix}", slot.name);
                let value = get(&name)?;
                check_state(&name, &value, target)?;
                no_grad(|| target.shallow_clone().f_copy_(&value).map(drop))?;
            }
        }
        Ok(())
    }
}

/// One update by libtorch's fused kernel.
fn fused_step(all: &[Fused<'_>], numbers: &Update) -> Result<()> {
    if all.is_empty() {
        return Ok(());
    }
    let list = |of: &dyn Fn(&Fused<'_>) -> *mut std::ffi::c_void| all.iter().map(of).collect::<Vec<_>>();
    let (parameters, grads) = (list(&|one| raw(one.parameter)), list(&|one| raw(&one.grad)));
    let (firsts, seconds) = (list(&|one| raw(one.first)), list(&|one| raw(one.second)));
    let Update { step, lr, beta1, beta2, eps, weight_decay } = *numbers;
    // SAFETY: four lists of as many live tensors, which the call updates in place and keeps no pointer to; it catches what libtorch throws.
    check(unsafe {
        pt_fused_adamw(
            parameters.as_ptr(),
            grads.as_ptr(),
            firsts.as_ptr(),
            seconds.as_ptr(),
            all.len(),
            step as f64,
            lr,
            beta1,
            beta2,
            weight_decay,
            eps,
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TensorError;

    fn parameter(values: &[f32], grad: &[f32]) -> Tensor {
        let p = Tensor::from_slice(values).set_requires_grad(true);
        (&p * Tensor::from_slice(grad)).sum(Kind::Float).backward();
        p
    }

    #[test]
    fn the_first_step_moves_by_the_learning_rate_against_the_sign() {
        let p = parameter(&[1.0, -1.0], &[0.5, -2.0]);
        let mut adam = AdamW::new(vec![("p".into(), p.shallow_clone())], AdamWConfig::default()).unwrap();
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
            .unwrap()
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
            AdamW::new(vec![("v".into(), vector.shallow_clone()), ("m".into(), matrix.shallow_clone())], config)
                .unwrap();
        adam.step(0.1).unwrap();
        assert_eq!(vector.double_value(&[0]), 2.0);
        assert!((matrix.double_value(&[0, 0]) - 1.9).abs() < 1e-6);
    }

    /// A leaf below the smallest 8-bit size, one above it with a short last block, and one in bf16.
    fn leaves() -> Vec<(String, Tensor)> {
        let leaf = |name: &str, n: i64, kind| {
            let values = (Tensor::arange(n, (Kind::Float, Device::Cpu)) * 0.37).sin().to_kind(kind).view([1, n]);
            (name.to_string(), values.set_requires_grad(true))
        };
        vec![leaf("a", 7, Kind::Float), leaf("b", 5000, Kind::Float), leaf("c", 4400, Kind::BFloat16)]
    }

    fn pull(leaves: &[(String, Tensor)], step: i64) {
        for (_, leaf) in leaves {
            let mut leaf = leaf.shallow_clone();
            leaf.zero_grad();
            ((&leaf - 0.3).square() * (step + 1) as f64).sum(Kind::Float).backward();
        }
    }

    const VARIANTS: [AdamWVariant; 4] =
        [AdamWVariant::Adamw, AdamWVariant::Adamw8bit, AdamWVariant::PagedAdamw, AdamWVariant::PagedAdamw8bit];

    fn of(variant: AdamWVariant) -> AdamWConfig {
        AdamWConfig { variant, weight_decay: 0.1, ..Default::default() }
    }

    fn clones(leaves: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
        leaves.iter().map(|(name, leaf)| (name.clone(), leaf.shallow_clone())).collect()
    }

    fn values(leaves: &[(String, Tensor)]) -> Vec<Tensor> {
        leaves.iter().map(|(_, leaf)| leaf.detach().copy()).collect()
    }

    /// Four steps, with the state saved after the second and restored by an optimizer of another variant.
    fn run(before: AdamWVariant, after: Option<AdamWVariant>) -> Vec<Tensor> {
        let leaves = leaves();
        let mut adam = AdamW::new(clones(&leaves), of(before)).unwrap();
        for step in 0..4 {
            pull(&leaves, step);
            adam.step(0.01).unwrap();
            if let (1, Some(after)) = (step, after) {
                let state: std::collections::HashMap<_, _> =
                    adam.state().into_iter().map(|(n, t)| (n, t.copy())).collect();
                adam = AdamW::new(clones(&leaves), of(after)).unwrap();
                adam.load_state(|name| Ok(state[name].shallow_clone())).unwrap();
            }
        }
        values(&leaves)
    }

    #[test]
    fn a_restored_state_continues_equally_wherever_it_lived() {
        use AdamWVariant::{Adamw, Adamw8bit, PagedAdamw, PagedAdamw8bit};
        for (before, after) in [(Adamw, PagedAdamw), (Adamw8bit, PagedAdamw8bit)] {
            let want = run(before, None);
            assert_eq!(run(after, None), want, "paging changes nothing");
            for (before, after) in [(before, before), (before, after), (after, before), (after, after)] {
                assert_eq!(run(before, Some(after)), want, "{before:?}, then {after:?}");
            }
        }
        assert_ne!(run(Adamw, None), run(Adamw8bit, None));
    }

    #[test]
    fn a_state_in_other_bits_is_refused() {
        let state = AdamW::new(leaves(), of(AdamWVariant::Adamw)).unwrap().state();
        let get = |name: &str| {
            let found = state.iter().find(|(known, _)| known == name);
            found
                .map(|(_, t)| t.shallow_clone())
                .ok_or_else(|| TensorError::argument("name", name, "one that is there"))
        };
        assert!(AdamW::new(leaves(), of(AdamWVariant::Adamw8bit)).unwrap().load_state(get).is_err());
        let get = |name: &str| get(name).map(|t| if name == "b.exp_avg" { t.to_kind(Kind::Uint8) } else { t });
        let error = AdamW::new(leaves(), of(AdamWVariant::Adamw)).unwrap().load_state(get).unwrap_err().to_string();
        assert_eq!(error, "`b.exp_avg` is Uint8, expected Float");
    }

    #[test]
    fn a_state_takes_what_it_says() {
        let numels = [7, 5000, 4400];
        let bytes = VARIANTS.map(|variant| {
            let adam = AdamW::new(leaves(), of(variant)).unwrap();
            let held: usize =
                adam.state().iter().skip(1).map(|(_, tensor)| tensor.numel() * tensor.kind().elt_size_in_bytes()).sum();
            assert_eq!((held, held), (adam.num_state_bytes(), variant.num_state_bytes(numels)));
            held
        });
        let eight = 8 * 7 + 2 * (5000 + 4 * 20) + 2 * (4400 + 4 * 18);
        assert_eq!(bytes, [8 * 9407, eight, 8 * 9407, eight]);
    }

    #[test]
    fn a_state_that_is_fetched_and_stored_gives_the_same_steps() {
        for variant in [AdamWVariant::PagedAdamw, AdamWVariant::PagedAdamw8bit] {
            let leaves = leaves();
            // What a CUDA device does, with the CPU as the device.
            let mut adam = AdamW::made_in(Place::Pinned, clones(&leaves), of(variant)).unwrap();
            for step in 0..4 {
                pull(&leaves, step);
                adam.step(0.01).unwrap();
            }
            let want = run(variant, None);
            for ((name, found), want) in leaves.iter().zip(&want) {
                assert_eq!(found, want, "{variant:?} {name}");
            }
        }
    }

    #[test]
    fn the_name_of_a_variant_is_that_of_its_configuration() {
        for variant in VARIANTS {
            assert_eq!(serde_json::to_value(variant).unwrap(), variant.name());
        }
    }
}
