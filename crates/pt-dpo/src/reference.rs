//! The reference of a run: where its log-probs come from, and how they are kept.

use crate::example::{DpoExample, ReferenceLogprobs};
use pt_model::{CausalLm, PackedBatch, PromptGroup, RunOptions, Sites};
use pt_tensor::io::{SafetensorsReader, save_safetensors};
use pt_tensor::{Device, Kind, LabelLogprobs, Tensor, no_grad};
use pt_train::data::packing::split_by_tokens;
use pt_train::objective::Example as _;
use pt_train::{Result, TrainError};
use std::path::Path;
use std::rc::Rc;

/// Where the reference's log-probs come from.
pub enum Reference {
    /// No loss asks for any.
    Absent,
    /// From the examples: they were computed once.
    Precomputed,
    /// The policy's model with other sites: with its adapter off, or with another one.
    Sites(Rc<dyn Sites>),
    /// Another model.
    Model(Box<CausalLm>, Rc<dyn Sites>),
    /// The policy's own tensors as they were.
    Copy(PolicyCopy),
}

/// A copy of the trained tensors, taken where it is made, which may follow them (TR-DPO, Gorbatovski et al. 2024,
/// <https://arxiv.org/abs/2404.09656>).
pub struct PolicyCopy {
    trained: Vec<(String, Tensor)>,
    values: Vec<Tensor>,
    sync_every: u64,
    sync_mixup: f64,
}

impl PolicyCopy {
    /// Copies `trained` as it stands; every `sync_every` steps (0 for never) the copy moves by `sync_mixup`.
    pub fn new(trained: &[(String, Tensor)], sync_every: u64, sync_mixup: f64) -> Self {
        let copy = |(_, tensor): &(String, Tensor)| tensor.detach().copy();
        let values = trained.iter().map(copy).collect();
        let trained = trained.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        Self { trained, values, sync_every, sync_mixup }
    }

    /// Runs `work` with the copy in the place of the trained tensors.
    fn in_place<R>(&self, work: impl FnOnce() -> R) -> R {
        let put = |values: &[Tensor]| {
            no_grad(|| {
                self.trained.iter().zip(values).for_each(|((_, tensor), value)| {
                    tensor.shallow_clone().copy_(value);
                });
            });
        };
        let kept: Vec<Tensor> = self.trained.iter().map(|(_, tensor)| tensor.detach().copy()).collect();
        put(&self.values);
        let result = work();
        put(&kept);
        result
    }

    fn after_update(&mut self, step: u64) {
        if self.sync_every == 0 || !step.is_multiple_of(self.sync_every) {
            return;
        }
        no_grad(|| {
            for ((_, tensor), value) in self.trained.iter().zip(&mut self.values) {
                let moved = tensor.detach() * self.sync_mixup + &*value * (1.0 - self.sync_mixup);
                value.copy_(&moved);
            }
        });
    }
}

impl Reference {
    /// The reference's log-probs at the labels of `batch`, `[num_labels]` f32 without a graph; `None` where there is no
    /// reference. `kept` are those of the batch's groups, in order, where they were computed once.
    pub(crate) fn logprobs<'a>(
        &self,
        model: &CausalLm,
        sites: &Rc<dyn Sites>,
        batch: &PackedBatch,
        kept: impl Iterator<Item = Option<&'a [f32]>>,
    ) -> Result<Option<Tensor>> {
        Ok(Some(match self {
            Self::Absent => return Ok(None),
            Self::Precomputed => {
                let logprobs: Vec<f32> = kept.flat_map(|kept| kept.unwrap_or(&[])).copied().collect();
                if logprobs.len() as i64 != batch.num_labels() {
                    return Err(TrainError::Config {
                        place: "reference".into(),
                        message: format!(
                            "has {} log-probs for {} scored tokens: compute them for these rows first",
                            logprobs.len(),
                            batch.num_labels()
                        ),
                    });
                }
                Tensor::from_slice(&logprobs).to_device(batch.label_ids.device())
            }
            Self::Sites(sites) => run(model, sites, batch)?,
            Self::Model(model, sites) => run(model, sites, batch)?,
            Self::Copy(copy) => copy.in_place(|| run(model, sites, batch))?,
        }))
    }

    pub(crate) fn after_update(&mut self, step: u64) {
        if let Self::Copy(copy) = self {
            copy.after_update(step);
        }
    }

    /// What a checkpoint has to keep: a copy of the policy cannot be made again.
    pub(crate) fn state(&self) -> Vec<(String, Tensor)> {
        match self {
            Self::Copy(copy) => {
                let named = copy.trained.iter().zip(&copy.values);
                named.map(|((name, _), value)| (format!("reference.{name}"), value.shallow_clone())).collect()
            }
            _ => vec![],
        }
    }

    pub(crate) fn load_state(&mut self, get: &dyn Fn(&str) -> pt_tensor::Result<Tensor>) -> Result<()> {
        if let Self::Copy(copy) = self {
            for ((name, _), value) in copy.trained.iter().zip(&mut copy.values) {
                let kept = get(&format!("reference.{name}"))?;
                no_grad(|| value.copy_(&kept.to_device(value.device())));
            }
        }
        Ok(())
    }
}

fn run(model: &CausalLm, sites: &Rc<dyn Sites>, batch: &PackedBatch) -> Result<Tensor> {
    let was_training = sites.set_training(false);
    let out = no_grad(|| model.label_logprobs(batch, sites, RunOptions::default(), &LabelLogprobs::default()));
    sites.set_training(was_training);
    Ok(out?.logprobs.to_kind(Kind::Float))
}

/// Computes the reference's log-probs of all scored tokens, once; `watch` hears how many examples are done.
///
/// # Errors
/// Those of the model, [`TrainError::NonFinite`] with the row.
pub fn precompute(
    reference: &Reference,
    model: &CausalLm,
    sites: &Rc<dyn Sites>,
    examples: &mut [DpoExample],
    max_tokens: usize,
    watch: &mut dyn FnMut(usize),
) -> Result<()> {
    let indices: Vec<usize> = (0..examples.len()).collect();
    let tokens = |row: usize| {
        let mismatched = examples[row].mismatched.as_ref().map_or(0, PromptGroup::num_tokens);
        examples[row].group().num_tokens() + mismatched
    };
    let mut num_done = 0;
    for rows in split_by_tokens(&indices, Some(max_tokens), tokens) {
        let (mut groups, mut owners) = (Vec::new(), Vec::new());
        for &row in &rows {
            groups.push(examples[row].group().clone());
            owners.push((row, false));
            if let Some(mismatched) = &examples[row].mismatched {
                groups.push(mismatched.clone());
                owners.push((row, true));
            }
        }
        let batch = PackedBatch::new(&groups, model.device())?;
        let logprobs = reference.logprobs(model, sites, &batch, std::iter::empty())?;
        let Some(logprobs) = logprobs else { return Ok(()) };
        let mut left = Vec::<f32>::try_from(logprobs.to_device(Device::Cpu)).map_err(pt_tensor::TensorError::from)?;
        for (group, (row, is_mismatched)) in groups.iter().zip(owners) {
            let rest = left.split_off(group.num_labels().min(left.len()));
            let own = std::mem::replace(&mut left, rest);
            if let Some(bad) = own.iter().position(|value| !value.is_finite()) {
                let place = format!("scored token {bad} of row {row}, counted from 0");
                return Err(TrainError::NonFinite { step: 0, what: "the reference's log-probs".into(), place });
            }
            let kept = examples[row].reference.get_or_insert_with(ReferenceLogprobs::default);
            if is_mismatched { kept.mismatched = own } else { kept.completions = own }
        }
        num_done += rows.len();
        watch(num_done);
    }
    Ok(())
}

/// What the file's sets are named.
const SETS: [&str; 2] = ["train", "eval"];

/// The metadata that says whose log-probs they are.
const IDENTITY: &str = "reference";

/// Writes log-probs that were computed once, of training and held-out rows; `identity` says of which reference, by a hash
/// of its weights, say.
///
/// # Errors
/// When the file cannot be written.
pub fn save_reference(path: &Path, sets: [&[DpoExample]; 2], identity: &str) -> Result<()> {
    let mut tensors = Vec::new();
    let mut metadata = vec![(IDENTITY.to_string(), identity.to_string())];
    for (name, examples) in SETS.into_iter().zip(sets) {
        let kept = || examples.iter().filter_map(|example| example.reference.as_ref());
        let column = |of: fn(&ReferenceLogprobs) -> &[f32]| kept().flat_map(of).copied().collect::<Vec<f32>>();
        tensors.push((name.to_string(), Tensor::from_slice(&column(|kept| &kept.completions))));
        tensors.push((format!("{name}.mismatched"), Tensor::from_slice(&column(|kept| &kept.mismatched))));
        metadata.push((format!("{name}.rows"), pt_train::train::fingerprint(examples)));
    }
    let metadata: Vec<(&str, &str)> = metadata.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    Ok(save_safetensors(path, &tensors, &metadata)?)
}

/// Reads what [`save_reference`] wrote for the same rows and the same reference.
///
/// # Errors
/// [`TrainError::Config`] when it was written for other rows or another reference, and when the file is damaged.
pub fn load_reference(path: &Path, sets: [&mut [DpoExample]; 2], identity: &str) -> Result<()> {
    let reader = SafetensorsReader::open(path)?;
    let fault = |message: String| TrainError::Config { place: path.display().to_string(), message };
    if reader.metadata().get(IDENTITY).is_none_or(|found| found != identity) {
        return Err(fault(
            "holds the log-probs of another reference: resume with the one that the run began with, or delete the file \
             to compute them again"
                .into(),
        ));
    }
    for (name, examples) in SETS.into_iter().zip(sets) {
        let found = reader.metadata().get(&format!("{name}.rows"));
        if found != Some(&pt_train::train::fingerprint(examples)) {
            return Err(fault(format!(
                "holds the reference's log-probs of other {name} rows: resume with the same data, or delete the file to \
                 compute them again"
            )));
        }
        let column = |name: &str| -> Result<std::vec::IntoIter<f32>> {
            let values = reader.tensor(name, Device::Cpu)?;
            Ok(Vec::<f32>::try_from(values).map_err(pt_tensor::TensorError::from)?.into_iter())
        };
        let (mut completions, mut mismatched) = (column(name)?, column(&format!("{name}.mismatched"))?);
        for example in examples.iter_mut() {
            let num_mismatched = example.mismatched.as_ref().map_or(0, PromptGroup::num_labels);
            let num_labels = example.preference.group.num_labels();
            example.reference = Some(ReferenceLogprobs {
                completions: completions.by_ref().take(num_labels).collect(),
                mismatched: mismatched.by_ref().take(num_mismatched).collect(),
            });
        }
        let is_short = |example: &DpoExample| {
            let kept =
                example.reference.as_ref().map_or((0, 0), |kept| (kept.completions.len(), kept.mismatched.len()));
            let num_mismatched = example.mismatched.as_ref().map_or(0, PromptGroup::num_labels);
            kept != (example.preference.group.num_labels(), num_mismatched)
        };
        if completions.len() + mismatched.len() > 0 || examples.iter().any(is_short) {
            return Err(fault("is damaged: it holds another number of log-probs than the rows have tokens".into()));
        }
    }
    Ok(())
}
