//! `cargo xtask bench dpo [--peers]`: pairs per second and peak memory of preference training with LoRA, on prompts as
//! long as their completions and on prompts four times as long.
//!
//! Each measurement is a process of its own, so that peak memory is its own; ours and the peer's alternate, and medians
//! over the rounds close the record.

use anyhow::Result;
use clap::Parser;
use pt_benches::{Record, json_of, medians, model_path, pairs, peer_model, ratios};
use pt_dpo::{Dpo, DpoExample, LossConfig, Reference};
use pt_model::{Bare, CausalLm, Pretrained, PromptGroup, RunOptions, Sites};
use pt_peft::{Adapter, LoraAdapter, LoraConfig};
use pt_tensor::{Device, parse_kind, peak_memory_bytes};
use pt_train::data::{Judgement, PreferenceGroup};
use pt_train::objective::{Objective, Pass};
use pt_train::schedule::ScheduleConfig;
use pt_train::step::Optimization;
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::rc::Rc;
use std::time::Instant;

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

/// Names of the two sorts of rows, with the prompt's length in units of the completion's.
const PROMPTS: [(&str, usize); 2] = [("short", 1), ("long", 4)];

fn main() -> Result<()> {
    let args = Args::parse();
    if args.once {
        let prompts = args.prompts.as_deref().unwrap_or("short");
        return once(args.dtype.as_deref().unwrap_or("f32"), prompts, args.steps as usize);
    }
    let folder = tempfile::tempdir()?;
    let scripts = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("peers");
    let mut record = Record::new(
        "dpo",
        json!({
            "steps": args.steps, "pairs_per_step": BATCH, "lora_rank": 16,
            // The default of its configuration, which the peer's script leaves as it is.
            "trl_gradient_checkpointing": true,
        }),
    )?;
    for (prompts, length) in PROMPTS {
        if args.prompts.as_deref().is_some_and(|only| only != prompts) {
            continue;
        }
        let data = folder.path().join(format!("{prompts}.jsonl"));
        let mut file = std::fs::File::create(&data)?;
        for row in pairs(BATCH * (args.steps as usize + 1), length) {
            let [chosen, rejected] = [0, 1].map(|side| &row.completions[side].token_ids);
            writeln!(file, "{}", json!({"prompt_ids": row.prompt, "chosen_ids": chosen, "rejected_ids": rejected}))?;
        }
        for (dtype, torch_dtype) in [("f32", "float32"), ("bf16", "bfloat16")] {
            if args.dtype.as_deref().is_some_and(|only| only != dtype) {
                continue;
            }
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            for round in 0..args.rounds {
                let steps = args.steps.to_string();
                let mut command = Command::new(std::env::current_exe()?);
                let own = json_of(command.args(["--once", "--dtype", dtype, "--prompts", prompts, "--steps", &steps]))?;
                record.add(json!({"tool": "pt", "prompts": prompts, "dtype": dtype, "round": round, "measured": own}));
                ours.push(own);
                if let Some(python) = &args.peers {
                    let model = peer_model(python, &scripts)?;
                    let mut command = Command::new(python);
                    command.arg(scripts.join("dpo_trl.py")).arg("--model").arg(model).arg("--data").arg(&data);
                    let peer = json_of(command.args(["--dtype", torch_dtype, "--batch", &BATCH.to_string()]))?;
                    record.add(
                        json!({"tool": "trl", "prompts": prompts, "dtype": dtype, "round": round, "measured": peer}),
                    );
                    theirs.push(peer);
                }
            }
            let (own, peer) = (medians(&ours), medians(&theirs));
            record.add(json!({"median": "pt", "prompts": prompts, "dtype": dtype, "measured": own}));
            if !theirs.is_empty() {
                let ratio = ratios(&own, &peer);
                record.add(json!({"ratio": "pt / trl", "prompts": prompts, "dtype": dtype, "measured": ratio}));
                record.add(json!({"median": "trl", "prompts": prompts, "dtype": dtype, "measured": peer}));
            }
        }
    }
    record.save()
}

fn once(dtype: &str, prompts: &str, steps: usize) -> Result<()> {
    let length = PROMPTS.iter().find(|(name, _)| *name == prompts).map_or(1, |(_, length)| *length);
    let kind = parse_kind(dtype)?.kind(Device::Cpu);
    let pretrained = Pretrained::open(model_path()?)?;
    let model = CausalLm::load(&pretrained, Device::Cpu, kind)?;
    let adapter = Rc::new(LoraAdapter::new(LoraConfig::default(), &model, 0)?);
    adapter.set_training(true);
    let schedule = ScheduleConfig::default().build(steps + 1)?;
    let scratch = std::env::temp_dir();
    let mut optimization =
        Optimization::new(adapter.parameters(), Default::default(), &scratch, schedule, 2e-5, Some(1.0))?;
    let sites: Rc<dyn Sites> = adapter;
    let loss = LossConfig::default();
    let judged = |group: PromptGroup| PreferenceGroup {
        group,
        judgement: Judgement::Ranks { ranks: vec![0, 1], scores: None },
        weight: 1.0,
    };
    let groups = pairs(BATCH * (steps + 1), length).into_iter().map(judged).collect();
    let examples = DpoExample::from_groups(groups, &loss, usize::MAX)?;
    // The reference runs beside each step, as TRL's does.
    let mut objective = Dpo::new(loss, Reference::Sites(Rc::new(Bare)))?;
    let (mut losses, mut seconds) = (Vec::new(), 0.0);
    for (step, rows) in examples.chunks(BATCH).enumerate() {
        let start = Instant::now();
        let pass = Pass { step: step as u64 + 1, model: &model, sites: &sites, options: RunOptions::default() };
        let window = objective.accumulate(&pass, &[rows.iter().collect()])?;
        optimization.step(step as u64 + 1)?;
        losses.push(window.loss);
        if step > 0 {
            seconds += start.elapsed().as_secs_f64();
        }
    }
    let rate = (steps * BATCH) as f64 / seconds;
    println!("{}", json!({"pairs_per_s": rate, "peak_rss_bytes": peak_memory_bytes(), "losses": losses}));
    Ok(())
}
