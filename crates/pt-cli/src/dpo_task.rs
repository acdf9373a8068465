//! Preference training as a kind of job: its rows, its reference, its first look at both.

use crate::checkpoints::adapter_folder;
use crate::job::Job;
use crate::open::{ModelArgs, no_tokenizer};
use crate::run_command::{absolute, dtype_name};
use crate::talk::{self, Refused};
use crate::task::{Checked, CheckedRows, CheckedSet, PROMPT_IS_KNOWN, Policy, Task};
use anyhow::{Context, Result};
use pt_dpo::{
    Dpo, DpoConfig, DpoExample, Loss, LossConfig, PolicyCopy, Reference, load_reference, precompute, save_reference,
};
use pt_model::{Bare, CausalLm, Pretrained, RunOptions, Sites};
use pt_peft::load_adapter;
use pt_train::data::{
    DataConfig, Judgement, PreferenceGroup, Row, join_labels, preference_preflight, prompt_overlap, read_rows,
};
use pt_train::encoder::ModelEncoder;
use pt_train::objective::{Objective, Pass, evaluate};
use pt_train::report::DataTable;
use pt_train::run_dir::RunDir;
use pt_train::settings::TrainConfig;
use sha2::{Digest, Sha256};
use std::cell::RefCell;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Where a run keeps the reference's log-probs.
const REFERENCE: &str = "reference_logps.safetensors";
/// Tokens a micro-batch of the reference's pass, which holds no graph.
const REFERENCE_TOKENS: usize = 4096;

/// Preference training.
#[derive(Default)]
pub(crate) struct DpoTask {
    /// Loaded before the run's folder stands, taken by the objective.
    reference: RefCell<Option<Reference>>,
}

impl Task for DpoTask {
    type Settings = DpoConfig;
    type Example = DpoExample;
    const COMMAND: &'static str = "dpo";
    const ROWS: &'static str = "`chosen`, `rejected`, optional `prompt`, `margin`, `weight`; `completions` with `ranks` \
                                or `scores`, optional `prompt`, `weight`; for kto `prompt`, `completion`, `label`";
    const TAKES_LABELS: bool = true;
    const TITLE: &'static str = "Preference training";
    const LOSS_UNIT: &'static str = "nats/pair";

    fn check(
        rows: &[Row],
        eval_rows: &[Row],
        pretrained: &Pretrained,
        encoder: &ModelEncoder<'_>,
        config: &TrainConfig<DpoConfig>,
    ) -> Result<Checked<DpoExample>> {
        let settings = &config.objective.reference;
        let sorts = config.objective.loss.loss_type.iter().find(|loss| matches!(loss, Loss::Aot | Loss::AotUnpaired));
        if let Some(loss) = sorts.filter(|_| config.batch.max_tokens.is_some() || config.batch.accumulation > 1) {
            return Err(Refused {
                message: format!(
                    "`{}` sorts the pairs of a step, and batch.max_tokens or batch.accumulation would have it sort parts",
                    loss.name()
                ),
                hint: "set batch.batch_size to the rows of a step, batch.max_tokens to null and batch.accumulation to 1"
                    .into(),
            }
            .into());
        }
        // Before a run stands or anything is loaded.
        if let Some(name) = &settings.model {
            find_reference(name, pretrained, config.data.max_length)?;
        }
        settings.adapter.as_deref().map_or(Ok(()), |folder| adapter_folder(folder).map(drop))?;
        let loss = &config.objective.loss;
        let train = checked("training", rows, encoder, &config.data, loss, true)?;
        let held_out = |rows: &[Row]| checked("held out", rows, encoder, &config.data, loss, false);
        Checked::of_sets(train, eval_rows, held_out, prompt_overlap, PROMPT_IS_KNOWN)
    }

    fn settle(config: &mut TrainConfig<DpoConfig>) {
        let settings = &mut config.objective.reference;
        settings.model = settings.model.as_deref().map(absolute);
        settings.adapter = settings.adapter.as_deref().map(|path| absolute(&path.to_string_lossy()).into());
    }

    fn prepare(&self, job: &Job<Self>, pretrained: &Pretrained, model: &CausalLm, policy: Policy<'_>) -> Result<()> {
        if job.config.objective.loss.needs_reference() {
            self.reference.replace(Some(reference(job, pretrained, model, policy)?));
        }
        Ok(())
    }

    fn objective(
        &self,
        job: &Job<Self>,
        run: &RunDir,
        _: &Pretrained,
        model: &CausalLm,
        policy: Policy<'_>,
        [train, eval]: [&mut CheckedRows<DpoExample>; 2],
    ) -> Result<Box<dyn Objective<Example = DpoExample>>> {
        let settings = &job.config.objective;
        let Some(mut reference) = self.reference.take() else {
            return Ok(Box::new(Dpo::new(settings.loss.clone(), Reference::Absent)?));
        };
        if settings.reference.is_precomputed() {
            let path = run.root().join(REFERENCE);
            let identity = reference_identity(job)?;
            let sets = [&mut train.examples[..], &mut eval.examples[..]];
            if path.exists() {
                load_reference(&path, sets, &identity)?;
                check_reference(&reference, model, policy.0, &train.examples)
                    .with_context(|| path.display().to_string())?;
            } else {
                for (what, examples) in ["training", "held-out"].into_iter().zip(sets) {
                    let mut work = talk::Work::new(&format!("reference on the {what} rows"), examples.len(), "rows");
                    precompute(&reference, model, policy.0, examples, REFERENCE_TOKENS, &mut |done| work.set(done))?;
                    work.finish();
                }
                save_reference(&path, [&train.examples, &eval.examples], &identity)?;
            }
            for (what, rows) in [("training", &train.examples), ("held-out", &eval.examples)] {
                if let Some(accuracy) = reference_accuracy(rows) {
                    eprintln!(
                        "the reference finds the chosen completion the more probable one in {:.1} % of the {what} pairs",
                        accuracy * 100.0
                    );
                }
            }
            reference = Reference::Precomputed;
        }
        Ok(Box::new(Dpo::new(settings.loss.clone(), reference)?))
    }
}

/// The reference as the settings name it.
fn reference(
    job: &Job<DpoTask>,
    pretrained: &Pretrained,
    model: &CausalLm,
    (sites, trained): Policy<'_>,
) -> Result<Reference> {
    let settings = &job.config.objective.reference;
    let adapter = |model: &CausalLm| -> Result<Rc<dyn Sites>> {
        match &settings.adapter {
            Some(folder) => Ok(load_adapter(&adapter_folder(folder)?, model)?),
            None => Ok(Rc::new(Bare)),
        }
    };
    if let Some(name) = &settings.model {
        let other =
            CausalLm::load(&find_reference(name, pretrained, job.config.data.max_length)?, job.device, job.kind)?;
        let sites = adapter(&other)?;
        return Ok(Reference::Model(Box::new(other), sites));
    }
    if settings.adapter.is_some() {
        return Ok(Reference::Sites(adapter(model)?));
    }
    let is_new_adapter = job.config.peft.is_some() && job.adapter.is_none();
    Ok(match settings.sync_every {
        // What is about to be trained is the reference itself; nothing has moved yet.
        0 if settings.is_precomputed() && !is_new_adapter => Reference::Sites(sites.clone()),
        0 if is_new_adapter => Reference::Sites(Rc::new(Bare)),
        every => Reference::Copy(PolicyCopy::new(trained, every, settings.sync_mixup)),
    })
}

/// Rows of one set, as the losses take them.
fn checked(
    name: &str,
    rows: &[Row],
    encoder: &ModelEncoder<'_>,
    data: &DataConfig,
    loss: &LossConfig,
    is_shown: bool,
) -> Result<CheckedSet<DpoExample>> {
    let preflight = preference_preflight(rows, encoder, data)?;
    if is_shown {
        eprintln!("{}", preflight.summary.to_text());
        for example in preflight.examples(rows, encoder, talk::is_terminal()) {
            eprintln!("{example}\n");
        }
    }
    let is_unpaired = |group: &PreferenceGroup| matches!(group.judgement, Judgement::Labels(_));
    let misfit = preflight.groups.iter().position(|group| is_unpaired(group) != loss.is_unpaired());
    if let Some(group) = misfit {
        let origin = &rows[preflight.row_of_group[group]].origin;
        let (has, takes) = match loss.is_unpaired() {
            true => ("a pair or a ranked list", "single completions with a `label`"),
            false => ("a single completion with a label", "pairs or ranked lists"),
        };
        let loss = loss.loss_type[0].name();
        return Err(Refused {
            message: format!("{origin}: holds {has}, and `{loss}` takes {takes}"),
            hint: "choose the loss by --set loss_type=..: kto and apo_zero_unpaired take labels, the others pairs"
                .into(),
        }
        .into());
    }
    // Before a run stands: the loss would refuse them at its first step.
    if let Some(marginless) = loss.without_margin() {
        let has_margin = |group: &PreferenceGroup| {
            group.judgement.states_margin() && group.pairs().iter().any(|pair| pair.margin != 0.0)
        };
        if let Some(group) = preflight.groups.iter().position(has_margin) {
            let origin = &rows[preflight.row_of_group[group]].origin;
            return Err(Refused {
                message: format!("{origin}: has a `margin`, and `{}` takes none", marginless.name()),
                hint: "leave the margins out, or take a loss on the difference of rewards, as sigmoid is".into(),
            }
            .into());
        }
    }
    let table = DataTable::of_preferences(name, &preflight.summary);
    // Labelled rows of one prompt are one group, so that the prompt is computed once.
    let (groups, first_rows) = join_labels(preflight.groups);
    let row_of_example = first_rows.into_iter().map(|group| preflight.row_of_group[group]).collect();
    let examples = DpoExample::from_groups(groups, loss, data.max_length).with_context(|| format!("{name} rows"))?;
    Ok((CheckedRows { examples, row_of_example }, table))
}

/// Share of pairs whose chosen completion is the more probable one under the reference; `None` without pairs.
fn reference_accuracy(examples: &[DpoExample]) -> Option<f64> {
    let (mut right, mut count) = (0, 0);
    for example in examples {
        let kept = example.reference.as_ref()?;
        let mut left = &kept.completions[..];
        let logps: Vec<f32> = (example.preference.group.label_counts())
            .map(|count| {
                let (own, rest) = left.split_at(count);
                left = rest;
                own.iter().sum()
            })
            .collect();
        let pairs = example.preference.pairs();
        right += pairs.iter().filter(|pair| logps[pair.chosen] > logps[pair.rejected]).count();
        count += pairs.len();
    }
    (count > 0).then(|| right as f64 / count as f64)
}

/// That kept log-probs are this reference's: the first rows are computed again.
fn check_reference(
    reference: &Reference,
    model: &CausalLm,
    sites: &Rc<dyn Sites>,
    examples: &[DpoExample],
) -> Result<()> {
    let mut again: Vec<DpoExample> = examples.iter().take(2).cloned().collect();
    precompute(reference, model, sites, &mut again, REFERENCE_TOKENS, &mut |_| ())?;
    let logprobs = |examples: &[DpoExample]| -> Vec<f32> {
        examples.iter().filter_map(|row| row.reference.as_ref()).flat_map(|kept| kept.completions.clone()).collect()
    };
    let (kept, found) = (logprobs(&examples[..again.len()]), logprobs(&again));
    let apart = kept.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    // bf16 rounds differently with the rows that a batch holds.
    if apart > 0.25 {
        return Err(Refused {
            message: format!("the reference gives other log-probs now than when they were kept: {apart:.3} nats apart"),
            hint: "resume with the reference that the run began with, or delete the file to compute them again".into(),
        }
        .into());
    }
    Ok(())
}

/// Another model as the reference: it has to read the policy's tokens.
fn find_reference(name: &str, policy: &Pretrained, max_length: usize) -> Result<Pretrained> {
    let pretrained = Pretrained::open(model_path(name)?)?;
    let refused = |what: String, hint: &str| -> Result<Pretrained> {
        Err(Refused { message: format!("reference.model {name}: {what}"), hint: hint.into() }.into())
    };
    let (own, other) = (policy.config.vocab_size, pretrained.config.vocab_size);
    if own != other {
        return refused(format!("has {other} tokens, the model {own}"), OTHER_VOCABULARY);
    }
    // A policy without a tokenizer is refused for itself.
    if let Some(own) = &policy.tokenizer {
        let Some(other) = &pretrained.tokenizer else {
            let hint = "put the model's own tokenizer.json beside its weights, if it was trained with that one";
            return refused("has no tokenizer, so that nothing tells whether it reads the model's tokens".into(), hint);
        };
        let differs = |id: &i64| own.id_to_token(*id) != other.id_to_token(*id);
        if let Some(id) = (0..own.vocab_size().max(other.vocab_size()) as i64).find(differs) {
            let word = |token: Option<String>| token.map_or_else(|| "no token".into(), |token| format!("`{token}`"));
            let (own, other) = (word(own.id_to_token(id)), word(other.id_to_token(id)));
            return refused(format!("token {id} is {other}, the model's is {own}"), OTHER_VOCABULARY);
        }
    }
    let context = pretrained.config.max_position_embeddings as usize;
    if max_length > context {
        let hint = "lower data.max_length, or take a reference that reads as much";
        return refused(format!("its context is {context}, data.max_length is {max_length}"), hint);
    }
    Ok(pretrained)
}

const OTHER_VOCABULARY: &str =
    "the reference has to share the model's vocabulary: take the model that it was trained from";

/// The folder or file that a model's name means.
fn model_path(name: &str) -> Result<PathBuf> {
    ModelArgs { model: name.into(), adapter: None, device: String::new(), dtype: String::new() }.path()
}

/// What kept log-probs belong to: the reference's weights, its adapter and the number formats it ran in.
fn reference_identity(job: &Job<DpoTask>) -> Result<String> {
    let settings = &job.config.objective.reference;
    let model = settings.model.as_deref().map_or_else(|| Ok(job.model_path.clone()), model_path)?;
    let is_policy = settings.model.is_none() && settings.adapter.is_none();
    let adapter = match &settings.adapter {
        Some(folder) => Some(adapter_folder(folder)?),
        None => job.adapter.clone().filter(|_| is_policy),
    };
    let adapter = adapter.map_or_else(|| Ok("none".into()), |folder| hash_of_files(&folder))?;
    let weights = job.command.as_ref().filter(|_| settings.model.is_none()).map_or("", |command| &command.weights);
    Ok(format!("model {} adapter {adapter} dtype {} {weights}", hash_of_files(&model)?, dtype_name(job.kind)))
}

/// A hash of a file's content, or of a folder's weights and settings. Of large files the length and pieces all over them:
/// gigabytes would take longer to read than the first steps, and training moves every tensor.
fn hash_of_files(path: &Path) -> Result<String> {
    const PIECE: u64 = 1 << 20;
    const NUM_PIECES: u64 = 32;
    let mut files = vec![path.to_path_buf()];
    if path.is_dir() {
        let entries = path.read_dir().with_context(|| format!("cannot read {}", path.display()))?;
        files = entries.flatten().map(|entry| entry.path()).collect();
        let is_part = |path: &PathBuf| {
            path.extension().is_some_and(|end| end == "safetensors" || end == "gguf" || end == "bin")
                || path.ends_with("config.json")
                || path.ends_with("adapter_config.json")
        };
        files.retain(is_part);
        files.sort();
    }
    let mut hasher = Sha256::new();
    for path in files {
        let mut read = || -> std::io::Result<()> {
            let mut file = std::fs::File::open(&path)?;
            let length = file.metadata()?.len();
            hasher.update(length.to_le_bytes());
            let is_small = length <= PIECE * NUM_PIECES;
            let starts = (0..if is_small { 1 } else { NUM_PIECES })
                .map(|piece| piece * (length - PIECE.min(length)) / (NUM_PIECES - 1));
            for start in starts {
                file.seek(SeekFrom::Start(start))?;
                std::io::copy(&mut (&mut file).take(if is_small { length } else { PIECE }), &mut hasher)?;
            }
            Ok(())
        };
        read().with_context(|| format!("cannot read {}", path.display()))?;
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Other rows to judge, with the reference's log-probs, which are those of the model before training.
pub(crate) struct TestRows {
    examples: Vec<DpoExample>,
    /// Share of pairs whose chosen completion is the more probable one before training.
    pub(crate) before: f64,
}

impl TestRows {
    /// Reads and checks rows and runs the model over them, while it is still untrained.
    pub(crate) fn new(job: &Job<DpoTask>, pretrained: &Pretrained, model: &CausalLm, path: &Path) -> Result<Self> {
        let rows = read_rows(&[path.to_path_buf()], &job.config.data.read_options())?;
        let encoder = ModelEncoder::new(pretrained).ok_or_else(|| no_tokenizer(pretrained))?;
        let (checked, _) = checked("test", &rows, &encoder, &job.config.data, &job.config.objective.loss, false)?;
        let mut examples = checked.examples;
        let bare: Rc<dyn Sites> = Rc::new(Bare);
        let mut work = talk::Work::new("test rows before training", examples.len(), "rows");
        let reference = Reference::Sites(bare.clone());
        precompute(&reference, model, &bare, &mut examples, REFERENCE_TOKENS, &mut |done| work.set(done))?;
        work.finish();
        let before = reference_accuracy(&examples).with_context(|| format!("{}: holds no pair", path.display()))?;
        Ok(Self { examples, before })
    }

    /// Shares of pairs that the trained policy tells apart: by how much it moved, and by probability alone.
    pub(crate) fn after(&self, job: &Job<DpoTask>, model: &CausalLm, sites: &Rc<dyn Sites>) -> Result<[f64; 2]> {
        let pass = Pass { step: 0, model, sites, options: RunOptions::default() };
        let mut objective = Dpo::new(job.config.objective.loss.clone(), Reference::Precomputed)?;
        let mut work = talk::Work::new("test rows after training", self.examples.len(), "rows");
        let mut watch = |done| work.set(done);
        let evaluation = evaluate(&mut objective, &pass, &self.examples, REFERENCE_TOKENS, &mut watch)?;
        work.finish();
        let share = |name| evaluation.value(name).context("the test rows hold no pair");
        Ok([share(pt_dpo::ACCURACY)?, share(pt_dpo::LOGPS_ACCURACY)?])
    }
}
