//! Modules that are trained whole beside an adapter: PEFT's `modules_to_save`.

use crate::Result;
use crate::adapter::NewWeight;
use crate::base::Base;
use crate::target::saved_parameters;
use pt_model::{CausalLm, Linear};
use pt_tensor::{DenseWeight, Kind, Tensor, no_grad};
use std::collections::{BTreeMap, BTreeSet};
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
        // The output layer stands here also where it is tied.
        let layers: BTreeMap<String, &Linear> =
            base.layers.iter().map(|layer| (format!("{}.weight", layer.path), *layer)).collect();
        let others: BTreeMap<String, Tensor> = base.plain_parameters().into_iter().chain(base.biases()).collect();
        let known: BTreeSet<&str> = layers.keys().chain(others.keys()).map(String::as_str).collect();
        let known: Vec<&str> = known.into_iter().collect();
        let leaf = |value: &Tensor| no_grad(|| value.detach().to_kind(Kind::Float).copy()).set_requires_grad(true);
        let mut by_name = BTreeMap::new();
        for index in saved_parameters(names, &known)? {
            let name = known[index].to_string();
            // Only what is chosen is decoded where weights are in 4 bits.
            let (value, is_transposed_in_file) = match (layers.get(&name), others.get(&name)) {
                (Some(layer), _) => (leaf(&layer.weight.dense()?), layer.is_transposed_in_file),
                (None, Some(value)) => (leaf(value), false),
                (None, None) => continue,
            };
            by_name.insert(name.clone(), Saved { name, value, is_transposed_in_file });
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use pt_tensor::{Device, TensorError, Weight};

    /// A weight that nobody may decode.
    #[derive(Debug)]
    struct Sealed;

    impl Weight for Sealed {
        fn size(&self) -> (i64, i64) {
            (2, 2)
        }

        fn dense(&self) -> pt_tensor::Result<Tensor> {
            Err(TensorError::Argument { what: "weight".into(), found: "decoded".into(), expected: "left alone".into() })
        }

        fn project(&self, hidden_states: &Tensor, _bias: Option<&Tensor>) -> pt_tensor::Result<Tensor> {
            Ok(hidden_states.shallow_clone())
        }

        fn device(&self) -> Device {
            Device::Cpu
        }

        fn kind(&self) -> Kind {
            Kind::Float
        }
    }

    #[test]
    fn only_the_chosen_weights_are_decoded() {
        let weight = Tensor::eye(2, (Kind::Float, Device::Cpu));
        let mut layers =
            [0, 1].map(|index| Linear::dense(index, ["a.first", "a.second"][index], weight.copy(), None).unwrap());
        layers[1].weight = Rc::new(Sealed);
        let copies = |name: &str| SavedModules::copies(&[name.to_string()], &layers.as_slice().into());
        assert_eq!(copies("first").unwrap().get("a.first.weight"), Some(&weight));
        assert!(copies("second").unwrap_err().to_string().contains("left alone"));
    }
}
