//! What `pt ppo` and `pt grpo` share: roles, rewards, progress, report.

use crate::checkpoints::RewardFolder;
use crate::interrupts;
use crate::memory::Memory;
use crate::open::no_tokenizer;
use crate::run_command::absolute;
use crate::talk::{self, Misused};
use crate::task::MAX_SHARD_BYTES;
use crate::training::{Prepared, TrainArgs, help_on, prepare};
use anyhow::Result;
use pt_model::{Bare, CausalLm, Pretrained, Sites};
use pt_peft::{Adapter, load_adapter};
use pt_rlhf::reward::{ModelReward, Reward, RewardSpec, WeightedSum, build, rewards_text};
use pt_rlhf::{
    Algorithm, Critic, CriticKind, EVAL_SCORES, Finding, GrpoConfig, IterationRecord, ModelScorer, Phase, PpoConfig,
    Prompt, Reference, RewardModel, RlObserver, RlOutcome, RlRun, Roles, SCORES, SampleRecord, ScalarHead,
    check_method, check_rewards, encode_prompts, read_prompts, reward_metric, train, trunk_of,
};
use pt_tensor::Tensor;
use pt_train::config::{flatten, to_yaml};
use pt_train::data::{Encode, Text};
use pt_train::encoder::ModelEncoder;
use pt_train::metrics::read_series;
use pt_train::report::{Better, Headline, Report, Sample};
use pt_train::run_dir::{RunDir, write_atomic};
use pt_train::train::{Ending, Trained};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Instant;

/// A command of reinforcement learning, by the settings that it runs.
pub(crate) trait RlTask: Algorithm {
    /// As in `pt ppo`.
    const COMMAND: &'static str;
    /// Title of the report.
    const TITLE: &'static str;

    /// Paths that the settings name, made absolute so that a run can be resumed from another folder.
    fn paths(&mut self) -> Vec<&mut PathBuf>;
}

/// Paths of reward models.
fn model_paths(rewards: &mut [RewardSpec]) -> impl Iterator<Item = &mut PathBuf> {
    rewards.iter_mut().filter_map(|spec| match spec {
        RewardSpec::Model(model) => Some(&mut model.path),
        _ => None,
    })
}

impl RlTask for PpoConfig {
    const COMMAND: &'static str = "ppo";
    const TITLE: &'static str = "Proximal policy optimization";

    fn paths(&mut self) -> Vec<&mut PathBuf> {
        model_paths(&mut self.rewards).chain(&mut self.critic.path).collect()
    }
}

impl RlTask for GrpoConfig {
    const COMMAND: &'static str = "grpo";
    const TITLE: &'static str = "Group-relative policy optimization";

    fn paths(&mut self) -> Vec<&mut PathBuf> {
        model_paths(&mut self.rewards).collect()
    }
}

/// The forms of the rows, for `--help`.
const ROWS: &str = "`prompt` (a text or messages) or `messages` that end with a user's turn; other fields, \
                               such as `answer`, are for the rewards.\n\nIn the fields below a step is an iteration (sample, \
                               score, update), `batch.batch_size` times `batch.accumulation` are its prompts, \
                               `batch.max_tokens` bounds the micro-batches of its passes, and what `eval_every` measures \
                               and `early_stopping` waits for is the held-out score, the higher the better. Of the fields of \
                               `data`, `sources`, `columns`, `as_chat` and `max_rows` matter; the length of prompts is \
                               bounded by `rollout.max_prompt_tokens`";

/// Where a run keeps responses that it learned from.
const SAMPLES: &str = "samples.jsonl";
/// How the metrics of rewards on held-out prompts begin.
const EVAL_PARTS: &str = "eval_rewards/";
/// Iterations of which the report shows responses.
const SHOWN: usize = 8;

pub(crate) fn run<A: RlTask>(args: TrainArgs) -> Result<ExitCode> {
    let Some(mut prepared) = prepare::<A>(&args, A::COMMAND)? else { return Ok(ExitCode::SUCCESS) };
    for path in prepared.config.objective.paths() {
        *path = absolute(&path.to_string_lossy()).into();
    }
    let algorithm = &prepared.config.objective;
    if algorithm.rewards().is_empty() {
        return Err(Misused {
            message: "rewards is empty: nothing says what a response is worth".into(),
            hint: "for instance --set 'rewards=[{type: number}]' (the row's `answer`), or \
                   --set 'rewards=[{type: model, path: RUN}]' (a run of `pt reward`); the fields are in --help"
                .into(),
        }
        .into());
    }
    let pretrained = Pretrained::open(prepared.flags.path()?)?;
    let encoder = ModelEncoder::new(&pretrained).ok_or_else(|| no_tokenizer(&pretrained))?;
    let prompts = checked(&prepared, &prepared.command.data, &pretrained, &encoder, "training")?;
    let eval_prompts = match prepared.command.eval_data.is_empty() {
        true => vec![],
        false => checked(&prepared, &prepared.command.eval_data, &pretrained, &encoder, "held-out")?,
    };
    let config = &prepared.config;
    let total = config.total_steps(prompts.len());
    let per_step = config.batch.rows_per_step().min(prompts.len());
    eprintln!(
        "{total} iterations of {per_step} prompts, {} responses of at most {} tokens each",
        algorithm.num_samples(),
        algorithm.rollout().max_new_tokens
    );
    if let (Some(method), Some(CriticKind::Adapter)) =
        (config.peft, algorithm.value_settings().map(|settings| settings.critic.kind))
    {
        // The critic is an adapter with a head.
        check_method(method)?;
    }
    // Before anything is loaded: rewards by rule as they are, those by models as folders that stand.
    let rules = build(algorithm.rewards(), &mut |spec| {
        RewardFolder::of(&spec.path).map_err(|error| unusable(spec, format!("{error:#}")))?;
        Ok(Box::new(Unloaded))
    })?;
    for prompts in [&prompts, &eval_prompts] {
        check_rewards(prompts, &rules)?;
    }
    if args.dry_run {
        eprintln!("nothing was trained (--dry-run)");
        return Ok(ExitCode::SUCCESS);
    }
    if config.method().is_some() && config.lora.lora_dropout > 0.0 {
        eprintln!("note: lora.lora_dropout is off here: sampling and training have to run the same policy");
    }
    eprintln!("loading {}", pretrained.path.display());
    let cast = Cast::load(&prepared, &pretrained)?;
    let mut reward = build(algorithm.rewards(), &mut |spec| cast.reward(spec, &prepared, &pretrained))?;
    let finished = play(&prepared, &pretrained, &cast, &mut reward, (&prompts, &eval_prompts), &encoder)?;
    Ok(match finished.ending {
        Ending::Interrupted => ExitCode::from(130),
        _ => ExitCode::SUCCESS,
    })
}

/// Stands in for a reward model while settings are checked.
struct Unloaded;

impl Reward for Unloaded {
    fn name(&self) -> &str {
        "unloaded"
    }

    fn score(&mut self, samples: &[pt_rlhf::reward::Sample<'_>]) -> pt_rlhf::Result<Vec<f64>> {
        Ok(vec![0.0; samples.len()])
    }
}

fn unusable(spec: &ModelReward, message: String) -> pt_rlhf::RlhfError {
    pt_rlhf::RlhfError::Reward {
        reward: spec.name.as_deref().unwrap_or("model").into(),
        message,
        hint: Some("give the path of a run of `pt reward`, of its adapter, or of a sequence classifier".into()),
    }
}

/// What stands below the options of `--help`.
pub(crate) fn help<A: RlTask>() -> String {
    format!(
        "{}\nTypes of rewards and their fields, as in --set 'rewards=[{{type: number}}, {{type: length, max: 40, weight: \
         0.1}}]':\n\n{}",
        help_on::<A>(ROWS),
        rewards_text()
    )
}

/// Prompts of some files, tokenized.
fn checked<A: RlTask>(
    prepared: &Prepared<A>,
    paths: &[String],
    pretrained: &Pretrained,
    encoder: &ModelEncoder<'_>,
    what: &str,
) -> Result<Vec<Prompt>> {
    let paths: Vec<PathBuf> = paths.iter().map(PathBuf::from).collect();
    let rows = read_prompts(&paths, &prepared.config.data.read_options())?;
    let rollout = prepared.config.objective.rollout();
    let virtual_tokens = prepared.config.method().map_or(0, |method| method.num_virtual_tokens());
    let context = pretrained.config.max_position_embeddings as usize;
    let room = context.saturating_sub(virtual_tokens + rollout.max_new_tokens);
    let prompts = encode_prompts(&rows, encoder, rollout.max_prompt_tokens, room)?;
    let num_plain = rows.iter().filter(|row| matches!(row.prompt, Text::Plain(_))).count();
    if num_plain > 0 {
        eprintln!(
            "note: {num_plain} {what} prompts are plain text, without the chat template that `pt chat` asks through; to \
             train what that asks: --set data.as_chat=true, or messages in `prompt`"
        );
    }
    let lengths: Vec<usize> = prompts.iter().map(|prompt| prompt.ids.len()).collect();
    eprintln!(
        "{} {what} prompts of {} to {} tokens{}",
        prompts.len(),
        lengths.iter().min().unwrap_or(&0),
        lengths.iter().max().unwrap_or(&0),
        match rows.len() - prompts.len() {
            0 => String::new(),
            dropped => format!("; {dropped} longer ones left out"),
        }
    );
    Ok(prompts)
}

/// Who plays the roles: one base with adapters and heads, or models of their own where all weights are trained.
struct Cast {
    model: Rc<CausalLm>,
    actor: Option<Rc<dyn Adapter>>,
    actor_leaves: Vec<(String, Tensor)>,
    /// What the policy is held to: the adapter that training goes on from, on the base.
    reference_sites: Rc<dyn Sites>,
    /// Another copy of the model, where the policy's own weights move.
    reference_model: Option<Rc<CausalLm>>,
    critic: Option<CriticCast>,
}

struct CriticCast {
    model: Option<Rc<CausalLm>>,
    adapter: Option<Rc<dyn Adapter>>,
    leaves: Vec<(String, Tensor)>,
    head: ScalarHead,
    kind: CriticKind,
}

impl Cast {
    fn load<A: RlTask>(prepared: &Prepared<A>, pretrained: &Pretrained) -> Result<Self> {
        let (config, kind) = (&prepared.config, prepared.kind);
        let algorithm = &config.objective;
        let load = || CausalLm::load_with(pretrained, prepared.device, kind, prepared.weights.format());
        let mut model = load()?;
        let new_adapter = |model: &CausalLm, seed| -> Result<Option<Rc<dyn Adapter>>> {
            let Some(mut method) = config.method() else { return Ok(None) };
            method.note_base_model(&pretrained.path.display().to_string());
            Ok(Some(method.create(model, pretrained.tokenizer.as_ref(), seed)?))
        };
        let from = prepared.flags.adapter.as_deref();
        let actor = match from {
            Some(folder) => Some(load_adapter(folder, &model)?),
            None => new_adapter(&model, config.seed)?,
        };
        let actor_leaves = match &actor {
            Some(adapter) => adapter.parameters(),
            None => model.train_all()?,
        };
        let needs_copy = actor.is_none() && algorithm.needs_reference();
        let reference_model = needs_copy.then(load).transpose()?.map(Rc::new);
        let reference_sites: Rc<dyn Sites> = match from {
            Some(folder) => load_adapter(folder, &model)?,
            None => Rc::new(Bare),
        };
        let critic = match algorithm.value_settings().map(|settings| settings.critic) {
            None => None,
            Some(critic) => {
                let is_apart = critic.kind == CriticKind::Adapter;
                let load_own = |from: Pretrained| {
                    CausalLm::load(&trunk_of(from)?, prepared.device, kind).map_err(anyhow::Error::from)
                };
                let width = model.config().hidden_size;
                let mut head = ScalarHead::new(width, config.seed, prepared.device)?;
                let (mut own, mut adapter) = (None, None);
                let folder =
                    |path: &PathBuf| RewardFolder::of(path).map_err(|_| critic_fault(path, "is no reward model"));
                match critic.path.as_ref().map(folder).transpose()? {
                    Some(RewardFolder::Model(folder)) => {
                        let from = Pretrained::open(&folder)?;
                        let reward = RewardModel::of_pretrained(&from, prepared.device)?;
                        let reward = reward.ok_or_else(|| critic_fault(&folder, "has no `score.weight`"))?;
                        head = reward.value_head()?;
                        if is_apart {
                            own = Some(load_own(from)?);
                        }
                    }
                    Some(RewardFolder::Adapter(folder)) if is_apart && actor.is_none() => {
                        return Err(critic_fault(&folder, "is an adapter, and without a method the critic is a model"));
                    }
                    Some(RewardFolder::Adapter(folder)) => {
                        let (reward, of_reward) = RewardModel::load_adapter(&folder, &model)?;
                        (head, adapter) = (reward.value_head()?, Some(of_reward));
                    }
                    None if is_apart && actor.is_none() => own = Some(load_own(Pretrained::open(&pretrained.path)?)?),
                    None => {}
                }
                if head.hidden_size() != width {
                    let found = format!("reads {} hidden states, the policy has {width}", head.hidden_size());
                    return Err(critic_fault(critic.path.as_deref().unwrap_or(&pretrained.path), &found));
                }
                if critic.path.is_none() && own.is_none() && critic.kind == CriticKind::Adapter {
                    adapter = new_adapter(&model, config.seed.wrapping_add(1))?;
                }
                if critic.kind == CriticKind::ActorHead {
                    // The head alone: the states are the actor's.
                    adapter = None;
                }
                let mut leaves = match (&mut own, &adapter) {
                    (Some(model), None) => model.train_all()?,
                    (_, Some(adapter)) => adapter.parameters(),
                    (None, None) => vec![],
                };
                leaves.extend(head.parameters());
                Some(CriticCast { model: own.map(Rc::new), adapter, leaves, head, kind: critic.kind })
            }
        };
        Ok(Self { model: Rc::new(model), actor, actor_leaves, reference_sites, reference_model, critic })
    }

    /// A reward model: an adapter on the base, or a model of its own.
    fn reward<A: RlTask>(
        &self,
        spec: &ModelReward,
        prepared: &Prepared<A>,
        pretrained: &Pretrained,
    ) -> pt_rlhf::Result<Box<dyn Reward>> {
        let name = spec.name.as_deref().unwrap_or("model");
        let failed = |message: String| unusable(spec, message);
        let folder = match RewardFolder::of(&spec.path).map_err(|error| failed(format!("{error:#}")))? {
            RewardFolder::Adapter(folder) => folder,
            RewardFolder::Model(folder) => {
                let other = Pretrained::open(&folder)?;
                if !reads_the_same(&other, pretrained) {
                    return Err(failed(format!("{} reads other tokens than the policy", folder.display())));
                }
                let Some(reward) = RewardModel::of_pretrained(&other, prepared.device)? else {
                    return Err(failed(format!("{} has no `score.weight`", folder.display())));
                };
                let model = CausalLm::load(&trunk_of(other)?, prepared.device, prepared.kind)?;
                return Ok(Box::new(ModelScorer::new(name, Rc::new(model), Rc::new(Bare), reward)?));
            }
        };
        // Over weights that move, the adapter would say something else every iteration.
        let model = match (&self.actor, &self.reference_model) {
            (Some(_), _) => self.model.clone(),
            (None, Some(copy)) => copy.clone(),
            (None, None) => Rc::new(CausalLm::load(pretrained, prepared.device, prepared.kind)?),
        };
        let (reward, adapter) = RewardModel::load_adapter(&folder, &model)?;
        Ok(Box::new(ModelScorer::new(name, model, adapter, reward)?))
    }
}

/// Whether two models have one vocabulary: each token the same id.
fn reads_the_same(one: &Pretrained, other: &Pretrained) -> bool {
    let (Some(of_one), Some(of_other)) = (&one.tokenizer, &other.tokenizer) else { return false };
    one.config.vocab_size == other.config.vocab_size
        && of_one.vocab_size() == of_other.vocab_size()
        && (0..of_one.vocab_size() as i64).all(|id| of_one.id_to_token(id) == of_other.id_to_token(id))
}

fn critic_fault(folder: &Path, message: &str) -> anyhow::Error {
    Misused {
        message: format!("critic.path: {} {message}", folder.display()),
        hint: "give a run of `pt reward` on the policy's own base: with the same --peft, or with --peft none where all of \
               the policy's weights are trained; or leave critic.path out"
            .into(),
    }
    .into()
}

/// Trains and reports.
fn play<A: RlTask>(
    prepared: &Prepared<A>,
    pretrained: &Pretrained,
    cast: &Cast,
    reward: &mut WeightedSum,
    (prompts, eval_prompts): (&[Prompt], &[Prompt]),
    encoder: &ModelEncoder<'_>,
) -> Result<RlOutcome> {
    let started = Instant::now();
    let config = &prepared.config;
    let run = match prepared.run.is_some() {
        true => RunDir::open(&prepared.output)?,
        false => RunDir::create(&prepared.output, &to_yaml(config)?)?,
    };
    let again = prepared.command.resume(&prepared.output);
    interrupts::can_continue_with(&again);
    // A resumed run keeps its own settings until these are seen to go with its checkpoint.
    let keep = || -> Result<()> {
        run.save_config(&to_yaml(config)?)?;
        prepared.command.save(run.root())
    };
    if prepared.run.is_none() {
        keep()?;
    }
    let trained: Vec<Tensor> = (cast.actor_leaves.iter())
        .chain(cast.critic.iter().flat_map(|critic| &critic.leaves))
        .map(|(_, leaf)| leaf.shallow_clone())
        .collect();
    eprintln!(
        "training {} parameters, {:?} on {:?}",
        trained.iter().map(Tensor::numel).sum::<usize>(),
        prepared.kind,
        prepared.device
    );
    let memory = Memory {
        weights: cast.model.memory(),
        trained,
        is_adapter: cast.actor.is_some(),
        variant: config.adamw.variant,
        device: prepared.device,
    };
    eprintln!("{}", memory.to_text());
    let sites = |adapter: &Option<Rc<dyn Adapter>>| -> Rc<dyn Sites> {
        match adapter {
            Some(adapter) => adapter.clone(),
            None => Rc::new(Bare),
        }
    };
    let save_actor = |folder: &Path| -> pt_train::Result<()> {
        match &cast.actor {
            Some(adapter) => Ok(adapter.save(&folder.join("adapter"))?),
            None => crate::job::save_model(&folder.join("model"), pretrained, &cast.model, MAX_SHARD_BYTES),
        }
    };
    let lr_factor = |adapter: &Option<Rc<dyn Adapter>>| {
        let adapter = adapter.clone();
        Box::new(move |name: &str| adapter.as_ref().map_or(1.0, |adapter| adapter.lr_factor(name)))
    };
    let mut actor_leaves: Vec<(String, Tensor)> = shared(&cast.actor_leaves);
    let critic = cast.critic.as_ref().map(|critic| {
        if critic.kind == CriticKind::ActorHead {
            actor_leaves.extend(shared(&critic.leaves));
            return Critic::OnActor(critic.head.shared());
        }
        let save = move |folder: &Path| -> pt_train::Result<()> {
            let reward = RewardModel::new(critic.head.shared());
            match (&critic.adapter, &critic.model) {
                (Some(adapter), _) => Ok(reward.save_adapter(adapter.as_ref(), folder)?),
                (None, Some(model)) => Ok(reward.save_model(model, pretrained, folder, MAX_SHARD_BYTES)?),
                (None, None) => Ok(()),
            }
        };
        let trained = Trained {
            model: critic.model.as_deref().unwrap_or(&cast.model),
            sites: sites(&critic.adapter),
            parameters: shared(&critic.leaves),
            lr_factor: lr_factor(&critic.adapter),
            save: Box::new(save),
        };
        Critic::Own(trained, critic.head.shared())
    });
    let actor = Trained {
        model: &cast.model,
        sites: sites(&cast.actor),
        parameters: actor_leaves,
        lr_factor: lr_factor(&cast.actor),
        save: Box::new(save_actor),
    };
    let reference = match &cast.reference_model {
        Some(model) => Reference::Model(model, cast.reference_sites.clone()),
        None => Reference::Sites(cast.reference_sites.clone()),
    };
    let mut rl = RlRun {
        roles: Roles { actor, reference: Some(reference), critic },
        reward: std::mem::replace(reward, WeightedSum::new("rewards")),
        prompts,
        eval_prompts,
        tokenizer: encoder.tokenizer,
        stop_ids: encoder.stop_ids(),
        config,
        run: &run,
    };
    let mut progress = Progress::new(&run, Box::new(keep))?;
    let outcome = interrupts::while_training(|stop| train(&mut rl, stop, &mut progress))?;
    progress.finish()?;
    drop(rl);
    report::<A>(prepared, &run, &outcome, &progress, started.elapsed().as_secs_f64())?;
    if outcome.ending == Ending::Interrupted {
        eprintln!("stopped at iteration {}; continue with: {again}", outcome.steps);
        return Ok(outcome);
    }
    eprintln!("saved {}", result(&run, prepared, &outcome)?.display());
    eprintln!("report {}", run.report_path().display());
    Ok(outcome)
}

fn shared(leaves: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
    leaves.iter().map(|(name, leaf)| (name.clone(), leaf.shallow_clone())).collect()
}

/// What to go on with: of the best checkpoint, else of the last.
fn result<A: RlTask>(run: &RunDir, prepared: &Prepared<A>, outcome: &RlOutcome) -> Result<PathBuf> {
    let best = run.best()?.map(|best| best.step);
    let part = if prepared.config.peft.is_some() { "adapter" } else { "model" };
    Ok(run.checkpoint_path(best.unwrap_or(outcome.steps)).join(part))
}

fn report<A: RlTask>(
    prepared: &Prepared<A>,
    run: &RunDir,
    outcome: &RlOutcome,
    progress: &Progress<'_>,
    seconds: f64,
) -> Result<()> {
    let series = read_series(&run.metrics_path())?;
    // Of the checkpoint that is handed on, which is the best where held-out prompts tell.
    let best = run.best()?.map(|best| best.step);
    let ends = |name: &str| {
        let points = series.get(name)?;
        let chosen = points.iter().find(|(step, _)| best == Some(*step)).or(points.last())?;
        Some((points.first()?.1, chosen.1))
    };
    let headline = |label: &str, (before, after): (f64, f64), better| Headline {
        label: label.into(),
        before: Some(before),
        after,
        unit: String::new(),
        better,
    };
    let mut headlines = Vec::new();
    headlines.extend(ends(EVAL_SCORES).map(|it| headline("held-out score (greedy)", it, Better::Higher)));
    // Rewards with weight 0 are there to be watched: what is wanted, beside what is rewarded.
    let parts: Vec<&str> =
        series.keys().filter_map(|name| name.strip_prefix(EVAL_PARTS)?.strip_suffix("/mean")).collect();
    if parts.len() > 1 {
        let of_part = |name: &&str| Some((format!("held-out {name}"), ends(&format!("eval_{}", reward_metric(name)))?));
        headlines.extend(parts.iter().filter_map(of_part).map(|(label, it)| headline(&label, it, Better::Higher)));
    }
    headlines.extend(ends(SCORES).map(|it| headline("score of rollouts", it, Better::Higher)));
    headlines.extend(ends("objective/kl").map(|it| headline("KL to the reference, nats", it, Better::Neither)));
    let shown = |sample: &SampleRecord| Sample {
        prompt: format!("iteration {}: {}", sample.step, sample.prompt),
        expected: None,
        before: None,
        after: judged_text(sample),
    };
    let (model, adapter) = (&prepared.command.model, result(run, prepared, outcome)?);
    let chat = match prepared.config.peft {
        Some(_) => format!("pt chat --model {model} --adapter {}", adapter.display()),
        None => format!("pt chat --model {}", adapter.display()),
    };
    let mut facts = vec![
        ("result".into(), adapter.display().to_string()),
        ("iterations".into(), outcome.steps.to_string()),
        ("seconds".into(), format!("{seconds:.0}")),
        ("peak memory".into(), format!("{:.2} GB", pt_tensor::peak_memory_bytes().unwrap_or(0) as f64 / 1e9)),
        ("pt".into(), env!("CARGO_PKG_VERSION").into()),
    ];
    facts.extend(progress.findings.iter().map(|(name, text)| (format!("diagnosis: {name}"), text.clone())));
    let report = Report {
        title: A::TITLE.into(),
        subtitle: format!("{model}, {:?} on {:?}", prepared.kind, prepared.device),
        headlines,
        series,
        samples: progress.shown().map(shown).collect(),
        facts,
        config: flatten(&prepared.config),
        commands: vec![chat, format!("tensorboard --logdir {}", run.tensorboard_path().display())],
        ..Report::default()
    };
    Ok(report.write(&run.report_path())?)
}

/// A response with what it was worth.
fn judged_text(sample: &SampleRecord) -> String {
    let parts: Vec<String> = sample.rewards.iter().map(|(name, score)| format!("{name} {score:.3}")).collect();
    let parts = if parts.len() > 1 { format!(" ({})", parts.join(", ")) } else { String::new() };
    let cut = if sample.is_ended { "" } else { ", cut off" };
    format!("{}\n\nscore {:.3}{parts}{cut}", sample.response, sample.score)
}

/// A bar of iterations on a terminal, a line an iteration; keeps responses for the report.
struct Progress<'a> {
    path: PathBuf,
    /// Keeps settings and command in the run, once the loop has taken them.
    keep_settings: Option<Box<dyn FnOnce() -> Result<()> + 'a>>,
    samples: Vec<SampleRecord>,
    findings: BTreeMap<&'static str, String>,
    bar: Option<indicatif::ProgressBar>,
    failed: Option<anyhow::Error>,
}

impl<'a> Progress<'a> {
    fn new(run: &RunDir, keep_settings: Box<dyn FnOnce() -> Result<()> + 'a>) -> Result<Self> {
        let path = run.root().join(SAMPLES);
        let last = run.latest()?.map_or(0, |(step, _)| step);
        let kept = std::fs::read_to_string(&path).unwrap_or_default();
        let samples = kept.lines().filter_map(|line| serde_json::from_str::<SampleRecord>(line).ok());
        let samples = samples.filter(|sample| sample.step <= last).collect();
        Ok(Self {
            path,
            keep_settings: Some(keep_settings),
            samples,
            findings: BTreeMap::new(),
            bar: None,
            failed: None,
        })
    }

    fn accepted(&mut self) {
        if let Some(Err(error)) = self.keep_settings.take().map(|keep| keep()) {
            self.failed.get_or_insert(error);
        }
    }

    fn finish(&mut self) -> Result<()> {
        self.accepted();
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.failed.take().map_or(Ok(()), Err)
    }

    /// Responses of some iterations, evenly spaced, the first and the last among them.
    fn shown(&self) -> impl Iterator<Item = &SampleRecord> {
        let mut steps: Vec<u64> = self.samples.iter().map(|sample| sample.step).collect();
        steps.dedup();
        let last = steps.len().saturating_sub(1);
        let count = SHOWN.min(steps.len());
        let picked: Vec<u64> = (0..count).map(|number| steps[number * last / count.saturating_sub(1).max(1)]).collect();
        self.samples.iter().filter(move |sample| picked.contains(&sample.step))
    }

    fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) if talk::is_terminal() => bar.println(line),
            _ => eprintln!("{line}"),
        }
    }

    fn keep(&self) -> Result<()> {
        let mut text = String::new();
        for sample in &self.samples {
            text.push_str(&serde_json::to_string(sample)?);
            text.push('\n');
        }
        Ok(write_atomic(&self.path, text.as_bytes())?)
    }
}

impl RlObserver for Progress<'_> {
    fn on_phase(&mut self, step: u64, phase: Phase, done: usize, total: usize) {
        self.accepted();
        let bar = self.bar.get_or_insert_with(|| talk::bar(0, "iterations"));
        bar.set_message(match phase {
            Phase::Sampling => format!("{step}: sampled {done} tokens of at most {total}"),
            Phase::Scoring => format!("{step}: scoring"),
            Phase::Comparing => format!("{step}: reference and critic"),
            Phase::Updating => format!("{step}: update {done}/{total}"),
            Phase::Evaluating => format!("{step}: held-out prompts {done}/{total}"),
        });
    }

    fn on_iteration(&mut self, record: &IterationRecord, samples: &[SampleRecord]) {
        let bar = self.bar.get_or_insert_with(|| talk::bar(0, "iterations"));
        bar.set_length(record.total_steps);
        bar.set_position(record.step);
        let value = |name: &str| record.value(name).unwrap_or(f64::NAN);
        let kl = record.value("objective/kl").map_or(String::new(), |kl| format!("  KL {kl:.3}"));
        let seconds: f64 =
            ["rollout", "scoring", "compare", "update"].iter().map(|part| value(&format!("seconds/{part}"))).sum();
        self.say(&format!(
            "iteration {}/{}  score {:.3}{kl}  length {:.1}  ended {:.0} %  entropy {:.2}  clipped {:.1} %  \
             {seconds:.1} s (sampling {:.1}, updates {:.1})",
            record.step,
            record.total_steps,
            value(SCORES),
            value("completions/mean_length"),
            value("completions/end_rate") * 100.0,
            value("policy/entropy_avg"),
            value("policy/clipfrac_avg") * 100.0,
            value("seconds/rollout"),
            value("seconds/update"),
        ));
        self.samples.extend_from_slice(samples);
        if let Err(error) = self.keep() {
            self.failed.get_or_insert(error);
        }
    }

    fn on_evaluation(&mut self, step: u64, score: f64, is_best: bool) {
        let mark = if is_best {
            " (best so far)"
        } else if step > 0 {
            " (no better than before)"
        } else {
            ""
        };
        self.say(&format!("iteration {step}: held-out score {score:.4}{mark}"));
    }

    fn on_finding(&mut self, _step: u64, finding: &Finding) {
        // Said once; the report has the latest numbers.
        let name = finding.diagnosis.name();
        if self.findings.insert(name, finding.to_string()).is_none() {
            self.say(&format!("note: {finding}"));
        }
    }
}
