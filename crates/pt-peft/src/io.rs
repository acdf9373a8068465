//! Adapter folders in PEFT's format: `adapter_config.json`, `adapter_model.safetensors`, `README.md`.

use crate::adapter::Adapter;
use crate::base::Base;
use crate::config::LoraConfig;
use crate::lora::{LoraAdapter, Planned, Saved};
use crate::target::Strictness;
use crate::{PeftError, Result};
use pt_tensor::io::{SafetensorsReader, create_folder_atomically, save_safetensors, write_atomically};
use pt_tensor::{Device, Kind, Tensor, no_grad};
use std::collections::BTreeMap;
use std::path::Path;

/// The file of settings.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The file of tensors.
pub const TENSOR_FILE: &str = "adapter_model.safetensors";
/// What PEFT puts before the path of a module in a tensor's name.
const PREFIX: &str = "base_model.model.";

impl LoraAdapter {
    /// Loads an adapter that PEFT or [`Adapter::save`] wrote, for a model or linear layers of one's own.
    ///
    /// The tensors must be exactly the adapter's. Two things that PEFT itself writes are passed over: copies of the
    /// base weight (`.base_layer.`), and embeddings that it adds unasked, as long as they equal the model's.
    ///
    /// # Errors
    /// [`PeftError::NotAnAdapter`] for a folder without an adapter, or with pickled tensors only; those of
    /// [`LoraConfig::from_peft_file`]; [`PeftError::NoMatch`]; [`PeftError::Keys`] with the difference.
    pub fn load<'a>(folder: &Path, base: impl Into<Base<'a>>) -> Result<Self> {
        let base = base.into();
        check_folder(folder)?;
        let config = LoraConfig::from_peft_file(&folder.join(CONFIG_FILE))?;
        let saved = Self::copies(&config, &base)?;
        let planned = Self::plan(&config, &base, &saved, Strictness::AnyName)?;
        let reader = SafetensorsReader::open(folder.join(TENSOR_FILE))?;
        // Before anything is allocated from the rank that the settings claim.
        check_tensors(&reader, &file_shapes(&planned, &saved), &base)?;
        let adapter = Self::assemble(config, &base, planned, saved)?;
        for (name, (mut tensor, is_transposed)) in adapter.entries() {
            let value = reader.tensor(&name, tensor.device())?;
            no_grad(|| tensor.f_copy_(&if is_transposed { value.tr() } else { value }))?;
        }
        Ok(adapter)
    }

    /// Tensors as the file has them: PEFT's name, the trained leaf, and whether the file holds the transpose.
    fn entries(&self) -> BTreeMap<String, (Tensor, bool)> {
        let transposed: Vec<&str> = self.saved().filter(|s| s.is_transposed_in_file).map(|s| s.name.as_str()).collect();
        let entry = |(name, tensor): (String, Tensor)| {
            let is_transposed = transposed.contains(&name.as_str());
            (format!("{PREFIX}{name}"), (tensor, is_transposed))
        };
        self.parameters().into_iter().map(entry).collect()
    }
}

/// The shapes that a file of such an adapter holds, by PEFT's names.
fn file_shapes(planned: &[Planned<'_>], saved: &BTreeMap<String, Saved>) -> BTreeMap<String, Vec<i64>> {
    let mut shapes = BTreeMap::new();
    for Planned { layer, rank, .. } in planned {
        let (out_features, in_features) = layer.weight.size();
        shapes.insert(format!("{PREFIX}{}.lora_A.weight", layer.path), vec![*rank, in_features]);
        shapes.insert(format!("{PREFIX}{}.lora_B.weight", layer.path), vec![out_features, *rank]);
    }
    for saved in saved.values() {
        let mut shape = saved.value.size();
        if saved.is_transposed_in_file {
            shape.reverse();
        }
        shapes.insert(format!("{PREFIX}{}", saved.name), shape);
    }
    shapes
}

/// Compares the tensors of a file with those that the adapter has.
fn check_tensors(reader: &SafetensorsReader, expected: &BTreeMap<String, Vec<i64>>, base: &Base<'_>) -> Result<()> {
    let missing: Vec<String> = expected.keys().filter(|name| reader.shape(name).is_none()).cloned().collect();
    let mut unexpected = Vec::new();
    for name in reader.names().filter(|name| !expected.contains_key(*name)) {
        if !is_base_copy(reader, name, base)? {
            unexpected.push(name.to_string());
        }
    }
    let differs = |(name, expected): (&String, &Vec<i64>)| {
        let found = reader.shape(name).filter(|found| found != expected)?;
        Some((name.clone(), found.to_vec(), expected.clone()))
    };
    let shapes: Vec<_> = expected.iter().filter_map(differs).collect();
    if missing.is_empty() && unexpected.is_empty() && shapes.is_empty() {
        return Ok(());
    }
    Err(PeftError::Keys { path: reader.path().into(), missing, unexpected, shapes })
}

/// Says what is wrong with a folder that holds no adapter we can read.
fn check_folder(folder: &Path) -> Result<()> {
    let not_an_adapter =
        |reason: String, hint: String| Err(PeftError::NotAnAdapter { path: folder.into(), reason, hint });
    if !folder.is_dir() {
        return not_an_adapter(
            "no such folder".into(),
            format!("an adapter is a folder with {CONFIG_FILE} and {TENSOR_FILE}"),
        );
    }
    if !folder.join(CONFIG_FILE).exists() {
        let is_model = folder.join("config.json").exists();
        let hint = if is_model {
            "this is a model: pass it as the model, not as the adapter"
        } else {
            "a named adapter lies in a folder of its name inside this one"
        };
        return not_an_adapter(format!("no {CONFIG_FILE}"), hint.into());
    }
    if folder.join(TENSOR_FILE).exists() {
        return Ok(());
    }
    if folder.join("adapter_model.bin").exists() {
        return not_an_adapter(
            "the tensors are in adapter_model.bin, a pickle, which can run code when it is read".into(),
            "convert it where you trust it: in Python, \
             `from safetensors.torch import save_file; import torch; \
             save_file(torch.load(\"adapter_model.bin\", weights_only=True), \"adapter_model.safetensors\")`"
                .into(),
        );
    }
    not_an_adapter(format!("no {TENSOR_FILE}"), "the save was cut short or the file was not copied".into())
}

/// Whether a tensor that the adapter does not have is a copy of the model's own, as PEFT writes of a targeted output
/// layer or embedding.
fn is_base_copy(reader: &SafetensorsReader, name: &str, base: &Base<'_>) -> Result<bool> {
    let Some(path) = name.strip_prefix(PREFIX) else { return Ok(false) };
    let shape = reader.shape(name).unwrap_or_default();
    base.has_equal(&path.replace(".base_layer.", "."), shape, || Ok(reader.tensor(name, Device::Cpu)?))
}

/// Writes an adapter. A new folder is filled under a temporary name and renamed; in one that exists each file is
/// exchanged whole, and a README that somebody may have written stays.
pub(crate) fn save(adapter: &LoraAdapter, folder: &Path) -> Result<()> {
    if folder.exists() {
        return write_files(adapter, folder);
    }
    create_folder_atomically(folder, |partial| write_files(adapter, partial))
}

fn write_files(adapter: &LoraAdapter, folder: &Path) -> Result<()> {
    let tensors: Vec<(String, Tensor)> = adapter
        .entries()
        .into_iter()
        .map(|(name, (tensor, is_transposed))| {
            let tensor = no_grad(|| tensor.detach().to_kind(Kind::Float));
            (name, if is_transposed { tensor.tr() } else { tensor })
        })
        .collect();
    save_safetensors(&folder.join(TENSOR_FILE), &tensors, &[("format", "pt")])?;
    let write_text =
        |name: &str, text: String| write_atomically(&folder.join(name), |out| out.write_all(text.as_bytes()));
    if !folder.join("README.md").exists() {
        write_text("README.md", model_card(adapter.config()))?;
    }
    Ok(write_text(CONFIG_FILE, adapter.config().to_peft_text(adapter.fan_in_fan_out()))?)
}

/// The model card: the tags that PEFT writes and that the hub reads, and the settings in a sentence.
fn model_card(config: &LoraConfig) -> String {
    let base = config.base_model_name_or_path.as_deref().unwrap_or("");
    // YAML: a single quote inside single quotes is doubled.
    let quoted = base.replace('\'', "''");
    let of_base = if base.is_empty() { String::new() } else { format!(" for `{base}`") };
    format!(
        "---\nbase_model: '{quoted}'\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n\
         - 'base_model:adapter:{quoted}'\n- lora\n- transformers\n---\n\n# LoRA adapter\n\n\
         A LoRA adapter{of_base}: rank {}, alpha {}{}.\n",
        config.rank,
        config.lora_alpha,
        if config.use_rslora { ", rank-stabilised" } else { "" },
    )
}
