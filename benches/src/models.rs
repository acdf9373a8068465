//! The models under test, their inputs and their roofs.

use anyhow::{Context, Result};
use pt_model::{CausalLm, Completion, ModelConfig, Pretrained, PromptGroup, RunOptions, Sites};
use pt_peft::{Adapter, LoraAdapter, LoraConfig};
use pt_tensor::{Device, Kind, Tensor, parse_kind, peak_memory_bytes};
use pt_train::objective::{Objective, Pass};
use pt_train::schedule::ScheduleConfig;
use pt_train::step::Optimization;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::time::Instant;

/// The model under test: what `cargo xtask bench` fetched.
///
/// # Errors
/// When PT_TEST_MODEL is not set.
pub fn model_path() -> Result<PathBuf> {
    let path =
        std::env::var_os("PT_TEST_MODEL").context("PT_TEST_MODEL is not set: run through `cargo xtask bench`")?;
    Ok(path.into())
}

/// `count` rows of about 110 prompt and 110 completion tokens, ragged (±50 %), the same on every machine.
pub fn rows(count: usize) -> Vec<PromptGroup> {
    let mut state = 1u64;
    // A plain linear congruential generator: the ids carry no meaning, they only have to be the same everywhere.
    let mut next = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    (0..count)
        .map(|_| {
            let mut ids = |len: u64| (0..len).map(|_| 100 + next(40_000) as i64).collect::<Vec<i64>>();
            let (prompt, completion) = (55 + ids(1)[0] as u64 % 110, 55 + ids(1)[0] as u64 % 110);
            PromptGroup::single(ids(prompt), Completion::new(ids(completion)))
        })
        .collect()
}

/// `count` preference pairs: two completions of about 110 tokens (±50 %) after a prompt of about `prompt_ratio` times
/// that, the same on every machine.
pub fn pairs(count: usize, prompt_ratio: usize) -> Vec<PromptGroup> {
    let rows = rows(count * (prompt_ratio + 1));
    let pair = |rows: &[PromptGroup]| {
        // A row brings a prompt and a completion of such a length each: one of them gives the sides, the others the prompt.
        let (sides, prompts) = (&rows[0], &rows[1..]);
        let completions = vec![Completion::new(sides.prompt.clone()), sides.completions[0].clone()];
        PromptGroup { prompt: prompts.iter().flat_map(|row| row.prompt.clone()).collect(), completions }
    };
    rows.chunks(prompt_ratio + 1).map(pair).collect()
}

/// The sorts of prompts that [`pairs`] are measured with: names, and lengths in units of a completion's.
pub const PAIR_PROMPTS: [(&str, usize); 2] = [("short", 1), ("long", 4)];

/// The length of a sort of prompts by its name; of the first when none is named.
pub fn pair_prompts(name: Option<&str>) -> usize {
    PAIR_PROMPTS.iter().find(|(known, _)| Some(*known) == name).map_or(1, |(_, length)| *length)
}

/// Steps of `batch` examples with LoRA of rank 16 on an objective of pairs; the seconds of all steps but the first.
/// `objective` makes it of the model, with what it trains beside the adapter.
///
/// # Errors
/// Those of model and objective.
pub fn measure_pairs<O: Objective>(
    dtype: &str,
    examples: &[O::Example],
    batch: usize,
    learning_rate: f64,
    objective: impl FnOnce(&CausalLm) -> Result<(O, Vec<(String, Tensor)>)>,
) -> Result<Value> {
    let kind = parse_kind(dtype)?.kind(Device::Cpu);
    let pretrained = Pretrained::open(model_path()?)?;
    let model = CausalLm::load(&pretrained, Device::Cpu, kind)?;
    let adapter = Rc::new(LoraAdapter::new(LoraConfig::default(), &model, 0)?);
    adapter.set_training(true);
    let (mut objective, beside) = objective(&model)?;
    let leaves = adapter.parameters().into_iter().chain(beside).collect();
    let num_steps = examples.len().div_ceil(batch);
    let schedule = ScheduleConfig::default().build(num_steps)?;
    let scratch = std::env::temp_dir();
    let mut optimization = Optimization::new(leaves, Default::default(), &scratch, schedule, learning_rate, Some(1.0))?;
    let sites: Rc<dyn Sites> = adapter;
    let (mut losses, mut seconds) = (Vec::new(), 0.0);
    for (step, rows) in examples.chunks(batch).enumerate() {
        let start = Instant::now();
        let pass = Pass { step: step as u64 + 1, model: &model, sites: &sites, options: RunOptions::default() };
        let window = objective.accumulate(&pass, &[rows.iter().collect()])?;
        optimization.step(step as u64 + 1)?;
        losses.push(window.loss);
        if step > 0 {
            seconds += start.elapsed().as_secs_f64();
        }
    }
    let rate = (num_steps.saturating_sub(1) * batch) as f64 / seconds;
    Ok(json!({"pairs_per_s": rate, "peak_rss_bytes": peak_memory_bytes(), "losses": losses}))
}

/// GFLOP/s of libtorch's products at the model's own linear shapes, forward and backward to the input, weighted as
/// a step weights them: the roof that a step is held against.
pub fn matmul_roof(config: &ModelConfig, tokens: i64, kind: Kind) -> f64 {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (queries, keys) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
    let shapes = [
        (hidden, queries),
        (hidden, keys),
        (hidden, keys),
        (queries, hidden),
        (hidden, inner),
        (hidden, inner),
        (inner, hidden),
    ];
    let random = |size: [i64; 2]| Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind);
    let (mut flops, mut seconds) = (0.0, 0.0);
    for (input, output) in shapes {
        let (x, weight, grad) = (random([tokens, input]), random([output, input]), random([tokens, output]));
        let best = |run: &dyn Fn() -> Tensor| {
            (0..7)
                .map(|_| {
                    let start = Instant::now();
                    let _ = run();
                    start.elapsed().as_secs_f64()
                })
                .fold(f64::MAX, f64::min)
        };
        seconds += best(&|| x.linear(&weight, None::<&Tensor>)) + best(&|| grad.matmul(&weight));
        flops += 4.0 * (tokens * input * output) as f64;
    }
    flops / seconds / 1e9
}

/// Floating-point operations of one training step with frozen weights: forward and gradient to the input of every
/// linear layer on all tokens, of the output layer on the labels. Attention and adapters are left out.
pub fn step_flops(config: &ModelConfig, tokens: i64, labels: i64) -> f64 {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (queries, keys) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
    let layer = hidden * (2 * queries + 2 * keys + 3 * inner);
    4.0 * (config.num_layers * layer * tokens + config.vocab_size * hidden * labels) as f64
}

/// Seconds since this process was started, loading its libraries included, where the system tells (Linux).
pub fn process_age() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name, in brackets, may hold spaces; the twentieth field after it is the start in hundredths of a second.
    let started: f64 = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
    let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
    Some(uptime.split_whitespace().next()?.parse::<f64>().ok()? - started / 100.0)
}

/// The Hugging Face folder of the model that the Python peers load, made once beside the model file.
///
/// # Errors
/// When the converter fails.
pub fn peer_model(python: &Path, scripts: &Path) -> Result<PathBuf> {
    let gguf = model_path()?;
    let folder = gguf.parent().context("the model has no folder")?.join("huggingface-f32");
    if !folder.join("config.json").exists() {
        let status = Command::new(python).arg(scripts.join("make_hf.py")).arg(&gguf).arg(&folder).status()?;
        anyhow::ensure!(status.success(), "make_hf.py failed");
    }
    Ok(folder)
}
