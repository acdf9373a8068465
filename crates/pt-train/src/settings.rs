//! Settings that every run shares, beside those of its objective.

use crate::data::{BatchConfig, DataConfig};
use crate::error::{Result, TrainError};
use crate::schedule::ScheduleConfig;
use pt_peft::{
    BitDeltaConfig, BitfitConfig, BottleneckConfig, Ia3Config, LoraConfig, Method, MethodConfig, PrefixTuningConfig,
    PromptTuningConfig, TinytlConfig,
};
use pt_tensor::AdamWConfig;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// What an objective has to say of its own part of the settings, [`TrainConfig::objective`].
pub trait ObjectiveConfig:
    Clone + Default + PartialEq + std::fmt::Debug + Serialize + DeserializeOwned + JsonSchema
{
    /// The learning rate of a run that names none, for an adapter.
    const LEARNING_RATE: f64;
    /// Steps between checkpoints of a run that says nothing of them.
    const SAVE_EVERY: u64 = 100;

    /// Every fault of the settings, in words.
    fn faults(&self) -> Vec<String>;
}

/// Settings of a run: those of the loop and those of what is optimized. Defaults are those of LoRA training in the
/// literature.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[serde(bound(serialize = "O: Serialize", deserialize = "O: ObjectiveConfig"))]
#[schemars(bound = "O: ObjectiveConfig")]
pub struct TrainConfig<O> {
    /// What is optimized; `--set FIELD=VALUE` reaches these fields without the section's name, too.
    pub objective: O,
    /// Passes over the data; ignored when `max_steps` is set.
    pub epochs: f64,
    /// Optimizer steps.
    pub max_steps: Option<u64>,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Its course over the run.
    pub schedule: ScheduleConfig,
    /// The optimizer.
    pub adamw: AdamWConfig,
    /// Gradients are scaled to at most this joint 2-norm; null for no clipping.
    pub max_grad_norm: Option<f64>,
    /// How rows become batches.
    pub batch: BatchConfig,
    /// How rows become tokens.
    pub data: DataConfig,
    /// Keep only layer inputs and compute activations again in the backward pass.
    pub activation_checkpointing: bool,
    /// Write a record every N steps.
    pub log_every: u64,
    /// Evaluate every N steps (and at the end); 0 for the end only.
    pub eval_every: u64,
    /// Save a checkpoint every N steps (and at the end); 0 for the end only.
    pub save_every: u64,
    /// Checkpoints to keep beside the best one.
    pub keep_checkpoints: usize,
    /// Stop after this many evaluations in a row without a better loss; null for never.
    pub early_stopping: Option<u64>,
    /// Seed of adapter weights and dropout (the order of rows has its own, `batch.seed`).
    pub seed: u64,
    /// The parameter-efficient method, whose settings stand in the section of its name; null trains all weights.
    pub peft: Option<Method>,
    /// LoRA.
    pub lora: LoraConfig,
    /// IA3.
    pub ia3: Ia3Config,
    /// BitFit.
    pub bitfit: BitfitConfig,
    /// Bottleneck adapters.
    pub bottleneck: BottleneckConfig,
    /// Prompt tuning, which wants a learning rate of 1e-2 to 3e-1.
    pub prompt_tuning: PromptTuningConfig,
    /// Prefix tuning, which wants a learning rate of 1e-3 to 1e-2.
    pub prefix_tuning: PrefixTuningConfig,
    /// TinyTL.
    pub tinytl: TinytlConfig,
}

impl<O: ObjectiveConfig> Default for TrainConfig<O> {
    fn default() -> Self {
        Self {
            objective: O::default(),
            epochs: 1.0,
            max_steps: None,
            learning_rate: O::LEARNING_RATE,
            schedule: ScheduleConfig::default(),
            adamw: AdamWConfig::default(),
            max_grad_norm: Some(1.0),
            batch: BatchConfig::default(),
            data: DataConfig::default(),
            activation_checkpointing: false,
            log_every: 1,
            eval_every: 0,
            save_every: O::SAVE_EVERY,
            keep_checkpoints: 2,
            early_stopping: None,
            seed: 0,
            peft: Some(Method::Lora),
            lora: LoraConfig::default(),
            ia3: Ia3Config::default(),
            bitfit: BitfitConfig::default(),
            bottleneck: BottleneckConfig::default(),
            prompt_tuning: PromptTuningConfig::default(),
            prefix_tuning: PrefixTuningConfig::default(),
            tinytl: TinytlConfig::default(),
        }
    }
}

impl<O: ObjectiveConfig> TrainConfig<O> {
    /// Lists every fault at once.
    ///
    /// # Errors
    /// [`TrainError::Config`].
    pub fn validate(&self) -> Result<()> {
        let faults = self.faults();
        if faults.is_empty() {
            return Ok(());
        }
        Err(TrainError::Config { place: "training".into(), message: faults.join("; ") })
    }

    /// As [`validate`](Self::validate), and that the settings fit a run with or without held-out rows.
    ///
    /// # Errors
    /// [`TrainError::Config`].
    pub fn validate_with(&self, has_eval_data: bool) -> Result<()> {
        self.validate()?;
        match self.early_stopping {
            Some(patience) if !has_eval_data => Err(TrainError::Config {
                place: "training".into(),
                message: format!(
                    "early_stopping is {patience}, and there is no held-out data to stop by: expected some, or null"
                ),
            }),
            _ => Ok(()),
        }
    }

    /// The chosen method with its settings.
    pub fn method(&self) -> Option<MethodConfig> {
        self.peft.map(|method| self.settings_of(method))
    }

    /// The settings in the section of a method, chosen or not.
    pub fn settings_of(&self, method: Method) -> MethodConfig {
        match method {
            Method::Lora => MethodConfig::Lora(self.lora.clone()),
            Method::Ia3 => MethodConfig::Ia3(self.ia3.clone()),
            Method::Bitfit => MethodConfig::Bitfit(self.bitfit.clone()),
            Method::Bottleneck => MethodConfig::Bottleneck(self.bottleneck.clone()),
            Method::PromptTuning => MethodConfig::PromptTuning(self.prompt_tuning.clone()),
            Method::PrefixTuning => MethodConfig::PrefixTuning(self.prefix_tuning.clone()),
            Method::Tinytl => MethodConfig::Tinytl(self.tinytl.clone()),
            // Never chosen by name: it is made of two models.
            Method::BitDelta => MethodConfig::BitDelta(BitDeltaConfig::default()),
        }
    }

    /// Chooses a method with its settings.
    pub fn set_method(&mut self, method: MethodConfig) {
        self.peft = Some(method.method());
        match method {
            MethodConfig::Lora(config) => self.lora = config,
            MethodConfig::Ia3(config) => self.ia3 = config,
            MethodConfig::Bitfit(config) => self.bitfit = config,
            MethodConfig::Bottleneck(config) => self.bottleneck = config,
            MethodConfig::PromptTuning(config) => self.prompt_tuning = config,
            MethodConfig::PrefixTuning(config) => self.prefix_tuning = config,
            MethodConfig::Tinytl(config) => self.tinytl = config,
            MethodConfig::BitDelta(_) => {}
        }
    }

    /// Optimizer steps of a run over `num_rows` rows.
    pub fn total_steps(&self, num_rows: usize) -> u64 {
        let steps_per_epoch = num_rows.div_ceil(self.batch.rows_per_step().max(1));
        self.max_steps.unwrap_or_else(|| (self.epochs * steps_per_epoch as f64).ceil() as u64)
    }

    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.max_steps.is_none() && !(self.epochs > 0.0 && self.epochs.is_finite()) {
            faults.push(format!("epochs is {}, expected over 0", self.epochs));
        }
        if self.max_steps == Some(0) {
            faults.push("max_steps is 0, expected at least 1".into());
        }
        if !(self.learning_rate > 0.0 && self.learning_rate.is_finite()) {
            faults.push(format!("learning_rate is {}, expected over 0", self.learning_rate));
        }
        if self.max_grad_norm.is_some_and(|norm| norm.is_nan() || norm <= 0.0) {
            faults.push(format!("max_grad_norm is {:?}, expected over 0 or null", self.max_grad_norm));
        }
        if self.log_every == 0 {
            faults.push("log_every is 0, expected at least 1".into());
        }
        if self.batch.batch_size == 0 || self.batch.accumulation == 0 || self.batch.max_tokens == Some(0) {
            let BatchConfig { batch_size, accumulation, max_tokens, .. } = &self.batch;
            let sizes = format!("batch_size {batch_size}, accumulation {accumulation}, max_tokens {max_tokens:?}");
            faults.push(format!("batch has {sizes}, expected each at least 1"));
        }
        if self.batch.batch_size.checked_mul(self.batch.accumulation).is_none() {
            let BatchConfig { batch_size, accumulation, .. } = &self.batch;
            faults.push(format!("batch_size {batch_size} times accumulation {accumulation} is too large a number"));
        }
        if self.early_stopping == Some(0) {
            faults.push("early_stopping is 0, expected at least 1, or null for never".into());
        }
        if let (Some(patience), 0) = (self.early_stopping, self.eval_every) {
            faults.push(format!("early_stopping is {patience} and eval_every is 0, expected at least 1"));
        }
        let AdamWConfig { variant: _, beta1, beta2, eps, weight_decay } = self.adamw;
        for (name, beta) in [("beta1", beta1), ("beta2", beta2)] {
            if !(0.0..1.0).contains(&beta) {
                faults.push(format!("adamw.{name} is {beta}, expected from 0 to under 1"));
            }
        }
        if !(eps > 0.0 && eps.is_finite()) {
            faults.push(format!("adamw.eps is {eps}, expected over 0"));
        }
        if !(weight_decay >= 0.0 && weight_decay.is_finite()) {
            faults.push(format!("adamw.weight_decay is {weight_decay}, expected at least 0"));
        }
        faults.extend(self.objective.faults());
        faults.extend(self.schedule.build(1).err().map(|fault| fault.to_string()));
        faults.extend(self.method().and_then(|method| method.validate().err()).map(|fault| fault.to_string()));
        let defaults = Self::default();
        for other in Method::ALL.into_iter().filter(|other| Some(*other) != self.peft) {
            if self.settings_of(other) != defaults.settings_of(other) {
                let (section, chosen) = (other.name(), self.peft.map_or("null", Method::name));
                faults.push(format!("{section} has settings and peft is {chosen}, expected none, or peft={section}"));
            }
        }
        faults
    }
}
