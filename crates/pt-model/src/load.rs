//! Opens a checkpoint: a Hugging Face folder or a `.gguf` file, with its configuration, tokenizer, chat template and
//! tensors under the names of the Hugging Face checkpoint.

use crate::chat_template::ChatTemplate;
use crate::config::{Architecture, ModelConfig};
use crate::error::nearest;
use crate::gguf::{Gguf, Layout, Placement, deinterleave_heads, placement};
use crate::tokenizer::Tokenizer;
use crate::{ModelError, Result};
use pt_tensor::io::SafetensorsReader;
use pt_tensor::{Device, Kind, Nf4Weight, Tensor, TensorError, Weight};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::path::{Path, PathBuf};

/// Tensors by the names of a Hugging Face checkpoint, read when asked for.
pub trait TensorSource: Debug + Send + Sync {
    /// The folder or file that the tensors come from, for messages.
    fn path(&self) -> &Path;

    /// All names, sorted.
    fn names(&self) -> Vec<String>;

    /// Shape of a tensor, or `None` when it is not there.
    fn shape(&self, name: &str) -> Option<Vec<i64>>;

    /// Bytes that a tensor takes once it is loaded to compute in `kind`, or `None` when it is not there. Nothing is decoded.
    fn num_bytes(&self, name: &str, kind: Kind) -> Option<usize> {
        let shape = self.shape(name)?;
        Some(shape.iter().product::<i64>() as usize * kind.elt_size_in_bytes())
    }

    /// Whether a tensor is stored in 4 bits.
    fn is_nf4(&self, _name: &str) -> bool {
        false
    }

    /// A tensor, converted to `kind`, on `device`.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`], or that of reading it.
    fn tensor(&self, name: &str, kind: Kind, device: Device) -> Result<Tensor>;

    /// A weight that is stored in 4 bits, `[out_features, in_features]`, to compute in `kind`; `None` when it is stored otherwise.
    /// [`tensor`](Self::tensor) gives such a weight dequantized.
    ///
    /// # Errors
    /// That of reading it.
    fn nf4(&self, _name: &str, _kind: Kind, _device: Device) -> Result<Option<Nf4Weight>> {
        Ok(None)
    }
}

/// An opened checkpoint. No weight has been read yet.
#[derive(Debug)]
pub struct Pretrained {
    /// The folder or file.
    pub path: PathBuf,
    /// Shape and constants of the model.
    pub config: ModelConfig,
    /// The tokenizer, where the checkpoint has one.
    pub tokenizer: Option<Tokenizer>,
    /// The chat template, where the checkpoint has one.
    pub chat_template: Option<ChatTemplate>,
    /// The weights.
    pub tensors: Box<dyn TensorSource>,
}

impl Pretrained {
    /// Opens a Hugging Face folder or a `.gguf` file.
    ///
    /// # Errors
    /// [`ModelError::NotAModel`] for a path that is neither, [`ModelError::Read`] for a file (a missing shard, say)
    /// that cannot be read, and those of the parts.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if path.is_dir() {
            return Self::open_folder(path);
        }
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            return Self::open_gguf(path);
        }
        match std::fs::metadata(path) {
            Err(source) => Err(ModelError::Read { path: path.into(), source }),
            Ok(_) => {
                Err(ModelError::NotAModel { path: path.into(), reason: "neither a folder nor a .gguf file".into() })
            }
        }
    }

    fn open_folder(path: &Path) -> Result<Self> {
        if !path.join("config.json").exists() {
            return Err(ModelError::NotAModel { path: path.into(), reason: "the folder has no config.json".into() });
        }
        let config = ModelConfig::from_file(&path.join("config.json"))?;
        refuse_other_quantization(path, &config)?;
        let tokenizer = path.join("tokenizer.json").exists().then(|| Tokenizer::from_file(path)).transpose()?;
        let chat_template = ChatTemplate::from_folder(path)?;
        let tensors = Box::new(FolderTensors::open(path, &config)?);
        Ok(Self { path: path.into(), config, tokenizer, chat_template, tensors })
    }

    fn open_gguf(path: &Path) -> Result<Self> {
        let gguf = Gguf::open(path)?;
        let vocab_size = gguf.info("token_embd.weight")?.shape[0];
        let is_tied = !gguf.tensors().contains_key("output.weight");
        let config = ModelConfig::from_gguf(path, gguf.metadata(), is_tied, vocab_size)?;
        let tokenizer = Tokenizer::from_gguf(path, gguf.metadata())?;
        let chat_template = match gguf.metadata().text(path, "tokenizer.chat_template")? {
            Some(source) => {
                let (bos, eos) = tokenizer.as_ref().map_or((None, None), |t| (t.bos_token(), t.eos_token()));
                Some(ChatTemplate::new(source, bos, eos)?)
            }
            None => None,
        };
        let tensors = Box::new(GgufTensors::new(gguf, &config)?);
        Ok(Self { path: path.into(), config, tokenizer, chat_template, tensors })
    }
}

/// Weights quantized in a way that is not read would only be missing or left over by name.
fn refuse_other_quantization(path: &Path, config: &ModelConfig) -> Result<()> {
    let Some(quantization) = config.raw.get("quantization_config").filter(|value| !value.is_null()) else {
        return Ok(());
    };
    let method = quantization["quant_method"].as_str().unwrap_or("unnamed");
    if method == "bitsandbytes" && quantization["load_in_8bit"] != true {
        return Ok(());
    }
    let reason = format!("its weights are quantized by `{method}`; only dense ones and bitsandbytes' 4 bits are read");
    Err(ModelError::NotAModel { path: path.into(), reason })
}

/// Reads a JSON file.
pub(crate) fn read_json(path: &Path) -> Result<serde_json::Value> {
    let bytes = std::fs::read(path).map_err(|source| ModelError::Read { path: path.into(), source })?;
    serde_json::from_slice(&bytes).map_err(|source| ModelError::Json { path: path.into(), source })
}

/// Reads a JSON file that may be absent.
pub(crate) fn read_json_if_there(path: &Path) -> Result<Option<serde_json::Value>> {
    if path.exists() { read_json(path).map(Some) } else { Ok(None) }
}

/// Safetensors of a folder.
#[derive(Debug)]
struct FolderTensors {
    reader: SafetensorsReader,
    /// Name asked for → name in the files.
    stored: BTreeMap<String, String>,
    /// Names in the files of weights in bitsandbytes' 4 bits.
    block4: BTreeSet<String>,
    /// Whether linear weights are written `[in_features, out_features]`, as GPT-2's are; 4-bit ones never are.
    is_transposed: bool,
}

impl FolderTensors {
    fn open(path: &Path, config: &ModelConfig) -> Result<Self> {
        let has = |name: &str| path.join(name).exists();
        if !has("model.safetensors") && !has("model.safetensors.index.json") {
            let reason = if has("pytorch_model.bin") || has("pytorch_model.bin.index.json") {
                "weights only as pytorch_model.bin, a pickle, which is never read; save them as safetensors"
            } else {
                "no model.safetensors and no model.safetensors.index.json"
            };
            return Err(ModelError::NotAModel { path: path.into(), reason: reason.into() });
        }
        let reader = SafetensorsReader::open(path).map_err(|error| match error {
            TensorError::Read { path, source } => ModelError::Read { path, source },
            other => other.into(),
        })?;
        let is_gpt2 = config.architecture == Architecture::Gpt2;
        let block4: BTreeSet<String> = reader.block4_names().map(str::to_owned).collect();
        // `x.weight.absmax` and the like are parts of the 4-bit tensor `x.weight`.
        let is_part =
            |name: &str| name.match_indices(".weight.").any(|(at, _)| block4.contains(&name[..at + ".weight".len()]));
        let stored = reader.names().filter(|name| !is_part(name)).filter_map(|name| {
            // Constants that old releases saved among the weights.
            let is_buffer = name.ends_with("rotary_emb.inv_freq")
                || (is_gpt2 && (name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias")));
            let is_bare = is_gpt2 && !name.starts_with("transformer.") && !name.starts_with("lm_head.");
            let asked = if is_bare { format!("transformer.{name}") } else { name.to_string() };
            (!is_buffer).then(|| (asked, name.to_string()))
        });
        let stored = stored.collect();
        Ok(Self { reader, stored, block4, is_transposed: is_gpt2 })
    }
}

impl TensorSource for FolderTensors {
    fn path(&self) -> &Path {
        self.reader.path()
    }

    fn names(&self) -> Vec<String> {
        self.stored.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<i64>> {
        let stored = self.stored.get(name)?;
        if self.block4.contains(stored) {
            let state = self.reader.block4_state(stored).ok()??;
            let mut shape: Vec<i64> = state.shape.iter().map(|&n| n as i64).collect();
            if self.is_transposed {
                shape.reverse();
            }
            return Some(shape);
        }
        self.reader.shape(stored).map(<[i64]>::to_vec)
    }

    fn num_bytes(&self, name: &str, kind: Kind) -> Option<usize> {
        if self.is_nf4(name) {
            let state = self.reader.block4_state(self.stored.get(name)?).ok()??;
            return Some(Nf4Weight::num_bytes_of(&state));
        }
        Some(self.shape(name)?.iter().product::<i64>() as usize * kind.elt_size_in_bytes())
    }

    fn is_nf4(&self, name: &str) -> bool {
        self.stored.get(name).is_some_and(|stored| self.block4.contains(stored))
    }

    fn tensor(&self, name: &str, kind: Kind, device: Device) -> Result<Tensor> {
        let stored = self.stored.get(name).ok_or_else(|| missing(self.reader.path(), name, self.stored.keys()))?;
        // Converted before it crosses to the device: the smaller of the two makes the trip in the common case.
        let tensor = match self.nf4(name, kind, Device::Cpu)? {
            Some(weight) if self.is_transposed => weight.dense()?.f_tr()?.f_contiguous()?,
            Some(weight) => weight.dense()?,
            None => self.reader.tensor(stored, Device::Cpu)?,
        };
        Ok(tensor.f_to_kind(kind)?.f_to_device(device)?)
    }

    fn nf4(&self, name: &str, kind: Kind, device: Device) -> Result<Option<Nf4Weight>> {
        match self.stored.get(name) {
            Some(stored) if self.block4.contains(stored) => Ok(Nf4Weight::read(&self.reader, stored, kind, device)?),
            _ => Ok(None),
        }
    }
}

fn missing<'a>(path: &Path, name: &str, known: impl IntoIterator<Item = &'a String>) -> ModelError {
    let near = nearest(name, known.into_iter().map(String::as_str));
    ModelError::MissingTensor { path: path.into(), name: name.into(), near }
}

/// Tensors of a GGUF file, renamed and put back into the checkpoint's layout.
#[derive(Debug)]
struct GgufTensors {
    gguf: Gguf,
    /// Name asked for → name in the file and layout there.
    stored: BTreeMap<String, (String, Layout)>,
}

impl GgufTensors {
    fn new(gguf: Gguf, config: &ModelConfig) -> Result<Self> {
        let mut stored = BTreeMap::new();
        for name in gguf.tensors().keys() {
            let Some(Placement { name: asked, layout }) = placement(name, config) else {
                let reason = match name.as_str() {
                    "rope_freqs.weight" => {
                        "it stretches its rotary frequencies by a table, which is not supported yet".into()
                    }
                    _ => format!("tensor `{name}` has no place in a {} model", config.architecture.model_type()),
                };
                return Err(ModelError::NotAModel { path: gguf.path().into(), reason });
            };
            stored.insert(asked, (name.clone(), layout));
        }
        Ok(Self { gguf, stored })
    }
}

/// Elements decoded at a time: enough for each of four threads to be worth starting.
const PIECE: u64 = 4 << 20;

impl TensorSource for GgufTensors {
    fn path(&self) -> &Path {
        self.gguf.path()
    }

    fn names(&self) -> Vec<String> {
        self.stored.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<i64>> {
        let (stored, layout) = self.stored.get(name)?;
        let mut shape = self.gguf.tensors().get(stored)?.shape.clone();
        if *layout == Layout::Transposed {
            shape.reverse();
        }
        Some(shape)
    }

    fn tensor(&self, name: &str, kind: Kind, device: Device) -> Result<Tensor> {
        let (stored, layout) =
            self.stored.get(name).ok_or_else(|| missing(self.gguf.path(), name, self.stored.keys()))?;
        let info = self.gguf.info(stored)?;
        let reordered = match *layout {
            Layout::InterleavedHeads { num_heads } => {
                let bytes = deinterleave_heads(&self.gguf.bytes(stored)?, info.shape[0], num_heads);
                Some(bytes.ok_or_else(|| {
                    let expected = format!("rows in {num_heads} heads of even width");
                    TensorError::Shape { what: format!("tensor `{stored}`"), found: info.shape.clone(), expected }
                })?)
            }
            _ => None,
        };
        // In pieces of whole blocks: an embedding in f32 beside its bytes would be the most that a 4-bit model ever takes.
        let (block_size, block_bytes) = info.ggml_type.block();
        let piece_bytes = PIECE / block_size * block_bytes;
        let tensor = Tensor::f_empty(info.shape.as_slice(), (kind, Device::Cpu))?;
        let (flat, mut decoded) = (tensor.f_view(-1)?, 0);
        for start in (0..info.num_bytes).step_by(piece_bytes as usize) {
            let range = start..info.num_bytes.min(start + piece_bytes);
            let bytes = match &reordered {
                Some(bytes) => Cow::Borrowed(&bytes[range.start as usize..range.end as usize]),
                None => Cow::Owned(self.gguf.part(info, range)?),
            };
            let elements = Tensor::f_from_slice(&self.gguf.dequantize_bytes(stored, info, &bytes)?)?;
            flat.f_narrow(0, decoded, elements.numel() as i64)?.f_copy_(&elements)?;
            decoded += elements.numel() as i64;
        }
        let tensor = if *layout == Layout::Transposed { tensor.f_t_copy()?.f_contiguous()? } else { tensor };
        Ok(tensor.f_to_kind(kind)?.f_to_device(device)?)
    }
}
