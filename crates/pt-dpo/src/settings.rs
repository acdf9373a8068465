//! The objective's part of a run's settings.

use crate::LossConfig;
use pt_train::settings::ObjectiveConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What preference training optimizes. The part of a run's settings named `objective`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DpoConfig {
    /// The losses.
    pub loss: LossConfig,
    /// What the policy is held to.
    pub reference: ReferenceConfig,
}

/// What the policy is held to. Without a model or an adapter of its own the reference is the policy as it stands before
/// training: the model without its new adapter, or with the adapter that training goes on from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ReferenceConfig {
    /// Another model as the reference: a folder, a .gguf file or a name, of the same vocabulary.
    pub model: Option<String>,
    /// An adapter over the model (or over `reference.model`) as the reference.
    pub adapter: Option<PathBuf>,
    /// Compute its log-probs once, before training, and keep them in the run; otherwise beside each step.
    pub precompute: bool,
    /// Move the reference towards the policy every N steps (TR-DPO), which then runs beside each step; 0 for never.
    pub sync_every: u64,
    /// How far it moves: reference = a · policy + (1 − a) · reference.
    pub sync_mixup: f64,
}

impl Default for ReferenceConfig {
    fn default() -> Self {
        Self { model: None, adapter: None, precompute: true, sync_every: 0, sync_mixup: 0.6 }
    }
}

impl ReferenceConfig {
    /// Whether log-probs are computed once.
    pub fn is_precomputed(&self) -> bool {
        self.precompute && self.sync_every == 0
    }
}

impl ObjectiveConfig for DpoConfig {
    /// For adapters; all weights are trained with 1e-6 or less.
    const LEARNING_RATE: f64 = 2e-5;

    fn faults(&self) -> Vec<String> {
        let mut faults = self.loss.faults();
        faults.extend(self.loss.unused());
        let ReferenceConfig { model, adapter, precompute: _, sync_every, sync_mixup } = &self.reference;
        if !(*sync_mixup > 0.0 && *sync_mixup <= 1.0) {
            faults.push(format!("reference.sync_mixup is {sync_mixup}, expected over 0 to 1"));
        }
        if *sync_every == 0 && *sync_mixup != ReferenceConfig::default().sync_mixup {
            faults.push(format!(
                "reference.sync_mixup is {sync_mixup}, expected {}: reference.sync_every is 0, so the reference does not move",
                ReferenceConfig::default().sync_mixup
            ));
        }
        let is_other = model.is_some() || adapter.is_some();
        if is_other && *sync_every > 0 {
            faults.push(format!(
                "reference.sync_every is {sync_every} beside a reference of its own, expected 0: only a copy of the \
                 policy can follow it"
            ));
        }
        if (is_other || *sync_every > 0) && !self.loss.needs_reference() {
            faults.push("a reference is set, and no loss of loss_type has use for one".into());
        }
        faults
    }
}
