//! `cargo xtask bench generate [--peers]`: prefill and decoding speed.
//!
//! Each measurement is a process of its own; ours and the peers' alternate.

use anyhow::Result;
use clap::Parser;
use pt_benches::{Record, json_of, median, model_path, peer_model, ratios, rows};
use pt_model::{Bare, CausalLm, GenerateConfig, Pretrained, Sites, generate};
use pt_tensor::{Device, parse_kind, peak_memory_bytes};
use serde_json::json;
use std::path::PathBuf;
use std::process::Command;
use std::rc::Rc;
use std::time::Instant;

#[derive(Parser)]
struct Args {
    /// Python with the peers' packages.
    #[arg(long)]
    peers: Option<PathBuf>,
    /// Rounds of ours and the peers'.
    #[arg(long, default_value_t = 2)]
    rounds: usize,
    /// Repeats within a round, of which the median counts.
    #[arg(long, default_value_t = 3)]
    repeats: usize,
    /// Only f32 or bf16.
    #[arg(long)]
    dtype: Option<String>,
    /// Measure once in this process and print JSON.
    #[arg(long, hide = true)]
    once: bool,
}

const PROMPT: usize = 128;
const NEW_TOKENS: usize = 128;
const PREFILL: usize = 512;

fn main() -> Result<()> {
    let args = Args::parse();
    if args.once {
        return once(args.dtype.as_deref().unwrap_or("f32"), args.repeats);
    }
    let scripts = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("peers");
    let setting = json!({"prompt": PROMPT, "new_tokens": NEW_TOKENS, "prefill": PREFILL, "repeats": args.repeats});
    let mut record = Record::new("generate", setting)?;
    let repeats = args.repeats.to_string();
    for (dtype, torch_dtype) in [("f32", "float32"), ("bf16", "bfloat16")] {
        if args.dtype.as_deref().is_some_and(|only| only != dtype) {
            continue;
        }
        for round in 0..args.rounds {
            let own = json_of(Command::new(std::env::current_exe()?).args([
                "--once",
                "--dtype",
                dtype,
                "--repeats",
                &repeats,
            ]))?;
            record.add(json!({"tool": "pt", "dtype": dtype, "round": round, "measured": own}));
            if let Some(python) = &args.peers {
                let model = peer_model(python, &scripts)?;
                let mut command = Command::new(python);
                command.arg(scripts.join("generate_transformers.py")).arg("--model").arg(model);
                let peer = json_of(command.args(["--dtype", torch_dtype, "--repeats", &repeats]))?;
                let ratios = ratios(&own, &peer);
                record.add(json!({"tool": "transformers", "dtype": dtype, "round": round, "measured": peer}));
                record.add(json!({"ratio": "pt / transformers", "dtype": dtype, "round": round, "measured": ratios}));
            }
        }
    }
    if let Some(python) = &args.peers {
        let mut command = Command::new(python);
        command.arg(scripts.join("generate_llama_cpp.py")).arg("--model").arg(model_path()?);
        let peer = json_of(command.args(["--repeats", &repeats]))?;
        record.add(json!({"tool": "llama.cpp", "measured": peer}));
    }
    record.save()
}

fn once(dtype: &str, repeats: usize) -> Result<()> {
    let kind = parse_kind(dtype)?.kind(Device::Cpu);
    let pretrained = Pretrained::open(model_path()?)?;
    let model = CausalLm::load(&pretrained, Device::Cpu, kind)?;
    let bare: Rc<dyn Sites> = Rc::new(Bare);
    let ids: Vec<i64> = rows(40).into_iter().flat_map(|row| row.prompt).collect();
    let prompt = |row: usize, len: usize| ids[row * 7..row * 7 + len].to_vec();
    // Seconds of a prefill of `len` tokens and `new` tokens after it.
    let run = |batch: usize, len: usize, new: usize| -> Result<f64> {
        let prompts: Vec<Vec<i64>> = (0..batch).map(|row| prompt(row, len)).collect();
        let config = GenerateConfig { max_new_tokens: new, ..Default::default() };
        let start = Instant::now();
        generate(&model, None, &prompts, &config, &bare, |_, _| true)?;
        Ok(start.elapsed().as_secs_f64())
    };
    run(1, 8, 4)?;
    let mut result = json!({});
    for batch in [1, 16] {
        let rate = || -> Result<f64> {
            let prefill = run(batch, PROMPT, 1)?;
            let whole = run(batch, PROMPT, NEW_TOKENS + 1)?;
            Ok((batch * NEW_TOKENS) as f64 / (whole - prefill))
        };
        let rates = (0..repeats).map(|_| rate()).collect::<Result<Vec<f64>>>()?;
        result[format!("decode_tokens_per_s_batch_{batch}")] = median(rates).into();
    }
    let rates = (0..repeats).map(|_| Ok(PREFILL as f64 / run(1, PREFILL, 1)?)).collect::<Result<Vec<f64>>>()?;
    result["prefill_tokens_per_s"] = median(rates).into();
    result["peak_rss_bytes"] = json!(peak_memory_bytes());
    println!("{result}");
    Ok(())
}
