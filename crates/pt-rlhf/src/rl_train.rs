//! The loop of reinforcement learning: sample, judge, compare, update; checkpoints, resume, evaluation.

use crate::algorithm::{Algorithm, AlgorithmState, Evidence, Targets};
use crate::diagnosis::{Finding, IterationStats, diagnose};
use crate::reward::WeightedSum;
use crate::rl_settings::RolloutConfig;
use crate::roles::{Critic, Roles};
use crate::rollout::Rollout;
use crate::update::{Update, Updater};
use crate::{Prompt, Result, RlhfError};
use pt_model::{Completion, FinishReason, GenerateConfig, PromptGroup, Tokenizer, generate};
use pt_tensor::io::{SafetensorsReader, save_safetensors};
use pt_tensor::{Device, Kind, Tensor, peak_memory_bytes};
use pt_train::TrainError;
use pt_train::data::{BatchConfig, Batches, Cursor};
use pt_train::metrics::{MetricsWriter, names};
use pt_train::run_dir::{Best, RunDir, write_atomic};
use pt_train::settings::TrainConfig;
use pt_train::step::Optimization;
use pt_train::tensorboard::EventWriter;
use pt_train::train::{Ending, Trained, fingerprint};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Mean score of a rollout, the metric that a run is about.
pub const SCORES: &str = "objective/scores";
/// The same of held-out prompts.
pub const EVAL_SCORES: &str = "eval_objective/scores";
/// Where a run keeps the rollout that it learns from.
const ROLLOUT: &str = "rollout.safetensors";

/// What an iteration is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Sampling; of so many tokens at most.
    Sampling,
    /// Scoring the responses.
    Scoring,
    /// The passes of reference and critic.
    Comparing,
    /// Optimizer steps.
    Updating,
    /// Answering held-out prompts.
    Evaluating,
}

/// One iteration as it goes to metrics.jsonl.
#[derive(Clone, Debug, PartialEq)]
pub struct IterationRecord {
    /// Iterations done.
    pub step: u64,
    /// Iterations of the whole run.
    pub total_steps: u64,
    /// Every number by the name of its metric.
    pub values: Vec<(String, f64)>,
}

impl IterationRecord {
    /// The number of a metric.
    pub fn value(&self, name: &str) -> Option<f64> {
        self.values.iter().find(|(known, _)| known == name).map(|(_, value)| *value)
    }
}

/// A response that was learned from, for people.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampleRecord {
    /// The iteration.
    pub step: u64,
    /// What was asked.
    pub prompt: String,
    /// What the model wrote.
    pub response: String,
    /// What it was worth.
    pub score: f32,
    /// What each reward gave it, before weights.
    #[serde(default)]
    pub rewards: BTreeMap<String, f64>,
    /// Whether it ended, and was not cut off.
    #[serde(default)]
    pub is_ended: bool,
}

/// Hears what a run does.
pub trait RlObserver {
    /// A phase of iteration `step` is `done` of `total`.
    fn on_phase(&mut self, _step: u64, _phase: Phase, _done: usize, _total: usize) {}
    /// An iteration is done; some of its responses.
    fn on_iteration(&mut self, _record: &IterationRecord, _samples: &[SampleRecord]) {}
    /// Held-out prompts were answered: their mean score, and whether it is the highest so far.
    fn on_evaluation(&mut self, _step: u64, _score: f64, _is_best: bool) {}
    /// Something seems to go wrong.
    fn on_finding(&mut self, _step: u64, _finding: &Finding) {}
}

/// What a run is made of.
pub struct RlRun<'a, A> {
    /// Who takes part.
    pub roles: Roles<'a>,
    /// What responses are worth.
    pub reward: WeightedSum,
    /// Prompts to train on.
    pub prompts: &'a [Prompt],
    /// Held-out prompts; may be empty.
    pub eval_prompts: &'a [Prompt],
    /// The policy's.
    pub tokenizer: &'a Tokenizer,
    /// Tokens that end a response.
    pub stop_ids: &'a [i64],
    /// All settings.
    pub config: &'a TrainConfig<A>,
    /// Its folder.
    pub run: &'a RunDir,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct RlOutcome {
    /// How.
    pub ending: Ending,
    /// Iterations done.
    pub steps: u64,
    /// The checkpoint with the highest held-out score, where there are held-out prompts.
    pub best: Option<Best>,
    /// Held-out score before training and at the last evaluation.
    pub eval_scores: (Option<f64>, Option<f64>),
}

/// The part of a checkpoint that is not tensors.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    step: u64,
    cursor: Cursor,
    /// Prompts sampled for so far.
    num_prompts: u64,
    algorithm: AlgorithmState,
    /// Of the latest iterations, for diagnoses.
    history: Vec<IterationStats>,
    best: Option<Best>,
    eval_scores: (Option<f64>, Option<f64>),
    evaluations_without_gain: u64,
    data_fingerprint: String,
    /// What responses were worth so far, as JSON: scores by other rewards cannot be compared.
    #[serde(default)]
    rewards: serde_json::Value,
}

/// Iterations whose numbers a checkpoint keeps: the course that diagnoses look at, and how the run began.
const HISTORY: usize = 64;

/// Trains in `run`, from its latest checkpoint where there is one.
///
/// A checkpoint holds parameters and optimizers of actor and critic, the price of the divergence, the scores' statistics
/// and the place among the prompts; sampling and the order of updates depend on seed and place alone. So a run that is
/// stopped or killed at any moment and resumed equals one that was not, bit for bit on one machine. A judged rollout is
/// kept beside the checkpoints, so that it is not sampled and judged again. `stop` is looked at between iterations and
/// while sampling.
///
/// # Errors
/// [`TrainError::NonFinite`], [`TrainError::Config`] for settings or prompts that do not fit the checkpoint, those of
/// the rewards, of model and files. The last checkpoint stands.
pub fn train<A: Algorithm>(
    run: &mut RlRun<'_, A>,
    stop: &AtomicBool,
    observer: &mut dyn RlObserver,
) -> Result<RlOutcome> {
    let config = run.config;
    config.validate_with(!run.eval_prompts.is_empty())?;
    let algorithm = &config.objective;
    let groups: Vec<PromptGroup> =
        run.prompts.iter().map(|prompt| PromptGroup { prompt: prompt.ids.clone(), completions: vec![] }).collect();
    let data_fingerprint = fingerprint(&groups);
    let total_steps = config.total_steps(groups.len());
    // The prompts of an iteration are taken together, whatever micro-batches they are computed in.
    let mut batches = Batches::new(groups, BatchConfig { max_tokens: None, ..config.batch.clone() })?;
    let updates = algorithm.updates();
    // As the updater deals prompts out.
    let per_step = config.batch.rows_per_step().min(run.prompts.len()).max(1);
    let num_minibatches = per_step.div_ceil(per_step.div_ceil(updates.num_minibatches));
    let num_updates = total_steps as usize * updates.num_epochs * num_minibatches;
    let optimization = |trained: &Trained<'_>, rate: f64| -> Result<Optimization> {
        let parameters = trained.parameters.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone()));
        let schedule = config.schedule.build(num_updates)?;
        let folder = run.run.root();
        let made = Optimization::new(parameters.collect(), config.adamw, folder, schedule, rate, config.max_grad_norm)?;
        Ok(made.with_lr_factors(&trained.lr_factor))
    };
    let actor = optimization(&run.roles.actor, config.learning_rate)?;
    let critic = match (&run.roles.critic, algorithm.value_settings()) {
        (Some(Critic::Own(trained, _)), Some(settings)) => {
            Some(optimization(trained, settings.critic.learning_rate.unwrap_or(config.learning_rate))?)
        }
        _ => None,
    };
    let mut updater = Updater::new(actor, critic, config);
    let mut state = State {
        step: 0,
        cursor: batches.cursor(),
        num_prompts: 0,
        algorithm: algorithm.start(),
        history: vec![],
        best: None,
        eval_scores: (None, None),
        evaluations_without_gain: 0,
        data_fingerprint: data_fingerprint.clone(),
        rewards: serde_json::json!([algorithm.rewards(), algorithm.missing_eos_penalty()]),
    };
    let rewards = state.rewards.clone();
    pt_tensor::random::seed(config.seed);
    if let Some((_, folder)) = run.run.latest()? {
        state = load(&folder, &mut updater)?;
        state.algorithm.kl = state.algorithm.kl.continued(algorithm.start().kl);
        if state.data_fingerprint != data_fingerprint {
            return Err(TrainError::Config {
                place: folder.display().to_string(),
                message: "was saved with other prompts: resume with the same data, or start a new run".into(),
            }
            .into());
        }
        if state.rewards != rewards {
            return Err(TrainError::Config {
                place: folder.display().to_string(),
                message:
                    "was saved with other rewards, whose scores cannot be compared: resume with the same, or start a \
                          new run from its adapter (--adapter)"
                        .into(),
            }
            .into());
        }
        batches.seek(state.cursor)?;
        // A crash may have come between the best checkpoint and the note that it is the best.
        if let Some(best) = state.best.as_ref().filter(|best| run.run.checkpoint_path(best.step).is_dir()) {
            run.run.set_best(best)?;
        }
    }
    let mut metrics = MetricsWriter::open(&run.run.metrics_path(), state.step)?;
    let mut events = EventWriter::create(&run.run.tensorboard_path(), (state.step > 0).then_some(state.step + 1))?;
    let mut ending = Ending::Done;
    if state.step == 0 && !run.eval_prompts.is_empty() {
        // A run that was stopped before its first checkpoint has measured it.
        let kept = metrics.series().get(EVAL_SCORES).and_then(|points| points.first()).map(|(_, score)| *score);
        let score = match kept {
            Some(score) => score,
            None => {
                let (score, values) = evaluate(run, 0, observer)?;
                metrics.write(0, &borrowed(&values))?;
                score
            }
        };
        state.eval_scores.0 = Some(score);
        observer.on_evaluation(0, score, false);
    }
    let is_out_of_patience =
        |state: &State| config.early_stopping.is_some_and(|patience| state.evaluations_without_gain >= patience);
    if is_out_of_patience(&state) {
        ending = Ending::EarlyStopped;
    }
    while ending == Ending::Done && state.step < total_steps {
        let started = Instant::now();
        let step = state.step + 1;
        // 1. The prompts of this iteration, responses to them, and what those are worth.
        let chosen: Vec<usize> = batches.next_indices().into_iter().flatten().collect();
        let (rollout, scoring) = match judged(run, &state, &chosen, stop, observer) {
            Ok(Some(judged)) => judged,
            Ok(None) => {
                ending = Ending::Interrupted;
                break;
            }
            Err(error) => {
                // A reward that fails (a program that crashed, say) costs no iteration that was done.
                if run.run.latest()?.is_none_or(|(step, _)| step < state.step) && state.step > 0 {
                    metrics.sync()?;
                    run.run.write_checkpoint(state.step, |folder| save(folder, run, &updater, &state))?;
                }
                return Err(error);
            }
        };
        let sampled = started.elapsed().as_secs_f64() - scoring;
        let judged = started.elapsed().as_secs_f64();
        // 2. Log-probs of policy and reference, values of the critic.
        observer.on_phase(step, Phase::Comparing, 0, 1);
        let compared = updater.compare(&run.roles, rollout, step)?;
        // 3. Advantages.
        let evidence = Evidence { reference: compared.reference.as_deref(), values: compared.values.as_deref() };
        let targets = algorithm.targets(&compared.rollout, evidence, &mut state.algorithm)?;
        let before_updates = started.elapsed().as_secs_f64();
        // 4. Optimizer steps.
        let update = updater.update(&run.roles, &compared, &targets, step, &mut |done, total| {
            observer.on_phase(step, Phase::Updating, done, total);
        })?;
        state.step = step;
        state.cursor = batches.cursor();
        state.num_prompts += chosen.len() as u64;
        let rollout = &compared.rollout;
        let mut values = numbers(rollout, &targets, &update, updater.sampling_gap);
        values.extend([
            (names::EPOCH.to_string(), batches.epochs_done()),
            ("episode".into(), state.num_prompts as f64 * algorithm.num_samples() as f64),
            ("seconds/rollout".into(), sampled),
            ("seconds/scoring".into(), scoring),
            ("seconds/compare".into(), before_updates - judged),
            ("seconds/update".into(), started.elapsed().as_secs_f64() - before_updates),
            (names::TOKENS_PER_SECOND.into(), update.num_tokens as f64 / started.elapsed().as_secs_f64()),
            (names::MEMORY.into(), peak_memory_bytes().unwrap_or(0) as f64),
        ]);
        let record = IterationRecord { step, total_steps, values };
        if step.is_multiple_of(config.log_every) || step == total_steps {
            metrics.write(step, &borrowed(&record.values))?;
            events.scalars(step, &borrowed(&record.values))?;
        }
        observer.on_iteration(&record, &samples(run.prompts, rollout, step));
        state.history.push(stats(&record, rollout));
        for finding in diagnose(&state.history) {
            observer.on_finding(step, &finding);
        }
        if state.history.len() > HISTORY {
            // The beginning stays: diagnoses compare with it.
            state.history.remove(HISTORY / 2);
        }
        // 5. Evaluate, save, stop.
        let is_last = step == total_steps;
        let mut is_best = false;
        let is_due = config.eval_every > 0 && step.is_multiple_of(config.eval_every);
        if !run.eval_prompts.is_empty() && (is_last || is_due) {
            let (score, values) = evaluate(run, step, observer)?;
            // The policy before training counts: what is no better is not the best.
            let most = state.best.as_ref().map(|best| best.value).or(state.eval_scores.0);
            is_best = most.is_none_or(|most| score > most);
            state.evaluations_without_gain = if is_best { 0 } else { state.evaluations_without_gain + 1 };
            state.eval_scores.1 = Some(score);
            if is_best {
                state.best = Some(Best { step, metric: EVAL_SCORES.into(), value: score });
            }
            metrics.write(step, &borrowed(&values))?;
            events.scalars(step, &borrowed(&values))?;
            observer.on_evaluation(step, score, is_best);
            if is_out_of_patience(&state) {
                ending = Ending::EarlyStopped;
            }
        }
        if stop.load(Ordering::Relaxed) && !is_last && ending == Ending::Done {
            ending = Ending::Interrupted;
        }
        let is_due = config.save_every > 0 && step.is_multiple_of(config.save_every);
        if is_last || is_due || is_best || ending != Ending::Done {
            updater.check_finite(step)?;
            metrics.sync()?;
            run.run.write_checkpoint(step, |folder| save(folder, run, &updater, &state))?;
            if let Some(best) = state.best.as_ref().filter(|_| is_best) {
                run.run.set_best(best)?;
            }
            run.run.prune(config.keep_checkpoints)?;
        }
    }
    if ending == Ending::Interrupted && run.run.latest()?.is_none_or(|(step, _)| step < state.step) {
        // While the iteration after it was sampled: nothing has moved since.
        run.run.write_checkpoint(state.step, |folder| save(folder, run, &updater, &state))?;
    }
    Ok(RlOutcome { ending, steps: state.step, best: state.best, eval_scores: state.eval_scores })
}

/// The judged rollout of the next iteration and the seconds that judging took: the kept one where it is of this
/// iteration, policy and settings, else a new one.
fn judged<A: Algorithm>(
    run: &mut RlRun<'_, A>,
    state: &State,
    chosen: &[usize],
    stop: &AtomicBool,
    observer: &mut dyn RlObserver,
) -> Result<Option<(Rollout, f64)>> {
    let (config, num_samples) = (run.config.objective.rollout(), run.config.objective.num_samples());
    let step = state.step + 1;
    let path = run.run.root().join(ROLLOUT);
    let key = format!("{step} {} {} {}", state.data_fingerprint, digest(&run.roles.actor), digest_of(run, chosen)?);
    let reward_names: Vec<String> = run.reward.names().map(str::to_string).collect();
    let kept = Rollout::load(&path, &key, run.prompts, run.tokenizer, run.stop_ids, &reward_names)?;
    if let Some(kept) = kept.filter(|kept| kept.prompts == chosen) {
        return Ok(Some((kept, 0.0)));
    }
    let actor = &run.roles.actor;
    let most = chosen.len() * num_samples * config.max_new_tokens;
    let mut go_on = |num_tokens: usize| {
        observer.on_phase(step, Phase::Sampling, num_tokens, most);
        !stop.load(Ordering::Relaxed)
    };
    let sampled = Rollout::sample(
        (actor.model, &actor.sites),
        run.tokenizer,
        run.stop_ids,
        run.prompts,
        chosen,
        (config, num_samples),
        (run.config.seed, state.num_prompts),
        &mut go_on,
    )?;
    let Some(mut rollout) = sampled else { return Ok(None) };
    observer.on_phase(step, Phase::Scoring, 0, 1);
    let started = Instant::now();
    rollout.judge(&mut run.reward, run.prompts, run.config.objective.missing_eos_penalty())?;
    let scoring = started.elapsed().as_secs_f64();
    rollout.save(&path, &key)?;
    Ok(Some((rollout, scoring)))
}

/// Numbers by the names of their metrics, as the writers take them.
fn borrowed(values: &[(String, f64)]) -> Vec<(&str, f64)> {
    values.iter().map(|(name, value)| (name.as_str(), *value)).collect()
}

/// Mean score of greedy answers to the held-out prompts, and all their numbers by name.
fn evaluate<A: Algorithm>(
    run: &mut RlRun<'_, A>,
    step: u64,
    observer: &mut dyn RlObserver,
) -> Result<(f64, Vec<(String, f64)>)> {
    let RolloutConfig { max_new_tokens, batch_size, .. } = *run.config.objective.rollout();
    let actor = &run.roles.actor;
    let mut rollout = Rollout { prompts: (0..run.eval_prompts.len()).collect(), ..Rollout::default() };
    let settings = GenerateConfig { max_new_tokens, stop_ids: run.stop_ids.to_vec(), ..GenerateConfig::default() };
    for prompts in run.eval_prompts.chunks(batch_size) {
        let ids: Vec<Vec<i64>> = prompts.iter().map(|prompt| prompt.ids.clone()).collect();
        let answers = generate(actor.model, Some(run.tokenizer), &ids, &settings, &actor.sites, |_, _| true)?;
        for (prompt, answer) in ids.into_iter().zip(answers) {
            rollout.is_ended.push(answer.finish_reason == FinishReason::Stop);
            rollout.texts.push(answer.text.unwrap_or_default());
            let completion = Completion::new(answer.token_ids);
            rollout.groups.push(PromptGroup::single(prompt, completion));
        }
        observer.on_phase(step, Phase::Evaluating, rollout.groups.len(), run.eval_prompts.len());
    }
    rollout.judge(&mut run.reward, run.eval_prompts, run.config.objective.missing_eos_penalty())?;
    let values = of_responses(&rollout);
    let score = values.first().map_or(f64::NAN, |(_, score)| *score);
    Ok((score, values.into_iter().map(|(name, value)| (format!("eval_{name}"), value)).collect()))
}

/// Numbers of responses and their scores, the mean score first.
fn of_responses(rollout: &Rollout) -> Vec<(String, f64)> {
    let count = rollout.scores.len().max(1) as f64;
    let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / count;
    let score = mean(&mut rollout.scores.iter().map(|score| f64::from(*score)));
    let spread = mean(&mut rollout.scores.iter().map(|value| (f64::from(*value) - score).powi(2))).sqrt();
    let lengths = rollout.lengths();
    let num_ended = rollout.is_ended.iter().filter(|is_ended| **is_ended).count();
    let mut values = vec![(SCORES.to_string(), score), ("objective/scores_std".into(), spread)];
    for (name, scores) in &rollout.parts {
        values.push((reward_metric(name), mean(&mut scores.iter().copied())));
    }
    values.extend([
        ("completions/mean_length".to_string(), mean(&mut lengths.iter().map(|length| *length as f64))),
        ("completions/end_rate".into(), num_ended as f64 / count),
    ]);
    values
}

/// The metric with the mean of a reward before it is weighted; of held-out prompts with `eval_` before it.
pub fn reward_metric(name: &str) -> String {
    format!("rewards/{name}/mean")
}

/// Every number of an iteration.
fn numbers(rollout: &Rollout, targets: &Targets, update: &Update, sampling_gap: f64) -> Vec<(String, f64)> {
    let num_ended = rollout.is_ended.iter().filter(|is_ended| **is_ended).count();
    let mut values = of_responses(rollout);
    values.extend(targets.metrics.iter().cloned());
    values.extend([("val/num_eos_tokens".to_string(), num_ended as f64), ("policy/sampling_gap".into(), sampling_gap)]);
    values.extend(update.values.iter().map(|(name, value)| (name.to_string(), *value)));
    values
}

/// Some responses of an iteration: the best, the worst, and one between.
fn samples(prompts: &[Prompt], rollout: &Rollout, step: u64) -> Vec<SampleRecord> {
    let mut order: Vec<usize> = (0..rollout.scores.len()).collect();
    order.sort_by(|a, b| rollout.scores[*b].total_cmp(&rollout.scores[*a]).then(a.cmp(b)));
    let mut picked: Vec<usize> = [0, order.len() / 2, order.len().saturating_sub(1)].to_vec();
    picked.dedup();
    let owners: Vec<usize> =
        rollout.responses_of_group().into_iter().enumerate().flat_map(|(group, all)| all.map(move |_| group)).collect();
    let record = |place: usize| {
        let response = *order.get(place)?;
        Some(SampleRecord {
            step,
            prompt: prompts[rollout.prompts[owners[response]]].question.clone(),
            response: rollout.texts[response].clone(),
            score: rollout.scores[response],
            rewards: rollout.parts.iter().map(|(name, scores)| (name.clone(), scores[response])).collect(),
            is_ended: rollout.is_ended[response],
        })
    };
    picked.into_iter().filter_map(record).collect()
}

/// What diagnoses look at.
fn stats(record: &IterationRecord, rollout: &Rollout) -> IterationStats {
    let value = |name: &str| record.value(name).unwrap_or(f64::NAN);
    let lengths: Vec<f64> = rollout.lengths().into_iter().map(|length| length as f64).collect();
    let scores: Vec<f64> = rollout.scores.iter().map(|score| f64::from(*score)).collect();
    IterationStats {
        kl: value("objective/kl"),
        entropy: value("policy/entropy_avg"),
        explained_variance: record.value("val/explained_variance"),
        score_mean: value(SCORES),
        score_std: value("objective/scores_std"),
        length_mean: value("completions/mean_length"),
        length_score_correlation: correlation(&lengths, &scores),
        end_rate: value("completions/end_rate"),
        clip_fraction: value("policy/clipfrac_avg"),
        ratio: value("val/ratio"),
        zero_std_share: record.value("frac_reward_zero_std"),
    }
}

/// Pearson's correlation; `None` where either does not vary.
fn correlation(one: &[f64], other: &[f64]) -> Option<f64> {
    let count = one.len().max(1) as f64;
    let mean = |values: &[f64]| values.iter().sum::<f64>() / count;
    let (mean_one, mean_other) = (mean(one), mean(other));
    let sum = |of: &dyn Fn(f64, f64) -> f64| -> f64 {
        one.iter().zip(other).map(|(a, b)| of(a - mean_one, b - mean_other)).sum()
    };
    let spread = (sum(&|a, _| a * a) * sum(&|_, b| b * b)).sqrt();
    (spread > 0.0).then(|| sum(&|a, b| a * b) / spread)
}

/// What tells the actor's weights from other ones: a hash of the sum and the norm of each trained tensor. They
/// are sums in one order, so equal weights give equal ones; no weight is copied.
fn digest(actor: &Trained<'_>) -> String {
    use sha2::{Digest, Sha256};
    let mut hash = Sha256::new();
    for (name, tensor) in &actor.parameters {
        hash.update(name.as_bytes());
        let tensor = tensor.detach();
        for sum in [tensor.sum(Kind::Double), tensor.norm()] {
            hash.update(sum.double_value(&[]).to_le_bytes());
        }
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What a rollout depends on beside the policy: a hash of how it is sampled and judged, and of what its prompts' rows hold.
fn digest_of<A: Algorithm>(run: &RlRun<'_, A>, chosen: &[usize]) -> Result<String> {
    use sha2::{Digest, Sha256};
    let algorithm = &run.config.objective;
    let fields: Vec<_> = chosen.iter().map(|&prompt| &run.prompts[prompt].fields).collect();
    let sampled = (algorithm.rollout(), algorithm.num_samples(), run.config.seed);
    let all = (sampled, algorithm.rewards(), algorithm.missing_eos_penalty(), fields);
    let text = serde_json::to_vec(&all).map_err(|error| RlhfError::Config {
        place: "rollout".into(),
        faults: vec![format!("its settings have no form as JSON: {error}")],
    })?;
    Ok(Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Name of the generator's state among the tensors of a checkpoint.
const RANDOM: &str = "random";
/// Where a checkpoint keeps the critic.
pub const CRITIC: &str = "critic";
const STATE: &str = "rl_state.json";
const TENSORS: &str = "rl_state.safetensors";

fn save<A>(folder: &Path, run: &RlRun<'_, A>, updater: &Updater<'_, A>, state: &State) -> Result<()>
where
    A: Algorithm,
{
    (run.roles.actor.save)(folder)?;
    if let Some(Critic::Own(trained, _)) = &run.roles.critic {
        (trained.save)(&folder.join(CRITIC))?;
    }
    let mut tensors = updater.state();
    tensors.push((RANDOM.into(), pt_tensor::random::state()?));
    save_safetensors(&folder.join(TENSORS), &tensors, &[])?;
    let text = serde_json::to_string_pretty(state)
        .map_err(|error| TrainError::Write { path: folder.join(STATE), source: error.into() })?;
    Ok(write_atomic(&folder.join(STATE), text.as_bytes())?)
}

fn load<A: Algorithm>(folder: &Path, updater: &mut Updater<'_, A>) -> Result<State> {
    let path = folder.join(STATE);
    let text = std::fs::read(&path).map_err(|source| TrainError::Read { path: path.clone(), source })?;
    let state: State = serde_json::from_slice(&text).map_err(|error| {
        RlhfError::from(TrainError::NotARun { path: path.clone(), message: format!("is damaged: {error}") })
    })?;
    let reader = SafetensorsReader::open(folder.join(TENSORS))?;
    let get = |name: &str| -> pt_tensor::Result<Tensor> { reader.tensor(name, Device::Cpu) };
    let all: Vec<String> = reader.names().filter(|name| *name != RANDOM).map(str::to_string).collect();
    updater.load_state(&all, &get)?;
    pt_tensor::random::set_state(&get(RANDOM)?)?;
    Ok(state)
}
