//! The training loop: rows in an order that resumes, an objective's gradients, updates, evaluation, checkpoints.

use crate::data::{Batches, Cursor};
use crate::error::{Result, TrainError};
use crate::metrics::{MetricsWriter, names};
use crate::objective::{Evaluation, Example, Objective, Pass, WindowRecord, evaluate};
use crate::run_dir::{Best, RunDir};
use crate::settings::{ObjectiveConfig, TrainConfig};
use crate::step::Optimization;
use crate::tensorboard::EventWriter;
use pt_model::{CausalLm, RunOptions, Sites};
use pt_tensor::io::{SafetensorsReader, save_safetensors};
use pt_tensor::{Device, Tensor, peak_memory_bytes};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

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
#[derive(Debug, Clone, PartialEq)]
pub struct StepRecord {
    /// Steps done.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Passes over the data so far.
    pub epoch: f64,
    /// The objective's loss over this window.
    pub loss: f64,
    /// The objective's other numbers.
    pub values: Vec<(&'static str, f64)>,
    /// Learning rate used.
    pub learning_rate: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Tokens through the model per second in this step, prompts included.
    pub tokens_per_second: f64,
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
pub fn standing<E: Example, O: ObjectiveConfig>(
    run: &RunDir,
    examples: &[E],
    config: &TrainConfig<O>,
) -> Result<Option<Standing>> {
    let Some((_, folder)) = run.latest()? else { return Ok(None) };
    let state = TrainerState::load(&folder)?;
    state.check_rows(&folder, &fingerprint(examples))?;
    Ok(Some(Standing {
        steps: state.step,
        total_steps: config.total_steps(examples.len()),
        is_early_stopped: state.is_out_of_patience(config.early_stopping),
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
#[derive(Debug, Clone, PartialEq)]
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

    fn is_out_of_patience(&self, early_stopping: Option<u64>) -> bool {
        early_stopping.is_some_and(|patience| self.evaluations_without_gain >= patience)
    }
}

/// Trains for an objective on `(examples, eval_examples)` in `run`, from its latest checkpoint where there is one.
///
/// N steps, a stop, and N more steps equal 2N steps bit for bit on one machine: a checkpoint holds parameters,
/// optimizer, the place in the data and the random state. `stop` is looked at after each step.
///
/// # Errors
/// [`TrainError::NonFinite`] with the place when a loss or gradient is not finite (the last checkpoint stands),
/// [`TrainError::Config`] for settings or data that do not fit the checkpoint, and errors of model and files.
pub fn train<E: Example, O: ObjectiveConfig>(
    trained: &Trained<'_>,
    objective: &mut dyn Objective<Example = E>,
    (examples, eval_examples): (Vec<E>, &[E]),
    config: &TrainConfig<O>,
    run: &RunDir,
    stop: &AtomicBool,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    config.validate_with(!eval_examples.is_empty())?;
    let fingerprint = fingerprint(&examples);
    let total_steps = config.total_steps(examples.len());
    let mut batches = Batches::new(examples, config.batch.clone())?;
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
        state = load_state(&folder, &mut optimization, objective)?;
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
    if state.is_out_of_patience(config.early_stopping) {
        outcome.ending = Ending::EarlyStopped;
    }

    while outcome.ending == Ending::Done && state.step < total_steps {
        let started = Instant::now();
        // 1. The rows of one step.
        let window = batches.next_window();
        let step = state.step + 1;
        // 2. Gradients of their mean loss.
        let pass = Pass { step, model: trained.model, sites: &trained.sites, options };
        let WindowRecord { loss, values, num_tokens } = objective.accumulate(&pass, &window)?;
        // 3. Clip and update.
        let update = optimization.step(step)?;
        objective.after_update(step)?;
        state.step = step;
        state.cursor = batches.cursor();
        let record = StepRecord {
            step,
            total_steps,
            epoch: batches.epochs_done(),
            loss,
            values,
            learning_rate: update.learning_rate,
            grad_norm: update.grad_norm,
            tokens_per_second: num_tokens as f64 / started.elapsed().as_secs_f64(),
        };
        if step.is_multiple_of(config.log_every) || step == total_steps {
            let mut values = vec![(names::LOSS, record.loss)];
            values.extend(&record.values);
            values.extend([
                (names::LEARNING_RATE, record.learning_rate),
                (names::GRAD_NORM, record.grad_norm),
                (names::EPOCH, record.epoch),
                (names::TOKENS_PER_SECOND, record.tokens_per_second),
                (names::MEMORY, peak_memory_bytes().unwrap_or(0) as f64),
            ]);
            metrics.write(step, &values)?;
            events.scalars(step, &values)?;
        }
        observer.on_step(&record);
        // 4. Evaluate, save, stop.
        let is_last = step == total_steps;
        let mut is_best = false;
        if !eval_examples.is_empty() && (is_last || (config.eval_every > 0 && step.is_multiple_of(config.eval_every))) {
            let mut watch = |done| observer.on_evaluating(step, done, eval_examples.len());
            let evaluation = evaluate(objective, &pass, eval_examples, eval_tokens, &mut watch)?;
            let values: Vec<(String, f64)> = std::iter::once((names::LOSS, evaluation.loss))
                .chain(evaluation.values.iter().copied())
                .map(|(name, value)| (format!("eval_{name}"), value))
                .collect();
            let values: Vec<(&str, f64)> = values.iter().map(|(name, value)| (name.as_str(), *value)).collect();
            metrics.write(step, &values)?;
            events.scalars(step, &values)?;
            is_best = state.best_loss.is_none_or(|best| evaluation.loss < best);
            state.evaluations_without_gain = if is_best { 0 } else { state.evaluations_without_gain + 1 };
            if is_best {
                (state.best_loss, state.best_step) = (Some(evaluation.loss), Some(step));
            }
            observer.on_evaluation(step, &evaluation, is_best);
            outcome.evaluation = Some(evaluation);
            if state.is_out_of_patience(config.early_stopping) {
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
            run.write_checkpoint(step, |folder| {
                save_checkpoint(folder, trained, &optimization, objective.state(), &state)
            })?;
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

/// What the objective's own tensors begin with there.
const OBJECTIVE: &str = "objective.";

fn save_checkpoint(
    folder: &Path,
    trained: &Trained<'_>,
    optimization: &Optimization,
    objective_state: Vec<(String, Tensor)>,
    state: &TrainerState,
) -> Result<()> {
    (trained.save)(folder)?;
    let mut tensors = optimization.state();
    tensors.push((RANDOM.into(), pt_tensor::random::state()?));
    tensors.extend(objective_state.into_iter().map(|(name, tensor)| (format!("{OBJECTIVE}{name}"), tensor)));
    save_safetensors(&folder.join("trainer_state.safetensors"), &tensors, &[])?;
    let text = serde_json::to_string_pretty(state).map_err(|e| TrainError::write(folder)(e.into()))?;
    crate::run_dir::write_atomic(&folder.join("trainer_state.json"), text.as_bytes())
}

fn load_state<E: Example>(
    folder: &Path,
    optimization: &mut Optimization,
    objective: &mut dyn Objective<Example = E>,
) -> Result<TrainerState> {
    let state = TrainerState::load(folder)?;
    let reader = SafetensorsReader::open(folder.join("trainer_state.safetensors"))?;
    let is_of_optimizer = |name: &&str| *name != RANDOM && !name.starts_with(OBJECTIVE);
    optimization.load_state(reader.names().filter(is_of_optimizer), |name| reader.tensor(name, Device::Cpu))?;
    objective.load_state(&|name| reader.tensor(&format!("{OBJECTIVE}{name}"), Device::Cpu))?;
    pt_tensor::random::set_state(&reader.tensor(RANDOM, Device::Cpu)?)?;
    Ok(state)
}

/// SHA-256 over all examples, so that a resumed run is known to see the same rows.
pub fn fingerprint(examples: &[impl Example]) -> String {
    use sha2::{Digest, Sha256};
    let mut hash = Sha256::new();
    examples.iter().for_each(|example| example.digest(&mut |bytes| hash.update(bytes)));
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
