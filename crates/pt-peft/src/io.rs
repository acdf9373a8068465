//! Adapter folders in PEFT's format: `adapter_config.json`, `adapter_model.safetensors`, `README.md`.

use crate::adapter::Adapter;
use crate::config::LoraConfig;
use crate::lora::LoraAdapter;
use crate::target::Strictness;
use crate::{PeftError, Result};
use pt_model::CausalLm;
use pt_tensor::io::{SafetensorsReader, save_safetensors, write_atomically};
use pt_tensor::{Kind, Tensor, no_grad};
use std::collections::BTreeMap;
use std::path::Path;

/// The file of settings.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The file of tensors.
pub const TENSOR_FILE: &str = "adapter_model.safetensors";
/// What PEFT puts before the path of a module in a tensor's name.
const PREFIX: &str = "base_model.model.";

impl LoraAdapter {
    /// Loads an adapter that PEFT or [`Adapter::save`] wrote, for `model`.
    ///
    /// The tensors must be exactly the adapter's. Two things that PEFT itself writes are passed over: copies of the
    /// base weight (`.base_layer.`), and embeddings that it adds unasked, as long as they equal the model's.
    ///
    /// # Errors
    /// [`PeftError::NotAnAdapter`] for a folder without an adapter, or with pickled tensors only; those of
    /// [`LoraConfig::from_peft_file`]; [`PeftError::NoMatch`]; [`PeftError::Keys`] with the difference.
    pub fn load(folder: &Path, model: &CausalLm) -> Result<Self> {
        let config_path = folder.join(CONFIG_FILE);
        let tensor_path = folder.join(TENSOR_FILE);
        check_folder(folder)?;
        let config = LoraConfig::from_peft_file(&config_path)?;
        let adapter = Self::shaped(config, model, Strictness::AnyName)?;
        let reader = SafetensorsReader::open(&tensor_path)?;
        adapter.fill(&reader, model)?;
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

    fn fill(&self, reader: &SafetensorsReader, model: &CausalLm) -> Result<()> {
        let entries = self.entries();
        let missing: Vec<String> =
            entries.keys().filter(|name| reader.shape(name).is_none()).map(Clone::clone).collect();
        let mut unexpected = Vec::new();
        for name in reader.names().filter(|name| !entries.contains_key(*name)) {
            if !is_base_copy(reader, name, model)? {
                unexpected.push(name.to_string());
            }
        }
        let mut shapes = Vec::new();
        for (name, (tensor, is_transposed)) in &entries {
            let mut expected = tensor.size();
            if *is_transposed {
                expected.reverse();
            }
            if let Some(found) = reader.shape(name).filter(|found| *found != expected) {
                shapes.push((name.clone(), found.to_vec(), expected));
            }
        }
        if !missing.is_empty() || !unexpected.is_empty() || !shapes.is_empty() {
            return Err(PeftError::Keys { path: reader.path().into(), missing, unexpected, shapes });
        }
        for (name, (mut tensor, is_transposed)) in entries {
            let value = reader.tensor(&name, tensor.device())?;
            no_grad(|| tensor.f_copy_(&if is_transposed { value.tr() } else { value }))?;
        }
        Ok(())
    }
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
fn is_base_copy(reader: &SafetensorsReader, name: &str, model: &CausalLm) -> Result<bool> {
    let Some(path) = name.strip_prefix(PREFIX) else { return Ok(false) };
    let path = path.replace(".base_layer.", ".");
    let Some(own) = model.parameter(&path) else { return Ok(false) };
    if reader.shape(name) != Some(own.size().as_slice()) {
        return Ok(false);
    }
    let value = reader.tensor(name, own.device())?.to_kind(own.kind());
    Ok(no_grad(|| value.equal(&own)))
}

/// Writes an adapter. A new folder is filled under a temporary name and renamed; in one that exists each file is
/// exchanged whole, and a README that somebody may have written stays.
pub(crate) fn save(adapter: &LoraAdapter, folder: &Path) -> Result<()> {
    if folder.exists() {
        return write_files(adapter, folder);
    }
    let write_error = |source| PeftError::Write { path: folder.into(), source };
    let name = folder.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let parent = folder.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(write_error)?;
    let partial = parent.join(format!(".partial-{name}-{}", std::process::id()));
    std::fs::create_dir(&partial).map_err(write_error)?;
    let outcome = write_files(adapter, &partial).and_then(|()| {
        std::fs::rename(&partial, folder).map_err(write_error)?;
        std::fs::File::open(parent).and_then(|parent| parent.sync_all()).map_err(write_error)
    });
    if outcome.is_err() {
        // What went wrong is in the error; a leftover that cannot be removed either adds nothing to it.
        let _ = std::fs::remove_dir_all(&partial);
    }
    outcome
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
