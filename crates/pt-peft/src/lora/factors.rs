//! The update of one linear layer.

use super::dora::Magnitude;
use super::linear::{dropped_at_random, lora_delta, lora_linear_cast};
use super::start::{Factored, WithoutPart};
use crate::{PeftError, Result};
use pt_model::Linear;
use pt_tensor::{DenseWeight, Kind, Tensor, Weight, no_grad};
use std::cell::RefCell;
use std::rc::Rc;

/// The two factors on one layer, and what its variants have beside them.
#[derive(Debug)]
pub(super) struct Factors {
    pub(super) path: String,
    /// `[rank, in_features]`, f32.
    pub(super) a: Tensor,
    /// `[out_features, rank]`, f32.
    pub(super) b: Tensor,
    /// `[out_features]`, f32, added after B (`lora_bias`).
    pub(super) bias: Option<Tensor>,
    /// DoRA's.
    pub(super) magnitude: Option<Magnitude>,
    /// A and B as they started, where that was a part of the weight, which they then replace.
    pub(super) part: Option<Factored>,
    pub(super) scaling: f64,
    cast: RefCell<Option<Cast>>,
    part_cast: RefCell<Option<Rc<WithoutPart>>>,
}

/// Copies in the compute kind and the versions of A and B that they show: a step of the optimizer or a load writes in
/// place, which counts the version up.
#[derive(Debug)]
struct Cast {
    versions: (i64, i64),
    a: Tensor,
    b: Tensor,
}

/// A layer as its adapter finds it: its own bias may be trained too.
#[derive(Debug, Clone, Copy)]
pub(super) struct Site<'a> {
    pub(super) layer: &'a Linear,
    pub(super) trained_bias: Option<&'a Tensor>,
    /// Chance that an input of the update is dropped; 0 when not training.
    pub(super) dropout: f64,
}

impl Factors {
    /// A, B and the others zero.
    pub(super) fn zeros(layer: &Linear, rank: i64, scaling: f64, has_bias: bool, has_magnitude: bool) -> Result<Self> {
        let (out_features, in_features) = layer.weight.size();
        let leaf = |size: &[i64]| -> Result<Tensor> {
            Ok(Tensor::f_zeros(size, (Kind::Float, layer.weight.device()))?.set_requires_grad(true))
        };
        Ok(Self {
            path: layer.path.clone(),
            a: leaf(&[rank, in_features])?,
            b: leaf(&[out_features, rank])?,
            bias: has_bias.then(|| leaf(&[out_features])).transpose()?,
            magnitude: has_magnitude.then(|| Magnitude::zeros(&layer.weight)).transpose()?,
            part: None,
            scaling,
            cast: RefCell::new(None),
            part_cast: RefCell::new(None),
        })
    }

    /// The trained tensors by the names that files have after the layer's path.
    pub(super) fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let mut all = vec![("lora_A.weight", &self.a), ("lora_B.weight", &self.b)];
        all.extend(self.bias.as_ref().map(|bias| ("lora_B.bias", bias)));
        all.extend(self.magnitude.as_ref().map(|magnitude| ("lora_magnitude_vector", &magnitude.vector)));
        all
    }

    /// Rows of A.
    pub(super) fn rank(&self) -> i64 {
        self.a.size()[0]
    }

    /// Overwrites A and B.
    pub(super) fn set(&self, (a, b): &(Tensor, Tensor)) {
        no_grad(|| {
            self.a.shallow_clone().copy_(a);
            self.b.shallow_clone().copy_(b);
        });
    }

    /// A and B in `kind`, without a graph.
    fn in_kind(&self, kind: Kind) -> Result<(Tensor, Tensor)> {
        if self.a.kind() == kind {
            return Ok((self.a.detach(), self.b.detach()));
        }
        let versions = (self.a.f_internal_version()?, self.b.f_internal_version()?);
        let mut cast = self.cast.borrow_mut();
        if let Some(known) = cast.as_ref().filter(|known| known.versions == versions && known.a.kind() == kind) {
            return Ok((known.a.shallow_clone(), known.b.shallow_clone()));
        }
        let (a, b) = no_grad(|| (self.a.detach().to_kind(kind), self.b.detach().to_kind(kind)));
        *cast = Some(Cast { versions, a: a.shallow_clone(), b: b.shallow_clone() });
        Ok((a, b))
    }

    /// The weight under the update: the layer's, without the part that A and B took over.
    fn base(&self, layer: &Linear) -> Rc<dyn Weight> {
        let Some(Factored { a, b }) = &self.part else { return layer.weight.clone() };
        let mut known = self.part_cast.borrow_mut();
        let same = known.take().filter(|known| Rc::ptr_eq(&known.weight, &layer.weight));
        let weight = same.unwrap_or_else(|| {
            let kind = layer.weight.kind();
            let (a, b) = (a.to_kind(kind), b.to_kind(kind));
            Rc::new(WithoutPart { weight: layer.weight.clone(), a, b, scaling: self.scaling })
        });
        *known = Some(weight.clone());
        weight
    }

    /// DoRA's factor of each row, m / ‖W + s·B·A‖.
    fn scale(&self, magnitude: &Magnitude, layer: &Linear) -> Result<Tensor> {
        magnitude.scale(&layer.weight, &self.a, &self.b, self.scaling)
    }

    /// The layer with its update: `[.., in_features]` → `[.., out_features]`.
    pub(super) fn forward(&self, site: Site<'_>, hidden_states: &Tensor) -> Result<Tensor> {
        let kind = hidden_states.kind();
        let (a, b) = self.in_kind(kind)?;
        let (a, b) = ((&self.a, &a), (&self.b, &b));
        let base = self.base(site.layer);
        let bias = site.trained_bias.or(site.layer.bias.as_ref());
        let Some(magnitude) = &self.magnitude else {
            // A bias that is trained is added where it gets its gradient, after the node.
            let (inner, outer) = if site.trained_bias.is_some() { (None, bias) } else { (bias, None) };
            let mut output = lora_linear_cast((&base, inner), hidden_states, a, b, self.scaling, site.dropout)?;
            for vector in outer.map(Tensor::shallow_clone).into_iter().chain(self.added()) {
                output += vector.to_kind(kind);
            }
            return Ok(output);
        };
        let scale = self.scale(magnitude, site.layer)?.to_kind(kind);
        let dropped = dropped_at_random(hidden_states, site.dropout)?;
        let mut output = lora_linear_cast((&base, None), &dropped, a, b, self.scaling, 0.0)? * scale;
        if site.dropout > 0.0 {
            // What was dropped still goes through the weight as it is: y = x·Wᵀ + (m/‖..‖ − 1) x'·Wᵀ + m/‖..‖ s·x'·Aᵀ·Bᵀ.
            output += base.project(&(hidden_states - dropped), None)?;
        }
        Ok(match bias {
            Some(bias) => output + bias.to_kind(kind),
            None => output,
        })
    }

    /// s times the update's own bias.
    fn added(&self) -> Option<Tensor> {
        self.bias.as_ref().map(|bias| bias * self.scaling)
    }

    /// As [`forward`](Self::forward), around what other adapters make of the layer.
    pub(super) fn around(&self, site: Site<'_>, hidden_states: &Tensor, inner: Tensor) -> Result<Tensor> {
        let kind = hidden_states.kind();
        let mut output = match &self.magnitude {
            None => inner + lora_delta(hidden_states, &self.a, &self.b, self.scaling, site.dropout)?,
            Some(magnitude) => {
                let scale = self.scale(magnitude, site.layer)?;
                let dropped = dropped_at_random(hidden_states, site.dropout)?;
                let update = lora_delta(&dropped, &self.a, &self.b, self.scaling, 0.0)? * scale.to_kind(kind);
                let base = match &site.layer.bias {
                    _ if site.dropout > 0.0 => site.layer.weight.project(&dropped, None)?,
                    Some(bias) => &inner - bias,
                    None => inner.shallow_clone(),
                };
                inner + base * (scale - 1.0).to_kind(kind) + update
            }
        };
        if let Some(Factored { a, b }) = &self.part {
            output -= lora_delta(hidden_states, a, b, self.scaling, 0.0)?;
        }
        if let Some(vector) = self.added() {
            output += vector.to_kind(kind);
        }
        if let Some(bias) = site.trained_bias {
            output += bias_change(bias, site.layer).to_kind(kind);
        }
        Ok(output)
    }

    /// What [`pt_model::Sites::output`] gives on an output layer: \[x, s·x·Aᵀ\] · \[W, B\]ᵀ. In bf16 the sum W + s·B·A
    /// would lose what is under half a unit in the last place of W, which is all of an update at first.
    pub(super) fn output(&self, site: Site<'_>, hidden_states: &Tensor) -> Result<(Tensor, Tensor)> {
        let kind = hidden_states.kind();
        let dense = site.layer.weight.dense()?;
        let dropped = dropped_at_random(hidden_states, site.dropout)?;
        let low = |x: &Tensor, a: &Tensor| -> Result<Tensor> {
            Ok(x.f_linear(&a.to_kind(kind), None::<Tensor>)? * self.scaling)
        };
        let (update, b) = (low(&dropped, &self.a)?, self.b.to_kind(kind));
        let mut parts = match &self.magnitude {
            None => vec![(hidden_states.shallow_clone(), dense), (update, b)],
            Some(magnitude) => {
                let scale = self.scale(magnitude, site.layer)?.to_kind(kind).unsqueeze(1);
                let mut parts = vec![(dropped.shallow_clone(), &dense * &scale), (update, b * scale)];
                if site.dropout > 0.0 {
                    parts.push((hidden_states - dropped, dense));
                }
                parts
            }
        };
        if let Some(Factored { a, b }) = &self.part {
            parts.push((low(hidden_states, a)?, -b.to_kind(kind)));
        }
        if let Some(vector) = self.added() {
            let ones = Tensor::ones([hidden_states.size()[0], 1], (kind, hidden_states.device()));
            parts.push((ones, vector.to_kind(kind).unsqueeze(1)));
        }
        let (states, weights): (Vec<Tensor>, Vec<Tensor>) = parts.into_iter().unzip();
        Ok((Tensor::f_cat(&states, -1)?, Tensor::f_cat(&weights, 1)?))
    }

    /// The weight and bias of the layer with the update in them, summed in f32; a bias only where it changes.
    pub(super) fn merged(&self, site: Site<'_>) -> Result<(Rc<dyn Weight>, Option<Tensor>)> {
        let dense = site.layer.weight.dense()?;
        let mut new = dense.to_kind(Kind::Float) + self.b.f_mm(&self.a)? * self.scaling;
        if let Some(Factored { a, b }) = &self.part {
            new -= b.f_mm(a)? * self.scaling;
        }
        if let Some(magnitude) = &self.magnitude {
            new *= self.scale(magnitude, site.layer)?.unsqueeze(1);
        }
        let bias = site.trained_bias.or(site.layer.bias.as_ref());
        let new_bias = match (self.added(), bias) {
            (Some(added), Some(bias)) => Some(bias.detach().to_kind(Kind::Float) + added),
            (Some(_), None) => {
                return Err(PeftError::NotMergeable {
                    method: "LoRA with `lora_bias`",
                    reason: "a layer that it is on has no bias that could take the update's",
                });
            }
            (None, _) => site.trained_bias.map(|bias| bias.detach().copy()),
        };
        let new_bias = new_bias.map(|bias| bias.to_kind(site.layer.weight.kind()));
        Ok((Rc::new(DenseWeight::new(new.to_kind(dense.kind()))?), new_bias))
    }

    /// A and B of the plain update of twice the rank: B·A − B₀·A₀ = \[B, −B₀\]·\[A; A₀\], as PEFT converts them.
    pub(super) fn converted(&self) -> Result<(Tensor, Tensor)> {
        let Some(Factored { a, b }) = &self.part else {
            return Ok((self.a.shallow_clone(), self.b.shallow_clone()));
        };
        no_grad(|| {
            let a = Tensor::f_cat(&[self.a.detach(), a.shallow_clone()], 0)?;
            Ok((a, Tensor::f_cat(&[self.b.detach(), -b], 1)?))
        })
    }
}

/// What a trained bias adds to the layer's own, f32.
pub(super) fn bias_change(trained: &Tensor, layer: &Linear) -> Tensor {
    match &layer.bias {
        Some(own) => trained - own.to_kind(Kind::Float),
        None => trained.shallow_clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pt_tensor::Device;

    #[test]
    fn copies_in_the_compute_kind_follow_steps_in_place() {
        let weight = Tensor::ones([3, 4], (Kind::Float, Device::Cpu));
        let layer = Linear::dense(0, "p", weight, None).unwrap();
        let factors = Factors::zeros(&layer, 2, 1.0, false, false).unwrap();
        let first = factors.in_kind(Kind::BFloat16).unwrap().0;
        assert_eq!(first.data_ptr(), factors.in_kind(Kind::BFloat16).unwrap().0.data_ptr());
        let _ = no_grad(|| factors.a.shallow_clone().g_add_scalar_(2.0));
        assert_eq!(factors.in_kind(Kind::BFloat16).unwrap().0.double_value(&[0, 0]), 2.0);
    }
}
