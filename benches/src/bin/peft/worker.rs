//! One run of ours, in a process of its own so that its peak memory is its own.

use crate::methods;
use anyhow::{Context, Result};
use pt_benches::{median, model_path};
use pt_model::{
    Bare, CausalLm, Completion, GenerateConfig, PackedBatch, Pretrained, PromptGroup, RunOptions, Sites, generate,
};
use pt_peft::Adapter;
use pt_tensor::io::save_safetensors;
use pt_tensor::{Device, LabelLogprobs, Tensor, parse_kind, peak_memory_bytes};
use pt_train::config::load_config;
use pt_train::metrics::names;
use pt_train::objective::{Pass, evaluate};
use pt_train::sft::{Sft, SftConfig};
use pt_train::step::Optimization;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Instant;

/// What one run is to do; the peers read the same file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) method: String,
    pub(crate) is_nf4: bool,
    pub(crate) seed: u64,
    pub(crate) dtype: String,
    /// Of each step.
    pub(crate) learning_rates: Vec<f64>,
    pub(crate) batch: usize,
    /// File of rows, and the order in which they are taken.
    pub(crate) rows: PathBuf,
    pub(crate) order: Vec<usize>,
    pub(crate) held_out: Option<PathBuf>,
    /// Tokens to decode with the adapter and without, and how many times; 0 for none.
    pub(crate) decode: usize,
    pub(crate) decode_rounds: usize,
}

/// A row in a file: the tokens, and which of them are trained.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    input_ids: Vec<i64>,
    is_label: Vec<bool>,
}

pub(crate) fn write_rows(path: &Path, rows: &[PromptGroup]) -> Result<()> {
    let mut text = String::new();
    for row in rows {
        let completion = &row.completions[0];
        let line = Line {
            input_ids: [row.prompt.as_slice(), &completion.token_ids].concat(),
            is_label: [vec![false; row.prompt.len()], completion.is_label.clone()].concat(),
        };
        text += &format!("{}\n", serde_json::to_string(&line)?);
    }
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn read_rows(path: &Path) -> Result<Vec<PromptGroup>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    text.lines()
        .map(|line| {
            let Line { mut input_ids, mut is_label } = serde_json::from_str(line)?;
            let len = is_label.iter().position(|&is_label| is_label).unwrap_or(is_label.len());
            let (token_ids, is_label) = (input_ids.split_off(len), is_label.split_off(len));
            Ok(PromptGroup::single(input_ids, Completion { token_ids, is_label }))
        })
        .collect()
}

/// Does the job and prints what was measured.
pub(crate) fn run(path: &Path) -> Result<()> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let job: Job = serde_json::from_str(&text)?;
    let method = methods::find(&job.method)?;
    let sets: Vec<(String, String)> = method.sets.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    let config: SftConfig = load_config(None, &sets)?;
    let pretrained = Pretrained::open(model_path()?)?;
    let kind = parse_kind(&job.dtype)?.kind(Device::Cpu);
    let mut model = CausalLm::load_with(&pretrained, Device::Cpu, kind, method.format())?;
    let mut result = json!({});

    let adapter: Option<Rc<dyn Adapter>> = match config.method() {
        Some(method) => Some(method.create(&model, pretrained.tokenizer.as_ref(), job.seed)?),
        None => None,
    };
    let sites: Rc<dyn Sites> = match &adapter {
        Some(adapter) => adapter.clone(),
        None => Rc::new(Bare),
    };
    let mut trained = Vec::new();
    if !method.is_base() {
        let parameters = match &adapter {
            Some(adapter) => adapter.parameters(),
            None => model.train_all()?,
        };
        trained.extend(parameters.iter().map(|(name, tensor)| (name.clone(), tensor.detach())));
        result["num_trainable"] = parameters.iter().map(|(_, tensor)| tensor.numel()).sum::<usize>().into();
        train(&job, &config, &model, &sites, parameters, &mut result)?;
    }
    result["peak_rss_bytes"] = json!(peak_memory_bytes());

    if let Some(held_out) = &job.held_out {
        let rows = read_rows(held_out)?;
        let pass = Pass { step: 0, model: &model, sites: &sites, options: RunOptions::default() };
        let evaluation = evaluate(&mut Sft::default(), &pass, &rows, 1024, &mut |_| ())?;
        result["held_out_loss"] = evaluation.loss.into();
        result["held_out_accuracy"] = evaluation.value(names::ACCURACY).into();
        result["held_out_labels"] = rows.iter().map(PromptGroup::num_labels).sum::<usize>().into();
    }
    let folder = tempfile::tempdir()?;
    match &adapter {
        Some(adapter) => adapter.save(&folder.path().join("adapter"))?,
        None => {
            std::fs::create_dir(folder.path().join("adapter"))?;
            save_safetensors(&folder.path().join("adapter/model.safetensors"), &trained, &[])?;
        }
    }
    result["adapter_bytes"] = tensor_bytes(&folder.path().join("adapter"))?.into();
    if adapter.is_some() && job.decode > 0 {
        let (alone, with) = decode(&job, &model, &sites)?;
        result["decode_ms_per_token_alone"] = alone.into();
        result["decode_ms_per_token"] = with.into();
    }
    println!("{result}");
    Ok(())
}

/// As `pt sft` trains, with the learning rates that the peers get, too.
fn train(
    job: &Job,
    config: &SftConfig,
    model: &CausalLm,
    sites: &Rc<dyn Sites>,
    parameters: Vec<(String, Tensor)>,
    result: &mut Value,
) -> Result<()> {
    // Where a paged optimizer keeps its file: on a disk, which /tmp may not be.
    let folder = tempfile::tempdir_in(std::env::current_exe()?.parent().context("the program has no folder")?)?;
    let steps = job.learning_rates.len();
    let schedule = super::schedule(steps)?;
    let highest = job.learning_rates.first().copied().unwrap_or_default();
    let mut optimization =
        Optimization::new(parameters, config.adamw, folder.path(), schedule, highest, config.max_grad_norm)?;
    let rows = read_rows(&job.rows)?;
    let (mut losses, mut seconds) = (Vec::new(), Vec::new());
    sites.set_training(true);
    for step in 0..steps {
        let start = Instant::now();
        let chosen = &job.order[step * job.batch..(step + 1) * job.batch];
        let groups: Vec<PromptGroup> = chosen.iter().map(|&index| rows[index].clone()).collect();
        let batch = PackedBatch::new(&groups, Device::Cpu)?;
        let out = model.label_logprobs(&batch, sites, RunOptions::default(), &LabelLogprobs::default())?;
        let loss = out.logprobs.sum(None) * (-1.0 / batch.num_labels() as f64);
        pt_tensor::autograd::backward(&[loss.shallow_clone()], &[Tensor::from(1f32)])?;
        optimization.step(step as u64 + 1)?;
        losses.push(loss.double_value(&[]));
        seconds.push(start.elapsed().as_secs_f64());
    }
    sites.set_training(false);
    result["losses"] = json!(losses);
    // The first step also finds memory and makes libtorch's threads.
    result["step_seconds"] = median(if steps > 1 { seconds.split_off(1) } else { seconds }).into();
    Ok(())
}

fn tensor_bytes(folder: &Path) -> Result<u64> {
    let mut total = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.path().extension().is_some_and(|extension| extension == "safetensors") {
            total += entry.metadata()?.len();
        }
    }
    Ok(total)
}

/// Milliseconds a token at batch 1 after a prompt of 64, of the model alone and with the adapter, in turns.
fn decode(job: &Job, model: &CausalLm, sites: &Rc<dyn Sites>) -> Result<(f64, f64)> {
    let bare: Rc<dyn Sites> = Rc::new(Bare);
    let prompt: Vec<i64> = read_rows(&job.rows)?.into_iter().flat_map(|row| row.prompt).take(64).collect();
    let run = |sites: &Rc<dyn Sites>, new: usize| -> Result<f64> {
        let config = GenerateConfig { max_new_tokens: new, ..Default::default() };
        let start = Instant::now();
        generate(model, None, std::slice::from_ref(&prompt), &config, sites, |_, _| true)?;
        Ok(start.elapsed().as_secs_f64())
    };
    let token = |sites: &Rc<dyn Sites>| -> Result<f64> {
        let first = run(sites, 1)?;
        Ok((run(sites, job.decode + 1)? - first) * 1e3 / job.decode as f64)
    };
    run(&bare, 4)?;
    run(sites, 4)?;
    let (mut alone, mut with) = (Vec::new(), Vec::new());
    for _ in 0..job.decode_rounds {
        alone.push(token(&bare)?);
        with.push(token(sites)?);
    }
    Ok((median(alone), median(with)))
}
