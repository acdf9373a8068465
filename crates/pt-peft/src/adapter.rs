//! What every method has in common.

use crate::{PeftError, Result};
use pt_model::{CausalLm, Linear, Sites};
use pt_tensor::{DenseWeight, Tensor, Weight, no_grad};
use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;

/// A parameter-efficient method on a model: sites that can be trained, switched off, saved and, for most, merged.
///
/// Laws, checked by [`testing::adapter_laws`](crate::testing::adapter_laws):
/// - new, it is the bare model where its paper says so;
/// - it alone is trained: each of its values gets a gradient, the model's none;
/// - switched off, the model gives the values of [`pt_model::Bare`], bit for bit;
/// - what a batch holds beside a sequence, a prompt that is shared or repeated, activation checkpointing and the
///   key/value cache change its values by rounding at most;
/// - merged, the bare model gives the values of the adapter switched on, within rounding;
/// - unmerged, the model's weights are what they were, bit for bit;
/// - saved and loaded, the adapter gives the same values, bit for bit, or within rounding where it is saved as another.
///
/// State is behind `Cell`s, because a forward pass and its graph share the adapter (`Rc<dyn Sites>`).
pub trait Adapter: Sites {
    /// The trained tensors, leaves, by stable names; writing into them in place changes the adapter.
    fn parameters(&self) -> Vec<(String, Tensor)>;

    /// Number of trained values.
    fn num_trainable(&self) -> usize {
        self.parameters().iter().map(|(_, tensor)| tensor.numel()).sum()
    }

    /// What whoever starts a run should know of it, in a sentence.
    fn note(&self) -> Option<String> {
        None
    }

    /// How many times the run's learning rate a parameter of this name is trained with (LoRA+).
    fn lr_factor(&self, _name: &str) -> f64 {
        1.0
    }

    /// Whether its folder holds another adapter of the same values, and not its own tensors: one that starts from the
    /// model's weights (PiSSA) is saved as what it adds to them, a projected prefix as what the projection gives.
    fn is_saved_converted(&self) -> bool {
        false
    }

    /// Whether the gradient of a parameter of this name is that of the values, and not, as the method's paper has it, one
    /// that holds something constant (DoRA: the norms of the rows).
    fn is_gradient_exact(&self, _name: &str) -> bool {
        true
    }

    /// Switches the adapter on or off; off, it is the bare model.
    fn set_enabled(&self, is_enabled: bool);

    /// The method around a linear layer that others may have changed already, for several adapters on one layer:
    /// `inner` is that layer as it would be without this adapter.
    ///
    /// # Errors
    /// When the shapes do not fit.
    fn around_linear(
        &self,
        _layer: &Linear,
        hidden_states: &Tensor,
        inner: &dyn Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        inner(hidden_states)
    }

    /// Names of parameters that the method replaces whole, the output layer's weight where it changes what that gives,
    /// and `prompt_embeddings` where it brings virtual tokens; two adapters cannot both replace one.
    fn replaced_parameters(&self) -> Vec<&str> {
        vec![]
    }

    /// Writes the adapter to a folder in PEFT's format.
    ///
    /// # Errors
    /// Those of the tensor layer; a new folder appears whole or not at all.
    fn save(&self, folder: &Path) -> Result<()>;

    /// Puts the update into the model's weights; the adapter then adds nothing until it is unmerged.
    ///
    /// # Errors
    /// [`PeftError::State`] when it is merged already, [`PeftError::NotMergeable`] for a method that is no change of
    /// weights; the model is then as it was.
    fn merge_into(&self, model: &mut CausalLm) -> Result<()>;

    /// Gives the model the weights back that it had before [`merge_into`](Self::merge_into).
    ///
    /// # Errors
    /// [`PeftError::State`] when it is not merged, or when the weights are no longer those that it put in: adapters
    /// merged one after another come out in reverse order. The model is then as it was.
    fn unmerge_from(&self, model: &mut CausalLm) -> Result<()>;
}

/// A trained leaf as a computation wants it: itself where a graph is recorded, else without the wish for a gradient, so
/// that kernels without a backward pass may be chosen.
pub(crate) fn for_use(leaf: &Tensor) -> Tensor {
    // tch does not tell whether a graph is recorded; the product of nothing does. (A view of a leaf keeps its wish.)
    let is_recorded = (leaf.flatten(0, -1).narrow(0, 0, 0) * 1.0).requires_grad();
    if is_recorded { leaf.shallow_clone() } else { leaf.detach() }
}

/// A weight that a merge puts into a layer, and a bias where that changes too.
pub(crate) struct NewWeight {
    /// [`Linear::index`].
    pub(crate) index: usize,
    pub(crate) weight: Rc<dyn Weight>,
    pub(crate) bias: Option<Tensor>,
}

/// What a merge displaced.
#[derive(Debug, Default)]
pub(crate) struct Merged {
    layers: Vec<Displaced>,
    values: Vec<Overwritten>,
}

/// A layer's weight and bias before the merge, and the weight after it.
#[derive(Debug)]
struct Displaced {
    index: usize,
    before: (Rc<dyn Weight>, Option<Tensor>),
    installed: (Rc<dyn Weight>, Option<Tensor>),
}

impl Displaced {
    /// Whether a layer still has what the merge put there. A merge may change the bias alone.
    fn is_installed_in(&self, layer: &Linear) -> bool {
        let address = |bias: &Option<Tensor>| bias.as_ref().map(Tensor::data_ptr);
        let (weight, bias) = &self.installed;
        layer.index == self.index && Rc::ptr_eq(&layer.weight, weight) && address(&layer.bias) == address(bias)
    }
}

/// A parameter that was overwritten in place, with its values before the merge and after it.
#[derive(Debug)]
struct Overwritten {
    parameter: Tensor,
    before: Tensor,
    written: Tensor,
}

/// What every adapter keeps of where it stands.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) is_enabled: Cell<bool>,
    pub(crate) is_training: Cell<bool>,
    merged: RefCell<Option<Merged>>,
}

impl State {
    /// Enabled, not training, not merged.
    pub(crate) fn new() -> Self {
        Self { is_enabled: Cell::new(true), is_training: Cell::new(false), merged: RefCell::new(None) }
    }

    /// Whether the adapter takes part in a forward pass: enabled and not already in the weights.
    pub(crate) fn is_live(&self) -> bool {
        self.is_enabled.get() && self.merged.borrow().is_none()
    }

    /// Merges once: `merge` does it, unless the adapter is merged already.
    pub(crate) fn merge(&self, merge: impl FnOnce() -> Result<Merged>) -> Result<()> {
        if self.merged.borrow().is_some() {
            return Err(PeftError::State("the adapter is merged already".into()));
        }
        *self.merged.borrow_mut() = Some(no_grad(merge)?);
        Ok(())
    }

    /// Gives back what the merge displaced.
    pub(crate) fn unmerge(&self, layers: &mut [&mut Linear]) -> Result<()> {
        let mut merged = self.merged.borrow_mut();
        let held = merged.as_ref().ok_or_else(|| PeftError::State("the adapter is not merged".into()))?;
        held.restore(layers)?;
        *merged = None;
        Ok(())
    }
}

impl Merged {
    /// Puts weights into a model's layers, and values over parameters outside them (the parameter, its new values).
    pub(crate) fn into_model(
        model: &mut CausalLm,
        mut weights: Vec<NewWeight>,
        outside: Vec<(Tensor, Tensor)>,
    ) -> Result<Self> {
        let mut merged = Self::default();
        let mut layers = model.linear_layers_mut()?;
        if let Some(output) = layers.last()
            && let Some(dense) = output.weight.parameter()
        {
            // A tied output layer shares the embedding's storage, which is about to be overwritten; PEFT, too, leaves
            // the other end of the tie as it was.
            let is_tied = outside.iter().any(|(parameter, _)| parameter.data_ptr() == dense.data_ptr());
            if is_tied && !weights.iter().any(|new| new.index == output.index) {
                let weight = Rc::new(DenseWeight::new(dense.copy())?);
                weights.push(NewWeight { index: output.index, weight, bias: None });
            }
        }
        merged.install(&mut layers, weights);
        for (parameter, values) in outside {
            merged.overwrite(parameter, &values);
        }
        Ok(merged)
    }

    /// Puts weights into layers.
    pub(crate) fn install(&mut self, layers: &mut [&mut Linear], weights: Vec<NewWeight>) {
        for NewWeight { index, weight, bias } in weights {
            if let Some(layer) = layers.iter_mut().find(|layer| layer.index == index) {
                let old_bias = layer.bias.as_ref().map(Tensor::shallow_clone);
                let old_weight = std::mem::replace(&mut layer.weight, weight.clone());
                layer.bias = bias.or_else(|| layer.bias.take());
                let installed = (weight, layer.bias.as_ref().map(Tensor::shallow_clone));
                self.layers.push(Displaced { index, before: (old_weight, old_bias), installed });
            }
        }
    }

    /// Overwrites a parameter outside the layers.
    fn overwrite(&mut self, mut parameter: Tensor, values: &Tensor) {
        no_grad(|| {
            let before = parameter.copy();
            parameter.copy_(values);
            self.values.push(Overwritten { before, written: parameter.copy(), parameter });
        });
    }

    /// Gives everything back; on an error nothing is changed.
    fn restore(&self, layers: &mut [&mut Linear]) -> Result<()> {
        for displaced in &self.layers {
            if !layers.iter().any(|layer| displaced.is_installed_in(layer)) {
                return Err(not_ours());
            }
        }
        if !no_grad(|| self.values.iter().all(|value| value.parameter.equal(&value.written))) {
            return Err(not_ours());
        }
        for Displaced { index, before: (weight, bias), .. } in &self.layers {
            if let Some(layer) = layers.iter_mut().find(|layer| layer.index == *index) {
                layer.weight = weight.clone();
                layer.bias = bias.as_ref().map(Tensor::shallow_clone);
            }
        }
        no_grad(|| {
            for value in &self.values {
                value.parameter.shallow_clone().copy_(&value.before);
            }
        });
        Ok(())
    }
}

fn not_ours() -> PeftError {
    PeftError::State(
        "the model's weights are not those that this adapter was merged into: unmerge what was merged after it first"
            .into(),
    )
}
