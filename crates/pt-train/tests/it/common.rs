use pt_model::{Bare, CausalLm, Completion, Pretrained, PromptGroup, Sites};
use pt_peft::{Adapter, LoraAdapter, LoraConfig};
use pt_tensor::{AdamWConfig, Device, Kind, Tensor};
use pt_train::Result;
use pt_train::data::BatchConfig;
use pt_train::run_dir::RunDir;
use pt_train::schedule::{ScheduleConfig, ScheduleKind};
use pt_train::sft::SftConfig;
use pt_train::train::{Observer, Outcome, StepRecord, Trained, train};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A folder of `fixtures/`.
pub(crate) fn fixtures(area: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(area)
}

/// Runs draw from libtorch's one generator, so those of a process take turns.
pub(crate) fn take_turns() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    // Tensors this small are computed faster, and in one order, by one thread.
    pt_tensor::set_num_threads(1);
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn tiny_llama() -> CausalLm {
    let pretrained = Pretrained::open(fixtures("models/llama/model")).unwrap();
    CausalLm::load(&pretrained, Device::Cpu, Kind::Float).unwrap()
}

/// The rows of `fixtures/sft`, tokenized already; each prompt ends where the first trained token begins.
pub(crate) fn rows() -> Vec<PromptGroup> {
    let text = std::fs::read_to_string(fixtures("sft/lora/rows.jsonl")).unwrap();
    text.lines()
        .map(|line| {
            let row: serde_json::Value = serde_json::from_str(line).unwrap();
            let numbers =
                |key: &str| -> Vec<i64> { row[key].as_array().unwrap().iter().map(|n| n.as_i64().unwrap()).collect() };
            let (ids, mask) = (numbers("input_ids"), numbers("completion_mask"));
            let start = mask.iter().position(|&m| m == 1).unwrap();
            let completion = Completion {
                token_ids: ids[start..].to_vec(),
                is_label: mask[start..].iter().map(|&m| m == 1).collect(),
            };
            PromptGroup::single(ids[..start].to_vec(), completion)
        })
        .collect()
}

/// The settings of `fixtures/sft`.
pub(crate) fn config() -> SftConfig {
    SftConfig {
        max_steps: Some(20),
        learning_rate: 1e-3,
        schedule: ScheduleConfig { kind: ScheduleKind::Linear, warmup_steps: Some(4), ..Default::default() },
        adamw: AdamWConfig { weight_decay: 0.01, ..Default::default() },
        max_grad_norm: Some(1.0),
        batch: BatchConfig { batch_size: 4, accumulation: 2, shuffle: false, ..Default::default() },
        save_every: 0,
        peft: None,
        ..Default::default()
    }
}

pub(crate) fn lora_config(dropout: f64) -> LoraConfig {
    LoraConfig { rank: 4, lora_alpha: 8.0, lora_dropout: dropout, ..Default::default() }
}

/// A model with what is trained on it.
pub(crate) struct Setup {
    pub(crate) model: CausalLm,
    sites: Rc<dyn Sites>,
    adapter: Option<Rc<LoraAdapter>>,
    pub(crate) parameters: Vec<(String, Tensor)>,
}

impl Setup {
    pub(crate) fn full() -> Self {
        let mut model = tiny_llama();
        let parameters = model.train_all().unwrap();
        Self { model, sites: Rc::new(Bare), adapter: None, parameters }
    }

    pub(crate) fn lora(make: impl FnOnce(&CausalLm) -> LoraAdapter) -> Self {
        let model = tiny_llama();
        let adapter = Rc::new(make(&model));
        adapter.set_training(true);
        Self { model, sites: adapter.clone(), parameters: adapter.parameters(), adapter: Some(adapter) }
    }

    pub(crate) fn values(&self) -> Vec<(String, Tensor)> {
        self.parameters.iter().map(|(name, value)| (name.clone(), value.detach().copy())).collect()
    }

    /// Trains in `run`; with `stop_after` someone asks for a stop during that step.
    pub(crate) fn train(
        &self,
        rows: Vec<PromptGroup>,
        eval_rows: &[PromptGroup],
        config: &SftConfig,
        run: &RunDir,
        stop_after: Option<u64>,
    ) -> (Result<Outcome>, Vec<StepRecord>) {
        let save = |folder: &Path| -> Result<()> {
            match &self.adapter {
                Some(adapter) => Ok(adapter.save(&folder.join("adapter"))?),
                None => Ok(()),
            }
        };
        let trained = Trained {
            model: &self.model,
            sites: self.sites.clone(),
            parameters: self.parameters.iter().map(|(name, value)| (name.clone(), value.shallow_clone())).collect(),
            lr_factor: Box::new(|name: &str| self.adapter.as_ref().map_or(1.0, |adapter| adapter.lr_factor(name))),
            save: Box::new(save),
        };
        let stop = AtomicBool::new(false);
        let mut recorder = Recorder { records: vec![], stop_after, stop: &stop };
        let outcome =
            train(&trained, &mut config.objective.clone(), (rows, eval_rows), config, run, &stop, &mut recorder);
        (outcome, recorder.records)
    }
}

struct Recorder<'a> {
    records: Vec<StepRecord>,
    stop_after: Option<u64>,
    stop: &'a AtomicBool,
}

impl Observer for Recorder<'_> {
    fn on_step(&mut self, record: &StepRecord) {
        self.records.push(record.clone());
        if self.stop_after == Some(record.step) {
            self.stop.store(true, Ordering::Relaxed);
        }
    }
}

pub(crate) fn new_run() -> (tempfile::TempDir, RunDir) {
    let folder = tempfile::tempdir().unwrap();
    let run = RunDir::create(&folder.path().join("run"), "seed: 0\n").unwrap();
    (folder, run)
}
