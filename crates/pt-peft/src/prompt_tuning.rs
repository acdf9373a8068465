//! Prompt tuning: trained embeddings of virtual tokens before every sequence.

use crate::adapter::State;
use crate::config::{Fields, read_json};
use crate::files::{self, Card, Entry};
use crate::init::{normal, uniform};
use crate::virtual_tokens::{self, Sizes, TENSOR, check_keys, check_room, count_fault, peft_text, zeros};
use crate::{Adapter, PeftError, Result};
use pt_model::{CausalLm, Sites, Tokenizer, VirtualTokens};
use pt_tensor::{Kind, Tensor, no_grad};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::Path;

/// Where the embeddings of the virtual tokens start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PromptInit {
    /// Drawn from N(0, 1), as PEFT does it (the paper draws from ±0.5).
    Random,
    /// Embeddings of tokens drawn from the vocabulary.
    #[default]
    SampleVocab,
    /// Embeddings of the tokens of `init_text`, repeated or cut to `num_virtual_tokens`.
    Text,
}

/// Prompt tuning (Lester et al. 2021, <https://arxiv.org/abs/2104.08691>): the model reads \[P; X\] for the embeddings X
/// of a sequence, and only P is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PromptTuningConfig {
    /// Virtual tokens before every sequence, at least 1; they take room in the context.
    pub num_virtual_tokens: i64,
    /// Where they start: `random`, `sample_vocab`, or `text`.
    pub init: PromptInit,
    /// The text that `init: text` starts from, such as the task in words.
    pub init_text: Option<String>,
    /// Name of the tokenizer that cut `init_text`, kept in the file; null for the base model's.
    pub tokenizer_name_or_path: Option<String>,
    /// The base model's name or path, kept in the file for whoever loads it.
    pub base_model_name_or_path: Option<String>,
    /// The base model's revision, kept in the file.
    pub revision: Option<String>,
}

impl Default for PromptTuningConfig {
    /// 20 tokens of the vocabulary.
    fn default() -> Self {
        Self {
            num_virtual_tokens: 20,
            init: PromptInit::SampleVocab,
            init_text: None,
            tokenizer_name_or_path: None,
            base_model_name_or_path: None,
            revision: None,
        }
    }
}

impl PromptTuningConfig {
    /// Checks ranges and combinations.
    ///
    /// # Errors
    /// [`PeftError::Config`] with every fault.
    pub fn validate(&self) -> Result<()> {
        let mut faults: Vec<String> = count_fault(self.num_virtual_tokens).into_iter().collect();
        let text = self.init_text.as_deref().unwrap_or_default();
        if self.init == PromptInit::Text && text.trim().is_empty() {
            faults.push("`init` is `text` and `init_text` is empty, expected a text to start from".into());
        }
        if self.init != PromptInit::Text && !text.is_empty() {
            faults.push("`init_text` is set and `init` is not `text`, expected both or neither".into());
        }
        if faults.is_empty() { Ok(()) } else { Err(PeftError::Config { faults }) }
    }

    /// Reads PEFT's `adapter_config.json`; keys that PEFT leaves out get PEFT's defaults (`init: random`).
    ///
    /// # Errors
    /// [`PeftError::Read`], [`PeftError::Json`]; [`PeftError::Field`] for another `peft_type` or a value of a wrong
    /// kind; [`PeftError::Unsupported`] for modules that are trained whole; [`PeftError::Config`].
    pub fn from_peft_file(path: &Path) -> Result<Self> {
        Self::from_peft_json(path, &read_json(path)?)
    }

    fn from_peft_json(path: &Path, value: &Value) -> Result<Self> {
        let fields = Fields { path, value };
        fields.check_method("PROMPT_TUNING")?;
        check_keys(&fields)?;
        let words = "\"RANDOM\", \"SAMPLE_VOCAB\" or \"TEXT\"";
        let init = match fields.get::<String>("prompt_tuning_init", words)?.as_deref() {
            None | Some("RANDOM") => PromptInit::Random,
            Some("SAMPLE_VOCAB") => PromptInit::SampleVocab,
            Some("TEXT") => PromptInit::Text,
            Some(other) => return Err(fields.wrong("prompt_tuning_init", &json!(other), words)),
        };
        // PEFT keeps a text that it does not use.
        let init_text = fields.get("prompt_tuning_init_text", "a text")?.filter(|_| init == PromptInit::Text);
        let missing = || fields.wrong("num_virtual_tokens", &Value::Null, "a whole number");
        let config = Self {
            num_virtual_tokens: fields.get("num_virtual_tokens", "a whole number")?.ok_or_else(missing)?,
            init,
            init_text,
            tokenizer_name_or_path: fields.get("tokenizer_name_or_path", "a name or a path")?,
            base_model_name_or_path: fields.get("base_model_name_or_path", "a name or a path")?,
            revision: fields.get("revision", "a revision")?,
        };
        config.validate().map_err(|error| error.in_file(path))?;
        Ok(config)
    }

    /// The text of PEFT's `adapter_config.json` for a model.
    pub fn to_peft_text(&self, model: &CausalLm) -> String {
        self.text(sizes(model))
    }

    fn text(&self, sizes: Sizes) -> String {
        let tokenizer = self.tokenizer_name_or_path.as_ref().or(self.base_model_name_or_path.as_ref());
        // PEFT refuses a start from a text without the tokenizer's name: where none is known, the file leaves out how the
        // prompt started, which its values do not need.
        let is_text = self.init == PromptInit::Text && tokenizer.is_some();
        let own = json!({
            "base_model_name_or_path": self.base_model_name_or_path,
            "prompt_tuning_init": match self.init {
                PromptInit::SampleVocab => "SAMPLE_VOCAB",
                PromptInit::Text if is_text => "TEXT",
                PromptInit::Random | PromptInit::Text => "RANDOM",
            },
            "prompt_tuning_init_text": self.init_text.as_ref().filter(|_| is_text),
            "revision": self.revision,
            "tokenizer_kwargs": null,
            "tokenizer_name_or_path": if is_text { json!(tokenizer) } else { json!(self.tokenizer_name_or_path) },
        });
        peft_text("PROMPT_TUNING", self.num_virtual_tokens, sizes, own)
    }
}

fn sizes(model: &CausalLm) -> Sizes {
    let config = model.config();
    Sizes { token_dim: config.hidden_size, num_attention_heads: config.num_heads, num_layers: config.num_layers }
}

/// Prompt tuning of a model: P, `[num_virtual_tokens, hidden_size]`, an f32 leaf whatever the model computes in.
///
/// Virtual tokens run through the layers once a batch, however many sequences it has. New, it is not the bare model:
/// the model reads tokens that were not there.
#[derive(Debug)]
pub struct PromptTuningAdapter {
    config: PromptTuningConfig,
    sizes: Sizes,
    embeddings: Tensor,
    state: State,
}

impl PromptTuningAdapter {
    /// A new prompt for a model. `init: text` needs the model's tokenizer; text is encoded as PEFT does it, with the
    /// begin token where the tokenizer adds one.
    ///
    /// # Errors
    /// [`PeftError::Config`] for settings that cannot be, for `init: text` without a tokenizer and for a text without
    /// tokens; those of the tokenizer.
    pub fn new(config: PromptTuningConfig, model: &CausalLm, tokenizer: Option<&Tokenizer>, seed: u64) -> Result<Self> {
        config.validate()?;
        check_room(config.num_virtual_tokens, model)?;
        let (count, sizes) = (config.num_virtual_tokens, sizes(model));
        let embeddings = zeros(&[count, sizes.token_dim], model)?;
        let start = match config.init {
            PromptInit::Random => {
                let values = normal(seed, TENSOR, embeddings.numel(), 1.0, None);
                Tensor::from_slice(&values).view_as(&embeddings).to_device(model.device())
            }
            PromptInit::SampleVocab => {
                let vocab_size = model.config().vocab_size;
                let places = uniform(seed, "sample_vocab", count as usize, 0.5); // ±0.5
                let id = |place: f32| ((f64::from(place) + 0.5) * vocab_size as f64) as i64;
                rows_of(model, &places.into_iter().map(|place| id(place).min(vocab_size - 1)).collect::<Vec<_>>())?
            }
            PromptInit::Text => rows_of(model, &text_ids(&config, model, tokenizer)?)?,
        };
        no_grad(|| embeddings.shallow_clone().f_copy_(&start))?;
        Ok(Self { config, sizes, embeddings, state: State::new() })
    }

    /// Loads a prompt that PEFT or [`Adapter::save`] wrote.
    ///
    /// # Errors
    /// [`PeftError::NotAnAdapter`] for a folder without an adapter; those of [`PromptTuningConfig::from_peft_file`];
    /// [`PeftError::Keys`] with the difference; [`PeftError::Config`] when the model's context is too short for it.
    pub fn load(folder: &Path, model: &CausalLm) -> Result<Self> {
        files::check_folder(folder)?;
        let config = PromptTuningConfig::from_peft_file(&folder.join(files::CONFIG_FILE))?;
        let sizes = sizes(model);
        let embeddings = virtual_tokens::read(folder, config.num_virtual_tokens, sizes.token_dim, model)?;
        Ok(Self { config, sizes, embeddings, state: State::new() })
    }

    /// The settings.
    pub fn config(&self) -> &PromptTuningConfig {
        &self.config
    }
}

/// Embeddings of tokens, `[ids.len(), hidden_size]`, f32.
fn rows_of(model: &CausalLm, ids: &[i64]) -> Result<Tensor> {
    let ids = Tensor::from_slice(ids).to_device(model.device());
    Ok(no_grad(|| model.embedding().1.f_index_select(0, &ids))?.to_kind(Kind::Float))
}

/// The ids of the text, repeated and cut to the number of virtual tokens.
fn text_ids(config: &PromptTuningConfig, model: &CausalLm, tokenizer: Option<&Tokenizer>) -> Result<Vec<i64>> {
    let fault = |fault: String| PeftError::Config { faults: vec![fault] };
    let text = config.init_text.as_deref().unwrap_or_default();
    let tokenizer = tokenizer.ok_or_else(|| fault("`init` is `text`, and the model has no tokenizer".into()))?;
    let mut ids: Vec<i64> = tokenizer.bos_to_add().into_iter().collect();
    ids.extend(tokenizer.encode(text)?);
    if ids.is_empty() {
        return Err(fault(format!("`init_text` is {text:?}, expected a text with at least one token")));
    }
    let vocab_size = model.config().vocab_size;
    if let Some(id) = ids.iter().find(|id| !(0..vocab_size).contains(*id)) {
        return Err(fault(format!("`init_text` has token {id}, expected ids below the model's {vocab_size}")));
    }
    Ok(ids.into_iter().cycle().take(config.num_virtual_tokens as usize).collect())
}

impl Sites for PromptTuningAdapter {
    fn num_virtual_tokens(&self) -> usize {
        if self.state.is_live() { self.config.num_virtual_tokens as usize } else { 0 }
    }

    fn virtual_tokens(&self) -> pt_model::Result<Option<VirtualTokens>> {
        Ok(self.state.is_live().then(|| VirtualTokens::Embeddings(self.embeddings.shallow_clone())))
    }
}

impl Adapter for PromptTuningAdapter {
    fn parameters(&self) -> Vec<(String, Tensor)> {
        vec![(TENSOR.into(), self.embeddings.shallow_clone())]
    }

    fn set_enabled(&self, is_enabled: bool) {
        self.state.is_enabled.set(is_enabled);
    }

    fn replaced_parameters(&self) -> Vec<&str> {
        vec![TENSOR]
    }

    fn save(&self, folder: &Path) -> Result<()> {
        files::save(
            folder,
            &self.config.text(self.sizes),
            "",
            [Entry::new(TENSOR.into(), &self.embeddings)],
            &Card {
                base: self.config.base_model_name_or_path.as_deref(),
                tag: "prompt-tuning",
                title: "Prompt tuning",
                settings: format!("{} virtual tokens", self.config.num_virtual_tokens),
            },
        )
    }

    fn merge_into(&self, _model: &mut CausalLm) -> Result<()> {
        let reason = "its virtual tokens stand before every sequence and are no change of weights";
        Err(PeftError::NotMergeable { method: "prompt tuning", reason })
    }

    fn unmerge_from(&self, _model: &mut CausalLm) -> Result<()> {
        self.state.unmerge(&mut [])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: Sizes = Sizes { token_dim: 8, num_attention_heads: 2, num_layers: 3 };

    #[test]
    fn a_written_config_reads_as_the_same() {
        let config = PromptTuningConfig {
            num_virtual_tokens: 7,
            init: PromptInit::Text,
            init_text: Some("good or bad?".into()),
            tokenizer_name_or_path: Some("org/tokenizer".into()),
            base_model_name_or_path: Some("org/model".into()),
            revision: Some("main".into()),
        };
        for config in [config, PromptTuningConfig::default()] {
            let value: Value = serde_json::from_str(&config.text(SIZES)).unwrap();
            assert!(value.as_object().unwrap().keys().is_sorted(), "{value}");
            assert_eq!(PromptTuningConfig::from_peft_json(Path::new("a"), &value).unwrap(), config);
        }
    }

    #[test]
    fn a_start_from_a_text_is_written_only_with_a_tokenizers_name() {
        let text = |base: Option<&str>| {
            let config = PromptTuningConfig {
                init: PromptInit::Text,
                init_text: Some("good or bad?".into()),
                base_model_name_or_path: base.map(Into::into),
                ..Default::default()
            };
            serde_json::from_str::<Value>(&config.text(SIZES)).unwrap()
        };
        let with = text(Some("org/model"));
        assert_eq!(
            (&with["prompt_tuning_init"], &with["tokenizer_name_or_path"]),
            (&json!("TEXT"), &json!("org/model"))
        );
        let without = text(None);
        assert_eq!(without["prompt_tuning_init"], "RANDOM");
        assert!(without["tokenizer_name_or_path"].is_null() && without["prompt_tuning_init_text"].is_null());
    }

    #[test]
    fn faults_and_wrong_values_are_named() {
        let config = PromptTuningConfig { num_virtual_tokens: 0, init: PromptInit::Text, ..Default::default() };
        let text = config.validate().unwrap_err().to_string();
        assert!(text.contains("`num_virtual_tokens` is 0") && text.contains("`init_text` is empty"), "{text}");
        let read = |value: Value| PromptTuningConfig::from_peft_json(Path::new("a"), &value).unwrap_err().to_string();
        for (key, value, part) in [
            ("prompt_tuning_init", json!("NEAREST"), "`prompt_tuning_init` is \"NEAREST\""),
            ("num_transformer_submodules", json!(2), "`num_transformer_submodules` is 2, expected 1"),
            ("num_virtual_tokens", json!("five"), "`num_virtual_tokens` is \"five\""),
            ("num_virtual_tokens", json!(-3), "`num_virtual_tokens` is -3"),
            ("modules_to_save", json!(["lm_head"]), "`modules_to_save`"),
            ("peft_type", json!("LORA"), "expected \"PROMPT_TUNING\""),
        ] {
            let mut file = json!({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4});
            file[key] = value;
            let text = read(file);
            assert!(text.contains(part), "{text}");
        }
    }
}
