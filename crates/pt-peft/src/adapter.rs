//! What every method has in common, and several adapters over one model.

use crate::lora::to_model;
use crate::{PeftError, Result};
use pt_model::{Branch, CausalLm, Linear, Sites};
use pt_tensor::{Tensor, Weight, no_grad};
use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;

/// A parameter-efficient method on a model: sites that can be trained, switched off, saved and merged.
///
/// Laws, checked by [`testing::adapter_laws`](crate::testing::adapter_laws):
/// - switched off, the model gives the values of [`pt_model::Bare`], bit for bit;
/// - merged, the bare model gives the values of the adapter switched on, within rounding;
/// - unmerged, the model's weights are what they were, bit for bit;
/// - saved and loaded, the adapter gives the same values, bit for bit.
///
/// State is behind `Cell`s, because a forward pass and its graph share the adapter (`Rc<dyn Sites>`).
pub trait Adapter: Sites {
    /// The trained tensors, leaves, by stable names; writing into them in place changes the adapter.
    fn parameters(&self) -> Vec<(String, Tensor)>;

    /// Number of trained values.
    fn num_trainable(&self) -> usize {
        self.parameters().iter().map(|(_, tensor)| tensor.numel()).sum()
    }

    /// Switches the adapter on or off; off, it is the bare model.
    fn set_enabled(&self, is_enabled: bool);

    /// What the method adds to the output of a linear layer, for several adapters on one layer.
    ///
    /// # Errors
    /// When the shapes do not fit.
    fn add_to(&self, layer: &Linear, hidden_states: &Tensor, output: Tensor) -> Result<Tensor>;

    /// Names of parameters that the method replaces whole; two adapters cannot both replace one.
    fn replaced_parameters(&self) -> Vec<&str> {
        vec![]
    }

    /// Writes the adapter to a folder in PEFT's format.
    ///
    /// # Errors
    /// [`PeftError::Write`] and those of the tensor layer; a new folder appears whole or not at all.
    fn save(&self, folder: &Path) -> Result<()>;

    /// Puts the update into the model's weights; the adapter then adds nothing until it is unmerged.
    ///
    /// # Errors
    /// [`PeftError::State`] when it is merged already; the model is then as it was.
    fn merge_into(&self, model: &mut CausalLm) -> Result<()>;

    /// Gives the model the weights back that it had before [`merge_into`](Self::merge_into).
    ///
    /// # Errors
    /// [`PeftError::State`] when it is not merged. Adapters merged one after another come out in reverse order.
    fn unmerge_from(&self, model: &mut CausalLm) -> Result<()>;
}

/// What a merge displaced.
#[derive(Debug, Default)]
pub(crate) struct Merged {
    /// Layer index, its weight and its bias before.
    pub(crate) weights: Vec<(usize, Rc<dyn Weight>, Option<Tensor>)>,
    /// A parameter that was overwritten in place, and its values before.
    pub(crate) values: Vec<(Tensor, Tensor)>,
}

impl Merged {
    /// Gives everything back; on an error nothing is changed.
    pub(crate) fn restore(&self, model: &mut CausalLm) -> Result<()> {
        let mut layers = model.linear_layers_mut()?;
        for (index, weight, bias) in &self.weights {
            if let Some(layer) = layers.iter_mut().find(|layer| layer.index == *index) {
                layer.weight = weight.clone();
                layer.bias = bias.as_ref().map(Tensor::shallow_clone);
            }
        }
        no_grad(|| {
            for (parameter, before) in &self.values {
                parameter.shallow_clone().copy_(before);
            }
        });
        Ok(())
    }
}

/// Named adapters over one model, of which none, one or several are active; the updates of several add up.
#[derive(Debug, Default)]
pub struct AdapterSet {
    adapters: Vec<(String, Rc<dyn Adapter>)>,
    active: RefCell<Vec<usize>>,
    is_disabled: Cell<bool>,
}

impl AdapterSet {
    /// A set without adapters: the bare model.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an adapter, or exchanges the one of that name; the first one added becomes active.
    pub fn insert(&mut self, name: impl Into<String>, adapter: Rc<dyn Adapter>) {
        let name = name.into();
        match self.adapters.iter_mut().find(|(known, _)| *known == name) {
            Some((_, known)) => *known = adapter,
            None => self.adapters.push((name, adapter)),
        }
        if self.adapters.len() == 1 {
            *self.active.borrow_mut() = vec![0];
        }
    }

    /// Names of all adapters, in the order they came.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.adapters.iter().map(|(name, _)| name.as_str())
    }

    /// Names of the active adapters.
    pub fn active(&self) -> Vec<&str> {
        self.active.borrow().iter().map(|&i| self.adapters[i].0.as_str()).collect()
    }

    /// An adapter by its name.
    ///
    /// # Errors
    /// [`PeftError::UnknownAdapter`].
    pub fn get(&self, name: &str) -> Result<&Rc<dyn Adapter>> {
        Ok(&self.adapters[self.position(name)?].1)
    }

    /// Chooses the active adapters; no name at all is the bare model.
    ///
    /// # Errors
    /// [`PeftError::UnknownAdapter`]; [`PeftError::State`] when two of them replace the same parameter.
    pub fn set_active(&self, names: &[&str]) -> Result<()> {
        let mut chosen: Vec<usize> = Vec::new();
        for name in names {
            let position = self.position(name)?;
            if !chosen.contains(&position) {
                chosen.push(position);
            }
        }
        let mut replaced: Vec<(&str, &str)> = Vec::new();
        for &position in &chosen {
            let (name, adapter) = &self.adapters[position];
            for parameter in adapter.replaced_parameters() {
                if let Some((_, other)) = replaced.iter().find(|(known, _)| *known == parameter) {
                    return Err(PeftError::State(format!("`{other}` and `{name}` both replace `{parameter}`")));
                }
                replaced.push((parameter, name));
            }
        }
        *self.active.borrow_mut() = chosen;
        Ok(())
    }

    /// Switches all adapters on or off together; off, the set is the bare model.
    pub fn set_enabled(&self, is_enabled: bool) {
        self.is_disabled.set(!is_enabled);
    }

    fn position(&self, name: &str) -> Result<usize> {
        self.adapters.iter().position(|(known, _)| known == name).ok_or_else(|| PeftError::UnknownAdapter {
            name: name.into(),
            available: self.names().map(Into::into).collect(),
        })
    }

    fn live(&self) -> Vec<&Rc<dyn Adapter>> {
        if self.is_disabled.get() {
            return vec![];
        }
        self.active.borrow().iter().map(|&i| &self.adapters[i].1).collect()
    }
}

impl Sites for AdapterSet {
    fn linear(&self, layer: &Linear, hidden_states: &Tensor) -> pt_model::Result<Tensor> {
        let live = self.live();
        // An adapter that replaces the weight has to come first: the others add to what it gives.
        let weight = format!("{}.weight", layer.path);
        let first = live.iter().position(|a| a.replaced_parameters().contains(&weight.as_str())).unwrap_or(0);
        let Some(base) = live.get(first) else { return layer.forward(hidden_states) };
        let mut output = base.linear(layer, hidden_states)?;
        for (_, adapter) in live.iter().enumerate().filter(|(position, _)| *position != first) {
            output = adapter.add_to(layer, hidden_states, output).map_err(to_model)?;
        }
        Ok(output)
    }

    fn embedding(&self, input_ids: &Tensor, embeddings: Tensor) -> pt_model::Result<Tensor> {
        self.live().into_iter().try_fold(embeddings, |embeddings, adapter| adapter.embedding(input_ids, embeddings))
    }

    fn branch(&self, branch: Branch, layer: usize, input: &Tensor, output: Tensor) -> pt_model::Result<Tensor> {
        self.live().into_iter().try_fold(output, |output, adapter| adapter.branch(branch, layer, input, output))
    }

    fn gap(&self, layer: usize, hidden_states: Tensor) -> pt_model::Result<Tensor> {
        self.live().into_iter().try_fold(hidden_states, |hidden_states, adapter| adapter.gap(layer, hidden_states))
    }

    fn parameter(&self, path: &str) -> Option<Tensor> {
        self.live().into_iter().find_map(|adapter| adapter.parameter(path))
    }

    fn set_training(&self, is_training: bool) -> bool {
        // Each is switched, active or not, so no `any` that ends early.
        self.adapters.iter().fold(false, |was, (_, adapter)| adapter.set_training(is_training) | was)
    }
}
