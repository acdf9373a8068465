//! `pt inspect`

use crate::checkpoints::Checkpoints;
use crate::open::{DataArgs, ModelArgs, no_tokenizer};
use crate::run_command::RunCommand;
use crate::talk::{Usage, say};
use anyhow::Result;
use pt_model::{Pretrained, WeightMemory};
use pt_peft::{CONFIG_FILE, MethodConfig};
use pt_rlhf::{RewardModel, ScoreStatistics};
use pt_tensor::io::SafetensorsReader;
use pt_tensor::{Device, Kind};
use pt_train::TrainError;
use pt_train::config::flatten;
use pt_train::data::{DataConfig, Row, preflight, read_rows, render_example, row_to_group};
use pt_train::encoder::ModelEncoder;
use pt_train::metrics::read_series;
use serde_json::json;
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A model, an adapter folder, a run, or (with --model for its tokenizer) a data set.
    path: PathBuf,
    /// The model whose tokenizer and template a data set is read with.
    #[arg(long)]
    model: Option<String>,
    /// Longest row of a data set, in tokens; 1024 when neither this nor data.max_length is set.
    #[arg(long)]
    max_length: Option<usize>,
    #[command(flatten)]
    read: DataArgs,
    /// Print JSON instead of text.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    // An adapter, or a checkpoint that holds one.
    let folders = ["", "adapter"].map(|part| args.path.join(part));
    if let Some(folder) = folders.iter().find(|folder| folder.join(CONFIG_FILE).exists()) {
        return adapter(&args, folder);
    }
    if args.path.join("config.yaml").exists() {
        return run_folder(&args);
    }
    match args.model.clone() {
        Some(model) => data(&args, model),
        None if is_data(&args.path) => {
            let path = args.path.display();
            Err(Usage(format!("{path} is a data set: give --model, whose tokenizer and template read it")).into())
        }
        None => model(&args),
    }
}

/// Whether a path is rows: a file by its name, a folder by the files in it.
fn is_data(path: &Path) -> bool {
    let is_rows = |path: &Path| path.extension().is_some_and(|extension| extension == "jsonl" || extension == "json");
    if !path.is_dir() {
        return is_rows(path);
    }
    let mut files = std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    !path.join("config.json").exists() && files.any(|path| is_rows(&path))
}

/// What an adapter is: its method and settings, and what its file holds.
fn adapter(args: &Args, folder: &Path) -> Result<ExitCode> {
    let is_reward = RewardModel::is_adapter(folder)?;
    let method = match is_reward {
        true => RewardModel::adapter_settings(folder)?,
        false => MethodConfig::from_folder(folder)?,
    };
    if matches!(method, MethodConfig::BitDelta(_)) {
        return super::delta::inspect(folder, args.json);
    }
    method.check_folder(folder)?;
    let file = folder.join(method.tensor_file());
    let reader = SafetensorsReader::open(&file)?;
    let bytes = std::fs::metadata(&file).map_or(0, |metadata| metadata.len());
    let shapes = || reader.names().filter_map(|name| Some((name, reader.shape(name)?)));
    let parameters: i64 = shapes().map(|(_, shape)| shape.iter().product::<i64>()).sum();
    let settings = method.settings()?;
    if args.json {
        let tensors: serde_json::Map<_, _> = shapes().map(|(name, shape)| (name.into(), json!(shape))).collect();
        let summary = json!({
            "path": folder, "method": method.method().name(), "parameters": parameters, "bytes": bytes,
            "settings": settings, "tensors": tensors,
        });
        say(serde_json::to_string_pretty(&summary)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let (path, name) = (folder.display(), method.method().name());
    say(format_args!(
        "{path}\n  an adapter: {name}, {parameters} parameters in {} tensors, {bytes} bytes",
        reader.names().count()
    ))?;
    if is_reward {
        let statistics = ScoreStatistics::load(folder)?;
        let like = statistics.map(|of| format!(", scores of mean {:.4} and deviation {:.4}", of.mean, of.std));
        say(format_args!("  a reward model{}", like.unwrap_or_default()))?;
    }
    for (field, value) in flatten(&settings) {
        say(format_args!("  {name}.{field}: {value}"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What a run has come to. Only reads: opening it as `--resume` does would sweep away what a live trainer is writing.
fn run_folder(args: &Args) -> Result<ExitCode> {
    let checkpoints = Checkpoints::of(&args.path);
    let metrics = args.path.join("metrics.jsonl");
    let series = if metrics.exists() { read_series(&metrics)? } else { Default::default() };
    let last: BTreeMap<&str, (u64, f64)> =
        series.iter().filter_map(|(name, points)| Some((name.as_str(), *points.last()?))).collect();
    let steps = last.values().map(|(step, _)| *step).max().unwrap_or(0);
    let command = RunCommand::load(&args.path)?;
    if args.json {
        let values: serde_json::Map<_, _> =
            last.iter().map(|(name, (step, value))| ((*name).into(), json!({"step": step, "value": value}))).collect();
        let summary = json!({
            "path": args.path, "steps": steps, "checkpoints": checkpoints.names, "best": checkpoints.best,
            "metrics": values, "command": command,
        });
        say(serde_json::to_string_pretty(&summary)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let path = args.path.display();
    say(format_args!("{path}\n  a run with {steps} steps done"))?;
    if let Some(command) = &command {
        say(format_args!("  model {}, data {}", command.model, command.data.join(", ")))?;
    }
    for (name, (step, value)) in &last {
        // Six digits, whether it is a learning rate or a number of bytes.
        let shown = if (1e-3..1e6).contains(&value.abs()) { format!("{value:.6}") } else { format!("{value:.5e}") };
        say(format_args!("  {name}: {shown} at step {step}"))?;
    }
    for name in &checkpoints.names {
        let mark = checkpoints.best_named(name).map(|best| format!(" (best: {} {:.4})", best.metric, best.value));
        say(format_args!("  checkpoint {}{}", checkpoints.path(name).display(), mark.unwrap_or_default()))?;
    }
    match &command {
        Some(command) => say(format_args!("  continue it: {}", command.resume(&args.path)))?,
        None => say("  continue it: the command that began it (it keeps no command.yaml), with --resume")?,
    }
    let chosen = checkpoints.chosen();
    match (chosen, &command) {
        (Some(folder), Some(command)) if folder.join("adapter").exists() => {
            let (verb, more) = use_of(command);
            let (model, adapter) = (&command.model, folder.join("adapter"));
            say(format_args!("  use it: pt {verb} --model {model} --adapter {}{more}", adapter.display()))?;
        }
        (Some(folder), command) if folder.join("model").exists() => {
            let (verb, more) = command.as_ref().map_or(("chat", ""), use_of);
            say(format_args!("  use it: pt {verb} --model {}{more}", folder.join("model").display()))?;
        }
        _ => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// The command that uses what a run has trained, and what it needs beside the model.
fn use_of(command: &RunCommand) -> (&'static str, &'static str) {
    if command.task() == "reward" { ("score", " --data ROWS.jsonl --output SCORES.jsonl") } else { ("chat", "") }
}

fn model(args: &Args) -> Result<ExitCode> {
    let path =
        ModelArgs { model: args.path.display().to_string(), adapter: None, device: "cpu".into(), dtype: "f32".into() }
            .path()?;
    let pretrained = Pretrained::open(&path)?;
    let config = &pretrained.config;
    let names = pretrained.tensors.names();
    let parameters: i64 =
        names.iter().filter_map(|n| pretrained.tensors.shape(n)).map(|s| s.iter().product::<i64>()).sum();
    if args.json {
        let summary = json!({
            "path": path, "architecture": config.architecture.class_name(), "parameters": parameters, "tensors": names.len(),
            "config": config.raw, "chat_template": pretrained.chat_template.is_some(),
        });
        say(serde_json::to_string_pretty(&summary)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    say(format_args!("{}", path.display()))?;
    say(format_args!(
        "  {} with {:.1} M parameters in {} tensors",
        config.architecture.class_name(),
        parameters as f64 / 1e6,
        names.len()
    ))?;
    say(format_args!(
        "  {} layers, hidden size {}, {} heads over {} key/value heads, context {}",
        config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads, config.max_position_embeddings
    ))?;
    say(format_args!(
        "  vocabulary {}, output layer {}",
        config.vocab_size,
        if config.tie_word_embeddings { "tied" } else { "separate" }
    ))?;
    say(format_args!("  chat template: {}", if pretrained.chat_template.is_some() { "yes" } else { "no" }))?;
    if let Some(tokenizer) = &pretrained.tokenizer {
        let ends: Vec<String> = tokenizer
            .eos_ids
            .iter()
            .map(|&id| format!("{id} {:?}", tokenizer.id_to_token(id).unwrap_or_default()))
            .collect();
        say(format_args!("  ends a turn: {}", ends.join(", ")))?;
    }
    if RewardModel::of_pretrained(&pretrained, Device::Cpu).is_ok_and(|reward| reward.is_some()) {
        say("  a reward model: `pt score` gives its scores of completions")?;
    }
    let memory = [Kind::Float, Kind::BFloat16].map(|kind| loaded_memory(&pretrained, kind));
    for line in memory_lines(&memory) {
        say(line)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What the weights take once they are loaded in `kind`; nothing is decoded to find out.
fn loaded_memory(pretrained: &Pretrained, kind: Kind) -> WeightMemory {
    let source = pretrained.tensors.as_ref();
    let mut memory = WeightMemory::default();
    for name in source.names() {
        let bytes = source.num_bytes(&name, kind).unwrap_or(0);
        if source.is_nf4(&name) {
            memory.num_quantized += source.shape(&name).map_or(0, |shape| shape.iter().product::<i64>() as usize);
            memory.quantized_bytes += bytes;
        } else {
            memory.dense_bytes += bytes;
        }
    }
    memory
}

fn memory_lines([wide, narrow]: &[WeightMemory; 2]) -> Vec<String> {
    let megabytes = |bytes: usize| bytes as f64 / 1e6;
    let both = |of: &dyn Fn(&WeightMemory) -> usize| {
        format!("{:.0} MB in f32, {:.0} MB in bf16", megabytes(of(wide)), megabytes(of(narrow)))
    };
    let mut lines = vec![format!("  memory for the weights: {}", both(&|m| m.quantized_bytes + m.dense_bytes))];
    if wide.num_quantized > 0 {
        let (count, each) = (wide.num_quantized as f64 / 1e6, wide.quantized_bytes as f64 / wide.num_quantized as f64);
        let quantized = megabytes(wide.quantized_bytes);
        lines.push(format!("    in 4 bits: {quantized:.0} MB, {count:.1} M weights of {each:.3} bytes"));
        lines.push(format!("    the rest: {}", both(&|m| m.dense_bytes)));
    }
    lines
}

fn data(args: &Args, model: String) -> Result<ExitCode> {
    // What training would refuse is counted here, so that it can be looked at.
    let mut defaults =
        vec![("data.on_empty", "drop".into()), ("data.too_long", "drop".into()), ("data.require_stop", "false".into())];
    defaults.extend(args.max_length.map(|length| ("data.max_length", length.to_string())));
    let config = args.read.config(&defaults)?;
    let rows = read_rows(std::slice::from_ref(&args.path), &config.read_options())?;
    let pretrained = ModelArgs { model, adapter: None, device: "cpu".into(), dtype: "f32".into() }.pretrained()?;
    let encoder = ModelEncoder::new(&pretrained).ok_or_else(|| no_tokenizer(&pretrained))?;
    let checked = match preflight(&rows, &encoder, &config) {
        Err(TrainError::AllDropped { rows: num_rows, reasons }) => {
            return all_dropped(args, &rows, num_rows, &reasons, &encoder, &config);
        }
        checked => checked?,
    };
    if args.json {
        say(serde_json::to_string_pretty(&checked.summary)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    say(checked.summary.to_text())?;
    for example in checked.examples(&rows, &encoder, std::io::stdout().is_terminal()) {
        say(example)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A data set that would train nothing: how many rows, why, and what the first of them are as tokens.
fn all_dropped(
    args: &Args,
    rows: &[Row],
    num_rows: usize,
    reasons: &str,
    encoder: &ModelEncoder<'_>,
    config: &DataConfig,
) -> Result<ExitCode> {
    if args.json {
        say(serde_json::to_string_pretty(&json!({"rows": num_rows, "kept": 0, "reasons": reasons}))?)?;
        return Ok(ExitCode::SUCCESS);
    }
    say(format_args!("none of {num_rows} rows would be trained: {reasons}\n"))?;
    for row in rows.iter().take(3) {
        let group = row_to_group(row, encoder, config.train_turns)?;
        let (tokens, labels) = (group.num_tokens(), group.num_labels());
        let text = render_example(&group, encoder, std::io::stdout().is_terminal());
        say(format_args!("{}: {tokens} tokens, {labels} trained\n{text}", row.origin))?;
    }
    Ok(ExitCode::SUCCESS)
}
