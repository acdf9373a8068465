//! One configuration for every decoder: read from a Hugging Face `config.json` or from GGUF metadata.

use crate::error::nearest;
use crate::gguf::Metadata;
use crate::{ModelError, Result};
use serde_json::{Map, Value, json};
use std::path::Path;

/// The decoder families that can be built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama and everything built like it, SmolLM among them: RMS norm, rotary positions, gated MLP.
    Llama,
    /// Llama with a sliding attention window in some releases.
    Mistral,
    /// Llama with biases on the query, key and value projections.
    Qwen2,
    /// Layer norm with bias, learned positions, plain MLP, `Conv1D` weights (stored `[in, out]`).
    Gpt2,
}

const MODEL_TYPES: [(&str, Architecture); 6] = [
    ("llama", Architecture::Llama),
    ("smollm", Architecture::Llama),
    ("smollm2", Architecture::Llama),
    ("mistral", Architecture::Mistral),
    ("qwen2", Architecture::Qwen2),
    ("gpt2", Architecture::Gpt2),
];

impl Architecture {
    /// `model_type` in `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Gpt2 => "gpt2",
        }
    }

    /// `architectures[0]` in `config.json`: the class that loads it in Python.
    pub fn class_name(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Gpt2 => "GPT2LMHeadModel",
        }
    }
}

/// The activation inside the MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x · sigmoid(x).
    Silu,
    /// Exact GELU (with erf).
    Gelu,
    /// GELU by its tanh approximation (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    /// max(x, 0).
    Relu,
}

/// How rotary frequencies are stretched for contexts longer than those of pre-training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Frequencies as they are.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The stretch, > 0.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a smooth ramp between.
    Llama3 {
        /// The stretch of the low frequencies, > 0.
        factor: f64,
        /// Wavelengths over `original_max_position_embeddings / low_freq_factor` tokens are stretched whole.
        low_freq_factor: f64,
        /// Wavelengths under `original_max_position_embeddings / high_freq_factor` tokens are kept.
        high_freq_factor: f64,
        /// Context of pre-training, in tokens.
        original_max_position_embeddings: f64,
    },
}

/// A decoder's shape and constants, by the names of `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Number of decoder layers.
    pub num_layers: i64,
    /// Number of query heads.
    pub num_heads: i64,
    /// Number of key and value heads; divides `num_heads`.
    pub num_kv_heads: i64,
    /// Width of a head.
    pub head_dim: i64,
    /// Width inside the MLP.
    pub intermediate_size: i64,
    /// Rows of the embedding; ids at or above the tokenizer's size are padding rows.
    pub vocab_size: i64,
    /// The longest context, in tokens.
    pub max_position_embeddings: i64,
    /// `rms_norm_eps`, or `layer_norm_epsilon` for GPT-2.
    pub norm_eps: f64,
    /// Base of the rotary frequencies; not used by GPT-2.
    pub rope_theta: f64,
    /// Stretch of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Whether the output weight is the embedding.
    pub tie_word_embeddings: bool,
    /// Bias on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub attention_output_bias: bool,
    /// Bias on the MLP's projections.
    pub mlp_bias: bool,
    /// Activation of the MLP.
    pub hidden_act: Activation,
    /// A token sees at most this many tokens, itself included; `None` for all. Without effect while the
    /// context is no longer than the window.
    pub sliding_window: Option<i64>,
    /// Begin-of-sequence id, if the model has one.
    pub bos_token_id: Option<i64>,
    /// End-of-sequence ids, from `config.json`; generation stops at those of the tokenizer too.
    pub eos_token_ids: Vec<i64>,
    /// Padding id, if the model has one.
    pub pad_token_id: Option<i64>,
    /// Kind that the weights were published in, `float32` say.
    pub torch_dtype: Option<String>,
    /// The whole `config.json`, kept for export; built from the metadata for a GGUF file.
    pub raw: Map<String, Value>,
}

/// Typed reads of one JSON object, with errors that name file and key.
struct Fields<'a> {
    path: &'a Path,
    /// Put before a key in messages, `rope_scaling.` say.
    prefix: &'a str,
    object: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The value under the first of `names` that is present and not null.
    fn get(&self, names: &[&'static str]) -> Option<(&'static str, &'a Value)> {
        names.iter().find_map(|&name| self.object.get(name).filter(|value| !value.is_null()).map(|value| (name, value)))
    }

    fn wrong(&self, name: &str, value: &Value, expected: &str) -> ModelError {
        ModelError::field(self.path, format!("{}{name}", self.prefix), value.to_string(), expected)
    }

    fn missing(&self, names: &[&'static str], expected: &str) -> ModelError {
        ModelError::MissingField {
            path: self.path.into(),
            field: format!("{}{}", self.prefix, names.join("` or `")),
            expected: expected.into(),
            near: names.iter().find_map(|name| nearest(name, self.object.keys().map(String::as_str))),
        }
    }

    fn size(&self, names: &[&'static str]) -> Result<Option<i64>> {
        let expected = "a whole number from 1 to 2147483647";
        let Some((name, value)) = self.get(names) else { return Ok(None) };
        let size = value.as_i64().filter(|&size| size > 0 && size <= i64::from(i32::MAX));
        size.map(Some).ok_or_else(|| self.wrong(name, value, expected))
    }

    fn required_size(&self, names: &[&'static str]) -> Result<i64> {
        self.size(names)?.ok_or_else(|| self.missing(names, "a whole number from 1"))
    }

    fn positive(&self, names: &[&'static str]) -> Result<Option<f64>> {
        let Some((name, value)) = self.get(names) else { return Ok(None) };
        let number = value.as_f64().filter(|&number| number > 0.0 && number.is_finite());
        number.map(Some).ok_or_else(|| self.wrong(name, value, "a number above 0"))
    }

    fn required_positive(&self, names: &[&'static str]) -> Result<f64> {
        self.positive(names)?.ok_or_else(|| self.missing(names, "a number above 0"))
    }

    fn flag(&self, name: &'static str, default: bool) -> Result<bool> {
        let Some((name, value)) = self.get(&[name]) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.wrong(name, value, "true or false"))
    }

    fn text(&self, names: &[&'static str]) -> Result<Option<&'a str>> {
        let Some((name, value)) = self.get(names) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(name, value, "a string"))
    }

    /// One id or a list of ids.
    fn ids(&self, name: &'static str) -> Result<Vec<i64>> {
        let Some((name, value)) = self.get(&[name]) else { return Ok(vec![]) };
        let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        let ids: Option<Vec<i64>> = list.iter().map(|id| id.as_i64().filter(|&id| id >= 0)).collect();
        ids.ok_or_else(|| self.wrong(name, value, "a token id or a list of token ids"))
    }
}

impl ModelConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// [`ModelError::Read`], [`ModelError::Json`], and those of [`from_json`](Self::from_json).
    pub fn from_file(path: &Path) -> Result<Self> {
        Self::from_json(path, crate::load::read_json(path)?)
    }

    /// Takes the content of a `config.json`; `path` stands in errors only.
    ///
    /// # Errors
    /// [`ModelError::MissingField`], [`ModelError::Field`], [`ModelError::UnknownArchitecture`].
    pub fn from_json(path: &Path, raw: Value) -> Result<Self> {
        let raw = match raw {
            Value::Object(raw) => raw,
            other => return Err(ModelError::field(path, "config", other.to_string(), "a JSON object")),
        };
        let fields = Fields { path, prefix: "", object: &raw };
        let model_type = fields
            .text(&["model_type"])?
            .ok_or_else(|| fields.missing(&["model_type"], "the name of an architecture"))?;
        let architecture = architecture_of(path, "model_type", model_type)?;
        let config = match architecture {
            Architecture::Gpt2 => Self::gpt2(&fields)?,
            _ => Self::llama_family(&fields, architecture)?,
        };
        let config = Self { raw, ..config };
        config.validate(path)?;
        Ok(config)
    }

    fn llama_family(fields: &Fields<'_>, architecture: Architecture) -> Result<Self> {
        let hidden_size = fields.required_size(&["hidden_size"])?;
        let num_heads = fields.required_size(&["num_attention_heads"])?;
        let head_dim = match fields.size(&["head_dim"])? {
            Some(head_dim) => head_dim,
            None if hidden_size % num_heads == 0 => hidden_size / num_heads,
            None => {
                let expected = format!("a divisor of hidden_size {hidden_size}, or a head_dim beside it");
                return Err(ModelError::field(fields.path, "num_attention_heads", num_heads.to_string(), expected));
            }
        };
        let is_qwen2 = architecture == Architecture::Qwen2;
        // Mistral has a window unless it says null; Qwen2 has one only where it says so, and then from a given layer on.
        let sliding_window = match architecture {
            Architecture::Mistral if !fields.object.contains_key("sliding_window") => Some(4096),
            Architecture::Mistral => fields.size(&["sliding_window"])?,
            Architecture::Qwen2 if fields.flag("use_sliding_window", false)? => {
                return Err(ModelError::field(
                    fields.path,
                    "use_sliding_window",
                    "true",
                    "false: windows per layer are not supported",
                ));
            }
            _ => None,
        };
        let (rope_theta, rope_scaling) = rope(fields)?;
        let attention_bias = !is_qwen2 && fields.flag("attention_bias", false)?;
        Ok(Self {
            architecture,
            hidden_size,
            num_layers: fields.required_size(&["num_hidden_layers"])?,
            num_heads,
            num_kv_heads: match architecture {
                // Older Llama files leave it out; the other families default to numbers of their own.
                Architecture::Llama => fields.size(&["num_key_value_heads"])?.unwrap_or(num_heads),
                _ => fields.required_size(&["num_key_value_heads"])?,
            },
            head_dim,
            intermediate_size: fields.required_size(&["intermediate_size"])?,
            vocab_size: fields.required_size(&["vocab_size"])?,
            max_position_embeddings: fields.required_size(&["max_position_embeddings"])?,
            norm_eps: fields.required_positive(&["rms_norm_eps"])?,
            rope_theta,
            rope_scaling,
            tie_word_embeddings: fields.flag("tie_word_embeddings", false)?,
            qkv_bias: is_qwen2 || attention_bias,
            attention_output_bias: attention_bias,
            mlp_bias: fields.flag("mlp_bias", false)?,
            hidden_act: activation(fields, &["hidden_act"], Activation::Silu)?,
            sliding_window,
            bos_token_id: fields.ids("bos_token_id")?.first().copied(),
            eos_token_ids: fields.ids("eos_token_id")?,
            pad_token_id: fields.ids("pad_token_id")?.first().copied(),
            torch_dtype: fields.text(&["dtype", "torch_dtype"])?.map(str::to_string),
            raw: Map::new(),
        })
    }

    fn gpt2(fields: &Fields<'_>) -> Result<Self> {
        let hidden_size = fields.required_size(&["n_embd", "hidden_size"])?;
        let num_heads = fields.required_size(&["n_head", "num_attention_heads"])?;
        for name in ["scale_attn_by_inverse_layer_idx", "add_cross_attention"] {
            if fields.flag(name, false)? {
                return Err(ModelError::field(fields.path, name, "true", "false"));
            }
        }
        if !fields.flag("scale_attn_weights", true)? {
            return Err(ModelError::field(fields.path, "scale_attn_weights", "false", "true"));
        }
        if hidden_size % num_heads != 0 {
            let expected = format!("a divisor of n_embd {hidden_size}");
            return Err(ModelError::field(fields.path, "n_head", num_heads.to_string(), expected));
        }
        Ok(Self {
            architecture: Architecture::Gpt2,
            hidden_size,
            num_layers: fields.required_size(&["n_layer", "num_hidden_layers"])?,
            num_heads,
            num_kv_heads: num_heads,
            head_dim: hidden_size / num_heads,
            intermediate_size: fields.size(&["n_inner"])?.unwrap_or(4 * hidden_size),
            vocab_size: fields.required_size(&["vocab_size"])?,
            max_position_embeddings: fields.required_size(&["n_positions", "n_ctx"])?,
            norm_eps: fields.positive(&["layer_norm_epsilon"])?.unwrap_or(1e-5),
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            tie_word_embeddings: fields.flag("tie_word_embeddings", true)?,
            qkv_bias: true,
            attention_output_bias: true,
            mlp_bias: true,
            hidden_act: activation(fields, &["activation_function"], Activation::GeluTanh)?,
            sliding_window: None,
            bos_token_id: fields.ids("bos_token_id")?.first().copied(),
            eos_token_ids: fields.ids("eos_token_id")?,
            pad_token_id: fields.ids("pad_token_id")?.first().copied(),
            torch_dtype: fields.text(&["dtype", "torch_dtype"])?.map(str::to_string),
            raw: Map::new(),
        })
    }

    /// Takes the metadata of a GGUF file. The file tells by its tensors, not its metadata, whether the output
    /// weight is tied and how many rows the embedding has, so both come as arguments.
    ///
    /// # Errors
    /// As [`from_json`](Self::from_json), with the metadata's own keys.
    pub fn from_gguf(path: &Path, metadata: &Metadata, tie_word_embeddings: bool, vocab_size: i64) -> Result<Self> {
        let name = metadata.required_text(path, "general.architecture")?;
        let architecture = match name {
            "llama" | "qwen2" | "gpt2" => architecture_of(path, "general.architecture", name)?,
            other => {
                let known: Vec<String> = ["llama", "qwen2", "gpt2"].map(String::from).to_vec();
                let near = nearest(other, known.iter().map(String::as_str));
                let (path, field) = (path.into(), "general.architecture".into());
                return Err(ModelError::UnknownArchitecture { path, field, found: other.into(), known, near });
            }
        };
        let key = |tail: &str| format!("{name}.{tail}");
        let size = |tail: &str| metadata.required_size(path, &key(tail));
        let num_heads = size("attention.head_count")?;
        let hidden_size = size("embedding_length")?;
        let mut raw = json!({
            "architectures": [architecture.class_name()],
            "model_type": architecture.model_type(),
            "vocab_size": vocab_size,
            "tie_word_embeddings": tie_word_embeddings,
            "torch_dtype": "float32",
        });
        let mut set = |name: &str, value: Value| raw[name] = value;
        if architecture == Architecture::Gpt2 {
            set("n_embd", hidden_size.into());
            set("n_head", num_heads.into());
            set("n_layer", size("block_count")?.into());
            set("n_inner", size("feed_forward_length")?.into());
            set("n_positions", size("context_length")?.into());
            set("layer_norm_epsilon", metadata.required_number(path, &key("attention.layer_norm_epsilon"))?.into());
            set("activation_function", "gelu_new".into());
        } else {
            set("hidden_size", hidden_size.into());
            set("num_attention_heads", num_heads.into());
            set("num_hidden_layers", size("block_count")?.into());
            set("intermediate_size", size("feed_forward_length")?.into());
            set("max_position_embeddings", size("context_length")?.into());
            set(
                "num_key_value_heads",
                metadata.size(path, &key("attention.head_count_kv"))?.unwrap_or(num_heads).into(),
            );
            set("rms_norm_eps", metadata.required_number(path, &key("attention.layer_norm_rms_epsilon"))?.into());
            set("rope_theta", metadata.number(path, &key("rope.freq_base"))?.unwrap_or(10_000.0).into());
            set("hidden_act", "silu".into());
            if let Some(head_dim) = metadata
                .size(path, &key("attention.key_length"))?
                .or(metadata.size(path, &key("rope.dimension_count"))?)
            {
                set("head_dim", head_dim.into());
            }
            if let Some(kind) = metadata.text(path, &key("rope.scaling.type"))?.filter(|&kind| kind != "none") {
                let factor = metadata.required_number(path, &key("rope.scaling.factor"))?;
                set("rope_scaling", json!({"rope_type": kind, "factor": factor}));
            }
        }
        for (name, key) in [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")] {
            if let Some(id) = metadata.token_id(path, &format!("tokenizer.ggml.{key}_token_id"))? {
                set(name, id.into());
            }
        }
        Self::from_json(path, raw)
    }

    fn validate(&self, path: &Path) -> Result<()> {
        if self.num_heads % self.num_kv_heads != 0 {
            let expected = format!("a divisor of num_attention_heads {}", self.num_heads);
            return Err(ModelError::field(path, "num_key_value_heads", self.num_kv_heads.to_string(), expected));
        }
        if self.architecture != Architecture::Gpt2 && self.head_dim % 2 != 0 {
            return Err(ModelError::field(
                path,
                "head_dim",
                self.head_dim.to_string(),
                "an even number (rotary pairs)",
            ));
        }
        Ok(())
    }
}

fn architecture_of(path: &Path, field: &str, name: &str) -> Result<Architecture> {
    let found = MODEL_TYPES.iter().find(|(known, _)| *known == name);
    found.map(|(_, architecture)| *architecture).ok_or_else(|| ModelError::UnknownArchitecture {
        path: path.into(),
        field: field.into(),
        found: name.into(),
        known: ["llama", "mistral", "qwen2", "gpt2"].map(String::from).to_vec(),
        near: nearest(name, MODEL_TYPES.iter().map(|(known, _)| *known)),
    })
}

fn activation(fields: &Fields<'_>, names: &[&'static str], default: Activation) -> Result<Activation> {
    Ok(match fields.text(names)? {
        None => default,
        Some("silu" | "swish") => Activation::Silu,
        Some("gelu") => Activation::Gelu,
        Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_fast") => Activation::GeluTanh,
        Some("relu") => Activation::Relu,
        Some(other) => {
            return Err(ModelError::field(
                fields.path,
                names[0],
                other,
                "silu, gelu, gelu_new, gelu_pytorch_tanh or relu",
            ));
        }
    })
}

/// Base and stretch of the rotary frequencies. Transformers 5 writes both in `rope_parameters`, transformers 4
/// the base as `rope_theta` and the stretch in `rope_scaling`, whose kind was once called `type`.
fn rope(fields: &Fields<'_>) -> Result<(f64, RopeScaling)> {
    let Some((name, value)) = fields.get(&["rope_parameters", "rope_scaling"]) else {
        return Ok((fields.positive(&["rope_theta"])?.unwrap_or(10_000.0), RopeScaling::None));
    };
    let object = value.as_object().ok_or_else(|| fields.wrong(name, value, "an object"))?;
    let prefix = format!("{name}.");
    let inner = Fields { path: fields.path, prefix: &prefix, object };
    let theta = match inner.positive(&["rope_theta"])? {
        Some(theta) => theta,
        None => fields.positive(&["rope_theta"])?.unwrap_or(10_000.0),
    };
    let scaling = match inner.text(&["rope_type", "type"])? {
        None | Some("default") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear { factor: inner.required_positive(&["factor"])? },
        Some("llama3") => RopeScaling::Llama3 {
            factor: inner.required_positive(&["factor"])?,
            low_freq_factor: inner.required_positive(&["low_freq_factor"])?,
            high_freq_factor: inner.required_positive(&["high_freq_factor"])?,
            original_max_position_embeddings: inner.required_positive(&["original_max_position_embeddings"])?,
        },
        Some(other) => {
            return Err(ModelError::field(
                fields.path,
                format!("{name}.rope_type"),
                other,
                "default, linear or llama3",
            ));
        }
    };
    Ok((theta, scaling))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama() -> Value {
        json!({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
            "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5, "eos_token_id": [2, 7]})
    }

    fn read(config: Value) -> Result<ModelConfig> {
        ModelConfig::from_json(Path::new("m/config.json"), config)
    }

    fn with(key: &str, value: Value) -> Value {
        let mut config = llama();
        config[key] = value;
        config
    }

    #[test]
    fn a_llama_config_is_read_with_the_defaults_of_transformers() {
        let config = read(llama()).unwrap();
        assert_eq!((config.head_dim, config.num_kv_heads, config.rope_theta), (16, 2, 10_000.0));
        assert_eq!(config.eos_token_ids, [2, 7]);
        assert!(!config.tie_word_embeddings && !config.qkv_bias);
        assert_eq!(config.raw["vocab_size"], 100);
    }

    #[test]
    fn both_spellings_of_the_rotary_parameters_mean_the_same() {
        let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192});
        let mut old = with("rope_scaling", llama3.clone());
        old["rope_theta"] = json!(500_000.0);
        let mut parameters = llama3;
        parameters["rope_theta"] = json!(500_000.0);
        let (old, new) = (read(old).unwrap(), read(with("rope_parameters", parameters)).unwrap());
        assert_eq!((old.rope_theta, old.rope_scaling), (new.rope_theta, new.rope_scaling));
        assert_eq!(old.rope_theta, 500_000.0);
    }

    #[test]
    fn qwen2_has_biases_on_query_key_and_value_only() {
        let config = read(with("model_type", json!("qwen2"))).unwrap();
        assert!(config.qkv_bias && !config.attention_output_bias && !config.mlp_bias);
    }

    #[test]
    fn gpt2_reads_its_own_names() {
        let config = read(
            json!({"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 50}),
        );
        let config = config.unwrap();
        assert_eq!((config.intermediate_size, config.head_dim, config.hidden_act), (128, 8, Activation::GeluTanh));
        assert!(config.tie_word_embeddings);
    }

    #[test]
    fn a_bad_config_is_named_by_file_key_and_value() {
        let check = |config: Value, part: &str| {
            let error = read(config).unwrap_err();
            let text = format!("{error} {}", error.hint().unwrap_or_default());
            assert!(text.contains("m/config.json") && text.contains(part), "{text}");
        };
        let mut renamed = llama();
        renamed["hidden_sizes"] = renamed["hidden_size"].take();
        renamed.as_object_mut().unwrap().remove("hidden_size");
        check(renamed, "did you mean `hidden_sizes`");
        check(with("hidden_size", json!("64")), "`hidden_size` is \"64\"");
        check(with("hidden_size", json!(-1)), "`hidden_size` is -1");
        check(with("hidden_size", json!(u64::MAX)), "`hidden_size`");
        check(with("num_key_value_heads", json!(3)), "a divisor of num_attention_heads 4");
        check(with("num_attention_heads", json!(5)), "num_attention_heads");
        check(with("model_type", json!("lama")), "did you mean `llama`");
        check(with("model_type", json!("bert")), "`bert`, expected one of llama");
        check(with("rope_scaling", json!({"rope_type": "yarn", "factor": 2})), "`rope_scaling.rope_type` is yarn");
        check(with("rope_scaling", json!({"type": "linear"})), "`rope_scaling.factor` is missing");
        check(with("hidden_act", json!("tanh")), "`hidden_act` is tanh");
        check(json!([1]), "JSON object");
    }
}
