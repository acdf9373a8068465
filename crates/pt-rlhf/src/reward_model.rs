//! A reward model: a trunk with a scalar head, and its files.

use crate::scalar_head::SCORE_WEIGHT;
use crate::{Result, RlhfError, ScalarHead};
use pt_model::{
    Architecture, CausalLm, ModelConfig, ModelError, PackedBatch, Pretrained, RunOptions, Sites, TensorSource,
};
use pt_peft::{Adapter, CONFIG_FILE, Method, MethodConfig, PeftError, TENSOR_FILE, load_adapter};
use pt_tensor::io::{SafetensorsReader, create_folder_atomically, save_safetensors, save_sharded, write_atomically};
use pt_tensor::{Device, Kind, Nf4Weight, Tensor, TensorError, no_grad};
use pt_train::data::{Encode, PromptGroup};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::path::Path;
use std::rc::Rc;

/// What `score.weight` comes to stand under where a GPT-2 checkpoint is read by its bare names.
const GPT2_SCORE_WEIGHT: &str = "transformer.score.weight";
const OUTPUT_WEIGHT: &str = "lm_head.weight";
/// PEFT's word for an adapter with a head beside it.
const SEQ_CLS: &str = "SEQ_CLS";
/// Names that PEFT gives such heads in `modules_to_save`; decoders have the first.
const HEAD_MODULES: [&str; 2] = ["score", "classifier"];
/// The file with the mean and the deviation of the scores.
pub const REWARD_FILE: &str = "reward.json";

/// Mean and standard deviation of many scores, in `reward.json` beside a reward model: `{"mean": -0.25, "std": 1.5,
/// "count": 1024}`, `std` that of a sample (with n − 1), `count` how many scores they are of.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScoreStatistics {
    /// Their mean.
    pub mean: f64,
    /// Their standard deviation.
    pub std: f64,
    /// How many they are.
    pub count: usize,
}

impl ScoreStatistics {
    /// Of scores; `None` of fewer than two.
    pub fn of(scores: &[f32]) -> Option<Self> {
        let count = scores.len();
        if count < 2 {
            return None;
        }
        let mean = scores.iter().map(|&score| f64::from(score)).sum::<f64>() / count as f64;
        let squares: f64 = scores.iter().map(|&score| (f64::from(score) - mean).powi(2)).sum();
        Some(Self { mean, std: (squares / (count - 1) as f64).sqrt(), count })
    }

    /// (score − mean) / std; a deviation of 0 leaves the difference.
    pub fn normalize(&self, score: f64) -> f64 {
        (score - self.mean) / if self.std > 0.0 { self.std } else { 1.0 }
    }

    /// Those kept in a folder; `None` where there are none.
    ///
    /// # Errors
    /// When the file cannot be read, is no JSON of this form, or holds no finite numbers.
    pub fn load(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(REWARD_FILE);
        if !path.exists() {
            return Ok(None);
        }
        let statistics: Self = serde_json::from_value(read_json(&path)?)
            .map_err(|source| ModelError::Json { path: path.clone(), source })?;
        let Self { mean, std, .. } = statistics;
        let mut faults = Vec::new();
        if !mean.is_finite() {
            faults.push(format!("mean is {mean}, expected a finite number"));
        }
        if !(std >= 0.0 && std.is_finite()) {
            faults.push(format!("std is {std}, expected at least 0"));
        }
        match faults.is_empty() {
            true => Ok(Some(statistics)),
            false => Err(RlhfError::Config { place: path.display().to_string(), faults }),
        }
    }

    fn save(&self, folder: &Path) -> Result<()> {
        write_json(&folder.join(REWARD_FILE), &json!({"mean": self.mean, "std": self.std, "count": self.count}))
    }
}

/// A checkpoint as the trunk of a reward model or a critic: without its output layer, which takes no memory so.
///
/// Its head, where it has one, is not among the trunk's tensors; [`RewardModel::of_pretrained`] reads it.
///
/// # Errors
/// [`ModelError::MissingTensor`] for a checkpoint that calls itself a sequence classifier and has no `score.weight`.
pub fn trunk_of(pretrained: Pretrained) -> Result<Pretrained> {
    let Pretrained { path, mut config, tokenizer, chat_template, tensors } = pretrained;
    // Tied, so that no output weight is looked for; `config.raw`, from which files are written, stays as it was.
    config.tie_word_embeddings = true;
    let tensors = Box::new(Trunk(tensors));
    if is_classifier(&config) && tensors.shape(SCORE_WEIGHT).is_none() {
        return Err(ModelError::MissingTensor { path, name: SCORE_WEIGHT.into(), near: None }.into());
    }
    Ok(Pretrained { path, config, tokenizer, chat_template, tensors })
}

/// Whether a checkpoint calls itself a sequence classifier.
fn is_classifier(config: &ModelConfig) -> bool {
    let class = config.raw.get("architectures").and_then(|classes| classes[0].as_str());
    class.is_some_and(|class| class.ends_with("ForSequenceClassification"))
}

/// A checkpoint's tensors but for its heads; the scalar head is there for who asks by name.
#[derive(Debug)]
struct Trunk(Box<dyn TensorSource>);

impl Trunk {
    /// The name that the checkpoint has a tensor by.
    fn stored<'a>(&self, name: &'a str) -> &'a str {
        if name == SCORE_WEIGHT && self.0.shape(name).is_none() { GPT2_SCORE_WEIGHT } else { name }
    }
}

impl TensorSource for Trunk {
    fn path(&self) -> &Path {
        self.0.path()
    }

    fn names(&self) -> Vec<String> {
        let mut names = self.0.names();
        names.retain(|name| ![SCORE_WEIGHT, GPT2_SCORE_WEIGHT, OUTPUT_WEIGHT].contains(&name.as_str()));
        names
    }

    fn shape(&self, name: &str) -> Option<Vec<i64>> {
        self.0.shape(self.stored(name))
    }

    fn num_bytes(&self, name: &str, kind: Kind) -> Option<usize> {
        self.0.num_bytes(self.stored(name), kind)
    }

    fn is_nf4(&self, name: &str) -> bool {
        self.0.is_nf4(name)
    }

    fn tensor(&self, name: &str, kind: Kind, device: Device) -> pt_model::Result<Tensor> {
        self.0.tensor(self.stored(name), kind, device)
    }

    fn nf4(&self, name: &str, kind: Kind, device: Device) -> pt_model::Result<Option<Nf4Weight>> {
        self.0.nf4(name, kind, device)
    }
}

/// A reward model over a trunk that it does not own: the model and what is switched on at its sites are handed to
/// [`scores`](Self::scores), so that policy, critic and reward model can be one base.
///
/// # Files
/// - A model folder of `transformers`: `LlamaForSequenceClassification` and its like with one label, whose tensors are
///   the trunk's and `score.weight`, `[1, hidden_size]`. [`trunk_of`] opens it, [`of_pretrained`](Self::of_pretrained)
///   reads the head, [`save_model`](Self::save_model) writes one.
/// - An adapter folder of PEFT with the task type `SEQ_CLS` and the head under `modules_to_save`
///   ([`load_adapter`](Self::load_adapter), [`save_adapter`](Self::save_adapter)).
///
/// Beside either, `reward.json` holds the [`ScoreStatistics`].
#[derive(Debug)]
pub struct RewardModel {
    /// The head.
    pub head: ScalarHead,
    /// What its scores are like, where that was measured.
    pub statistics: Option<ScoreStatistics>,
}

impl RewardModel {
    /// With this head, its scores not yet measured.
    pub fn new(head: ScalarHead) -> Self {
        Self { head, statistics: None }
    }

    /// The same reward model: both train one head.
    #[must_use]
    pub fn shared(&self) -> Self {
        Self { head: self.head.shared(), statistics: self.statistics }
    }

    /// A value head for a critic that begins as this model: a copy of the head in the units of normalized scores, which
    /// are what [`ModelScorer`](crate::ModelScorer) rewards. Their mean cannot be taken off, a head has no bias.
    ///
    /// # Errors
    /// As [`ScalarHead::from_tensor`].
    pub fn value_head(&self) -> Result<ScalarHead> {
        let deviation = self.statistics.map(|known| known.std).filter(|std| *std > 0.0).unwrap_or(1.0);
        ScalarHead::from_tensor(&no_grad(|| self.head.weight() / deviation))
    }

    /// Scores of a batch's completions, `[num_completions]`, f32: the head's at the last token of each.
    ///
    /// Which token that is follows from where the completion ends in the batch, never from token ids: `transformers`
    /// reads at the last id that is not the padding's, and so before the end of a turn that is used to pad.
    ///
    /// # Errors
    /// As [`CausalLm::hidden_states_at`], and for a model of another width.
    pub fn scores(
        &self,
        model: &CausalLm,
        sites: &Rc<dyn Sites>,
        batch: &PackedBatch,
        run: RunOptions,
    ) -> Result<Tensor> {
        self.check_fits(model)?;
        let last = &batch.last_positions;
        let positions = Tensor::from_slice(last).to_device(model.device());
        let prompts: Vec<usize> = last.iter().map(|&position| batch.prompt_of_token[position as usize]).collect();
        // [num_completions, hidden_size]
        let states = model.hidden_states_at(batch, (&positions, &prompts), sites, run)?;
        self.head.forward(&states)
    }

    /// That the head reads this model's states.
    ///
    /// # Errors
    /// [`RlhfError::Shape`] when it is of another width.
    pub fn check_fits(&self, model: &CausalLm) -> Result<()> {
        let hidden_size = model.config().hidden_size;
        if self.head.hidden_size() == hidden_size {
            return Ok(());
        }
        Err(RlhfError::shape(
            SCORE_WEIGHT,
            self.head.weight(),
            format!("[1, {hidden_size}], the model's hidden size; this head is another model's"),
        ))
    }

    /// The reward model that a checkpoint holds; `None` where it has no head. [`trunk_of`] opens its trunk.
    ///
    /// # Errors
    /// [`ModelError::Shape`] for a head of more than one label or another width; those of reading.
    pub fn of_pretrained(pretrained: &Pretrained, device: Device) -> Result<Option<Self>> {
        let tensors = pretrained.tensors.as_ref();
        let Some(name) = [SCORE_WEIGHT, GPT2_SCORE_WEIGHT].into_iter().find(|name| tensors.shape(name).is_some())
        else {
            return Ok(None);
        };
        let (found, expected) = (tensors.shape(name).unwrap_or_default(), vec![1, pretrained.config.hidden_size]);
        if found != expected {
            let path = pretrained.path.clone();
            return Err(ModelError::Shape { path, name: SCORE_WEIGHT.into(), found, expected }.into());
        }
        let head = ScalarHead::from_tensor(&tensors.tensor(name, Kind::Float, device)?)?;
        let folder = if pretrained.path.is_dir() { Some(&pretrained.path) } else { None };
        let statistics = folder.map(|folder| ScoreStatistics::load(folder)).transpose()?.flatten();
        Ok(Some(Self { head, statistics }))
    }

    /// Whether an adapter's folder holds a reward model.
    ///
    /// # Errors
    /// When its `adapter_config.json` cannot be read.
    pub fn is_adapter(folder: &Path) -> Result<bool> {
        Ok(read_json(&folder.join(CONFIG_FILE))?["task_type"] == SEQ_CLS)
    }

    /// Loads an adapter with its head, as PEFT or [`save_adapter`](Self::save_adapter) wrote them.
    ///
    /// # Errors
    /// Those of [`load_adapter`]; [`PeftError::NotAnAdapter`] for an adapter without a head, [`PeftError::Keys`] for a
    /// head that is missing or of another shape.
    pub fn load_adapter(folder: &Path, model: &CausalLm) -> Result<(Self, Rc<dyn Adapter>)> {
        let file = folder.join(TENSOR_FILE);
        if !folder.join(CONFIG_FILE).exists() || !file.exists() {
            // Says what there is instead.
            load_adapter(folder, model).map_err(peft)?;
        }
        let config = read_json(&folder.join(CONFIG_FILE))?;
        if config["task_type"] != SEQ_CLS {
            return Err(peft(PeftError::NotAnAdapter {
                path: folder.into(),
                reason: format!(
                    "its task_type is {}, expected \"{SEQ_CLS}\": it has no reward head",
                    config["task_type"]
                ),
                hint: "a reward model is trained by `pt reward`, or by PEFT with task_type \"SEQ_CLS\"".into(),
            }));
        }
        let reader = SafetensorsReader::open(&file)?;
        let name = head_name(&config);
        let expected = vec![1, model.config().hidden_size];
        let fault = match reader.shape(name) {
            None => Some((vec![name.to_string()], vec![])),
            Some(found) if found != expected => Some((vec![], vec![(name.to_string(), found.to_vec(), expected)])),
            Some(_) => None,
        };
        if let Some((missing, shapes)) = fault {
            return Err(peft(PeftError::Keys { path: file, missing, unexpected: vec![], shapes }));
        }
        let head = ScalarHead::from_tensor(&reader.tensor(name, model.device())?)?;

        let view = view_without_head(folder, config)?;
        let others = reader.names().filter(|other| *other != name);
        let tensors = others.map(|name| Ok::<_, RlhfError>((name.to_string(), reader.tensor(name, Device::Cpu)?)));
        save_safetensors(&view.path().join(TENSOR_FILE), &tensors.collect::<Result<Vec<_>>>()?, &[("format", "pt")])?;
        let adapter = load_adapter(view.path(), model).map_err(|error| peft(told_of(error, view.path(), folder)))?;
        Ok((Self { head, statistics: ScoreStatistics::load(folder)? }, adapter))
    }

    /// The settings of such an adapter, without its head's place among the `modules_to_save`.
    ///
    /// # Errors
    /// As [`MethodConfig::from_folder`].
    pub fn adapter_settings(folder: &Path) -> Result<MethodConfig> {
        let view = view_without_head(folder, read_json(&folder.join(CONFIG_FILE))?)?;
        MethodConfig::from_folder(view.path()).map_err(|error| peft(told_of(error, view.path(), folder)))
    }

    /// Writes an adapter with the head, as PEFT's `PeftModelForSequenceClassification` does: the task type `SEQ_CLS`,
    /// `score` among the `modules_to_save`, its weight among the adapter's tensors; and `reward.json` where the scores
    /// were measured. A new folder appears whole or not at all.
    ///
    /// # Errors
    /// [`RlhfError::Config`] for a method whose files have no place for a head; those of writing.
    pub fn save_adapter(&self, adapter: &dyn Adapter, folder: &Path) -> Result<()> {
        let fill = |folder: &Path| -> Result<()> {
            let has_card = folder.join("README.md").exists();
            adapter.save(folder).map_err(peft)?;
            self.add_head(folder)?;
            if !has_card {
                correct_card(&folder.join("README.md"))?;
            }
            self.save_statistics(folder)
        };
        if folder.exists() { fill(folder) } else { create_folder_atomically(folder, fill) }
    }

    /// Writes `reward.json`; without statistics, none of another model stays.
    fn save_statistics(&self, folder: &Path) -> Result<()> {
        let path = folder.join(REWARD_FILE);
        match self.statistics {
            Some(statistics) => statistics.save(folder),
            None if path.exists() => {
                Ok(std::fs::remove_file(&path).map_err(|source| TensorError::Write { path, source })?)
            }
            None => Ok(()),
        }
    }

    /// Puts the head into an adapter's files.
    fn add_head(&self, folder: &Path) -> Result<()> {
        let method = MethodConfig::from_folder(folder).map_err(peft)?;
        check_method(method.method())?;
        let path = folder.join(CONFIG_FILE);
        let mut config = read_json(&path)?;
        if let Value::Object(fields) = &mut config {
            fields.insert("task_type".into(), SEQ_CLS.into());
            let mut modules = fields.get("modules_to_save").and_then(Value::as_array).cloned().unwrap_or_default();
            modules.retain(|module| !is_head(module));
            modules.push(HEAD_MODULES[0].into());
            modules.sort_by_key(Value::to_string);
            fields.insert("modules_to_save".into(), modules.into());
            fields.sort_keys();
        }
        let file = folder.join(TENSOR_FILE);
        let mut tensors = Vec::new();
        {
            let reader = SafetensorsReader::open(&file)?;
            for name in reader.names() {
                // Off the mapped file, which is about to be replaced.
                tensors.push((name.to_string(), reader.tensor(name, Device::Cpu)?.copy()));
            }
        }
        tensors.push((head_name(&config).into(), self.head.weight().detach()));
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        save_safetensors(&file, &tensors, &[("format", "pt")])?;
        write_json(&path, &config)
    }

    /// Writes trunk and head as a model folder that `transformers` loads as `ForSequenceClassification`, with the
    /// tokenizer of `pretrained` (the trunk as [`trunk_of`] opened it) and `reward.json` where the scores were
    /// measured.
    ///
    /// `transformers` batches such a model only with a padding token, and reads before it; where the checkpoint names
    /// none, or one that ends a turn, another is named that never ends a completion.
    ///
    /// # Errors
    /// Those of writing, and for a model of another width.
    pub fn save_model(
        &self,
        model: &CausalLm,
        pretrained: &Pretrained,
        folder: &Path,
        max_shard_bytes: usize,
    ) -> Result<()> {
        self.check_fits(model)?;
        let mut tensors = model.named_parameters()?;
        tensors.retain(|(name, _)| name != OUTPUT_WEIGHT);
        let head = self.head.weight().detach().to_kind(model.kind());
        tensors.push((SCORE_WEIGHT.into(), head));
        let padding = padding_id(pretrained);
        let config = classifier_config(pretrained, model.kind(), padding);
        let fill = |folder: &Path| -> Result<()> {
            save_sharded(folder, &tensors, max_shard_bytes)?;
            write_json(&folder.join("config.json"), &Value::Object(config))?;
            if let Some(tokenizer) = &pretrained.tokenizer {
                tokenizer.save(folder)?;
                let path = folder.join("tokenizer_config.json");
                let mut settings = read_json(&path)?;
                if let Some(token) = padding.and_then(|id| tokenizer.id_to_token(id)) {
                    settings["pad_token"] = token.into();
                    write_json(&path, &settings)?;
                }
            }
            self.save_statistics(folder)
        };
        if folder.exists() { fill(folder) } else { create_folder_atomically(folder, fill) }
    }
}

/// That a method's files have a place for a head.
///
/// # Errors
/// [`RlhfError::Config`].
pub fn check_method(method: Method) -> Result<()> {
    match method {
        Method::Bottleneck | Method::BitDelta => Err(RlhfError::Config {
            place: "peft".into(),
            faults: vec![format!(
                "the method is {}, whose files have no place for a reward head, expected one in PEFT's format, as lora",
                method.name()
            )],
        }),
        _ => Ok(()),
    }
}

/// A completion without what a chat template writes after the end of the turn (a line break, say), so that a score is
/// read at the token with which a sampled answer ends.
///
/// Only white space is cut off, and only behind a token that ends a turn.
pub fn end_at_turn(group: &mut PromptGroup, encoder: &dyn Encode) {
    for completion in &mut group.completions {
        let is_stop = |id: &i64| encoder.stop_ids().contains(id);
        let Some(last) = completion.token_ids.iter().rposition(is_stop) else { continue };
        if encoder.decode(&completion.token_ids[last + 1..]).trim().is_empty() {
            completion.token_ids.truncate(last + 1);
            completion.is_label.truncate(last + 1);
        }
    }
}

/// Whether an entry of `modules_to_save` is a head's.
fn is_head(module: &Value) -> bool {
    module.as_str().is_some_and(|name| HEAD_MODULES.contains(&name))
}

/// The head's name among an adapter's tensors: PEFT wraps the model once more for methods that change its layers.
fn head_name(config: &Value) -> &'static str {
    match config["peft_type"].as_str() {
        Some("PROMPT_TUNING" | "PREFIX_TUNING") => "base_model.score.weight",
        _ => "base_model.model.score.weight",
    }
}

/// A folder with an adapter's settings but for its head: pt-peft knows nothing of heads, and is strict.
fn view_without_head(folder: &Path, mut config: Value) -> Result<tempfile::TempDir> {
    let view = tempfile::tempdir().map_err(|source| ModelError::Read { path: folder.into(), source })?;
    if let Some(Value::Array(modules)) = config.get_mut("modules_to_save") {
        modules.retain(|module| !is_head(module));
    }
    write_json(&view.path().join(CONFIG_FILE), &config)?;
    Ok(view)
}

/// The configuration of a checkpoint with one label, and weights of a kind.
fn classifier_config(pretrained: &Pretrained, kind: Kind, padding: Option<i64>) -> Map<String, Value> {
    let mut config = pretrained.config.raw.clone();
    let class = match pretrained.config.architecture {
        Architecture::Llama => "LlamaForSequenceClassification",
        Architecture::Mistral => "MistralForSequenceClassification",
        Architecture::Qwen2 => "Qwen2ForSequenceClassification",
        Architecture::Gpt2 => "GPT2ForSequenceClassification",
    };
    let dtype = match kind {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "float32",
    };
    // Transformers counts the labels by their names.
    for (key, value) in [
        ("architectures", json!([class])),
        ("id2label", json!({"0": "LABEL_0"})),
        ("label2id", json!({"LABEL_0": 0})),
        ("dtype", json!(dtype)),
    ] {
        config.insert(key.into(), value);
    }
    if let Some(id) = padding {
        config.insert("pad_token_id".into(), id.into());
    }
    // The weights are dense, whatever they were read from.
    for key in ["torch_dtype", "quantization_config", "num_labels"] {
        config.remove(key);
    }
    config
}

/// An id to pad with that no completion ends with: the checkpoint's own unless it ends a turn, the one that begins a
/// text, else the first special one.
fn padding_id(pretrained: &Pretrained) -> Option<i64> {
    let Pretrained { config, tokenizer, .. } = pretrained;
    let ends_a_turn = |id: &i64| {
        config.eos_token_ids.contains(id) || tokenizer.as_ref().is_some_and(|tokenizer| tokenizer.eos_ids.contains(id))
    };
    let special = |tokenizer: &pt_model::Tokenizer| {
        let ids = 0..config.vocab_size.min(tokenizer.vocab_size() as i64);
        ids.into_iter().find(|id| tokenizer.is_special(*id) && !ends_a_turn(id))
    };
    let named = [config.pad_token_id, config.bos_token_id].into_iter().flatten().find(|id| !ends_a_turn(id));
    named.or_else(|| tokenizer.as_ref().and_then(special)).or(config.pad_token_id)
}

/// The model card of an adapter says that it classifies.
fn correct_card(path: &Path) -> Result<()> {
    let text = std::fs::read_to_string(path).map_err(|source| ModelError::Read { path: path.into(), source })?;
    let text = text.replace("pipeline_tag: text-generation", "pipeline_tag: text-classification");
    let note = "\nA reward model: `score.weight` makes a completion's score of the hidden state at its last token, the \
                one that ends the turn.\n";
    Ok(write_atomically(path, |out| out.write_all(format!("{text}{note}").as_bytes()))?)
}

/// An error of the view of an adapter, told of the adapter's own folder.
fn told_of(mut error: PeftError, view: &Path, folder: &Path) -> PeftError {
    match &mut error {
        PeftError::Read { path, .. }
        | PeftError::Json { path, .. }
        | PeftError::NotAnAdapter { path, .. }
        | PeftError::Field { path, .. }
        | PeftError::Unsupported { path, .. }
        | PeftError::Keys { path, .. } => {
            if let Ok(rest) = path.strip_prefix(view) {
                *path = folder.join(rest);
            }
        }
        _ => {}
    }
    error
}

fn peft(error: PeftError) -> RlhfError {
    RlhfError::Train(error.into())
}

fn read_json(path: &Path) -> Result<Value> {
    let bytes = std::fs::read(path).map_err(|source| ModelError::Read { path: path.into(), source })?;
    Ok(serde_json::from_slice(&bytes).map_err(|source| ModelError::Json { path: path.into(), source })?)
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    Ok(write_atomically(path, |out| out.write_all(format!("{value:#}\n").as_bytes()))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_normalize_and_survive_their_file() {
        let statistics = ScoreStatistics::of(&[1.0, 2.0, 3.0, 6.0]).unwrap();
        assert_eq!((statistics.mean, statistics.count), (3.0, 4));
        assert!((statistics.std - (14.0f64 / 3.0).sqrt()).abs() < 1e-12);
        assert!((statistics.normalize(3.0 + statistics.std) - 1.0).abs() < 1e-12);
        assert_eq!(ScoreStatistics::of(&[1.0]), None);
        assert_eq!(ScoreStatistics { mean: 1.0, std: 0.0, count: 2 }.normalize(3.0), 2.0);
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(ScoreStatistics::load(folder.path()).unwrap(), None);
        statistics.save(folder.path()).unwrap();
        assert_eq!(ScoreStatistics::load(folder.path()).unwrap(), Some(statistics));
    }

    #[test]
    fn a_value_head_is_in_units_of_normalized_scores_and_a_copy() {
        let head = ScalarHead::new(3, 0, pt_tensor::Device::Cpu).unwrap();
        let weights = |head: &ScalarHead| Vec::<f32>::try_from(head.weight().detach().view([-1])).unwrap();
        let plain = RewardModel::new(head);
        assert_eq!(weights(&plain.value_head().unwrap()), weights(&plain.head));
        let statistics = Some(ScoreStatistics { mean: 5.0, std: 2.0, count: 9 });
        let model = RewardModel { statistics, ..plain };
        let halved: Vec<f32> = weights(&model.head).iter().map(|weight| weight / 2.0).collect();
        let value_head = model.value_head().unwrap();
        assert_eq!(weights(&value_head), halved);
        let _ = no_grad(|| value_head.weight().shallow_clone().zero_());
        assert_ne!(weights(&model.head), [0.0; 3]);
    }

    #[test]
    fn a_damaged_file_of_statistics_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(REWARD_FILE);
        std::fs::write(&path, r#"{"mean": 0.5, "std": -1.0, "count": 3}"#).unwrap();
        let error = ScoreStatistics::load(folder.path()).unwrap_err().to_string();
        assert!(error.ends_with("reward.json: std is -1, expected at least 0"), "{error}");
        std::fs::write(&path, r#"{"mean": 0.5}"#).unwrap();
        assert!(ScoreStatistics::load(folder.path()).unwrap_err().to_string().contains("reward.json"));
    }

    #[test]
    fn methods_without_a_place_for_a_head_are_refused() {
        check_method(Method::Lora).unwrap();
        let error = check_method(Method::Bottleneck).unwrap_err().to_string();
        assert!(error.starts_with("peft: the method is bottleneck"), "{error}");
    }
}
