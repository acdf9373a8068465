use pt_dpo::{Dpo, DpoConfig, DpoExample, LossConfig, Reference};
use pt_model::{Bare, CausalLm, Pretrained, PromptGroup, Sites};
use pt_peft::{Adapter, LoraAdapter};
use pt_tensor::{Device, Kind, Tensor};
use pt_train::Result;
use pt_train::data::{Judgement, PreferenceGroup};
use pt_train::run_dir::RunDir;
use pt_train::settings::TrainConfig;
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

/// Pairs, the first completion preferred.
pub(crate) fn examples(groups: &[PromptGroup], loss: &LossConfig) -> Vec<DpoExample> {
    let judged = |group: &PromptGroup| PreferenceGroup {
        group: group.clone(),
        judgement: Judgement::Ranks { ranks: vec![0, 1], scores: None },
        weight: 1.0,
    };
    DpoExample::from_groups(groups.iter().map(judged).collect(), loss, 1000).unwrap()
}

/// A model with what is trained on it.
pub(crate) struct Setup {
    pub(crate) model: CausalLm,
    pub(crate) sites: Rc<dyn Sites>,
    adapter: Option<Rc<LoraAdapter>>,
    pub(crate) parameters: Vec<(String, Tensor)>,
}

impl Setup {
    pub(crate) fn full(mut model: CausalLm) -> Self {
        let parameters = model.train_all().unwrap();
        Self { model, sites: Rc::new(Bare), adapter: None, parameters }
    }

    pub(crate) fn lora(model: CausalLm, make: impl FnOnce(&CausalLm) -> LoraAdapter) -> Self {
        let adapter = Rc::new(make(&model));
        adapter.set_training(true);
        Self { model, sites: adapter.clone(), parameters: adapter.parameters(), adapter: Some(adapter) }
    }

    pub(crate) fn values(&self) -> Vec<Tensor> {
        self.parameters.iter().map(|(_, value)| value.detach().copy()).collect()
    }

    /// Trains in `run`; with `stop_after` someone asks for a stop during that step.
    pub(crate) fn train(
        &self,
        rows: Vec<DpoExample>,
        eval_rows: &[DpoExample],
        config: &TrainConfig<DpoConfig>,
        run: &RunDir,
        reference: Reference,
        stop_after: Option<u64>,
    ) -> (Outcome, Vec<StepRecord>) {
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
        let mut objective = Dpo::new(config.objective.loss.clone(), reference).unwrap();
        let outcome = train(&trained, &mut objective, (rows, eval_rows), config, run, &stop, &mut recorder).unwrap();
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
