//! `pt delta`: fine-tunes as one bit a weight (BitDelta).

use super::generate::at_least_one;
use crate::checkpoints::adapter_folder;
use crate::interrupts;
use crate::job::save_model;
use crate::open::{DataArgs, FolderArgs, ModelArgs, check_free, no_tokenizer};
use crate::talk::{self, Misused, say};
use anyhow::{Context, Result};
use pt_model::{Bare, CausalLm, Pretrained, Sites};
use pt_peft::{
    Adapter, BitDeltaAdapter, BitDeltaConfig, DeltaBytes, FineTuned, KeptWhole, ScaleSharing, StoredDelta, compress,
    load_adapter,
};
use pt_tensor::{AdamWConfig, Kind};
use pt_train::data::{read_rows, row_to_group};
use pt_train::distill::{DistillConfig, LogitsError, Role, distill, pieces};
use pt_train::encoder::ModelEncoder;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Instant;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Make a delta of a base and its fine-tune: a bit a weight, and scales.
    Compress(CompressArgs),
    /// Train a delta's scales until the base with it gives the fine-tune's logits.
    Distill(DistillArgs),
    /// Show what a delta holds.
    Inspect(InspectArgs),
    /// Fold a delta into its base and save a Hugging Face folder.
    Merge(MergeArgs),
    /// Read a delta in BitDelta's own packing, its dictionary as safetensors.
    Import(ImportArgs),
    /// Write a delta in BitDelta's own packing, as safetensors.
    Export(ExportArgs),
}

/// The model that a delta is over.
#[derive(clap::Args)]
struct BaseArgs {
    /// The base: a Hugging Face folder, a .gguf file, or a name that `pt models` lists.
    #[arg(long)]
    model: String,
    /// auto, cpu, cuda, cuda:N or mps.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Number format of weights and activations, or of what is saved: auto, f32, bf16 or f16.
    #[arg(long, default_value = "auto")]
    dtype: String,
}

impl BaseArgs {
    /// The flags for a model: this one, or another in its place.
    fn of(&self, model: Option<&String>) -> ModelArgs {
        let model = model.unwrap_or(&self.model).clone();
        ModelArgs { model, adapter: None, device: self.device.clone(), dtype: self.dtype.clone() }
    }
}

/// The fine-tune.
#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct TunedArgs {
    /// The fine-tuned model, in the same forms as --model.
    #[arg(long)]
    fine_tuned: Option<String>,
    /// An adapter over --model that makes the fine-tune, or a run that trained one: in the place of --fine-tuned. Distillation
    /// then keeps one model in memory.
    #[arg(long)]
    adapter: Option<PathBuf>,
}

#[derive(clap::ValueEnum, Debug, Clone, Copy)]
enum Scales {
    /// One for a matrix, as in the paper
    Matrix,
    /// One for each output
    Row,
    /// One for 128 weights of an output
    Group128,
}

#[derive(clap::ValueEnum, Debug, Clone, Copy)]
enum Keep {
    /// Those that the fine-tune moved
    Changed,
    /// All, as BitDelta's script does
    All,
    /// None: the base's are used
    None,
}

impl From<Scales> for ScaleSharing {
    fn from(scales: Scales) -> Self {
        match scales {
            Scales::Matrix => Self::Matrix,
            Scales::Row => Self::Row,
            Scales::Group128 => Self::Group128,
        }
    }
}

impl From<Keep> for KeptWhole {
    fn from(keep: Keep) -> Self {
        match keep {
            Keep::Changed => Self::Changed,
            Keep::All => Self::All,
            Keep::None => Self::None,
        }
    }
}

#[derive(clap::Args)]
struct CompressArgs {
    #[command(flatten)]
    base: BaseArgs,
    #[command(flatten)]
    tuned: TunedArgs,
    /// Weights that share a scale.
    #[arg(long, value_enum, default_value = "matrix")]
    scales: Scales,
    /// Which embeddings, norms, biases and output layers are carried in full precision (--dtype; auto: the fine-tune's own,
    /// bf16 for GGUF files). They count in the delta's size.
    #[arg(long, value_enum, default_value = "changed")]
    keep: Keep,
    /// New folder for the delta.
    #[arg(long)]
    output: PathBuf,
}

#[derive(clap::Args)]
struct DistillArgs {
    #[command(flatten)]
    base: BaseArgs,
    #[command(flatten)]
    tuned: TunedArgs,
    /// The delta, as `pt delta compress` made it.
    #[arg(long)]
    delta: PathBuf,
    /// Calibration rows, JSONL or JSON, of any form that `pt sft` takes; all their tokens count.
    #[arg(long, required = true)]
    data: Vec<PathBuf>,
    #[command(flatten)]
    read: DataArgs,
    /// New folder for the delta with trained scales.
    #[arg(long)]
    output: PathBuf,
    /// Optimizer steps.
    #[arg(long, default_value_t = 200)]
    steps: u64,
    /// Highest learning rate, on a cosine; when absent 1e-4, but at most a twentieth of the mean scale.
    #[arg(long)]
    learning_rate: Option<f64>,
    /// Decoupled weight decay of the scales.
    #[arg(long, default_value_t = 0.0)]
    weight_decay: f64,
    /// Pieces of text a step.
    #[arg(long, default_value_t = 4, value_parser = at_least_one())]
    batch_size: usize,
    /// Tokens of a piece; longer rows are cut into several.
    #[arg(long, default_value_t = 128, value_parser = at_least_one())]
    seq_len: usize,
    /// Seed of the order of pieces.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Keep only layer inputs and compute activations again in the backward pass: less memory, more time.
    #[arg(long)]
    activation_checkpointing: bool,
}

#[derive(clap::Args)]
struct InspectArgs {
    /// The delta's folder.
    delta: PathBuf,
    /// Print JSON instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct MergeArgs {
    #[command(flatten)]
    base: BaseArgs,
    /// The delta's folder.
    #[arg(long)]
    delta: PathBuf,
    #[command(flatten)]
    folder: FolderArgs,
}

#[derive(clap::Args)]
struct ImportArgs {
    #[command(flatten)]
    base: BaseArgs,
    /// The file: PATH.mask, PATH.coeff and whole parameters by name. A pickle (.pt) is refused with the way to convert it.
    #[arg(long)]
    file: PathBuf,
    /// Which of the parameters in full precision are kept.
    #[arg(long, value_enum, default_value = "changed")]
    keep: Keep,
    /// New folder for the delta.
    #[arg(long)]
    output: PathBuf,
}

#[derive(clap::Args)]
struct ExportArgs {
    /// The delta's folder.
    delta: PathBuf,
    /// New .safetensors file.
    #[arg(long)]
    output: PathBuf,
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    match args.command {
        Command::Compress(args) => run_compress(args),
        Command::Distill(args) => run_distill(args),
        Command::Inspect(args) => inspect(&args.delta, args.json),
        Command::Merge(args) => merge(args),
        Command::Import(args) => import(args),
        Command::Export(args) => export(args),
    }
}

/// A bar whose length is heard with the first tensor.
fn tensor_bar() -> (indicatif::ProgressBar, impl Fn(&str, usize)) {
    let bar = talk::bar(0, "tensors");
    let advance = {
        let bar = bar.clone();
        move |_: &str, count: usize| {
            bar.set_length(count as u64);
            bar.inc(1);
        }
    };
    (bar, advance)
}

fn run_compress(args: CompressArgs) -> Result<ExitCode> {
    check_free(&args.output)?;
    let flags = args.base.of(None);
    let base = flags.pretrained()?;
    let config = BitDeltaConfig {
        scale_sharing: args.scales.into(),
        kept_whole: args.keep.into(),
        base_model_name_or_path: Some(base.path.display().to_string()),
        ..BitDeltaConfig::default()
    };
    let (bar, advance) = tensor_bar();
    let (delta, kind) = match (&args.tuned.fine_tuned, &args.tuned.adapter) {
        (Some(model), _) => {
            let flags = args.base.of(Some(model));
            let tuned = flags.pretrained()?;
            let kind = flags.saved_kind(&tuned, Kind::BFloat16)?;
            (compress(&base, FineTuned::Checkpoint(&tuned), config, kind, advance)?, kind)
        }
        (None, adapter) => {
            let folder = adapter_folder(adapter.as_deref().context("give --fine-tuned or --adapter")?)?;
            let kind = flags.saved_kind(&base, Kind::BFloat16)?;
            // In f32, so that the difference to the base is not rounded.
            let mut model = CausalLm::load(&base, pt_tensor::Device::Cpu, Kind::Float)?;
            load_adapter(&folder, &model)?.merge_into(&mut model)?;
            (compress(&base, FineTuned::Model(&model), config, kind, advance)?, kind)
        }
    };
    bar.finish_and_clear();
    delta.save(&args.output)?;
    let size = if kind == Kind::Float { 4 } else { 2 };
    eprintln!("saved to {}", args.output.display());
    eprintln!("{}", compared(num_parameters(&base) * size, delta.bytes()));
    Ok(ExitCode::SUCCESS)
}

/// Parameters of a checkpoint.
fn num_parameters(pretrained: &Pretrained) -> usize {
    let names = pretrained.tensors.names().into_iter();
    let sizes = names.filter_map(|name| pretrained.tensors.shape(&name)).map(|shape| shape.iter().product::<i64>());
    sizes.sum::<i64>() as usize
}

/// What a delta takes in the place of a whole model.
fn compared(before: usize, bytes: DeltaBytes) -> String {
    let mb = |bytes: usize| format!("{:.2} MB", bytes as f64 / 1e6);
    format!(
        "the fine-tune: {}; the delta: {} (signs {}, scales {}, carried whole {}), {:.1} times smaller",
        mb(before),
        mb(bytes.total()),
        mb(bytes.signs),
        mb(bytes.scales),
        mb(bytes.whole),
        before as f64 / bytes.total().max(1) as f64
    )
}

/// Pieces that the error before and after is measured on.
const MEASURED: usize = 32;

fn run_distill(args: DistillArgs) -> Result<ExitCode> {
    check_free(&args.output)?;
    interrupts::watch();
    let config = DistillConfig {
        steps: args.steps,
        learning_rate: args.learning_rate,
        adamw: AdamWConfig { weight_decay: args.weight_decay, ..AdamWConfig::default() },
        batch_size: args.batch_size,
        seq_len: args.seq_len,
        seed: args.seed,
        activation_checkpointing: args.activation_checkpointing,
        ..DistillConfig::default()
    };
    config.validate()?;
    let data = args.read.config(&[])?;
    let rows = read_rows(&args.data, &data.read_options())?;
    let delta = StoredDelta::load(&args.delta)?;
    let teacher_folder = args.tuned.adapter.as_deref().map(adapter_folder).transpose()?;
    let flags = args.base.of(None);
    let pretrained = flags.pretrained()?;
    let encoder = ModelEncoder::new(&pretrained).ok_or_else(|| no_tokenizer(&pretrained))?;
    let groups: Vec<_> =
        rows.iter().map(|row| row_to_group(row, &encoder, data.train_turns)).collect::<Result<_, _>>()?;
    let pieces = pieces(&groups, config.seq_len);
    let (device, kind) = (flags.device()?, flags.kind()?);
    let model = CausalLm::load(&pretrained, device, kind)?;
    let adapter = Rc::new(BitDeltaAdapter::new(delta, &model)?);
    let tuned = match &args.tuned.fine_tuned {
        Some(tuned) => Some(CausalLm::load(&args.base.of(Some(tuned)).pretrained()?, device, kind)?),
        None => None,
    };
    let sites: Rc<dyn Sites> = match &teacher_folder {
        Some(folder) => load_adapter(folder, &model)?,
        None => Rc::new(Bare),
    };
    let teacher = Role { model: tuned.as_ref().unwrap_or(&model), sites };
    let student = Role { model: &model, sites: adapter.clone() };
    eprintln!(
        "distilling {} scales on {} pieces of at most {} tokens, {kind:?} on {device:?}",
        adapter.num_trainable(),
        pieces.len(),
        config.seq_len
    );
    let error = LogitsError::new(&student, &teacher)?;
    let measured = &pieces[..pieces.len().min(MEASURED)];
    let before = error.mean(&student, &teacher, measured)?;
    let (mut work, started) = (talk::Work::new("distilling", config.steps as usize, "steps"), Instant::now());
    let steps = interrupts::while_training(|stop| {
        distill(&student, adapter.parameters(), &teacher, &pieces, &config, stop, |record| {
            work.set(record.step as usize);
            work.note(format!("error {:.4}  lr {:.1e}", record.loss, record.learning_rate));
        })
    })?;
    work.finish();
    let after = error.mean(&student, &teacher, measured)?;
    adapter.note_distilled(steps);
    adapter.save(&args.output)?;
    eprintln!(
        "mean squared error of logits on {} pieces: {before:.5} before, {after:.5} after {steps} steps, {:.0} s",
        measured.len(),
        started.elapsed().as_secs_f64()
    );
    eprintln!("saved to {}", args.output.display());
    if steps < config.steps {
        eprintln!("stopped early; its scales are those of step {steps}");
        return Ok(ExitCode::from(130));
    }
    Ok(ExitCode::SUCCESS)
}

/// What a delta holds; `pt inspect` shows the same.
pub(crate) fn inspect(folder: &Path, is_json: bool) -> Result<ExitCode> {
    let delta = StoredDelta::load(folder)?;
    let (bytes, config) = (delta.bytes(), delta.config());
    let whole: Vec<&str> = delta.whole().map(|(name, _)| name).collect();
    let scales: Vec<(&str, f64)> =
        delta.signs().map(|(path, signs)| (path, signs.scale().abs().mean(Kind::Double).double_value(&[]))).collect();
    let weights: i64 = delta.signs().map(|(_, signs)| signs.size().0 * signs.size().1).sum();
    if is_json {
        let summary = json!({
            "path": folder, "method": "bitdelta", "settings": config, "base_checksum": delta.base_checksum(),
            "weights": weights, "bytes": {
                "signs": bytes.signs, "scales": bytes.scales, "whole": bytes.whole, "total": bytes.total(),
            },
            "mean_scales": scales.iter().map(|(path, scale)| ((*path).to_string(), json!(scale)))
                .collect::<serde_json::Map<_, _>>(),
            "carried_whole": whole,
        });
        say(serde_json::to_string_pretty(&summary)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    say(format_args!(
        "{}\n  a 1-bit delta: {} bytes; signs {} of {weights} weights in {} layers, scales {}, carried whole {}",
        folder.display(),
        bytes.total(),
        bytes.signs,
        scales.len(),
        bytes.scales,
        bytes.whole
    ))?;
    say(format_args!("  base: {}", config.base_model_name_or_path.as_deref().unwrap_or("not named")))?;
    say(format_args!("  base_checksum: {}", delta.base_checksum()))?;
    say(format_args!("  scale_sharing: {}", json!(config.scale_sharing).as_str().unwrap_or_default()))?;
    say(format_args!("  distilled_steps: {}", config.distilled_steps))?;
    let order = |a: &&(&str, f64), b: &&(&str, f64)| a.1.total_cmp(&b.1);
    if let (Some(least), Some(most)) = (scales.iter().min_by(order), scales.iter().max_by(order)) {
        say(format_args!("  mean scales: {:.2e} ({}) to {:.2e} ({})", least.1, least.0, most.1, most.0))?;
    }
    for name in whole {
        say(format_args!("  carried whole: {name}"))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn merge(args: MergeArgs) -> Result<ExitCode> {
    args.folder.check()?;
    let flags = args.base.of(None);
    let delta = StoredDelta::load(&args.delta)?;
    let pretrained = flags.pretrained()?;
    // Nothing is rounded in f32.
    let kind = flags.saved_kind(&pretrained, Kind::Float)?;
    let mut model = CausalLm::load(&pretrained, flags.device()?, kind)?;
    BitDeltaAdapter::new(delta, &model)?.merge_into(&mut model)?;
    args.folder.fill(|folder, max_shard_bytes| save_model(folder, &pretrained, &model, max_shard_bytes))?;
    Ok(ExitCode::SUCCESS)
}

fn import(args: ImportArgs) -> Result<ExitCode> {
    check_free(&args.output)?;
    let base = args.base.of(None).pretrained()?;
    let config = BitDeltaConfig {
        kept_whole: args.keep.into(),
        base_model_name_or_path: Some(base.path.display().to_string()),
        ..BitDeltaConfig::default()
    };
    let (bar, advance) = tensor_bar();
    let delta = StoredDelta::import(&args.file, &base, config, advance)?;
    bar.finish_and_clear();
    delta.save(&args.output)?;
    eprintln!("saved to {}", args.output.display());
    Ok(ExitCode::SUCCESS)
}

fn export(args: ExportArgs) -> Result<ExitCode> {
    if args.output.exists() {
        let message = format!("{} already exists", args.output.display());
        return Err(Misused { message, hint: "choose another --output, or remove it first".into() }.into());
    }
    StoredDelta::load(&args.delta)?.export(&args.output)?;
    eprintln!("saved to {}", args.output.display());
    Ok(ExitCode::SUCCESS)
}
