//! `pt inspect`

use crate::open::ModelArgs;
use anyhow::Result;
use pt_model::Pretrained;
use pt_peft::LoraConfig;
use pt_train::data::{DataConfig, preflight, read_rows};
use serde_json::json;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A model, an adapter folder, or (with --model for its tokenizer) a data set.
    path: PathBuf,
    /// The model whose tokenizer and template a data set is read with.
    #[arg(long)]
    model: Option<String>,
    /// Longest row of a data set, in tokens.
    #[arg(long, default_value_t = 1024)]
    max_length: usize,
    /// Print JSON instead of text.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    if args.path.join("adapter_config.json").exists() {
        let config = LoraConfig::from_peft_file(&args.path.join("adapter_config.json"))?;
        println!("{}", serde_json::to_string_pretty(&config)?);
        return Ok(ExitCode::SUCCESS);
    }
    match args.model.clone() {
        Some(model) => data(&args, model),
        None => model(&args),
    }
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
        println!("{}", serde_json::to_string_pretty(&summary)?);
        return Ok(ExitCode::SUCCESS);
    }
    println!("{}", path.display());
    println!(
        "  {} with {:.1} M parameters in {} tensors",
        config.architecture.class_name(),
        parameters as f64 / 1e6,
        names.len()
    );
    println!(
        "  {} layers, hidden size {}, {} heads over {} key/value heads, context {}",
        config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads, config.max_position_embeddings
    );
    println!(
        "  vocabulary {}, output layer {}",
        config.vocab_size,
        if config.tie_word_embeddings { "tied" } else { "separate" }
    );
    println!("  chat template: {}", if pretrained.chat_template.is_some() { "yes" } else { "no" });
    if let Some(tokenizer) = &pretrained.tokenizer {
        let ends: Vec<String> = tokenizer
            .eos_ids
            .iter()
            .map(|&id| format!("{id} {:?}", tokenizer.id_to_token(id).unwrap_or_default()))
            .collect();
        println!("  ends a turn: {}", ends.join(", "));
    }
    println!(
        "  memory for the weights: {:.0} MB in f32, {:.0} MB in bf16",
        parameters as f64 * 4e-6,
        parameters as f64 * 2e-6
    );
    Ok(ExitCode::SUCCESS)
}

fn data(args: &Args, model: String) -> Result<ExitCode> {
    let config = DataConfig { max_length: args.max_length, ..Default::default() };
    let rows = read_rows(std::slice::from_ref(&args.path), &config.read_options())?;
    let pretrained = ModelArgs { model, adapter: None, device: "cpu".into(), dtype: "f32".into() }.pretrained()?;
    let encoder = pt_train::encoder::ModelEncoder::new(&pretrained)
        .ok_or_else(|| anyhow::anyhow!("the model carries no tokenizer: put its tokenizer.json beside config.json"))?;
    let checked = preflight(&rows, &encoder, &config)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&checked.summary)?);
        return Ok(ExitCode::SUCCESS);
    }
    println!("{}", checked.summary.to_text());
    for example in checked.examples(&rows, &encoder, std::io::stdout().is_terminal()) {
        println!("{example}");
    }
    Ok(ExitCode::SUCCESS)
}
