//! `cargo xtask bench reward [--peers]`: pairs per second and peak memory of training a reward model with LoRA, on prompts
//! as long as their completions and on prompts four times as long.

use anyhow::Result;
use clap::Parser;
use pt_benches::{PAIR_PROMPTS, Record, compare, json_of, measure_pairs, pair_prompts, pairs, peer_model};
use pt_model::CausalLm;
use pt_rlhf::{RewardConfig, RewardModel, RewardTraining, ScalarHead};
use pt_tensor::Device;
use pt_train::data::{Judgement, PreferenceGroup};
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

#[derive(Parser)]
struct Args {
    /// Python with the peers' packages.
    #[arg(long)]
    peers: Option<PathBuf>,
    /// Steps of 4 pairs that are measured after the first.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// Rounds of ours and the peer's; the median of an even number would be the larger of the middle two.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Only f32 or bf16.
    #[arg(long)]
    dtype: Option<String>,
    /// Only short or long.
    #[arg(long)]
    prompts: Option<String>,
    /// Measure once in this process and print JSON.
    #[arg(long, hide = true)]
    once: bool,
}

const BATCH: usize = 4;

fn main() -> Result<()> {
    let args = Args::parse();
    if args.once {
        let length = pair_prompts(args.prompts.as_deref());
        let judged = |group| PreferenceGroup {
            group,
            judgement: Judgement::Ranks { ranks: vec![0, 1], scores: None },
            weight: 1.0,
        };
        let examples: Vec<PreferenceGroup> =
            pairs(BATCH * (args.steps as usize + 1), length).into_iter().map(judged).collect();
        let objective = |model: &CausalLm| {
            let head = ScalarHead::new(model.config().hidden_size, 1, Device::Cpu)?;
            let leaves = head.parameters();
            Ok((RewardTraining::new(RewardConfig::default(), RewardModel::new(head))?, leaves))
        };
        println!("{}", measure_pairs(args.dtype.as_deref().unwrap_or("f32"), &examples, BATCH, 1e-4, objective)?);
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let scripts = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("peers");
    let mut record = Record::new(
        "reward",
        json!({
            "steps": args.steps, "pairs_per_step": BATCH, "lora_rank": 16,
            // The default of its configuration, which the peer's script leaves as it is.
            "trl_gradient_checkpointing": true,
        }),
    )?;
    for (prompts, length) in PAIR_PROMPTS {
        if args.prompts.as_deref().is_some_and(|only| only != prompts) {
            continue;
        }
        let data = folder.path().join(format!("{prompts}.jsonl"));
        let mut file = std::fs::File::create(&data)?;
        for row in pairs(BATCH * (args.steps as usize + 1), length) {
            let [chosen, rejected] = [0, 1].map(|side| [&row.prompt[..], &row.completions[side].token_ids].concat());
            writeln!(file, "{}", json!({"chosen_ids": chosen, "rejected_ids": rejected}))?;
        }
        for (dtype, torch_dtype) in [("f32", "float32"), ("bf16", "bfloat16")] {
            if args.dtype.as_deref().is_some_and(|only| only != dtype) {
                continue;
            }
            let steps = args.steps.to_string();
            let mut own = || {
                let mut command = Command::new(std::env::current_exe()?);
                json_of(command.args(["--once", "--dtype", dtype, "--prompts", prompts, "--steps", &steps]))
            };
            let mut peer = || {
                let Some(python) = &args.peers else { return Ok(None) };
                let mut command = Command::new(python);
                command.arg(scripts.join("reward_trl.py")).arg("--model").arg(peer_model(python, &scripts)?);
                command.arg("--data").arg(&data);
                json_of(command.args(["--dtype", torch_dtype, "--batch", &BATCH.to_string()])).map(Some)
            };
            let labels = json!({"prompts": prompts, "dtype": dtype});
            compare(&mut record, &labels, args.rounds, &mut [("pt", &mut own)], ("trl", &mut peer))?;
        }
    }
    record.save()
}
