//! The model's own biases, where they are trained beside the update.

use super::options::BiasMode;
use crate::Result;
use crate::base::Base;
use crate::saved::SavedModules;
use pt_model::CausalLm;
use pt_tensor::{Kind, Tensor, no_grad};
use std::collections::BTreeMap;

/// A trained bias.
#[derive(Debug)]
struct Bias {
    /// An f32 leaf.
    value: Tensor,
    /// Whether its layer has an update, behind which PEFT's files have it.
    is_targeted: bool,
}

/// All of them, by the path of their module.
#[derive(Debug)]
pub(super) struct Biases {
    by_module: BTreeMap<String, Bias>,
    /// What the model computes in.
    kind: Kind,
}

impl Biases {
    /// Trainable f32 copies of the biases that `mode` chooses; `targets` are the paths of the layers with an update.
    pub(super) fn copies(mode: BiasMode, base: &Base<'_>, targets: &[&str], saved: &SavedModules) -> Result<Self> {
        let biases = if mode == BiasMode::None { vec![] } else { base.biases() };
        let copy = |(name, value): (String, Tensor)| {
            let module = name.strip_suffix(".bias")?;
            let is_targeted = targets.contains(&module);
            if saved.contains(&name) || (mode == BiasMode::LoraOnly && !is_targeted) {
                return None;
            }
            let value = no_grad(|| value.detach().to_kind(Kind::Float).copy()).set_requires_grad(true);
            Some((module.to_string(), Bias { value, is_targeted }))
        };
        Ok(Self { by_module: biases.into_iter().filter_map(copy).collect(), kind: base.kind() })
    }

    /// The bias of a module, f32.
    pub(super) fn get(&self, module: &str) -> Option<&Tensor> {
        self.by_module.get(module).map(|bias| &bias.value)
    }

    /// Names in the model, names in files (without the prefix), and values.
    pub(super) fn named(&self) -> impl Iterator<Item = (String, String, &Tensor)> {
        self.by_module.iter().map(|(module, bias)| {
            let inside = if bias.is_targeted { ".base_layer" } else { "" };
            (format!("{module}.bias"), format!("{module}{inside}.bias"), &bias.value)
        })
    }

    /// What [`pt_model::Sites::parameter`] gives for a path: a norm's bias, in the kind of its input.
    pub(super) fn parameter(&self, path: &str) -> Option<Tensor> {
        Some(self.get(path.strip_suffix(".bias")?)?.to_kind(self.kind))
    }

    /// Those outside linear layers, with the values that a merge writes over them.
    pub(super) fn outside_layers(&self, model: &CausalLm) -> Vec<(Tensor, Tensor)> {
        let paths: Vec<&str> = model.linear_layers().map(|layer| layer.path.as_str()).collect();
        self.by_module
            .iter()
            .filter(|(module, _)| !paths.contains(&module.as_str()))
            .filter_map(|(module, bias)| Some((model.parameter(&format!("{module}.bias"))?, bias.value.detach())))
            .collect()
    }
}
