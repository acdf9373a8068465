//! `cargo xtask bench grpo [--peers]`: GRPO iterations (4 prompts, 8 responses of 53 tokens to each) with LoRA and a reward
//! that costs nothing, beside TRL.

use anyhow::Result;
use clap::Parser;
use pt_benches::{Judge, Record, compare, json_of, measure, peer_model, prompt_ids};
use pt_rlhf::GrpoConfig;
use pt_train::settings::TrainConfig;
use serde_json::json;
use std::path::PathBuf;
use std::process::Command;

#[derive(Parser)]
struct Args {
    /// Python with the peers' packages.
    #[arg(long)]
    peers: Option<PathBuf>,
    /// Iterations that are measured after the first.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// Rounds of ours and the peer's; the median of an even number would be the larger of the middle two.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Only f32 or bf16.
    #[arg(long)]
    dtype: Option<String>,
    /// Measure once in this process and print JSON.
    #[arg(long, hide = true)]
    once: bool,
}

const PROMPTS: usize = 4;
const SAMPLES: usize = 8;
const RESPONSE: usize = 53;

fn main() -> Result<()> {
    let args = Args::parse();
    let prompts = prompt_ids(PROMPTS * (args.steps as usize + 1));
    if args.once {
        let mut config = TrainConfig::<GrpoConfig>::default();
        config.objective.rollout.max_new_tokens = RESPONSE;
        config.objective.num_samples = SAMPLES;
        config.batch.batch_size = PROMPTS;
        config.max_steps = Some(args.steps + 1);
        config.save_every = 0;
        let folder = tempfile::tempdir()?;
        let dtype = args.dtype.as_deref().unwrap_or("f32");
        println!("{}", measure(&config, prompts, Judge::Rule, dtype, &folder.path().join("run"))?);
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let scripts = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("peers");
    let data = folder.path().join("prompts.jsonl");
    std::fs::write(&data, prompts.iter().map(|ids| format!("{}\n", json!({"input_ids": ids}))).collect::<String>())?;
    let mut record = Record::new(
        "grpo",
        json!({
            "iterations": args.steps, "prompts": PROMPTS, "samples": SAMPLES, "response_tokens": RESPONSE,
            "lora_rank": 16,
            // The default of its configuration, which the peer's script leaves as it is.
            "trl_gradient_checkpointing": true,
        }),
    )?;
    for (dtype, torch_dtype) in [("f32", "float32"), ("bf16", "bfloat16")] {
        if args.dtype.as_deref().is_some_and(|only| only != dtype) {
            continue;
        }
        let steps = args.steps.to_string();
        let mut own =
            || json_of(Command::new(std::env::current_exe()?).args(["--once", "--dtype", dtype, "--steps", &steps]));
        let mut peer = || {
            let Some(python) = &args.peers else { return Ok(None) };
            let mut command = Command::new(python);
            command.arg(scripts.join("grpo_trl.py")).arg("--model").arg(peer_model(python, &scripts)?);
            command.arg("--data").arg(&data).args(["--dtype", torch_dtype, "--prompts", &PROMPTS.to_string()]);
            json_of(command.args(["--samples", &SAMPLES.to_string()])).map(Some)
        };
        compare(&mut record, &json!({"dtype": dtype}), args.rounds, &mut [("pt", &mut own)], ("trl", &mut peer))?;
    }
    record.save()
}
