//! Supervised fine-tuning: −log p of the trained tokens, averaged over the whole accumulation window.

use crate::data::{BatchConfig, Batches, Cursor, DataConfig, PromptGroup};
use crate::error::{Result, TrainError};
use crate::metrics::{MetricsWriter, names};
use crate::run_dir::{Best, RunDir};
use crate::schedule::ScheduleConfig;
use crate::step::{Optimization, finite, first_not_finite};
use crate::tensorboard::EventWriter;
use pt_model::{CausalLm, PackedBatch, RunOptions, Sites};
use pt_peft::{
    BitDeltaConfig, BitfitConfig, BottleneckConfig, Ia3Config, LoraConfig, Method, MethodConfig, PrefixTuningConfig,
    PromptTuningConfig, TinytlConfig,
};
use pt_tensor::io::{SafetensorsReader, save_safetensors};
use pt_tensor::{AdamWConfig, Device, LabelLogprobs, Tensor, no_grad, peak_memory_bytes};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Settings of the training loop. Defaults are those of LoRA training in the literature.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SftConfig {
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

impl Default for SftConfig {
    fn default() -> Self {
        Self {
            epochs: 1.0,
            max_steps: None,
            learning_rate: 2e-4,
            schedule: ScheduleConfig::default(),
            adamw: AdamWConfig::default(),
            max_grad_norm: Some(1.0),
            batch: BatchConfig::default(),
            data: DataConfig::default(),
            activation_checkpointing: false,
            log_every: 1,
            eval_every: 0,
            save_every: 100,
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

impl SftConfig {
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
        self.peft.map(|method| match method {
            Method::Lora => MethodConfig::Lora(self.lora.clone()),
            Method::Ia3 => MethodConfig::Ia3(self.ia3.clone()),
            Method::Bitfit => MethodConfig::Bitfit(self.bitfit.clone()),
            Method::Bottleneck => MethodConfig::Bottleneck(self.bottleneck.clone()),
            Method::PromptTuning => MethodConfig::PromptTuning(self.prompt_tuning.clone()),
            Method::PrefixTuning => MethodConfig::PrefixTuning(self.prefix_tuning.clone()),
            Method::Tinytl => MethodConfig::Tinytl(self.tinytl.clone()),
            // Never chosen by name: it is made of two models.
            Method::BitDelta => MethodConfig::BitDelta(BitDeltaConfig::default()),
        })
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
        faults.extend(self.schedule.build(1).err().map(|fault| fault.to_string()));
        faults.extend(self.method().and_then(|method| method.validate().err()).map(|fault| fault.to_string()));
        faults
    }
}

/// What is trained: a model, what is switched on at its sites, and the tensors that learn.
pub struct Trained<'a> {
    /// The model.
    pub model: &'a CausalLm,
    /// The adapter (or [`pt_model::Bare`] for full fine-tuning).
    pub sites: Rc<dyn Sites>,
    /// The trained leaves by stable names.
    pub parameters: Vec<(String, Tensor)>,
    /// How many times the schedule's learning rate each is trained with, by name; see [`pt_peft::Adapter::lr_factor`].
    pub lr_factor: Box<dyn Fn(&str) -> f64 + 'a>,
    /// Writes the result (adapter or model files) into a folder.
    #[allow(clippy::type_complexity)]
    pub save: Box<dyn Fn(&Path) -> Result<()> + 'a>,
}

/// One record of the run, as it goes to metrics.jsonl.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepRecord {
    /// Steps done.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Passes over the data so far.
    pub epoch: f64,
    /// Mean −log p of the trained tokens of this window, nats.
    pub loss: f64,
    /// Share of trained tokens that were the most probable ones.
    pub accuracy: f64,
    /// Learning rate used.
    pub learning_rate: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Tokens through the model per second in this step, prompts included.
    pub tokens_per_second: f64,
}

/// Mean over a held-out set.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    /// Mean −log p of the labels, nats.
    pub loss: f64,
    /// Share of labels that were the most probable tokens.
    pub accuracy: f64,
    /// Labels scored.
    pub num_labels: u64,
}

/// How far a run has come, as its last checkpoint says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Steps done.
    pub steps: u64,
    /// Steps that the configuration asks for.
    pub total_steps: u64,
    /// The held-out loss did not get better any more.
    pub is_early_stopped: bool,
}

impl Standing {
    /// Whether [`train`] would do no further step.
    pub fn is_complete(&self) -> bool {
        self.steps >= self.total_steps || self.is_early_stopped
    }
}

/// How far `run` has come with these rows and settings; `None` before its first checkpoint.
///
/// # Errors
/// [`TrainError::Config`] when its checkpoint was trained on other rows, [`TrainError::Read`], [`TrainError::NotARun`].
pub fn standing(run: &RunDir, train_groups: &[PromptGroup], config: &SftConfig) -> Result<Option<Standing>> {
    let Some((_, folder)) = run.latest()? else { return Ok(None) };
    let state = TrainerState::load(&folder)?;
    state.check_rows(&folder, &fingerprint(train_groups))?;
    Ok(Some(Standing {
        steps: state.step,
        total_steps: config.total_steps(train_groups.len()),
        is_early_stopped: state.is_out_of_patience(config),
    }))
}

/// Hears what a run does.
pub trait Observer {
    /// A step is done.
    fn on_step(&mut self, _record: &StepRecord) {}
    /// `done` of the `total` held-out rows are evaluated.
    fn on_evaluating(&mut self, _step: u64, _done: usize, _total: usize) {}
    /// An evaluation is done; `is_best` says whether its loss is the lowest so far.
    fn on_evaluation(&mut self, _step: u64, _evaluation: &Evaluation, _is_best: bool) {}
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// All steps are done.
    Done,
    /// The held-out loss did not get better any more.
    EarlyStopped,
    /// Someone asked to stop; a checkpoint was saved.
    Interrupted,
}

/// What stands after a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// How it ended.
    pub ending: Ending,
    /// Steps done; the checkpoint of that step is the last one.
    pub steps: u64,
    /// The last evaluation.
    pub evaluation: Option<Evaluation>,
    /// The best checkpoint, where there was held-out data: it may be an earlier one than the last.
    pub best: Option<BestCheckpoint>,
}

/// The checkpoint with the lowest held-out loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BestCheckpoint {
    /// Its step: [`RunDir::checkpoint_path`] is its folder.
    pub step: u64,
    /// Its held-out loss, nats.
    pub loss: f64,
}

/// The part of a checkpoint that is not tensors.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct TrainerState {
    step: u64,
    cursor: Cursor,
    best_loss: Option<f64>,
    #[serde(default)]
    best_step: Option<u64>,
    evaluations_without_gain: u64,
    /// Fingerprint of the tokenized rows.
    data_fingerprint: String,
}

impl TrainerState {
    fn best(&self) -> Option<BestCheckpoint> {
        self.best_step.zip(self.best_loss).map(|(step, loss)| BestCheckpoint { step, loss })
    }

    fn load(checkpoint: &Path) -> Result<Self> {
        let path = checkpoint.join("trainer_state.json");
        let text = std::fs::read(&path).map_err(TrainError::read(&path))?;
        serde_json::from_slice(&text)
            .map_err(|e| TrainError::NotARun { path: path.clone(), message: format!("is damaged: {e}") })
    }

    /// That the rows at hand are those which the checkpoint in `folder` was trained on.
    fn check_rows(&self, folder: &Path, fingerprint: &str) -> Result<()> {
        if self.data_fingerprint == fingerprint {
            return Ok(());
        }
        Err(TrainError::Config {
            place: folder.display().to_string(),
            message: "was saved with other training rows: resume with the same data, or start a new run".into(),
        })
    }

    fn is_out_of_patience(&self, config: &SftConfig) -> bool {
        config.early_stopping.is_some_and(|patience| self.evaluations_without_gain >= patience)
    }
}

/// Mean −log p of the labels of `groups`, without a graph and without dropout, in micro-batches of at most
/// `max_tokens`. `watch` hears after each of them how many groups are done.
///
/// # Errors
/// [`TrainError::Config`] when there is no label, [`TrainError::NonFinite`] with the row (`step` is 0).
pub fn evaluate(
    model: &CausalLm,
    sites: &Rc<dyn Sites>,
    groups: &[PromptGroup],
    max_tokens: usize,
    mut watch: impl FnMut(usize),
) -> Result<Evaluation> {
    evaluate_at(0, model, sites, groups, max_tokens, &mut watch)
}

fn evaluate_at(
    step: u64,
    model: &CausalLm,
    sites: &Rc<dyn Sites>,
    groups: &[PromptGroup],
    max_tokens: usize,
    watch: &mut dyn FnMut(usize),
) -> Result<Evaluation> {
    let was_training = sites.set_training(false);
    let evaluation = score(step, model, sites, groups, max_tokens, watch);
    sites.set_training(was_training);
    evaluation
}

fn score(
    step: u64,
    model: &CausalLm,
    sites: &Rc<dyn Sites>,
    groups: &[PromptGroup],
    max_tokens: usize,
    watch: &mut dyn FnMut(usize),
) -> Result<Evaluation> {
    let indices: Vec<usize> = (0..groups.len()).collect();
    let batches = crate::data::packing::split_by_tokens(&indices, Some(max_tokens), |row| groups[row].num_tokens());
    let (mut sum, mut correct, mut count, mut num_done) = (0.0, 0.0, 0, 0);
    no_grad(|| -> Result<()> {
        for rows in batches {
            let chunk: Vec<PromptGroup> = rows.iter().map(|&row| groups[row].clone()).collect();
            let batch = PackedBatch::new(&chunk, model.device())?;
            let out = model.label_logprobs(&batch, sites, RunOptions::default(), &LabelLogprobs::default())?;
            let logprob = out.logprobs.sum(pt_tensor::Kind::Double).double_value(&[]);
            if !logprob.is_finite() {
                let completion = batch.label_completion[first_not_finite(&out.logprobs)] as usize;
                let mut row_of = rows.iter().flat_map(|&row| std::iter::repeat_n(row, groups[row].completions.len()));
                let row = row_of.nth(completion).unwrap_or(0);
                let place = format!("held-out row {row} of {}, counted from 0", groups.len());
                return Err(TrainError::NonFinite { step, what: "held-out log-probs".into(), place });
            }
            sum -= logprob;
            correct += out.is_top1.sum(pt_tensor::Kind::Double).double_value(&[]);
            count += batch.num_labels();
            num_done += rows.len();
            watch(num_done);
        }
        Ok(())
    })?;
    if count == 0 {
        return Err(TrainError::Config { place: "eval_data".into(), message: "no row holds a token to score".into() });
    }
    Ok(Evaluation { loss: sum / count as f64, accuracy: correct / count as f64, num_labels: count as u64 })
}

/// Runs supervised fine-tuning in `run`, from its latest checkpoint where there is one.
///
/// N steps, a stop, and N more steps equal 2N steps bit for bit on one machine: a checkpoint holds parameters,
/// optimizer, the place in the data and the random state. `stop` is looked at after each step.
///
/// # Errors
/// [`TrainError::NonFinite`] with the place when a loss or gradient is not finite (the last checkpoint stands),
/// [`TrainError::Config`] for settings or data that do not fit the checkpoint, and errors of model and files.
pub fn train(
    trained: &Trained<'_>,
    train_groups: Vec<PromptGroup>,
    eval_groups: &[PromptGroup],
    config: &SftConfig,
    run: &RunDir,
    stop: &AtomicBool,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    config.validate_with(!eval_groups.is_empty())?;
    let fingerprint = fingerprint(&train_groups);
    let total_steps = config.total_steps(train_groups.len());
    let mut batches = Batches::new(train_groups, config.batch.clone())?;
    let schedule = config.schedule.build(total_steps as usize)?;
    let mut optimization = Optimization::new(
        trained.parameters.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect(),
        config.adamw,
        run.root(),
        schedule,
        config.learning_rate,
        config.max_grad_norm,
    )?
    .with_lr_factors(&trained.lr_factor);
    pt_tensor::random::seed(config.seed);

    let mut state = TrainerState { data_fingerprint: fingerprint.clone(), ..Default::default() };
    if let Some((_, folder)) = run.latest()? {
        state = load_state(&folder, &mut optimization)?;
        state.check_rows(&folder, &fingerprint)?;
        batches.seek(state.cursor)?;
        // A crash may have come between the best checkpoint and the note that it is the best.
        if let Some(best) = state.best().filter(|best| run.checkpoint_path(best.step).is_dir()) {
            name_best(run, best)?;
        }
    }
    let mut metrics = MetricsWriter::open(&run.metrics_path(), state.step)?;
    let mut events = EventWriter::create(&run.tensorboard_path(), (state.step > 0).then_some(state.step + 1))?;
    let options = RunOptions { is_checkpointed: config.activation_checkpointing };
    let eval_tokens = config.batch.max_tokens.unwrap_or(4096);
    let mut outcome = Outcome { ending: Ending::Done, steps: state.step, evaluation: None, best: state.best() };
    if state.is_out_of_patience(config) {
        outcome.ending = Ending::EarlyStopped;
    }

    while outcome.ending == Ending::Done && state.step < total_steps {
        let started = Instant::now();
        // 1. The rows of one step, and how many tokens they train together.
        let window = batches.next_window();
        let num_labels: usize = window.iter().flatten().map(PromptGroup::num_labels).sum();
        let (mut loss, mut correct, mut num_tokens) = (0.0, 0.0, 0);
        let step = state.step + 1;
        // 2. Each micro-batch adds its share: the sum over its labels divided by the labels of the window.
        for groups in &window {
            let batch = PackedBatch::new(groups, trained.model.device())?;
            num_tokens += batch.num_tokens();
            if batch.num_labels() == 0 {
                continue;
            }
            let out = trained
                .model
                .label_logprobs(&batch, &trained.sites, options, &LabelLogprobs::default())
                .map_err(|source| TrainError::Step { step, tokens: batch.num_tokens(), source: Box::new(source) })?;
            loss -= finite(step, "log-probs", &out.logprobs)?;
            correct += out.is_top1.sum(pt_tensor::Kind::Double).double_value(&[]);
            let share = out.logprobs.sum(None) * (-1.0 / num_labels as f64);
            pt_tensor::autograd::backward(&[share], &[Tensor::from(1f32).to_device(trained.model.device())]).map_err(
                |source| TrainError::Step { step, tokens: batch.num_tokens(), source: Box::new(source.into()) },
            )?;
        }
        // 3. Clip and update.
        let update = optimization.step(step)?;
        state.step = step;
        state.cursor = batches.cursor();
        let record = StepRecord {
            step,
            total_steps,
            epoch: batches.epochs_done(),
            loss: loss / num_labels.max(1) as f64,
            accuracy: correct / num_labels.max(1) as f64,
            learning_rate: update.learning_rate,
            grad_norm: update.grad_norm,
            tokens_per_second: num_tokens as f64 / started.elapsed().as_secs_f64(),
        };
        if step.is_multiple_of(config.log_every) || step == total_steps {
            let values = [
                (names::LOSS, record.loss),
                (names::ACCURACY, record.accuracy),
                (names::LEARNING_RATE, record.learning_rate),
                (names::GRAD_NORM, record.grad_norm),
                (names::EPOCH, record.epoch),
                (names::TOKENS_PER_SECOND, record.tokens_per_second),
                (names::MEMORY, peak_memory_bytes().unwrap_or(0) as f64),
            ];
            metrics.write(step, &values)?;
            events.scalars(step, &values)?;
        }
        observer.on_step(&record);
        // 4. Evaluate, save, stop.
        let is_last = step == total_steps;
        let mut is_best = false;
        if !eval_groups.is_empty() && (is_last || (config.eval_every > 0 && step.is_multiple_of(config.eval_every))) {
            let mut watch = |done| observer.on_evaluating(step, done, eval_groups.len());
            let evaluation = evaluate_at(step, trained.model, &trained.sites, eval_groups, eval_tokens, &mut watch)?;
            let values = [(names::EVAL_LOSS, evaluation.loss), (names::EVAL_ACCURACY, evaluation.accuracy)];
            metrics.write(step, &values)?;
            events.scalars(step, &values)?;
            is_best = state.best_loss.is_none_or(|best| evaluation.loss < best);
            state.evaluations_without_gain = if is_best { 0 } else { state.evaluations_without_gain + 1 };
            if is_best {
                (state.best_loss, state.best_step) = (Some(evaluation.loss), Some(step));
            }
            observer.on_evaluation(step, &evaluation, is_best);
            outcome.evaluation = Some(evaluation);
            if state.is_out_of_patience(config) {
                outcome.ending = Ending::EarlyStopped;
            }
        }
        if stop.load(Ordering::Relaxed) && !is_last && outcome.ending == Ending::Done {
            outcome.ending = Ending::Interrupted;
        }
        let is_due = config.save_every > 0 && step.is_multiple_of(config.save_every);
        if is_last || is_due || is_best || outcome.ending != Ending::Done {
            optimization.check_finite(step)?;
            metrics.sync()?;
            run.write_checkpoint(step, |folder| save_checkpoint(folder, trained, &optimization, &state))?;
            if let Some(best) = state.best().filter(|_| is_best) {
                name_best(run, best)?;
            }
            run.prune(config.keep_checkpoints)?;
        }
        (outcome.steps, outcome.best) = (step, state.best());
    }
    Ok(outcome)
}

fn name_best(run: &RunDir, best: BestCheckpoint) -> Result<()> {
    run.set_best(&Best { step: best.step, metric: names::EVAL_LOSS.into(), value: best.loss })
}

/// Name of the CPU generator's state among the tensors of a checkpoint; other devices draw as it says.
const RANDOM: &str = "random";

fn save_checkpoint(
    folder: &Path,
    trained: &Trained<'_>,
    optimization: &Optimization,
    state: &TrainerState,
) -> Result<()> {
    (trained.save)(folder)?;
    let mut tensors = optimization.state();
    tensors.push((RANDOM.into(), pt_tensor::random::state()?));
    save_safetensors(&folder.join("trainer_state.safetensors"), &tensors, &[])?;
    let text = serde_json::to_string_pretty(state).map_err(|e| TrainError::write(folder)(e.into()))?;
    crate::run_dir::write_atomic(&folder.join("trainer_state.json"), text.as_bytes())
}

fn load_state(folder: &Path, optimization: &mut Optimization) -> Result<TrainerState> {
    let state = TrainerState::load(folder)?;
    let reader = SafetensorsReader::open(folder.join("trainer_state.safetensors"))?;
    optimization.load_state(reader.names().filter(|name| *name != RANDOM), |name| reader.tensor(name, Device::Cpu))?;
    pt_tensor::random::set_state(&reader.tensor(RANDOM, Device::Cpu)?)?;
    Ok(state)
}

/// SHA-256 over tokens and labels, so that a resumed run is known to see the same rows.
fn fingerprint(groups: &[PromptGroup]) -> String {
    use sha2::{Digest, Sha256};
    let mut hash = Sha256::new();
    for group in groups {
        for (ids, mark) in
            std::iter::once((&group.prompt, 0u8)).chain(group.completions.iter().map(|c| (&c.token_ids, 1)))
        {
            hash.update([mark]);
            hash.update((ids.len() as u64).to_le_bytes());
            ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
        }
        group.completions.iter().flat_map(|c| &c.is_label).for_each(|&is_label| hash.update([u8::from(is_label)]));
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
