//! LoRA: a low-rank update beside a frozen linear layer.

use crate::adapter::{Adapter, Merged, NewWeight};
use crate::base::Base;
use crate::config::LoraConfig;
use crate::target::{Strictness, pattern_value, saved_parameters, target_layers};
use crate::{PeftError, Result};
use pt_model::{CausalLm, Linear, ModelError, Sites};
use pt_tensor::autograd::attach_backward;
use pt_tensor::{DenseWeight, Kind, Tensor, TensorError, no_grad, random};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
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
    lora_linear_cast(layer, hidden_states, (a, &in_compute_a), (b, &in_compute_b), scaling, dropout)
}

/// As [`lora_linear`]; `a` and `b` come with their detached copies in the compute kind.
fn lora_linear_cast(
    layer: &Linear,
    hidden_states: &Tensor,
    (a, a_cast): (&Tensor, &Tensor),
    (b, b_cast): (&Tensor, &Tensor),
    scaling: f64,
    dropout: f64,
) -> Result<Tensor> {
    let is_base_trained = layer.weight.parameter().is_some_and(Tensor::requires_grad)
        || layer.bias.as_ref().is_some_and(Tensor::requires_grad);
    if is_base_trained {
        return Ok(layer.forward(hidden_states)? + lora_delta(hidden_states, a, b, scaling, dropout)?);
    }
    let (out_features, in_features) = layer.weight.size();
    // x, flat: [tokens, in]; the closure keeps it, so it must not carry the graph behind it.
    let flat = hidden_states.detach().f_reshape([-1, in_features])?;
    let keep = 1.0 - dropout;
    let (output, low, mask) = no_grad(|| -> Result<_> {
        let output = layer.forward(&hidden_states.detach())?;
        let draw = || flat.empty_like().to_kind(Kind::Bool).bernoulli_float_(keep);
        let mask = (dropout > 0.0).then(|| random::led_by_cpu(flat.device(), draw)).transpose()?;
        let mut low = dropped(&flat, mask.as_ref(), keep).f_mm(&a_cast.tr())?; // [tokens, rank]
        let _ = low.g_mul_scalar_(scaling);
        let _ = output.f_view([-1, out_features])?.f_addmm_(&low, &b_cast.tr())?;
        Ok((output, low, mask))
    })?;
    let weight = layer.weight.clone();
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
fn lora_delta(hidden_states: &Tensor, a: &Tensor, b: &Tensor, scaling: f64, dropout: f64) -> Result<Tensor> {
    let low = lora_low(hidden_states, a, scaling, dropout)?; // [.., rank]
    Ok(low.f_linear(&b.to_kind(hidden_states.kind()), None::<Tensor>)?)
}

/// Its first half, `[.., rank]`: scaling · dropout(x)·Aᵀ.
fn lora_low(hidden_states: &Tensor, a: &Tensor, scaling: f64, dropout: f64) -> Result<Tensor> {
    let x = match dropout > 0.0 {
        true => random::led_by_cpu(hidden_states.device(), || hidden_states.f_dropout(dropout, true))??,
        false => hidden_states.shallow_clone(),
    };
    Ok(x.f_linear(&a.to_kind(hidden_states.kind()), None::<Tensor>)? * scaling)
}

/// The two factors on one layer.
#[derive(Debug)]
struct Factors {
    path: String,
    /// `[rank, in_features]`, f32.
    a: Tensor,
    /// `[out_features, rank]`, f32.
    b: Tensor,
    scaling: f64,
    /// Copies in the compute kind and the versions of A and B that they show: a step of the optimizer or a load
    /// writes in place, which counts the version up.
    cast: RefCell<Option<Cast>>,
}

#[derive(Debug)]
struct Cast {
    versions: (i64, i64),
    a: Tensor,
    b: Tensor,
}

impl Factors {
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

    /// scaling · B·A in f32, `[out_features, in_features]`.
    fn update(&self) -> Tensor {
        self.b.matmul(&self.a) * self.scaling
    }
}

/// A parameter that is trained whole, in our layout (`[out_features, in_features]` for linear layers).
#[derive(Debug)]
pub(crate) struct Saved {
    /// Hugging Face name: `lm_head.weight`.
    pub(crate) name: String,
    pub(crate) value: Tensor,
    /// Whether files hold its transpose (GPT-2's Conv1D).
    pub(crate) is_transposed_in_file: bool,
}

/// LoRA on some layers of a model, and modules that are trained whole.
///
/// A and B are f32 leaves whatever the model computes in; a forward pass uses copies in its kind.
#[derive(Debug)]
pub struct LoraAdapter {
    config: LoraConfig,
    /// By [`Linear::index`].
    factors: Vec<Option<Factors>>,
    saved: BTreeMap<String, Saved>,
    /// Name of the output layer's weight, where the layer has an update.
    output_weight: Option<String>,
    fan_in_fan_out: bool,
    /// What the model computes in.
    kind: Kind,
    is_enabled: Cell<bool>,
    is_training: Cell<bool>,
    merged: RefCell<Option<Merged>>,
}

/// A layer that gets an update. Nothing of it is allocated yet.
pub(crate) struct Planned<'a> {
    pub(crate) layer: &'a Linear,
    pub(crate) rank: i64,
    scaling: f64,
    is_output: bool,
}

impl LoraAdapter {
    /// A new adapter for a [`CausalLm`], or for linear layers of a model of one's own: A uniform in ±1/√in_features
    /// (PEFT's Kaiming with a = √5), B zero, modules to save copied. Each tensor has its own random stream from `seed`
    /// and its name, so a layer starts the same whatever other layers are adapted.
    ///
    /// # Errors
    /// [`PeftError::Config`] for settings that cannot be, [`PeftError::NoMatch`] for names that the model does not
    /// have, [`PeftError::Pattern`]; [`PeftError::Tensor`] when there is no memory for a rank.
    ///
    /// # Example
    /// LoRA on a tch model that is not ours: name its linear layers, and ask the adapter where the layer would compute.
    /// ```
    /// use pt_model::{Linear, Sites};
    /// use pt_peft::{Adapter, LoraAdapter, LoraConfig};
    /// use pt_tensor::{Device, Kind, Tensor};
    /// let weight = Tensor::eye(4, (Kind::Float, Device::Cpu)); // [out_features, in_features]
    /// let mut layers = [Linear::dense(0, "encoder.proj", weight, None)?];
    /// let config = LoraConfig { rank: 2, lora_alpha: 2.0, ..LoraConfig::default() };
    /// let adapter = LoraAdapter::new(config, layers.as_slice(), 0)?;
    /// let x = Tensor::ones([1, 4], (Kind::Float, Device::Cpu));
    /// assert_eq!(adapter.linear(&layers[0], &x)?, x); // B is zero
    /// // Train `adapter.parameters()`, then save it, or put the update into the weights.
    /// adapter.merge_into_layers(&mut layers)?;
    /// # Ok::<(), pt_peft::PeftError>(())
    /// ```
    pub fn new<'a>(config: LoraConfig, base: impl Into<Base<'a>>, seed: u64) -> Result<Self> {
        let base = base.into();
        config.validate()?;
        let saved = Self::copies(&config, &base)?;
        let planned = Self::plan(&config, &base, &saved, Strictness::EveryName)?;
        let adapter = Self::assemble(config, &base, planned, saved)?;
        for factors in adapter.factors.iter().flatten() {
            let bound = 1.0 / (factors.a.size()[1] as f32).sqrt();
            let values = uniform(seed, &format!("{}.lora_A.weight", factors.path), factors.a.numel(), bound);
            no_grad(|| factors.a.shallow_clone().copy_(&Tensor::from_slice(&values).view_as(&factors.a)));
        }
        Ok(adapter)
    }

    /// The layers that get an update, in model order.
    pub(crate) fn plan<'a>(
        config: &LoraConfig,
        base: &Base<'a>,
        saved: &BTreeMap<String, Saved>,
        strictness: Strictness,
    ) -> Result<Vec<Planned<'a>>> {
        let paths: Vec<&str> = base.layers.iter().map(|layer| layer.path.as_str()).collect();
        let mut targets = target_layers(config, &paths, base.output, strictness)?;
        targets.retain(|&position| !saved.contains_key(&format!("{}.weight", paths[position])));
        let plan = |position: usize| {
            let layer = base.layers[position];
            let rank = *pattern_value("rank_pattern", &config.rank_pattern, &layer.path)?.unwrap_or(&config.rank);
            let alpha =
                *pattern_value("alpha_pattern", &config.alpha_pattern, &layer.path)?.unwrap_or(&config.lora_alpha);
            Ok(Planned { layer, rank, scaling: config.scaling(rank, alpha), is_output: Some(position) == base.output })
        };
        targets.into_iter().map(plan).collect()
    }

    /// The adapter with A and B zero.
    pub(crate) fn assemble(
        config: LoraConfig,
        base: &Base<'_>,
        planned: Vec<Planned<'_>>,
        saved: BTreeMap<String, Saved>,
    ) -> Result<Self> {
        let size = base.layers.iter().map(|layer| layer.index + 1).max().unwrap_or(0);
        let mut factors: Vec<Option<Factors>> = (0..size).map(|_| None).collect();
        let (mut fan_in_fan_out, mut output_weight) = (false, None);
        for Planned { layer, rank, scaling, is_output } in planned {
            let (out_features, in_features) = layer.weight.size();
            let leaf = |size: [i64; 2]| -> Result<Tensor> {
                Ok(Tensor::f_zeros(size, (Kind::Float, layer.weight.device()))?.set_requires_grad(true))
            };
            factors[layer.index] = Some(Factors {
                path: layer.path.clone(),
                a: leaf([rank, in_features])?,
                b: leaf([out_features, rank])?,
                scaling,
                cast: RefCell::new(None),
            });
            fan_in_fan_out |= layer.is_transposed_in_file;
            if is_output {
                output_weight = Some(format!("{}.weight", layer.path));
            }
        }
        Ok(Self {
            config,
            factors,
            saved,
            output_weight,
            fan_in_fan_out,
            kind: base.kind(),
            is_enabled: Cell::new(true),
            is_training: Cell::new(false),
            merged: RefCell::new(None),
        })
    }

    /// Trainable f32 copies of the parameters of `modules_to_save`.
    pub(crate) fn copies(config: &LoraConfig, base: &Base<'_>) -> Result<BTreeMap<String, Saved>> {
        if config.modules_to_save.is_empty() {
            return Ok(BTreeMap::new());
        }
        // Names and values in our layout; the output layer stands here also where it is tied.
        let mut all: BTreeMap<String, Saved> = BTreeMap::new();
        for (name, value) in base.named_parameters()? {
            all.insert(name.clone(), Saved { name, value, is_transposed_in_file: false });
        }
        for layer in &base.layers {
            let name = format!("{}.weight", layer.path);
            let is_transposed_in_file = layer.is_transposed_in_file;
            all.insert(name.clone(), Saved { name, value: layer.weight.dense()?, is_transposed_in_file });
        }
        let names: Vec<&str> = all.keys().map(String::as_str).collect();
        let chosen: Vec<String> =
            saved_parameters(&config.modules_to_save, &names)?.into_iter().map(|i| names[i].to_string()).collect();
        // The model asks its sites for these only; a copy of another would be trained to no effect.
        let is_asked_for = |name: &String| {
            let is_linear =
                base.layers.iter().any(|layer| name.rsplit_once('.').is_some_and(|(path, _)| path == layer.path));
            is_linear || (name.ends_with(".weight") && !name.ends_with(".wpe.weight"))
        };
        let faults: Vec<String> = chosen
            .iter()
            .filter(|name| !is_asked_for(name))
            .map(|name| format!("`modules_to_save` takes `{name}`, which cannot be trained whole yet"))
            .collect();
        if !faults.is_empty() {
            return Err(PeftError::Config { faults });
        }
        Ok(chosen
            .into_iter()
            .filter_map(|name| all.remove(&name))
            .map(|saved| {
                let value = no_grad(|| saved.value.detach().to_kind(Kind::Float).copy()).set_requires_grad(true);
                (saved.name.clone(), Saved { value, ..saved })
            })
            .collect())
    }

    /// The settings.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// Whether the base stores its adapted weights transposed, as PEFT's config says it.
    pub(crate) fn fan_in_fan_out(&self) -> bool {
        self.fan_in_fan_out
    }

    /// Paths of the adapted layers, in model order, with the factor of each update.
    pub fn targets(&self) -> impl Iterator<Item = (&str, f64)> {
        self.factors.iter().flatten().map(|factors| (factors.path.as_str(), factors.scaling))
    }

    pub(crate) fn saved(&self) -> impl Iterator<Item = &Saved> {
        self.saved.values()
    }

    /// Whether the update takes part in a forward pass: enabled and not already in the weights.
    fn is_live(&self) -> bool {
        self.is_enabled.get() && self.merged.borrow().is_none()
    }

    fn factors_of(&self, layer: &Linear) -> Option<&Factors> {
        self.factors.get(layer.index).and_then(Option::as_ref)
    }

    fn dropout(&self) -> f64 {
        if self.is_training.get() { self.config.lora_dropout } else { 0.0 }
    }

    /// The layer with its own copy of the weight, where it is trained whole.
    fn saved_linear(&self, layer: &Linear, hidden_states: &Tensor) -> Result<Option<Tensor>> {
        if self.saved.is_empty() {
            return Ok(None);
        }
        let Some(weight) = self.saved.get(&format!("{}.weight", layer.path)) else { return Ok(None) };
        let kind = hidden_states.kind();
        let bias = match self.saved.get(&format!("{}.bias", layer.path)) {
            Some(bias) => Some(bias.value.to_kind(kind)),
            None => layer.bias.as_ref().map(Tensor::shallow_clone),
        };
        Ok(Some(hidden_states.f_linear(&weight.value.to_kind(kind), bias)?))
    }
}

impl Sites for LoraAdapter {
    fn linear(&self, layer: &Linear, hidden_states: &Tensor) -> pt_model::Result<Tensor> {
        if !self.is_live() {
            return layer.forward(hidden_states);
        }
        if let Some(factors) = self.factors_of(layer) {
            let output = factors.in_kind(hidden_states.kind()).and_then(|(a, b)| {
                let (a, b) = ((&factors.a, &a), (&factors.b, &b));
                lora_linear_cast(layer, hidden_states, a, b, factors.scaling, self.dropout())
            });
            return output.map_err(to_model);
        }
        match self.saved_linear(layer, hidden_states).map_err(to_model)? {
            Some(output) => Ok(output),
            None => layer.forward(hidden_states),
        }
    }

    fn output(&self, layer: &Linear, hidden_states: &Tensor) -> pt_model::Result<(Tensor, Tensor)> {
        if !self.is_live() {
            return pt_model::Bare.output(layer, hidden_states);
        }
        let kind = hidden_states.kind();
        if let Some(factors) = self.factors_of(layer) {
            // [x, scaling · dropout(x)·Aᵀ] · [W, B]ᵀ: in bf16 the sum W + scaling·B·A would lose what is under half a
            // unit in the last place of W, which is all of an update at first.
            let low = lora_low(hidden_states, &factors.a, factors.scaling, self.dropout()).map_err(to_model)?;
            let weight = Tensor::f_cat(&[layer.weight.dense()?, factors.b.to_kind(kind)], 1)?;
            return Ok((Tensor::f_cat(&[hidden_states, &low], -1)?, weight));
        }
        match self.saved.get(&format!("{}.weight", layer.path)) {
            Some(saved) => Ok((hidden_states.shallow_clone(), saved.value.to_kind(kind))),
            None => pt_model::Bare.output(layer, hidden_states),
        }
    }

    fn parameter(&self, path: &str) -> Option<Tensor> {
        if !self.is_live() {
            return None;
        }
        let saved = self.saved.get(path)?;
        // Norms compute in the kind of their input. Tables are left to the model, which casts what it looks up.
        let is_norm = saved.value.dim() == 1;
        Some(if is_norm { saved.value.to_kind(self.kind) } else { saved.value.shallow_clone() })
    }

    fn set_training(&self, is_training: bool) -> bool {
        self.is_training.replace(is_training)
    }
}

/// An error as a site returns it; [`PeftError::from`] gives the same one back.
pub(crate) fn to_model(error: PeftError) -> ModelError {
    match error {
        PeftError::Model(error) => error,
        PeftError::Tensor(error) => error.into(),
        other => ModelError::Tensor(TensorError::Other { hint: other.hint(), error: Box::new(other) }),
    }
}

impl Adapter for LoraAdapter {
    fn parameters(&self) -> Vec<(String, Tensor)> {
        let mut all = Vec::new();
        for factors in self.factors.iter().flatten() {
            all.push((format!("{}.lora_A.weight", factors.path), factors.a.shallow_clone()));
            all.push((format!("{}.lora_B.weight", factors.path), factors.b.shallow_clone()));
        }
        all.extend(self.saved.values().map(|saved| (saved.name.clone(), saved.value.shallow_clone())));
        all
    }

    fn set_enabled(&self, is_enabled: bool) {
        self.is_enabled.set(is_enabled);
    }

    fn add_to(&self, layer: &Linear, hidden_states: &Tensor, output: Tensor) -> Result<Tensor> {
        if !self.is_live() {
            return Ok(output);
        }
        match self.factors_of(layer) {
            Some(f) => Ok(output + lora_delta(hidden_states, &f.a, &f.b, f.scaling, self.dropout())?),
            None => Ok(output),
        }
    }

    fn replaced_parameters(&self) -> Vec<&str> {
        self.saved.keys().map(String::as_str).chain(self.output_weight.as_deref()).collect()
    }

    fn save(&self, folder: &std::path::Path) -> Result<()> {
        crate::io::save(self, folder)
    }

    fn merge_into(&self, model: &mut CausalLm) -> Result<()> {
        self.check_unmerged()?;
        let mut merged = Merged::default();
        no_grad(|| -> Result<()> {
            let layers: Vec<&Linear> = model.linear_layers().collect();
            // All new weights first: should one fail, the model is as it was.
            let mut weights = self.merged_weights(&layers)?;
            let paths: Vec<&str> = layers.iter().map(|layer| layer.path.as_str()).collect();
            let outside: Vec<(&Saved, Tensor)> = self
                .saved
                .values()
                .filter(|saved| !saved.name.rsplit_once('.').is_some_and(|(module, _)| paths.contains(&module)))
                .filter_map(|saved| model.parameter(&saved.name).map(|base| (saved, base)))
                .collect();
            let mut layers = model.linear_layers_mut()?;
            if let Some(output) = layers.last() {
                // A tied output layer shares the embedding's storage, which is about to be overwritten; PEFT, too,
                // leaves the other end of the tie as it was.
                let dense = output.weight.dense()?;
                let is_tied = outside.iter().any(|(_, base)| base.data_ptr() == dense.data_ptr());
                if is_tied && !weights.iter().any(|new| new.index == output.index) {
                    let weight = Rc::new(DenseWeight::new(dense.copy())?);
                    weights.push(NewWeight { index: output.index, weight, bias: None });
                }
            }
            merged.install(&mut layers, weights);
            for (saved, base) in outside {
                merged.overwrite(base, &saved.value);
            }
            Ok(())
        })?;
        *self.merged.borrow_mut() = Some(merged);
        Ok(())
    }

    fn unmerge_from(&self, model: &mut CausalLm) -> Result<()> {
        self.unmerge(&mut model.linear_layers_mut()?)
    }
}

impl LoraAdapter {
    /// [`Adapter::merge_into`] for the linear layers of a model of one's own.
    ///
    /// # Errors
    /// As there.
    pub fn merge_into_layers(&self, layers: &mut [Linear]) -> Result<()> {
        self.check_unmerged()?;
        let weights = no_grad(|| self.merged_weights(&layers.iter().collect::<Vec<_>>()))?;
        let mut merged = Merged::default();
        merged.install(&mut layers.iter_mut().collect::<Vec<_>>(), weights);
        *self.merged.borrow_mut() = Some(merged);
        Ok(())
    }

    /// [`Adapter::unmerge_from`] for the linear layers of a model of one's own.
    ///
    /// # Errors
    /// As there.
    pub fn unmerge_from_layers(&self, layers: &mut [Linear]) -> Result<()> {
        self.unmerge(&mut layers.iter_mut().collect::<Vec<_>>())
    }

    fn unmerge(&self, layers: &mut [&mut Linear]) -> Result<()> {
        let mut merged = self.merged.borrow_mut();
        let held = merged.as_ref().ok_or_else(|| PeftError::State("the adapter is not merged".into()))?;
        held.restore(layers)?;
        *merged = None;
        Ok(())
    }

    fn check_unmerged(&self) -> Result<()> {
        match *self.merged.borrow() {
            Some(_) => Err(PeftError::State("the adapter is merged already".into())),
            None => Ok(()),
        }
    }

    /// The weights of the layers that the adapter changes: W + scaling·B·A, summed in f32, or those trained whole.
    fn merged_weights(&self, layers: &[&Linear]) -> Result<Vec<NewWeight>> {
        let mut weights = Vec::new();
        for layer in layers {
            let own = self.saved.get(&format!("{}.weight", layer.path));
            let new = match (own, self.factors_of(layer)) {
                (Some(own), _) => own.value.detach().to_kind(layer.weight.kind()).copy(),
                (None, Some(factors)) => {
                    let dense = layer.weight.dense()?;
                    (dense.to_kind(Kind::Float) + factors.update()).to_kind(dense.kind())
                }
                (None, None) => continue,
            };
            let bias = self.saved.get(&format!("{}.bias", layer.path)).zip(layer.bias.as_ref());
            let bias = bias.map(|(own, base)| own.value.detach().to_kind(base.kind()).copy());
            weights.push(NewWeight { index: layer.index, weight: Rc::new(DenseWeight::new(new)?), bias });
        }
        Ok(weights)
    }
}

/// `len` values uniform in ±`bound`, from a seed and a name: SplitMix64 (Steele et al. 2014) over the FNV-1a hash of
/// the name. Our own, so that neither libtorch's generator nor a library's version changes where training starts.
fn uniform(seed: u64, name: &str, len: usize, bound: f32) -> Vec<f32> {
    let hash =
        name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, byte| (h ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let mut state = hash ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..len)
        .map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            // 24 random bits: every value is exact in f32.
            let unit = (z >> 40) as f32 / (1u32 << 24) as f32;
            (2.0 * unit - 1.0) * bound
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use pt_tensor::Device;

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

    #[test]
    fn copies_in_the_compute_kind_follow_steps_in_place() {
        let leaf = |size: [i64; 2]| Tensor::ones(size, (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let factors =
            Factors { path: "p".into(), a: leaf([2, 4]), b: leaf([3, 2]), scaling: 1.0, cast: RefCell::new(None) };
        let first = factors.in_kind(Kind::BFloat16).unwrap().0;
        assert_eq!(first.data_ptr(), factors.in_kind(Kind::BFloat16).unwrap().0.data_ptr());
        let _ = no_grad(|| factors.a.shallow_clone().g_add_scalar_(1.0));
        assert_eq!(factors.in_kind(Kind::BFloat16).unwrap().0.double_value(&[0, 0]), 2.0);
    }

    #[test]
    fn starting_values_depend_on_seed_and_name_and_stay_in_their_bounds() {
        let values = uniform(1, "a", 4000, 0.5);
        assert!(values.iter().all(|v| v.abs() <= 0.5));
        let mean = values.iter().sum::<f32>() / 4000.0;
        let variance = values.iter().map(|v| v * v).sum::<f32>() / 4000.0;
        assert!(mean.abs() < 0.02 && (variance - 0.25 / 3.0).abs() < 0.005, "{mean} {variance}");
        assert_eq!(values, uniform(1, "a", 4000, 0.5));
        assert_ne!(values, uniform(2, "a", 4000, 0.5));
        assert_ne!(values, uniform(1, "b", 4000, 0.5));
    }
}
