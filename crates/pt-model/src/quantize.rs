//! Checkpoints in bitsandbytes' 4 bits.

use crate::config::Architecture;
use crate::load::Pretrained;
use crate::{ModelError, Result};
use pt_tensor::{Device, Kind, Nf4Options, Tensor, nf4_tensors};
use serde_json::{Map, Value, json};

/// A tensor and its name in a checkpoint.
type NamedTensor = (String, Tensor);

/// The tensors of a checkpoint with its linear layers in NF4, and a `config.json` that says so: what transformers with
/// bitsandbytes saves, and loads. Embeddings, norms and the output layer stay in `kind`, which is also what products are to be computed in;
/// codes and scales are those of the stored weights, as [`CausalLm::load_with`](crate::CausalLm::load_with) has them, whatever it is.
///
/// One linear layer's dense weight is in memory at a time; `on_tensor` hears the name of each, and how many there are.
///
/// # Errors
/// [`ModelError::Unsupported`] for a checkpoint that is quantized already; those of reading it.
pub fn quantize_checkpoint(
    pretrained: &Pretrained,
    kind: Kind,
    options: Nf4Options,
    mut on_tensor: impl FnMut(&str, usize),
) -> Result<(Vec<NamedTensor>, Map<String, Value>)> {
    let source = pretrained.tensors.as_ref();
    let names = source.names();
    let mut tensors = Vec::new();
    for name in &names {
        on_tensor(name, names.len());
        if source.nf4(name, kind, Device::Cpu)?.is_some() {
            return Err(ModelError::Unsupported { what: format!("quantizing `{name}`, which is in 4 bits already") });
        }
        if source.shape(name).is_some_and(|shape| is_block_linear(name, &shape)) {
            let tensor = source.tensor(name, Kind::Float, Device::Cpu)?;
            // GPT-2 writes its weights [in_features, out_features]; in 4 bits they lie as every other model's.
            let is_transposed = pretrained.config.architecture == Architecture::Gpt2;
            let weight = if is_transposed { tensor.f_tr()?.f_contiguous()? } else { tensor };
            tensors.extend(nf4_tensors(name, &weight, options, kind)?);
        } else {
            tensors.push((name.clone(), source.tensor(name, kind, Device::Cpu)?));
        }
    }
    Ok((tensors, quantized_config(&pretrained.config.raw, kind, options.double_quant)))
}

/// A checkpoint's `config.json` with a note that its linear layers are in NF4 and everything else in `kind`.
pub fn quantized_config(raw: &Map<String, Value>, kind: Kind, has_double_quant: bool) -> Map<String, Value> {
    let mut config = raw.clone();
    let dtype = match kind {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "float32",
    };
    config.remove("torch_dtype");
    config.insert("dtype".into(), dtype.into());
    config.insert(
        "quantization_config".into(),
        json!({
            "quant_method": "bitsandbytes",
            "load_in_4bit": true,
            "load_in_8bit": false,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": has_double_quant,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": ["lm_head"],
            "llm_int8_threshold": 6.0,
            "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_has_fp16_weight": false,
        }),
    );
    config
}

/// Whether a checkpoint's tensor is the weight of a linear layer of the decoder blocks, all but the output layer: the matrices that are no
/// embedding.
pub fn is_block_linear(name: &str, shape: &[i64]) -> bool {
    let path = name.strip_suffix(".weight").unwrap_or_default();
    let is_other = ["embed_tokens", "wte", "wpe", "lm_head"].iter().any(|other| path.rsplit('.').next() == Some(other));
    shape.len() == 2 && !path.is_empty() && !is_other
}
