//! LoRA: a low-rank update beside a frozen linear layer.

mod config;
mod linear;

pub use config::LoraConfig;
pub use linear::lora_linear;

use crate::Result;
use crate::adapter::{Adapter, Merged, NewWeight, State};
use crate::base::Base;
use crate::error::to_model;
use crate::files;
use crate::init::uniform;
use crate::saved::SavedModules;
use crate::target::{Strictness, pattern_value, target_layers};
use linear::{lora_delta, lora_linear_cast, lora_low};
use pt_model::{CausalLm, Linear, Sites};
use pt_tensor::{DenseWeight, Kind, Tensor, no_grad};
use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

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

/// LoRA on some layers of a model, and modules that are trained whole.
///
/// A and B are f32 leaves whatever the model computes in; a forward pass uses copies in its kind.
#[derive(Debug)]
pub struct LoraAdapter {
    config: LoraConfig,
    /// By [`Linear::index`].
    factors: Vec<Option<Factors>>,
    saved: SavedModules,
    /// Name of the output layer's weight, where the layer has an update.
    output_weight: Option<String>,
    fan_in_fan_out: bool,
    state: State,
}

/// A layer that gets an update. Nothing of it is allocated yet.
struct Planned<'a> {
    layer: &'a Linear,
    rank: i64,
    scaling: f64,
    is_output: bool,
}

impl LoraAdapter {
    /// A new adapter for a [`CausalLm`], or for linear layers of a model of one's own: A uniform in ±1/√in_features
    /// (PEFT's Kaiming with a = √5), B zero, modules to save copied. Each tensor has its own random stream from `seed`
    /// and its name, so a layer starts the same whatever other layers are adapted.
    ///
    /// # Errors
    /// [`PeftError::Config`](crate::PeftError::Config) for settings that cannot be, [`PeftError::NoMatch`](crate::PeftError::NoMatch) for names that the model does not
    /// have, [`PeftError::Pattern`](crate::PeftError::Pattern); [`PeftError::Tensor`](crate::PeftError::Tensor) when there is no memory for a rank.
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
        let saved = SavedModules::copies(&config.modules_to_save, &base)?;
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
    fn plan<'a>(
        config: &LoraConfig,
        base: &Base<'a>,
        saved: &SavedModules,
        strictness: Strictness,
    ) -> Result<Vec<Planned<'a>>> {
        let paths: Vec<&str> = base.layers.iter().map(|layer| layer.path.as_str()).collect();
        let mut targets = target_layers(&config.targets(), &paths, base.output, strictness)?;
        targets.retain(|&position| !saved.contains(&format!("{}.weight", paths[position])));
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
    fn assemble(config: LoraConfig, base: &Base<'_>, planned: Vec<Planned<'_>>, saved: SavedModules) -> Result<Self> {
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
        Ok(Self { config, factors, saved, output_weight, fan_in_fan_out, state: State::new() })
    }

    /// Loads an adapter that PEFT or [`Adapter::save`] wrote, for a model or linear layers of one's own.
    ///
    /// The tensors must be exactly the adapter's. Two things that PEFT itself writes are passed over: copies of the
    /// base weight (`.base_layer.`), and embeddings that it adds unasked, as long as they equal the model's.
    ///
    /// # Errors
    /// [`PeftError::NotAnAdapter`](crate::PeftError::NotAnAdapter) for a folder without an adapter, or with pickled tensors only; those of
    /// [`LoraConfig::from_peft_file`]; [`PeftError::NoMatch`](crate::PeftError::NoMatch); [`PeftError::Keys`](crate::PeftError::Keys) with the difference.
    pub fn load<'a>(folder: &Path, base: impl Into<Base<'a>>) -> Result<Self> {
        let base = base.into();
        files::check_folder(folder)?;
        let config = LoraConfig::from_peft_file(&folder.join(files::CONFIG_FILE))?;
        let saved = SavedModules::copies(&config.modules_to_save, &base)?;
        let planned = Self::plan(&config, &base, &saved, Strictness::AnyName)?;
        let mut shapes = files::shapes_of(&saved);
        for Planned { layer, rank, .. } in &planned {
            let (out_features, in_features) = layer.weight.size();
            shapes.insert(format!("{}.lora_A.weight", layer.path), vec![*rank, in_features]);
            shapes.insert(format!("{}.lora_B.weight", layer.path), vec![out_features, *rank]);
        }
        // Compared before anything is allocated from the rank that the settings claim.
        let file = files::AdapterFile::open(folder, &base, files::MODULES, &shapes)?;
        let adapter = Self::assemble(config, &base, planned, saved)?;
        file.read_into(adapter.entries())?;
        Ok(adapter)
    }

    /// Tensors as the file has them.
    fn entries(&self) -> Vec<files::Entry> {
        let factors = self.factors.iter().flatten().flat_map(|factors| {
            let entry = |part: &str, tensor: &Tensor| files::Entry::new(format!("{}.{part}", factors.path), tensor);
            [entry("lora_A.weight", &factors.a), entry("lora_B.weight", &factors.b)]
        });
        factors.chain(files::entries_of(&self.saved)).collect()
    }

    /// The settings.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// Paths of the adapted layers, in model order, with the factor of each update.
    pub fn targets(&self) -> impl Iterator<Item = (&str, f64)> {
        self.factors.iter().flatten().map(|factors| (factors.path.as_str(), factors.scaling))
    }

    fn factors_of(&self, layer: &Linear) -> Option<&Factors> {
        self.factors.get(layer.index).and_then(Option::as_ref)
    }

    fn dropout(&self) -> f64 {
        if self.state.is_training.get() { self.config.lora_dropout } else { 0.0 }
    }
}

impl Sites for LoraAdapter {
    fn linear(&self, layer: &Linear, hidden_states: &Tensor) -> pt_model::Result<Tensor> {
        if !self.state.is_live() {
            return layer.forward(hidden_states);
        }
        if let Some(factors) = self.factors_of(layer) {
            let output = factors.in_kind(hidden_states.kind()).and_then(|(a, b)| {
                let (a, b) = ((&factors.a, &a), (&factors.b, &b));
                lora_linear_cast(layer, hidden_states, a, b, factors.scaling, self.dropout())
            });
            return output.map_err(to_model);
        }
        match self.saved.linear(layer, hidden_states).map_err(to_model)? {
            Some(output) => Ok(output),
            None => layer.forward(hidden_states),
        }
    }

    fn output(&self, layer: &Linear, hidden_states: &Tensor) -> pt_model::Result<(Tensor, Tensor)> {
        if !self.state.is_live() {
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
            Some(weight) => Ok((hidden_states.shallow_clone(), weight.to_kind(kind))),
            None => pt_model::Bare.output(layer, hidden_states),
        }
    }

    fn parameter(&self, path: &str) -> Option<Tensor> {
        if !self.state.is_live() {
            return None;
        }
        self.saved.parameter(path)
    }

    fn set_training(&self, is_training: bool) -> bool {
        self.state.is_training.replace(is_training)
    }
}

impl Adapter for LoraAdapter {
    fn parameters(&self) -> Vec<(String, Tensor)> {
        let mut all = Vec::new();
        for factors in self.factors.iter().flatten() {
            all.push((format!("{}.lora_A.weight", factors.path), factors.a.shallow_clone()));
            all.push((format!("{}.lora_B.weight", factors.path), factors.b.shallow_clone()));
        }
        all.extend(self.saved.iter().map(|saved| (saved.name.clone(), saved.value.shallow_clone())));
        all
    }

    fn set_enabled(&self, is_enabled: bool) {
        self.state.is_enabled.set(is_enabled);
    }

    fn around_linear(
        &self,
        layer: &Linear,
        hidden_states: &Tensor,
        inner: &dyn Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let output = inner(hidden_states)?;
        match self.factors_of(layer).filter(|_| self.state.is_live()) {
            Some(f) => Ok(output + lora_delta(hidden_states, &f.a, &f.b, f.scaling, self.dropout())?),
            None => Ok(output),
        }
    }

    fn replaced_parameters(&self) -> Vec<&str> {
        self.saved.iter().map(|saved| saved.name.as_str()).chain(self.output_weight.as_deref()).collect()
    }

    fn save(&self, folder: &Path) -> Result<()> {
        files::save(
            folder,
            &self.config.to_peft_text(self.fan_in_fan_out),
            files::MODULES,
            self.entries(),
            &files::Card {
                base: self.config.base_model_name_or_path.as_deref(),
                tag: "lora",
                title: "LoRA adapter",
                settings: self.config.in_words(),
            },
        )
    }

    fn merge_into(&self, model: &mut CausalLm) -> Result<()> {
        self.state.merge(|| {
            // All new weights first: should one fail, the model is as it was.
            let weights = self.merged_weights(&model.linear_layers().collect::<Vec<_>>())?;
            let outside = self.saved.outside_layers(model);
            Merged::into_model(model, weights, outside)
        })
    }

    fn unmerge_from(&self, model: &mut CausalLm) -> Result<()> {
        self.state.unmerge(&mut model.linear_layers_mut()?)
    }
}

impl LoraAdapter {
    /// [`Adapter::merge_into`] for the linear layers of a model of one's own.
    ///
    /// # Errors
    /// As there.
    pub fn merge_into_layers(&self, layers: &mut [Linear]) -> Result<()> {
        self.state.merge(|| {
            let weights = self.merged_weights(&layers.iter().collect::<Vec<_>>())?;
            let mut merged = Merged::default();
            merged.install(&mut layers.iter_mut().collect::<Vec<_>>(), weights);
            Ok(merged)
        })
    }

    /// [`Adapter::unmerge_from`] for the linear layers of a model of one's own.
    ///
    /// # Errors
    /// As there.
    pub fn unmerge_from_layers(&self, layers: &mut [Linear]) -> Result<()> {
        self.state.unmerge(&mut layers.iter_mut().collect::<Vec<_>>())
    }

    /// The weights of the layers that the adapter changes: W + scaling·B·A, summed in f32, or those trained whole.
    fn merged_weights(&self, layers: &[&Linear]) -> Result<Vec<NewWeight>> {
        let mut weights = Vec::new();
        for layer in layers {
            if let Some(whole) = self.saved.merged_layer(layer)? {
                weights.push(whole);
            } else if let Some(factors) = self.factors_of(layer) {
                let dense = layer.weight.dense()?;
                let new = (dense.to_kind(Kind::Float) + factors.update()).to_kind(dense.kind());
                weights.push(NewWeight { index: layer.index, weight: Rc::new(DenseWeight::new(new)?), bias: None });
            }
        }
        Ok(weights)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pt_tensor::Device;

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
}
