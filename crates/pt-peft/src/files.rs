//! Adapter folders in PEFT's format: `adapter_config.json`, `adapter_model.safetensors`, `README.md`.

use crate::base::Base;
use crate::saved::SavedModules;
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
pub(crate) const MODULES: &str = "base_model.model.";

/// How a package lays out an adapter's folder.
#[derive(Debug)]
pub(crate) struct Layout {
    /// The hub's name of the package.
    library: &'static str,
    /// The file of tensors.
    pub(crate) tensor_file: &'static str,
    /// Its pickled form, which is refused.
    pickle: &'static str,
    /// What stands before the names of tensors.
    prefix: &'static str,
}

/// PEFT's; some methods have another prefix.
pub(crate) const PEFT: Layout =
    Layout { library: "peft", tensor_file: TENSOR_FILE, pickle: "adapter_model.bin", prefix: MODULES };
/// AdapterHub's `adapters`.
pub(crate) const ADAPTER_HUB: Layout = Layout {
    library: "adapter-transformers",
    tensor_file: "adapter.safetensors",
    pickle: "pytorch_adapter.bin",
    prefix: "",
};

/// A tensor of the adapter and how the file has it.
#[derive(Debug)]
pub(crate) struct Entry {
    /// Its name there, without the prefix.
    pub(crate) name: String,
    /// The leaf.
    pub(crate) tensor: Tensor,
    /// Whether the file holds the transpose.
    pub(crate) is_transposed: bool,
}

impl Entry {
    /// A tensor that the file has as it is.
    pub(crate) fn new(name: String, tensor: &Tensor) -> Self {
        Self { name, tensor: tensor.shallow_clone(), is_transposed: false }
    }
}

/// The entries of modules that are trained whole.
pub(crate) fn entries_of(saved: &SavedModules) -> impl Iterator<Item = Entry> {
    saved.iter().map(|saved| Entry {
        name: saved.name.clone(),
        tensor: saved.value.shallow_clone(),
        is_transposed: saved.is_transposed_in_file,
    })
}

/// Their shapes in the file, by name.
pub(crate) fn shapes_of(saved: &SavedModules) -> BTreeMap<String, Vec<i64>> {
    let shape = |entry: Entry| {
        let mut shape = entry.tensor.size();
        if entry.is_transposed {
            shape.reverse();
        }
        (entry.name, shape)
    };
    entries_of(saved).map(shape).collect()
}

/// The tensors of an adapter's folder, seen to be those that the adapter has.
pub(crate) struct AdapterFile {
    reader: SafetensorsReader,
    prefix: &'static str,
}

impl AdapterFile {
    /// Opens the tensors in `folder` and compares their names (after `prefix`) and shapes with `expected`. Copies of the
    /// base's own parameters, as PEFT writes them of a targeted output layer or embedding, are passed over.
    ///
    /// # Errors
    /// [`PeftError::Keys`] with the difference; those of the reader.
    pub(crate) fn open(
        folder: &Path,
        base: &Base<'_>,
        prefix: &'static str,
        expected: &BTreeMap<String, Vec<i64>>,
    ) -> Result<Self> {
        Self::open_as(folder, base, &Layout { prefix, ..PEFT }, expected)
    }

    /// As [`open`](Self::open), in another package's layout.
    pub(crate) fn open_as(
        folder: &Path,
        base: &Base<'_>,
        layout: &Layout,
        expected: &BTreeMap<String, Vec<i64>>,
    ) -> Result<Self> {
        let reader = SafetensorsReader::open(folder.join(layout.tensor_file))?;
        let file = Self { reader, prefix: layout.prefix };
        file.check(expected, base)?;
        Ok(file)
    }

    /// Copies the values into the adapter's tensors.
    pub(crate) fn read_into(&self, entries: impl IntoIterator<Item = Entry>) -> Result<()> {
        for Entry { name, mut tensor, is_transposed } in entries {
            let value = self.reader.tensor(&format!("{}{name}", self.prefix), tensor.device())?;
            no_grad(|| tensor.f_copy_(&if is_transposed { value.tr() } else { value }))?;
        }
        Ok(())
    }

    fn check(&self, expected: &BTreeMap<String, Vec<i64>>, base: &Base<'_>) -> Result<()> {
        let expected: BTreeMap<String, &Vec<i64>> =
            expected.iter().map(|(name, shape)| (format!("{}{name}", self.prefix), shape)).collect();
        let missing: Vec<String> = expected.keys().filter(|name| self.reader.shape(name).is_none()).cloned().collect();
        let mut unexpected = Vec::new();
        for name in self.reader.names().filter(|name| !expected.contains_key(*name)) {
            if !self.is_base_copy(name, base)? {
                unexpected.push(name.to_string());
            }
        }
        let differs = |(name, expected): (&String, &&Vec<i64>)| {
            let found = self.reader.shape(name).filter(|found| found != expected)?;
            Some((name.clone(), found.to_vec(), expected.to_vec()))
        };
        let shapes: Vec<_> = expected.iter().filter_map(differs).collect();
        if missing.is_empty() && unexpected.is_empty() && shapes.is_empty() {
            return Ok(());
        }
        Err(PeftError::Keys { path: self.reader.path().into(), missing, unexpected, shapes })
    }

    /// Whether a tensor that the adapter does not have is a copy of the model's own.
    fn is_base_copy(&self, name: &str, base: &Base<'_>) -> Result<bool> {
        let Some(path) = name.strip_prefix(MODULES) else { return Ok(false) };
        let shape = self.reader.shape(name).unwrap_or_default();
        base.has_equal(&path.replace(".base_layer.", "."), shape, || Ok(self.reader.tensor(name, Device::Cpu)?))
    }
}

fn not_an_adapter(folder: &Path, reason: String, hint: String) -> Result<()> {
    Err(PeftError::NotAnAdapter { path: folder.into(), reason, hint })
}

/// Says what is wrong with a folder without an adapter's settings.
pub(crate) fn check_has_settings(folder: &Path) -> Result<()> {
    if !folder.is_dir() {
        return not_an_adapter(
            folder,
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
        return not_an_adapter(folder, format!("no {CONFIG_FILE}"), hint.into());
    }
    Ok(())
}

/// Says what is wrong with a folder that holds no adapter we can read.
pub(crate) fn check_folder(folder: &Path) -> Result<()> {
    check_folder_as(folder, &PEFT)
}

/// As [`check_folder`], in another package's layout.
pub(crate) fn check_folder_as(folder: &Path, layout: &Layout) -> Result<()> {
    let Layout { tensor_file, pickle, .. } = layout;
    check_has_settings(folder)?;
    if folder.join(tensor_file).exists() {
        return Ok(());
    }
    if folder.join(pickle).exists() {
        return not_an_adapter(
            folder,
            format!("the tensors are in {pickle}, a pickle, which can run code when it is read"),
            format!(
                "convert it where you trust it: in Python, `from safetensors.torch import save_file; import torch; \
                 save_file({{k: v.clone() for k, v in torch.load(\"{pickle}\", weights_only=True).items()}}, \
                 \"{tensor_file}\")`"
            ),
        );
    }
    not_an_adapter(folder, format!("no {tensor_file}"), "the save was cut short or the file was not copied".into())
}

/// What the model card says.
pub(crate) struct Card<'a> {
    /// The base model's name, where it is known.
    pub(crate) base: Option<&'a str>,
    /// The hub's tag of the method.
    pub(crate) tag: &'static str,
    pub(crate) title: &'static str,
    /// The settings, as the end of a sentence.
    pub(crate) settings: String,
}

impl Card<'_> {
    /// The tags that PEFT writes and that the hub reads, and the settings in a sentence.
    fn text(&self, library: &str) -> String {
        let Self { base, tag, title, settings } = self;
        let base = base.unwrap_or("");
        // YAML: a single quote inside single quotes is doubled.
        let quoted = base.replace('\'', "''");
        let of_base = if base.is_empty() { String::new() } else { format!(" for `{base}`") };
        format!(
            "---\nbase_model: '{quoted}'\nlibrary_name: {library}\npipeline_tag: text-generation\ntags:\n\
             - 'base_model:adapter:{quoted}'\n- {tag}\n- transformers\n---\n\n# {title}\n\n{title}{of_base}: {settings}.\n"
        )
    }
}

/// Writes an adapter. A new folder is filled under a temporary name and renamed; in one that exists each file is
/// exchanged whole, and a README that somebody may have written stays.
pub(crate) fn save(
    folder: &Path,
    config: &str,
    prefix: &'static str,
    entries: impl IntoIterator<Item = Entry>,
    card: &Card<'_>,
) -> Result<()> {
    save_as(folder, &Layout { prefix, ..PEFT }, config, entries, card)
}

/// As [`save`], in another package's layout.
pub(crate) fn save_as(
    folder: &Path,
    layout: &Layout,
    config: &str,
    entries: impl IntoIterator<Item = Entry>,
    card: &Card<'_>,
) -> Result<()> {
    let prefix = layout.prefix;
    let tensor = |Entry { name, tensor, is_transposed }: Entry| {
        let tensor = no_grad(|| tensor.detach().to_kind(Kind::Float));
        (format!("{prefix}{name}"), if is_transposed { tensor.tr() } else { tensor })
    };
    let mut tensors: Vec<(String, Tensor)> = entries.into_iter().map(tensor).collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    write(folder, layout.tensor_file, config, &tensors, &[("format", "pt")], &card.text(layout.library))
}

/// Writes the files of an adapter, as [`save`] does, of tensors as they are.
pub(crate) fn write(
    folder: &Path,
    tensor_file: &str,
    config: &str,
    tensors: &[(String, Tensor)],
    metadata: &[(&str, &str)],
    readme: &str,
) -> Result<()> {
    let fill = |folder: &Path| -> Result<()> {
        save_safetensors(&folder.join(tensor_file), tensors, metadata)?;
        let write_text =
            |name: &str, text: &str| write_atomically(&folder.join(name), |out| out.write_all(text.as_bytes()));
        if !folder.join("README.md").exists() {
            write_text("README.md", readme)?;
        }
        Ok(write_text(CONFIG_FILE, config)?)
    };
    if folder.exists() { fill(folder) } else { create_folder_atomically(folder, fill) }
}
