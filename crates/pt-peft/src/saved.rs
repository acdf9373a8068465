//! Modules that are trained whole beside an adapter: PEFT's `modules_to_save`.

use crate::Result;
use crate::adapter::NewWeight;
use crate::base::Base;
use crate::target::saved_parameters;
use pt_model::{CausalLm, Linear};
use pt_tensor::{DenseWeight, Kind, Tensor, no_grad};
use std::collections::BTreeMap;
use std::rc::Rc;

/// A parameter that is trained whole, in our layout (`[out_features, in_features]` for linear layers).
#[derive(Debug)]
pub(crate) struct Saved {
    /// Hugging Face name: `lm_head.weight`.
    pub(crate) name: String,
    /// An f32 leaf, unless it is frozen.
    pub(crate) value: Tensor,
    /// Whether files hold its transpose (GPT-2's Conv1D).
    pub(crate) is_transposed_in_file: bool,
}

/// All of them, by name.
#[derive(Debug)]
pub(crate) struct SavedModules {
    by_name: BTreeMap<String, Saved>,
    /// What the model computes in.
    kind: Kind,
}

impl SavedModules {
    /// Trainable f32 copies of the parameters that `names` choose, out of `base`.
    pub(crate) fn copies(names: &[String], base: &Base<'_>) -> Result<Self> {
        let kind = base.kind();
        if names.is_empty() {
            return Ok(Self { by_name: BTreeMap::new(), kind });
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
        let known: Vec<&str> = all.keys().map(String::as_str).collect();
        let chosen: Vec<String> =
            saved_parameters(names, &known)?.into_iter().map(|index| known[index].to_string()).collect();
        let leaf = |value: &Tensor| no_grad(|| value.detach().to_kind(Kind::Float).copy()).set_requires_grad(true);
        let copies = chosen.into_iter().filter_map(|name| all.remove(&name));
        let by_name = copies.map(|saved| (saved.name.clone(), Saved { value: leaf(&saved.value), ..saved })).collect();
        Ok(Self { by_name, kind })
    }

    /// Values that take the place of a model's parameters and are not trained, in our layout.
    pub(crate) fn frozen(values: impl IntoIterator<Item = (String, Tensor)>, kind: Kind) -> Self {
        let saved = |(name, value): (String, Tensor)| {
            (name.clone(), Saved { name, value: value.detach(), is_transposed_in_file: false })
        };
        Self { by_name: values.into_iter().map(saved).collect(), kind }
    }

    /// Whether a parameter is among them.
    pub(crate) fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Saved> {
        self.by_name.values()
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Tensor> {
        self.by_name.get(name).map(|saved| &saved.value)
    }

    /// A layer with its own copies of weight and bias, where it is trained whole.
    pub(crate) fn linear(&self, layer: &Linear, hidden_states: &Tensor) -> Result<Option<Tensor>> {
        if self.by_name.is_empty() {
            return Ok(None);
        }
        let Some(weight) = self.get(&format!("{}.weight", layer.path)) else { return Ok(None) };
        let kind = hidden_states.kind();
        let bias = match self.get(&format!("{}.bias", layer.path)) {
            Some(bias) => Some(bias.to_kind(kind)),
            None => layer.bias.as_ref().map(Tensor::shallow_clone),
        };
        Ok(Some(hidden_states.f_linear(&weight.to_kind(kind), bias)?))
    }

    /// What [`pt_model::Sites::parameter`] gives for a path.
    pub(crate) fn parameter(&self, path: &str) -> Option<Tensor> {
        let value = self.get(path)?;
        // Norms compute in the kind of their input. Tables are left to the model, which casts what it looks up.
        let is_norm = value.dim() == 1;
        Some(if is_norm { value.to_kind(self.kind) } else { value.shallow_clone() })
    }

    /// A layer's new weight and bias for a merge, where it is trained whole.
    pub(crate) fn merged_layer(&self, layer: &Linear) -> Result<Option<NewWeight>> {
        let Some(weight) = self.get(&format!("{}.weight", layer.path)) else { return Ok(None) };
        let weight = Rc::new(DenseWeight::new(weight.detach().to_kind(layer.weight.kind()).copy())?);
        let bias = self.get(&format!("{}.bias", layer.path)).zip(layer.bias.as_ref());
        let bias = bias.map(|(own, base)| own.detach().to_kind(base.kind()).copy());
        Ok(Some(NewWeight { index: layer.index, weight, bias }))
    }

    /// Parameters of the model outside its linear layers, with the values that a merge writes over them.
    pub(crate) fn outside_layers(&self, model: &CausalLm) -> Vec<(Tensor, Tensor)> {
        let paths: Vec<&str> = model.linear_layers().map(|layer| layer.path.as_str()).collect();
        self.iter()
            .filter(|saved| !saved.name.rsplit_once('.').is_some_and(|(module, _)| paths.contains(&module)))
            .filter_map(|saved| Some((model.parameter(&saved.name)?, saved.value.detach())))
            .collect()
    }
}
