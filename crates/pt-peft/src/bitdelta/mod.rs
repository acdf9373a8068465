//! BitDelta: a fine-tune as one bit a weight and a few scales over its base.
//!
//! [`compress`] makes a [`StoredDelta`] of two models; [`BitDeltaAdapter`] applies one to its base on the fly, trains its
//! scales (`pt_train::distill`) and merges it.

mod compress;
mod config;
mod fingerprint;
mod original;
mod stored;

pub use compress::{FineTuned, compress};
pub use config::{BitDeltaConfig, KeptWhole, ScaleSharing};
pub use stored::{DeltaBytes, StoredDelta};

use crate::adapter::{Adapter, Merged, NewWeight, State};
use crate::base::Base;
use crate::error::to_model;
use crate::saved::SavedModules;
use crate::{PeftError, Result};
use pt_model::{CausalLm, Linear, Sites};
use pt_tensor::{DenseWeight, Kind, ScaledSigns, Tensor, TensorError, add_deltas};
use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// A 1-bit delta on the linear layers of a model: y = x·W_baseᵀ + x·(delta_scale · signs)ᵀ + bias, and parameters that it
/// carries whole in the place of the model's (BitDelta, Liu et al. 2024, <https://arxiv.org/abs/2402.10193>).
///
/// Only the scales are trained, as the paper says; its script moves embeddings, norms and the output layer as well.
#[derive(Debug)]
pub struct BitDeltaAdapter {
    config: BitDeltaConfig,
    distilled_steps: Cell<u64>,
    /// By [`Linear::index`].
    layers: Vec<Option<SignedLayer>>,
    whole: SavedModules,
    /// As they are stored.
    stored_whole: Vec<(String, Tensor)>,
    base: fingerprint::Fingerprint,
    state: State,
}

/// A layer that has signs.
#[derive(Debug)]
struct SignedLayer {
    path: String,
    signs: ScaledSigns,
    /// The fine-tune's bias, where the delta carries it.
    bias: Option<Tensor>,
}

impl BitDeltaAdapter {
    /// Puts a delta on its base.
    ///
    /// # Errors
    /// [`PeftError::Keys`] when the base has other layers, [`PeftError::NotAnAdapter`] when it has other values: a delta
    /// means nothing over another model.
    pub fn new<'a>(delta: StoredDelta, base: impl Into<Base<'a>>) -> Result<Self> {
        let base = base.into();
        check_names(&delta, &base)?;
        if !delta.base.fits(&base)? {
            return Err(PeftError::NotAnAdapter {
                path: delta.origin,
                reason: "its base has other weights than this model (base_checksum)".into(),
                hint: format!(
                    "give the model that the delta was made over{}, without another adapter merged into it",
                    delta.config.base_model_name_or_path.map_or(String::new(), |name| format!(", `{name}`"))
                ),
            });
        }
        let (kind, device) = (base.kind(), base.device());
        let mut whole: Vec<(String, Tensor)> =
            delta.whole.iter().map(|(name, value)| (name.clone(), value.to_kind(kind).to_device(device))).collect();
        if let Some((embedding, output)) = base.tied_output() {
            // The output layer goes with the embedding that it is tied to, unless the delta has one of its own.
            let value_of =
                |name: &String| whole.iter().find(|(known, _)| known == name).map(|(_, v)| v.shallow_clone());
            let tied = if value_of(&output).is_some() { None } else { value_of(&embedding) };
            whole.extend(tied.map(|value| (output, value)));
        }
        let whole = SavedModules::frozen(whole, kind);
        let size = base.layers.iter().map(|layer| layer.index + 1).max().unwrap_or(0);
        let mut layers: Vec<Option<SignedLayer>> = (0..size).map(|_| None).collect();
        for (path, signs) in delta.signs {
            let Some(layer) = base.layers.iter().find(|layer| layer.path == path) else { continue };
            let signs = signs.to_device(layer.weight.device())?;
            let _ = signs.scale().set_requires_grad(true);
            let bias = whole.get(&format!("{path}.bias")).map(Tensor::shallow_clone);
            layers[layer.index] = Some(SignedLayer { path, signs, bias });
        }
        Ok(Self {
            distilled_steps: Cell::new(delta.config.distilled_steps),
            config: delta.config,
            layers,
            whole,
            stored_whole: delta.whole,
            base: delta.base,
            state: State::new(),
        })
    }

    /// Loads a delta from a folder.
    ///
    /// # Errors
    /// As [`StoredDelta::load`] and [`new`](Self::new).
    pub fn load<'a>(folder: &Path, base: impl Into<Base<'a>>) -> Result<Self> {
        Self::new(StoredDelta::load(folder)?, base)
    }

    /// A copy of the delta with its scales as they are now, which training then leaves alone.
    ///
    /// # Errors
    /// [`PeftError::Tensor`] when there is no memory for it.
    pub fn to_stored(&self) -> Result<StoredDelta> {
        let stored = self.shared();
        let signs =
            stored.signs.iter().map(|(path, signs)| Ok((path.clone(), signs.copy()?))).collect::<Result<_>>()?;
        Ok(StoredDelta { signs, ..stored })
    }

    /// The delta, over the very tensors that are trained.
    fn shared(&self) -> StoredDelta {
        let signs = self.layers.iter().flatten().map(|layer| (layer.path.clone(), layer.signs.clone())).collect();
        let whole = self.stored_whole.iter().map(|(name, value)| (name.clone(), value.shallow_clone())).collect();
        let config = BitDeltaConfig { distilled_steps: self.distilled_steps.get(), ..self.config.clone() };
        StoredDelta { config, signs, whole, base: self.base, origin: PathBuf::from("the delta") }
    }

    /// Notes that distillation trained the scales for so many steps more.
    pub fn note_distilled(&self, steps: u64) {
        self.distilled_steps.set(self.distilled_steps.get() + steps);
    }

    fn layer_of(&self, layer: &Linear) -> Option<&SignedLayer> {
        self.layers.get(layer.index).and_then(Option::as_ref).filter(|_| self.state.is_live())
    }

    /// Whether signs are all that it changes of a layer.
    fn has_signs_alone(&self, layer: &Linear) -> bool {
        match self.layer_of(layer) {
            Some(signed) => signed.bias.is_none(),
            None => !self.state.is_live() || self.whole.get(&format!("{}.weight", layer.path)).is_none(),
        }
    }
}

/// Every layer of the base but the output layer has signs of its shape, and what is carried whole is the base's.
fn check_names(delta: &StoredDelta, base: &Base<'_>) -> Result<()> {
    let (mut missing, mut unexpected, mut shapes) = (Vec::new(), Vec::new(), Vec::new());
    let of_blocks = base.layers.iter().enumerate().filter(|(position, _)| Some(*position) != base.output);
    let of_blocks: Vec<&Linear> = of_blocks.map(|(_, layer)| *layer).collect();
    for layer in &of_blocks {
        match delta.signs.iter().find(|(path, _)| *path == layer.path) {
            None => missing.push(format!("{}.signs", layer.path)),
            Some((_, signs)) if signs.size() != layer.weight.size() => {
                let size = |size| ScaledSigns::signs_size(size);
                shapes.push((format!("{}.signs", layer.path), size(signs.size()), size(layer.weight.size())));
            }
            Some(_) => {}
        }
    }
    for (path, _) in &delta.signs {
        if !of_blocks.iter().any(|layer| layer.path == *path) {
            unexpected.push(format!("{path}.signs"));
        }
    }
    for (name, value) in &delta.whole {
        match base.parameter(name)? {
            None => unexpected.push(name.clone()),
            Some(own) if own.size() != value.size() => shapes.push((name.clone(), value.size(), own.size())),
            Some(_) => {}
        }
    }
    if missing.is_empty() && unexpected.is_empty() && shapes.is_empty() {
        return Ok(());
    }
    Err(PeftError::Keys { path: delta.origin.clone(), missing, unexpected, shapes })
}

impl Sites for BitDeltaAdapter {
    fn linear(&self, layer: &Linear, hidden_states: &Tensor) -> pt_model::Result<Tensor> {
        if let Some(SignedLayer { signs, bias, .. }) = self.layer_of(layer) {
            let y = layer.weight.project(hidden_states, bias.as_ref().or(layer.bias.as_ref()))?;
            return Ok(signs.add_to(&y, hidden_states)?);
        }
        if self.state.is_live()
            && let Some(output) = self.whole.linear(layer, hidden_states).map_err(to_model)?
        {
            return Ok(output);
        }
        layer.forward(hidden_states)
    }

    fn output(&self, layer: &Linear, hidden_states: &Tensor) -> pt_model::Result<(Tensor, Tensor)> {
        let weight = self.whole.get(&format!("{}.weight", layer.path)).filter(|_| self.state.is_live());
        match weight {
            Some(weight) => Ok((hidden_states.shallow_clone(), weight.to_kind(hidden_states.kind()))),
            None => pt_model::Bare.output(layer, hidden_states),
        }
    }

    fn parameter(&self, path: &str) -> Option<Tensor> {
        if self.state.is_live() { self.whole.parameter(path) } else { None }
    }
}

impl Adapter for BitDeltaAdapter {
    fn parameters(&self) -> Vec<(String, Tensor)> {
        let layers = self.layers.iter().flatten();
        layers.map(|layer| (format!("{}.scale", layer.path), layer.signs.scale().shallow_clone())).collect()
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
        let y = inner(hidden_states)?;
        let Some(SignedLayer { signs, bias, .. }) = self.layer_of(layer) else { return Ok(y) };
        let y = match (bias, &layer.bias) {
            (Some(own), Some(base)) => y + (own - base),
            _ => y,
        };
        Ok(signs.add_to(&y, hidden_states)?)
    }

    fn replaced_parameters(&self) -> Vec<&str> {
        self.whole.iter().map(|saved| saved.name.as_str()).collect()
    }

    fn save(&self, folder: &Path) -> Result<()> {
        self.shared().save(folder)
    }

    fn merge_into(&self, model: &mut CausalLm) -> Result<()> {
        self.state.merge(|| {
            let mut weights = Vec::new();
            for layer in model.linear_layers() {
                if let Some(SignedLayer { signs, bias, .. }) = self.layers.get(layer.index).and_then(Option::as_ref) {
                    let dense = layer.weight.dense()?;
                    let weight = (dense.to_kind(Kind::Float) + signs.dense()?).to_kind(dense.kind());
                    let bias = bias.as_ref().map(Tensor::copy);
                    weights.push(NewWeight { index: layer.index, weight: Rc::new(DenseWeight::new(weight)?), bias });
                } else {
                    weights.extend(self.whole.merged_layer(layer)?);
                }
            }
            let outside = self.whole.outside_layers(model);
            Merged::into_model(model, weights, outside)
        })
    }

    fn unmerge_from(&self, model: &mut CausalLm) -> Result<()> {
        self.state.unmerge(&mut model.linear_layers_mut()?)
    }
}

/// A linear layer over rows that belong to different deltas of one base: the base's product once, and to each row that of
/// its own delta. `tenant_of_row` has an index of `adapters`, or none for the base alone, for each row.
///
/// Each row gets what [`Sites::linear`] of its adapter gives it alone. Signs are added in one pass where no graph is
/// recorded; a layer that an adapter changes in more than signs (a bias, an output layer carried whole) is computed by
/// turns. Embeddings and norms are no rows' matter: adapters that carry those whole cannot share a batch by this alone.
///
/// # Shapes
/// `hidden_states`: `[rows, in_features]` → `[rows, out_features]`
///
/// # Errors
/// [`PeftError::Tensor`] when shapes do not fit or a tenant has no adapter.
pub fn tenants_linear(
    layer: &Linear,
    hidden_states: &Tensor,
    tenant_of_row: &[Option<usize>],
    adapters: &[&BitDeltaAdapter],
) -> Result<Tensor> {
    let num_rows = hidden_states.size().first().copied().unwrap_or(0);
    if num_rows != tenant_of_row.len() as i64 {
        return Err(argument("tenant_of_row", format!("of {} rows", tenant_of_row.len()), format!("of {num_rows}")));
    }
    if let Some(tenant) = tenant_of_row.iter().flatten().find(|tenant| **tenant >= adapters.len()) {
        return Err(argument("tenant_of_row", tenant.to_string(), format!("under {} adapters", adapters.len())));
    }
    let y = layer.forward(hidden_states)?;
    if adapters.iter().all(|adapter| adapter.has_signs_alone(layer)) {
        let (mut deltas, mut places) = (Vec::new(), Vec::new());
        for adapter in adapters {
            let signed = adapter.layer_of(layer);
            places.push(signed.map(|_| deltas.len()));
            deltas.extend(signed.map(|signed| &signed.signs));
        }
        let tenants: Vec<Option<usize>> =
            tenant_of_row.iter().map(|tenant| tenant.and_then(|tenant| places[tenant])).collect();
        return Ok(add_deltas(&deltas, &tenants, &y, hidden_states)?);
    }
    let mut output = y;
    for (index, adapter) in adapters.iter().enumerate() {
        let is_own = |row: &i64| tenant_of_row[*row as usize] == Some(index);
        let rows: Vec<i64> = (0..num_rows).filter(is_own).collect();
        if !rows.is_empty() {
            let rows = Tensor::f_from_slice(&rows)?.f_to_device(output.device())?;
            let own = adapter.linear(layer, &hidden_states.f_index_select(0, &rows)?)?;
            output = output.f_index_copy(0, &rows, &own)?;
        }
    }
    Ok(output)
}

fn argument(what: &str, found: String, expected: String) -> PeftError {
    TensorError::Argument { what: what.into(), found, expected }.into()
}
