//! What prompt tuning and prefix tuning share: virtual tokens before every sequence, in one tensor of the file.

use crate::base::Base;
use crate::config::{Fields, is_off};
use crate::files::{AdapterFile, check_folder};
use crate::{PeftError, Result};
use pt_model::CausalLm;
use pt_tensor::{Kind, Tensor};
use serde_json::{Map, Value, json};
use std::path::Path;

/// The file's one tensor, and what two of these adapters cannot both bring.
pub(crate) const TENSOR: &str = "prompt_embeddings";

/// What PEFT's file says of the model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    /// Width of a virtual token: the embedding's, or that of a layer's keys.
    pub(crate) token_dim: i64,
    pub(crate) num_attention_heads: i64,
    pub(crate) num_layers: i64,
}

/// That the virtual tokens leave room for others in the model's context.
pub(crate) fn check_room(num_virtual_tokens: i64, model: &CausalLm) -> Result<()> {
    let context = model.config().max_position_embeddings;
    if num_virtual_tokens < context {
        return Ok(());
    }
    let fault = format!(
        "`num_virtual_tokens` is {num_virtual_tokens}, expected less than the model's context, {context} tokens"
    );
    Err(PeftError::Config { faults: vec![fault] })
}

/// The fault of a number of virtual tokens that cannot be.
pub(crate) fn count_fault(num_virtual_tokens: i64) -> Option<String> {
    (num_virtual_tokens < 1).then(|| format!("`num_virtual_tokens` is {num_virtual_tokens}, expected at least 1"))
}

/// Checks the keys that every such file has: of decoders, without modules that are trained whole.
pub(crate) fn check_keys(fields: &Fields<'_>) -> Result<()> {
    let submodules: Option<i64> = fields.get("num_transformer_submodules", "1, for a decoder")?;
    if let Some(other) = submodules.filter(|&submodules| submodules != 1) {
        return Err(fields.wrong("num_transformer_submodules", &json!(other), "1, for a decoder"));
    }
    match fields.value.get("modules_to_save").filter(|value| !is_off(value)) {
        Some(value) => {
            let features = vec![format!("`modules_to_save` = {value}")];
            Err(PeftError::Unsupported { path: fields.path.into(), features, is_mergeable: false })
        }
        None => Ok(()),
    }
}

/// The text of PEFT's `adapter_config.json`: the method's own keys, and those that every such file has, sorted.
pub(crate) fn peft_text(method: &str, num_virtual_tokens: i64, sizes: Sizes, own: Value) -> String {
    let common = json!({
        "auto_mapping": null,
        "inference_mode": true,
        "modules_to_save": null,
        "num_attention_heads": sizes.num_attention_heads,
        "num_layers": sizes.num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": num_virtual_tokens,
        "peft_type": method,
        "task_type": "CAUSAL_LM",
        "token_dim": sizes.token_dim,
    });
    let mut all: Vec<(String, Value)> = [common, own]
        .into_iter()
        .flat_map(|part| if let Value::Object(keys) = part { keys } else { Map::new() })
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    format!("{:#}", Value::Object(all.into_iter().collect()))
}

/// The file's tensor, `[num_virtual_tokens, width]` in f32, as a leaf.
pub(crate) fn read(folder: &Path, num_virtual_tokens: i64, width: i64, model: &CausalLm) -> Result<Tensor> {
    check_folder(folder)?;
    check_room(num_virtual_tokens, model)?;
    let shape = vec![num_virtual_tokens, width];
    let file = AdapterFile::open(folder, &Base::from(model), "", &[(TENSOR.to_string(), shape.clone())].into())?;
    let tensor = zeros(&shape, model)?;
    file.read_into([crate::files::Entry::new(TENSOR.into(), &tensor)])?;
    Ok(tensor)
}

/// A leaf of zeros in f32.
pub(crate) fn zeros(shape: &[i64], model: &CausalLm) -> Result<Tensor> {
    Ok(Tensor::f_zeros(shape, (Kind::Float, model.device()))?.set_requires_grad(true))
}
