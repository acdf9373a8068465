//! `cargo xtask bench sft [--peers]`: tokens per second, peak memory and start-up of LoRA fine-tuning.
//!
//! Each measurement is a process of its own, so that peak memory is its own; ours and the peer's alternate, and medians
//! over the rounds close the record.

use anyhow::Result;
use clap::Parser;
use pt_benches::{
    Record, json_of, matmul_roof, medians, model_path, peer_model, process_age, ratios, rows, step_flops,
};
use pt_model::{CausalLm, PackedBatch, Pretrained, RunOptions, Sites};
use pt_peft::{Adapter, LoraAdapter, LoraConfig};
use pt_tensor::{AdamW, Device, Kind, LabelLogprobs, Tensor, clip_grad_norm_, parse_kind, peak_memory_bytes};
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
    /// Steps of 8 rows that are measured after the first.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// Rounds of ours and the peer's.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Only f32 or bf16.
    #[arg(long)]
    dtype: Option<String>,
    /// Measure once in this process and print JSON.
    #[arg(long, hide = true)]
    once: bool,
}

const BATCH: usize = 8;

fn main() -> Result<()> {
    let args = Args::parse();
    if args.once {
        return once(args.dtype.as_deref().unwrap_or("f32"), args.steps as usize);
    }
    let folder = tempfile::tempdir()?;
    let data = folder.path().join("rows.jsonl");
    let mut file = std::fs::File::create(&data)?;
    for row in rows(BATCH * (args.steps as usize + 1)) {
        let completion = &row.completions[0].token_ids;
        let mask = [vec![0; row.prompt.len()], vec![1; completion.len()]].concat();
        let ids = [row.prompt.clone(), completion.clone()].concat();
        writeln!(file, "{}", json!({"input_ids": ids, "completion_mask": mask}))?;
    }
    let scripts = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("peers");
    let mut record = Record::new("sft", json!({"steps": args.steps, "rows_per_step": BATCH, "lora_rank": 16}))?;
    for (dtype, torch_dtype) in [("f32", "float32"), ("bf16", "bfloat16")] {
        if args.dtype.as_deref().is_some_and(|only| only != dtype) {
            continue;
        }
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for round in 0..args.rounds {
            let steps = args.steps.to_string();
            let own =
                json_of(Command::new(std::env::current_exe()?).args(["--once", "--dtype", dtype, "--steps", &steps]))?;
            record.add(json!({"tool": "pt", "dtype": dtype, "round": round, "measured": own}));
            ours.push(own);
            if let Some(python) = &args.peers {
                let model = peer_model(python, &scripts)?;
                let mut command = Command::new(python);
                command.arg(scripts.join("sft_trl.py")).arg("--model").arg(model).arg("--data").arg(&data);
                let peer = json_of(command.args(["--dtype", torch_dtype, "--steps", &(args.steps + 1).to_string()]))?;
                record.add(json!({"tool": "trl", "dtype": dtype, "round": round, "measured": peer}));
                theirs.push(peer);
            }
        }
        let (own, peer) = (medians(&ours), medians(&theirs));
        record.add(json!({"median": "pt", "dtype": dtype, "measured": own}));
        if !theirs.is_empty() {
            record.add(json!({"ratio": "pt / trl", "dtype": dtype, "measured": ratios(&own, &peer)}));
            record.add(json!({"median": "trl", "dtype": dtype, "measured": peer}));
        }
    }
    record.save()
}

fn once(dtype: &str, steps: usize) -> Result<()> {
    let started = Instant::now();
    // What the loader took before main, libtorch's start included.
    let before_main = process_age().unwrap_or(0.0);
    let kind = parse_kind(dtype)?.kind(Device::Cpu);
    let pretrained = Pretrained::open(model_path()?)?;
    let model = CausalLm::load(&pretrained, Device::Cpu, kind)?;
    let to_training = before_main + started.elapsed().as_secs_f64();
    let adapter = Rc::new(LoraAdapter::new(LoraConfig::default(), &model, 0)?);
    let parameters: Vec<Tensor> = adapter.parameters().into_iter().map(|(_, tensor)| tensor).collect();
    let mut optimizer = AdamW::new(adapter.parameters(), Default::default())?;
    let sites: Rc<dyn Sites> = adapter;
    let rows = rows(BATCH * (steps + 1));
    let (mut first, mut seconds, mut tokens, mut labels) = (0.0, 0.0, 0, 0);
    for (step, groups) in rows.chunks(BATCH).enumerate() {
        let start = Instant::now();
        let batch = PackedBatch::new(groups, Device::Cpu)?;
        let out = model.label_logprobs(&batch, &sites, RunOptions::default(), &LabelLogprobs::default())?;
        let loss = out.logprobs.mean(Kind::Float) * -1.0;
        pt_tensor::autograd::backward(&[loss], &[Tensor::from(1f32)])?;
        clip_grad_norm_(&parameters, 1.0);
        optimizer.step(2e-4)?;
        optimizer.zero_grad();
        if step == 0 {
            first = before_main + started.elapsed().as_secs_f64();
        } else {
            seconds += start.elapsed().as_secs_f64();
            tokens += batch.num_tokens();
            labels += batch.num_labels();
        }
    }
    let peak = peak_memory_bytes();
    let rate = step_flops(model.config(), tokens, labels) / seconds / 1e9;
    let roof = matmul_roof(model.config(), tokens / steps as i64, kind);
    let result = json!({
        "tokens_per_s": tokens as f64 / seconds, "peak_rss_bytes": peak, "seconds_to_training": to_training,
        "seconds_to_first_step": first,
        "gflops": rate, "roof_gflops": roof, "share_of_roof": rate / roof,
    });
    println!("{result}");
    Ok(())
}
