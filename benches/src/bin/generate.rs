//! `cargo xtask bench generate [--peers]`: prefill and decoding speed.
//!
//! Each measurement is a process of its own; ours and the peers' alternate, round by round, and medians close the record.

use anyhow::{Result, bail};
use clap::Parser;
use pt_benches::{Record, json_of, llama_cpp_python, median, medians, model_path, peer_model, ratios, rows};
use pt_model::{Bare, CausalLm, GenerateConfig, LinearFormat, Pretrained, Sites, generate};
use pt_tensor::{Device, Nf4Arithmetic, Nf4Options, parse_kind, peak_memory_bytes, set_num_threads};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::time::Instant;

#[derive(Parser)]
struct Args {
    /// Python with the peers' packages.
    #[arg(long)]
    peers: Option<PathBuf>,
    /// Rounds of ours and the peers'.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Repeats within a round, of which the median counts.
    #[arg(long, default_value_t = 3)]
    repeats: usize,
    /// Threads; may be given several times. Without it, one and all.
    #[arg(long)]
    threads: Vec<usize>,
    /// Only f32 or bf16.
    #[arg(long)]
    dtype: Option<String>,
    /// How the linear layers are held in a single measurement.
    #[arg(long, hide = true, default_value = "dense")]
    weights: String,
    /// Measure once in this process and print JSON.
    #[arg(long, hide = true)]
    once: bool,
}

const PROMPT: usize = 128;
const NEW_TOKENS: usize = 128;
const PREFILL: [usize; 2] = [128, 512];

/// How we hold the linear layers: as they are loaded, in NF4, and in NF4 with 8-bit activations and the output layer too.
const OWN_WEIGHTS: [&str; 3] = ["dense", "nf4", "nf4-int8"];

/// What llama.cpp runs: the file as it is, and its own conversions of it.
const LLAMA_CPP_WEIGHTS: [&str; 4] = ["as shipped", "F16", "Q4_0", "IQ4_NL"];

fn main() -> Result<()> {
    let args = Args::parse();
    if args.once {
        let threads = args.threads.first().copied().unwrap_or(1);
        return once(args.dtype.as_deref().unwrap_or("f32"), &args.weights, threads, args.repeats);
    }
    let cores = std::thread::available_parallelism()?.get();
    let mut all_threads = if args.threads.is_empty() { vec![1, cores] } else { args.threads.clone() };
    all_threads.dedup();
    let setting = json!({
        "prompt": PROMPT, "new_tokens": NEW_TOKENS, "prefill": PREFILL, "rounds": args.rounds, "repeats": args.repeats,
    });
    let mut record = Record::new("generate", setting)?;
    for threads in all_threads {
        let mut tools = Vec::new();
        for dtype in ["f32", "bf16"] {
            if args.dtype.as_deref().is_none_or(|only| only == dtype) {
                for weights in OWN_WEIGHTS {
                    tools.push(own(dtype, weights, threads, args.repeats)?);
                }
                if let Some(python) = &args.peers {
                    tools.push(transformers(python, dtype, threads, args.repeats)?);
                }
            }
        }
        if args.peers.is_some() {
            match llama_cpp_python() {
                Some(python) => tools.extend(llama_cpp(&python, threads, args.repeats)?),
                None => record.add(json!({"tool": "llama.cpp", "skipped": "it could not be compiled here"})),
            }
        }
        for round in 0..args.rounds {
            for tool in &mut tools {
                let measured = json_of(&mut tool.command)?;
                record.add(json!({
                    "tool": tool.name, "weights": tool.weights, "threads": threads, "round": round, "measured": measured,
                }));
                tool.measured.push(measured);
            }
        }
        sum_up(&mut record, &tools, threads);
    }
    record.save()
}

/// One tool on one kind of weights, run as a process.
struct Tool {
    name: &'static str,
    weights: String,
    command: Command,
    measured: Vec<Value>,
}

impl Tool {
    fn new(name: &'static str, weights: &str, command: Command) -> Self {
        Self { name, weights: weights.to_owned(), command, measured: Vec::new() }
    }
}

fn own(dtype: &str, weights: &str, threads: usize, repeats: usize) -> Result<Tool> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--once", "--dtype", dtype, "--weights", weights]);
    command.args(["--repeats", &repeats.to_string(), "--threads", &threads.to_string()]);
    // transformers has the same number formats: it is compared with what is named as it is there.
    let name = if weights == "dense" { dtype.to_owned() } else { format!("{dtype} {weights}") };
    Ok(Tool::new("pt", &name, command))
}

fn script(python: &Path, name: &str, threads: usize, repeats: usize) -> Command {
    let mut command = Command::new(python);
    command.arg(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("peers").join(name)).arg("--prefill");
    command.args(PREFILL.map(|length| length.to_string()));
    command.args(["--prompt", &PROMPT.to_string(), "--new-tokens", &NEW_TOKENS.to_string()]);
    command.args(["--repeats", &repeats.to_string(), "--threads", &threads.to_string()]);
    command
}

fn transformers(python: &Path, dtype: &str, threads: usize, repeats: usize) -> Result<Tool> {
    let scripts = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("peers");
    let mut command = script(python, "generate_transformers.py", threads, repeats);
    command.arg("--model").arg(peer_model(python, &scripts)?);
    command.args(["--dtype", if dtype == "f32" { "float32" } else { "bfloat16" }]);
    Ok(Tool::new("transformers", dtype, command))
}

/// llama.cpp on each kind of weights. Its threads spin while they wait for one another, which is best on idle cores and
/// ruinous on shared ones, so with several threads it also runs with threads that sleep.
fn llama_cpp(python: &Path, threads: usize, repeats: usize) -> Result<Vec<Tool>> {
    let waits: &[(&str, Option<&str>)] =
        if threads > 1 { &[("", None), (", threads sleep", Some("passive"))] } else { &[("", None)] };
    let mut tools = Vec::new();
    for weights in LLAMA_CPP_WEIGHTS {
        for (note, policy) in waits {
            let mut command = script(python, "generate_llama_cpp.py", threads, repeats);
            command.arg("--model").arg(model_path()?).args(["--weights", weights]);
            if let Some(policy) = policy {
                command.env("OMP_WAIT_POLICY", policy);
            }
            tools.push(Tool::new("llama.cpp", &format!("{weights}{note}"), command));
        }
    }
    Ok(tools)
}

/// Adds the medians of each tool, and ours as multiples of them.
fn sum_up(record: &mut Record, tools: &[Tool], threads: usize) {
    let middles: Vec<(&Tool, Value)> = tools.iter().map(|tool| (tool, medians(&tool.measured))).collect();
    for (tool, middle) in &middles {
        record.add(json!({"median": tool.name, "weights": tool.weights, "threads": threads, "measured": middle}));
    }
    for (own, own_middle) in middles.iter().filter(|(tool, _)| tool.name == "pt") {
        // transformers on the same number format; llama.cpp has formats of its own.
        let peers = middles
            .iter()
            .filter(|(tool, _)| tool.name == "llama.cpp" || tool.name == "transformers" && tool.weights == own.weights);
        for (peer, peer_middle) in peers {
            record.add(json!({
                "ratio": format!("pt / {}", peer.name), "weights": [own.weights, peer.weights], "threads": threads,
                "measured": ratios(own_middle, peer_middle),
            }));
        }
    }
}

fn once(dtype: &str, weights: &str, threads: usize, repeats: usize) -> Result<()> {
    set_num_threads(threads as i32);
    let kind = parse_kind(dtype)?.kind(Device::Cpu);
    let pretrained = Pretrained::open(model_path()?)?;
    let nf4 = |arithmetic, with_output| LinearFormat::Nf4 { options: Nf4Options::default(), arithmetic, with_output };
    let format = match weights {
        "dense" => LinearFormat::AsStored,
        "nf4" => nf4(Nf4Arithmetic::Exact, false),
        "nf4-int8" => nf4(Nf4Arithmetic::Int8, true),
        other => bail!("--weights {other}: expected one of {OWN_WEIGHTS:?}"),
    };
    let model = CausalLm::load_with(&pretrained, Device::Cpu, kind, format)?;
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
    for length in PREFILL {
        let rates = (0..repeats).map(|_| Ok(length as f64 / run(1, length, 1)?)).collect::<Result<Vec<f64>>>()?;
        result[format!("prefill_{length}_tokens_per_s")] = median(rates).into();
    }
    result["peak_rss_bytes"] = json!(peak_memory_bytes());
    println!("{result}");
    Ok(())
}
