//! `cargo xtask bench ppo [--peers]`: full PPO iterations (16 prompts, a response of 53 tokens to each, 4 epochs) with LoRA
//! on the policy and a reward model, with a critic of its own and with a value head on the policy's trunk; beside TRL 1.12,
//! the last that has PPO, with its separate value model.

use anyhow::Result;
use clap::Parser;
use pt_benches::{Judge, Record, compare, json_of, measure, peer_model, prompt_ids};
use pt_rlhf::{CriticKind, PpoConfig};
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
    /// Measure a critic, `adapter` or `actor_head`, once in this process and print JSON.
    #[arg(long, hide = true)]
    once: Option<String>,
}

const PROMPTS: usize = 16;
const RESPONSE: usize = 53;

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(critic) = &args.once {
        let mut config = TrainConfig::<PpoConfig>::default();
        config.objective.rollout.max_new_tokens = RESPONSE;
        config.objective.critic.kind = match critic.as_str() {
            "actor_head" => CriticKind::ActorHead,
            _ => CriticKind::Adapter,
        };
        config.batch.batch_size = PROMPTS;
        config.max_steps = Some(args.steps + 1);
        config.save_every = 0;
        let folder = tempfile::tempdir()?;
        let prompts = prompt_ids(PROMPTS * (args.steps as usize + 1));
        let dtype = args.dtype.as_deref().unwrap_or("f32");
        println!("{}", measure(&config, prompts, Judge::Model, dtype, &folder.path().join("run"))?);
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let scripts = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("peers");
    let data = folder.path().join("prompts.jsonl");
    let prompts = prompt_ids(PROMPTS * (args.steps as usize + 1));
    std::fs::write(&data, prompts.iter().map(|ids| format!("{}\n", json!({"input_ids": ids}))).collect::<String>())?;
    let mut record = Record::new(
        "ppo",
        json!({
            "iterations": args.steps, "prompts": PROMPTS, "response_tokens": RESPONSE, "epochs": 4, "lora_rank": 16,
            "trl_value_model": "a model of its own, all weights trained",
        }),
    )?;
    for (dtype, torch_dtype) in [("f32", "float32"), ("bf16", "bfloat16")] {
        if args.dtype.as_deref().is_some_and(|only| only != dtype) {
            continue;
        }
        let steps = args.steps.to_string();
        let own = |critic: &str| {
            let program = std::env::current_exe()?;
            json_of(Command::new(program).args(["--once", critic, "--dtype", dtype, "--steps", &steps]))
        };
        let mut peer = || {
            let python = args.peers.as_ref().filter(|_| std::env::var_os("PT_PPO_PYTHON").is_some());
            let Some(python) = python else { return Ok(None) };
            let model = peer_model(python, &scripts)?;
            let python = std::env::var_os("PT_PPO_PYTHON").unwrap_or_default();
            let mut command = Command::new(python);
            command.arg(scripts.join("ppo_trl.py")).arg("--model").arg(model).arg("--data").arg(&data);
            json_of(command.args(["--dtype", torch_dtype, "--prompts", &PROMPTS.to_string()])).map(Some)
        };
        compare(
            &mut record,
            &json!({"dtype": dtype}),
            args.rounds,
            &mut [
                ("pt, critic of its own", &mut || own("adapter")),
                ("pt, value head on the actor", &mut || own("actor_head")),
            ],
            ("trl", &mut peer),
        )?;
    }
    record.save()
}
