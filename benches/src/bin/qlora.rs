//! `cargo xtask bench qlora [--peers]`: LoRA over NF4 weights against LoRA over bf16 ones, in memory and time.
//!
//! The model is Qwen2.5-Coder-1.5B-Instruct, rows have 256 tokens, activations are checkpointed. Each side is a process
//! of its own, so that its peak memory is its own; both stay open and take steps in turn, so that a machine that is busy
//! with other things is so for both. With --peers, the same over NF4 weights of SmolLM2 beside PEFT and bitsandbytes.

use anyhow::{Context, Result, bail};
use clap::Parser;
use pt_benches::{Record, median, model_path, peer_model};
use pt_model::{CausalLm, Completion, LinearFormat, PackedBatch, Pretrained, PromptGroup, RunOptions, Sites};
use pt_peft::{Adapter, LoraAdapter, LoraConfig};
use pt_tensor::{
    AdamW, AdamWConfig, Device, Kind, LabelLogprobs, Nf4Arithmetic, Nf4Options, Tensor, clip_grad_norm_, parse_kind,
    peak_memory_bytes,
};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::rc::Rc;
use std::time::Instant;

#[derive(Parser)]
struct Args {
    /// Python with the peers' packages.
    #[arg(long)]
    peers: Option<PathBuf>,
    /// Steps that are measured after the first; with 0 only memory is.
    #[arg(long, default_value_t = 3)]
    steps: u64,
    /// Rows of 256 tokens in a step.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..))]
    rows: u64,
    /// What both sides compute in, and the dense side holds its weights in: bf16 or f32. Where libtorch has no fast products
    /// in bf16 (x86-64 without AVX-512), times are worth comparing in f32 only.
    #[arg(long, default_value = "bf16")]
    dtype: String,
    /// Only SmolLM2, beside the peer.
    #[arg(long, requires = "peers")]
    only_peer: bool,
    /// Be one side: load, then take a step for each line on stdin.
    #[arg(long, hide = true, requires = "model")]
    side: Option<String>,
    #[arg(long, hide = true)]
    model: Option<PathBuf>,
}

/// Tokens of a row: a prompt and a completion of half of it each.
const ROW: usize = 256;

fn main() -> Result<()> {
    let args = Args::parse();
    let rows = args.rows as usize;
    if let (Some(side), Some(model)) = (&args.side, &args.model) {
        return be(side, model.clone(), rows, parse_kind(&args.dtype)?.kind(Device::Cpu));
    }
    let mut record = Record::new(
        "qlora",
        json!({"steps": args.steps, "rows_per_step": rows, "tokens_per_row": ROW, "dtype": args.dtype}),
    )?;
    let own = |side: &str, model: &PathBuf| -> Result<Worker> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--side", side, "--dtype", &args.dtype, "--rows", &rows.to_string(), "--model"]).arg(model);
        Worker::start(side, command)
    };
    if !args.only_peer {
        let model =
            std::env::var_os("PT_QLORA_MODEL").context("PT_QLORA_MODEL is not set: run through `cargo xtask bench`")?;
        let model = PathBuf::from(model);
        let [nf4, dense] = alternate([own("nf4", &model)?, own("dense", &model)?], args.steps, &mut record)?;
        let (memory, time) = (ratio(&nf4, &dense, "peak_rss_bytes"), ratio(&nf4, &dense, "seconds_per_step"));
        record.add(
            json!({"ratio": "nf4 / dense", "peak_rss_bytes": memory, "target_memory": 0.55, "seconds_per_step": time,
            "target_time": 1.3, "is_met": memory <= 0.55 && (time <= 1.3 || args.steps == 0)}),
        );
    }
    if let Some(python) = &args.peers {
        let scripts = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("peers");
        let mut command = Command::new(python);
        command.arg(scripts.join("qlora_peft.py")).arg("--model").arg(peer_model(python, &scripts)?);
        command.args(["--rows", &rows.to_string()]);
        let sides = [own("nf4", &model_path()?)?, Worker::start("peft", command)?];
        let [ours, peer] = alternate(sides, args.steps, &mut record)?;
        let rate = 1.0 / ratio(&ours, &peer, "seconds_per_step");
        let memory = ratio(&ours, &peer, "peak_rss_bytes");
        record.add(json!({"ratio": "pt / peft, SmolLM2, nf4", "tokens_per_s": rate, "target_rate": 5.0,
            "peak_rss_bytes": memory, "is_met": rate >= 5.0}));
    }
    record.save()
}

fn ratio(one: &Value, other: &Value, field: &str) -> f64 {
    one[field].as_f64().unwrap_or(f64::NAN) / other[field].as_f64().unwrap_or(f64::NAN)
}

/// Lets two sides take their steps in turn, the first of each uncounted.
fn alternate(mut sides: [Worker; 2], steps: u64, record: &mut Record) -> Result<[Value; 2]> {
    let mut seconds = [vec![], vec![]];
    for step in 0..=steps {
        for (side, seconds) in sides.iter_mut().zip(&mut seconds) {
            let taken = side.step()?;
            if step > 0 {
                seconds.push(taken);
            }
        }
    }
    let mut outcomes = [Value::Null, Value::Null];
    for ((side, seconds), outcome) in sides.into_iter().zip(seconds).zip(&mut outcomes) {
        let name = side.name.clone();
        let mut measured = side.finish()?;
        measured["seconds_of_steps"] = seconds.clone().into();
        measured["seconds_per_step"] = median(seconds).into();
        record.add(json!({"side": name, "measured": measured}));
        *outcome = measured;
    }
    Ok(outcomes)
}

/// A side in a process of its own: it answers each line with one JSON line, and the end of its input with the last.
struct Worker {
    name: String,
    child: Child,
    /// Closed at the end.
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Worker {
    fn start(name: &str, mut command: Command) -> Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (input, output) = (child.stdin.take(), child.stdout.take().context("no stdout")?);
        Ok(Self { name: name.into(), child, input, output: BufReader::new(output) })
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        while !line.starts_with('{') {
            line.clear();
            if self.output.read_line(&mut line)? == 0 {
                bail!("{} ended without an answer: {}", self.name, self.child.wait()?);
            }
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Seconds of a step.
    fn step(&mut self) -> Result<f64> {
        writeln!(self.input.as_mut().context("it has ended")?, "step")?;
        self.answer()?["seconds"].as_f64().context("a step has no time")
    }

    fn finish(mut self) -> Result<Value> {
        self.input = None;
        let last = self.answer()?;
        self.child.wait()?;
        Ok(last)
    }
}

/// One side: it trains on the same rows as the other, and says at the end what that took.
fn be(side: &str, model: PathBuf, rows: usize, kind: Kind) -> Result<()> {
    let nf4 =
        LinearFormat::Nf4 { options: Nf4Options::default(), arithmetic: Nf4Arithmetic::Exact, with_output: false };
    let format = if side == "nf4" { nf4 } else { LinearFormat::AsStored };
    let model = CausalLm::load_with(&Pretrained::open(model)?, Device::Cpu, kind, format)?;
    let loaded = peak_memory_bytes();
    let adapter = Rc::new(LoraAdapter::new(LoraConfig::default(), &model, 0)?);
    let parameters: Vec<Tensor> = adapter.parameters().into_iter().map(|(_, tensor)| tensor).collect();
    let config = AdamWConfig::default();
    let state = config.variant.num_state_bytes(parameters.iter().map(Tensor::numel));
    let mut optimizer = AdamW::new(adapter.parameters(), config)?;
    let sites: Rc<dyn Sites> = adapter;
    let groups: Vec<PromptGroup> = (0..rows as i64)
        .map(|row| {
            let ids = |from: i64| (0..ROW as i64 / 2).map(|at| 100 + (at * 7919 + row * 31 + from) % 40_000).collect();
            PromptGroup::single(ids(0), Completion::new(ids(11)))
        })
        .collect();
    let batch = PackedBatch::new(&groups, Device::Cpu)?;
    for line in std::io::stdin().lock().lines() {
        line?;
        let start = Instant::now();
        let options = RunOptions { is_checkpointed: true };
        let out = model.label_logprobs(&batch, &sites, options, &LabelLogprobs::default())?;
        let loss = out.logprobs.mean(Kind::Float) * -1.0;
        pt_tensor::autograd::backward(&[loss], &[Tensor::from(1f32)])?;
        clip_grad_norm_(&parameters, 1.0);
        optimizer.step(2e-4)?;
        optimizer.zero_grad();
        println!("{}", json!({"seconds": start.elapsed().as_secs_f64()}));
    }
    let (weights, trained) = (model.memory(), parameters.iter().map(|t| 4 * t.numel()).sum::<usize>());
    let peak = peak_memory_bytes();
    let known = weights.quantized_bytes + weights.dense_bytes + 2 * trained + state;
    let parts = json!({"4-bit weights": weights.quantized_bytes, "dense weights": weights.dense_bytes, "adapter": trained,
        "gradients": trained, "optimizer state": state, "activations, libraries": peak.map(|peak| peak as i64 - known as i64)});
    let each = weights.quantized_bytes as f64 / weights.num_quantized as f64;
    println!(
        "{}",
        json!({"peak_rss_bytes": peak, "peak_of_loading": loaded, "bytes_by_part": parts,
            "bytes_per_4bit_weight": Some(each).filter(|each| each.is_finite())})
    );
    Ok(())
}
