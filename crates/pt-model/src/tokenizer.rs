//! Text to token ids and back, from `tokenizer.json` or from GGUF metadata.
//!
//! [`Tokenizer::encode`] adds no special token: what the model sees is what the chat template or the caller wrote.
//! Plain text has no template; [`Tokenizer::bos_to_add`] is what its caller puts before it.
//! All ids come from the checkpoint; none is guessed from a token's spelling.

use crate::gguf::Metadata;
use crate::load::{read_json, read_json_if_there};
use crate::{ModelError, Result};
use pt_tensor::io::write_atomically;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// A tokenizer with the ids that end a text.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    bos_token: Option<String>,
    eos_token: Option<String>,
    bos_to_add: Option<i64>,
    /// Ids at which generation stops; the first is the checkpoint's own end-of-text or end-of-turn token.
    pub eos_ids: Vec<i64>,
    /// `tokenizer_config.json`, kept for export.
    config: Map<String, Value>,
    /// `generation_config.json`, kept for export.
    generation_config: Map<String, Value>,
    /// `chat_template.jinja`, kept for export.
    template_file: Option<String>,
}

/// How a byte-level BPE splits text before merging, by the name in `tokenizer.ggml.pre`.
struct PreTokenizer {
    names: &'static [&'static str],
    /// Apply NFC first.
    is_nfc: bool,
    /// Take a whole piece that stands in the vocabulary without merging up to it.
    ignore_merges: bool,
    /// Put the begin token before a text where the file does not say; as llama.cpp has it.
    adds_bos: bool,
    split: Split,
}

enum Split {
    /// GPT-2's pattern.
    Gpt2,
    /// Each digit by itself, then GPT-2's pattern.
    DigitsThenGpt2,
    /// A pattern of its own.
    Pattern(&'static str),
}

const PRE_TOKENIZERS: [PreTokenizer; 4] = [
    PreTokenizer {
        names: &["gpt-2", "gpt2", "phi-2", "olmo", "mpt"],
        is_nfc: false,
        ignore_merges: false,
        adds_bos: false,
        split: Split::Gpt2,
    },
    PreTokenizer {
        names: &["smollm", "starcoder", "refact", "codeshell"],
        is_nfc: false,
        ignore_merges: false,
        adds_bos: false,
        split: Split::DigitsThenGpt2,
    },
    PreTokenizer {
        names: &["qwen2", "deepseek-r1-qwen"],
        is_nfc: true,
        ignore_merges: false,
        adds_bos: false,
        split: Split::Pattern(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
    },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3"],
        is_nfc: false,
        ignore_merges: true,
        adds_bos: true,
        split: Split::Pattern(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
    },
];

impl Tokenizer {
    /// Reads `tokenizer.json` of a folder, and the special tokens from `tokenizer_config.json`,
    /// `generation_config.json` and `config.json` beside it, as far as they are there.
    ///
    /// # Errors
    /// [`ModelError::Read`], [`ModelError::Json`], [`ModelError::Tokenizer`] for a file that the `tokenizers` crate
    /// refuses, [`ModelError::Field`] for a special token that is not in the vocabulary.
    pub fn from_file(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|source| ModelError::Read { path: path.clone(), source })?;
        let config_path = folder.join("tokenizer_config.json");
        let mut tokenizer = Self::from_json(&path, &bytes, object_if_there(&config_path)?)?;
        tokenizer.generation_config = object_if_there(&folder.join("generation_config.json"))?;
        tokenizer.template_file = template_file(folder)?;
        for key in ["bos_token", "eos_token"] {
            let token = special_token(&config_path, &tokenizer.config, key)?;
            if let Some(token) = token.as_deref().filter(|token| tokenizer.token_to_id(token).is_none()) {
                return Err(ModelError::field(&config_path, key, token, "a token of tokenizer.json"));
            }
            match key {
                "bos_token" => tokenizer.bos_token = token,
                _ => tokenizer.eos_token = token,
            }
        }
        tokenizer.eos_ids.extend(tokenizer.eos_token.as_deref().and_then(|token| tokenizer.token_to_id(token)));
        // generation_config.json is what decides when generation stops; config.json is its older home.
        for name in ["generation_config.json", "config.json"] {
            let path = folder.join(name);
            let Some(json) = read_json_if_there(&path)? else { continue };
            let value = &json["eos_token_id"];
            if value.is_null() {
                continue;
            }
            for id in value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice) {
                let id = id.as_i64().filter(|&id| id >= 0);
                let id = id.ok_or_else(|| {
                    ModelError::field(&path, "eos_token_id", value.to_string(), "a token id or a list of them")
                })?;
                tokenizer.add_eos(id);
            }
            break;
        }
        // What the configuration says goes before what tokenizer.json does, as in transformers.
        match tokenizer.config.get("add_bos_token") {
            Some(Value::Bool(false)) => tokenizer.bos_to_add = None,
            Some(Value::Bool(true)) => {
                let bos = tokenizer.bos_token.as_deref().and_then(|token| tokenizer.token_to_id(token));
                tokenizer.bos_to_add = Some(bos.ok_or_else(|| {
                    ModelError::field(&config_path, "add_bos_token", "true", "a `bos_token` beside it, or false")
                })?);
            }
            _ => {}
        }
        Ok(tokenizer)
    }

    /// Builds the tokenizer that a GGUF file carries; `None` when it carries none.
    ///
    /// # Errors
    /// [`ModelError::Field`] and [`ModelError::MissingField`] for metadata that is wrong or missing, and for
    /// tokenizers other than byte-level BPE.
    pub fn from_gguf(path: &Path, metadata: &Metadata) -> Result<Option<Self>> {
        match metadata.text(path, "tokenizer.ggml.model")? {
            None => return Ok(None),
            Some("gpt2") => {}
            Some(other) => return Err(ModelError::field(path, "tokenizer.ggml.model", other, "gpt2 (byte-level BPE)")),
        }
        let key = "tokenizer.ggml.pre";
        let name = metadata.required_text(path, key)?;
        let pre_tokenizer = PRE_TOKENIZERS.iter().find(|pre| pre.names.contains(&name)).ok_or_else(|| {
            let known: Vec<&str> = PRE_TOKENIZERS.iter().flat_map(|pre| pre.names.iter().copied()).collect();
            ModelError::field(path, key, name, format!("one of {}", known.join(", ")))
        })?;
        let tokens = metadata.required_strings(path, "tokenizer.ggml.tokens")?;
        let mut json = tokenizer_json(path, metadata, tokens, pre_tokenizer)?;
        let special = |name: &str| -> Result<Option<(i64, String)>> {
            let key = format!("tokenizer.ggml.{name}_token_id");
            let Some(id) = metadata.token_id(path, &key)? else { return Ok(None) };
            let token = tokens.get(id as usize);
            let expected = format!("an id below {}", tokens.len());
            token
                .map(|token| Some((id, token.clone())))
                .ok_or_else(|| ModelError::field(path, key, id.to_string(), expected))
        };
        let (bos, eos, eot, padding) = (special("bos")?, special("eos")?, special("eot")?, special("padding")?);
        let mut config = Map::new();
        let adds_bos = metadata.flag(path, "tokenizer.ggml.add_bos_token")?.unwrap_or(pre_tokenizer.adds_bos);
        if let (true, Some((id, token))) = (adds_bos, &bos) {
            // In both places, so that whoever reads an exported folder adds it too.
            config.insert("add_bos_token".into(), true.into());
            json["post_processor"] = json!({"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                    {"SpecialToken": {"id": token, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}}});
        }
        let bytes = serde_json::to_vec(&json).map_err(|source| ModelError::Json { path: path.into(), source })?;
        for (key, token) in [("bos_token", &bos), ("eos_token", &eos), ("pad_token", &padding)] {
            if let Some((_, token)) = token {
                config.insert(key.into(), token.clone().into());
            }
        }
        if let Some(template) = metadata.text(path, "tokenizer.chat_template")? {
            config.insert("chat_template".into(), template.into());
        }
        config.insert("clean_up_tokenization_spaces".into(), false.into());
        config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        let mut tokenizer = Self::from_json(path, &bytes, config)?;
        for (id, _) in [&eos, &eot].into_iter().flatten() {
            tokenizer.add_eos(*id);
        }
        (tokenizer.bos_token, tokenizer.eos_token) = (bos.map(|(_, token)| token), eos.map(|(_, token)| token));
        Ok(Some(tokenizer))
    }

    fn from_json(path: &Path, json: &[u8], config: Map<String, Value>) -> Result<Self> {
        let refused = |error: tokenizers::Error| ModelError::Tokenizer { path: path.into(), reason: error.to_string() };
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(refused)?;
        // A file may carry the truncation and padding of the run that saved it.
        inner.with_truncation(None).map_err(refused)?;
        inner.with_padding(None);
        let processor = serde_json::to_value(inner.get_post_processor());
        let bos_to_add = leading_special(&processor.unwrap_or_default());
        Ok(Self {
            path: path.into(),
            inner,
            bos_token: None,
            eos_token: None,
            bos_to_add,
            eos_ids: vec![],
            config,
            generation_config: Map::new(),
            template_file: None,
        })
    }

    fn add_eos(&mut self, id: i64) {
        if !self.eos_ids.contains(&id) {
            self.eos_ids.push(id);
        }
    }

    /// Token ids of a text. No special token is added; one that is spelled out in the text becomes its id.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn encode(&self, text: &str) -> Result<Vec<i64>> {
        let encoding = self.inner.encode_fast(text, false).map_err(|error| self.failed(error))?;
        Ok(encoding.get_ids().iter().map(|&id| i64::from(id)).collect())
    }

    /// Text of token ids. Bytes that are not UTF-8, a character cut in two among them, become U+FFFD; ids without a
    /// token, padding rows of the embedding, give nothing.
    ///
    /// # Errors
    /// [`ModelError::Argument`] for an id that no tokenizer has, [`ModelError::Tokenizer`].
    pub fn decode(&self, token_ids: &[i64], skip_special: bool) -> Result<String> {
        let ids = token_ids.iter().map(|&id| u32::try_from(id)).collect::<std::result::Result<Vec<u32>, _>>();
        let ids = ids.map_err(|_| ModelError::Argument {
            what: "token_ids".into(),
            found: format!("{:?}", token_ids.iter().find(|id| u32::try_from(**id).is_err()).unwrap_or(&-1)),
            expected: "ids from 0".into(),
        })?;
        self.inner.decode(&ids, skip_special).map_err(|error| self.failed(error))
    }

    fn failed(&self, error: tokenizers::Error) -> ModelError {
        ModelError::Tokenizer { path: self.path.clone(), reason: error.to_string() }
    }

    /// Id of a token, special ones included.
    pub fn token_to_id(&self, token: &str) -> Option<i64> {
        self.inner.token_to_id(token).map(i64::from)
    }

    /// The token of an id, as it stands in the vocabulary.
    pub fn id_to_token(&self, id: i64) -> Option<String> {
        self.inner.id_to_token(u32::try_from(id).ok()?)
    }

    /// Whether an id is a special token: one that [`decode`](Self::decode) can skip.
    pub fn is_special(&self, id: i64) -> bool {
        let added = self.inner.get_added_tokens_decoder();
        u32::try_from(id).is_ok_and(|id| added.get(&id).is_some_and(|token| token.special))
    }

    /// Number of tokens, added ones included; the model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The begin-of-sequence token, if there is one.
    pub fn bos_token(&self) -> Option<&str> {
        self.bos_token.as_deref()
    }

    /// Id that stands before each plain text by the checkpoint's own rules, where it has such a rule: transformers
    /// adds it by default, [`encode`](Self::encode) leaves it to the caller. A chat template writes it out itself.
    pub fn bos_to_add(&self) -> Option<i64> {
        self.bos_to_add
    }

    /// The checkpoint's end token, if there is one.
    pub fn eos_token(&self) -> Option<&str> {
        self.eos_token.as_deref()
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json`, `generation_config.json` with the end ids, and the chat template
    /// (inside `tokenizer_config.json` or as `chat_template.jinja`, wherever it stood) to a folder, as transformers reads
    /// them.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`], or [`ModelError::Tensor`] for a file that cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let json = self.inner.to_string(true).map_err(|error| self.failed(error))?;
        write_atomically(&folder.join("tokenizer.json"), |out| out.write_all(json.as_bytes()))?;
        write_json(&folder.join("tokenizer_config.json"), &self.config)?;
        let mut generation_config = self.generation_config.clone();
        match self.eos_ids.as_slice() {
            [] => {}
            [id] => drop(generation_config.insert("eos_token_id".into(), (*id).into())),
            ids => drop(generation_config.insert("eos_token_id".into(), ids.into())),
        }
        if !generation_config.is_empty() {
            write_json(&folder.join("generation_config.json"), &generation_config)?;
        }
        if let Some(template) = &self.template_file {
            write_atomically(&folder.join(TEMPLATE_FILE), |out| out.write_all(template.as_bytes()))?;
        }
        Ok(())
    }
}

/// Where transformers keeps the chat template since its release 5; it goes before the one in `tokenizer_config.json`.
const TEMPLATE_FILE: &str = "chat_template.jinja";

/// The text of a folder's `chat_template.jinja`, if it has one.
pub(crate) fn template_file(folder: &Path) -> Result<Option<String>> {
    let path = folder.join(TEMPLATE_FILE);
    let read = || std::fs::read_to_string(&path).map_err(|source| ModelError::Read { path: path.clone(), source });
    path.exists().then(read).transpose()
}

/// The object of a JSON file; an empty one where there is no file.
fn object_if_there(path: &Path) -> Result<Map<String, Value>> {
    match read_json_if_there(path)? {
        None => Ok(Map::new()),
        Some(Value::Object(object)) => Ok(object),
        Some(other) => Err(ModelError::field(path, "content", other.to_string(), "a JSON object")),
    }
}

fn write_json(path: &Path, object: &Map<String, Value>) -> Result<()> {
    let text = serde_json::to_vec_pretty(object).map_err(|source| ModelError::Json { path: path.into(), source })?;
    Ok(write_atomically(path, |out| out.write_all(&text))?)
}

/// The special token that a post-processor of `tokenizer.json` puts before a text.
fn leading_special(processor: &Value) -> Option<i64> {
    match processor["type"].as_str()? {
        "TemplateProcessing" => {
            let token = processor["single"][0]["SpecialToken"]["id"].as_str()?;
            processor["special_tokens"][token]["ids"][0].as_i64()
        }
        "BertProcessing" | "RobertaProcessing" => processor["cls"][1].as_i64(),
        "Sequence" => processor["processors"].as_array()?.iter().find_map(leading_special),
        _ => None,
    }
}

/// A token of `tokenizer_config.json`: its text, or an object whose `content` is its text.
pub(crate) fn special_token(path: &Path, config: &Map<String, Value>, key: &str) -> Result<Option<String>> {
    let value = match config.get(key) {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Object(token)) => token.get("content").unwrap_or(&Value::Null),
        Some(value) => value,
    };
    let text = value.as_str().map(|text| Some(text.to_string()));
    text.ok_or_else(|| ModelError::field(path, key, value.to_string(), "a token, or an object with its content"))
}

/// What `tokenizer.json` holds for a byte-level BPE, from the lists of a GGUF file.
fn tokenizer_json(path: &Path, metadata: &Metadata, tokens: &[String], pre_tokenizer: &PreTokenizer) -> Result<Value> {
    /// Type of a token with a meaning of its own (`<|im_end|>`); never produced from plain text by merging.
    const CONTROL: i64 = 3;
    /// Type of a token that its maker added to the vocabulary as a piece of plain text.
    const USER_DEFINED: i64 = 4;

    let key = "tokenizer.ggml.token_type";
    let types = metadata.integers(path, key)?.unwrap_or_default();
    if !types.is_empty() && types.len() != tokens.len() {
        return Err(ModelError::field(
            path,
            key,
            format!("a list of {}", types.len()),
            format!("one type for each of {} tokens", tokens.len()),
        ));
    }
    let added = tokens.iter().zip(&types).enumerate().filter(|(_, (token, kind))| {
        // The crate refuses an empty added token; it could never be met in a text anyway.
        !token.is_empty() && matches!(**kind, CONTROL | USER_DEFINED)
    });
    let added: Vec<Value> = added
        .map(|(id, (token, kind))| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": *kind == CONTROL})
        })
        .collect();
    let vocab: Map<String, Value> = tokens.iter().enumerate().map(|(id, token)| (token.clone(), id.into())).collect();
    let key = "tokenizer.ggml.merges";
    let merges = metadata.required_strings(path, key)?.iter().map(|merge| match merge.split_once(' ') {
        Some((left, right))
            if vocab.contains_key(left)
                && vocab.contains_key(right)
                && vocab.contains_key(&format!("{left}{right}")) =>
        {
            Ok(json!([left, right]))
        }
        _ => Err(ModelError::field(
            path,
            key,
            format!("{merge:?}"),
            "two tokens that merge into a third, with a space between",
        )),
    });
    let merges: Vec<Value> = merges.collect::<Result<_>>()?;
    let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let split = match &pre_tokenizer.split {
        Split::Gpt2 => byte_level(true),
        Split::DigitsThenGpt2 => json!({"type": "Sequence", "pretokenizers":
            [{"type": "Digits", "individual_digits": true}, byte_level(true)]}),
        Split::Pattern(pattern) => json!({"type": "Sequence", "pretokenizers":
            [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false}, byte_level(false)]}),
    };
    let normalizer = if pre_tokenizer.is_nfc { json!({"type": "NFC"}) } else { Value::Null };
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": split,
        "post_processor": null,
        "decoder": byte_level(true),
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": pre_tokenizer.ignore_merges, "vocab": vocab, "merges": merges},
    }))
}

/// `chat_template` of a `tokenizer_config.json`: one template, or named ones of which `default` is meant.
pub(crate) fn template_of_config(folder: &Path) -> Result<(Option<String>, Option<String>, Option<String>)> {
    let path = folder.join("tokenizer_config.json");
    if !path.exists() {
        return Ok((None, None, None));
    }
    let json = read_json(&path)?;
    let empty = Map::new();
    let config = json.as_object().unwrap_or(&empty);
    let template = match config.get("chat_template") {
        None | Some(Value::Null) => None,
        Some(Value::String(template)) => Some(template.clone()),
        Some(Value::Array(named)) => {
            let default = named.iter().find(|entry| entry["name"] == "default");
            default.and_then(|entry| entry["template"].as_str()).map(str::to_string)
        }
        Some(other) => {
            return Err(ModelError::field(
                &path,
                "chat_template",
                other.to_string(),
                "a template, or a list of named ones",
            ));
        }
    };
    Ok((template, special_token(&path, config, "bos_token")?, special_token(&path, config, "eos_token")?))
}
