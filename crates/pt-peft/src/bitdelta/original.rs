//! BitDelta's own packing, as safetensors.
//!
//! Its script writes a dictionary with `torch.save`: `PATH.mask`, i32 `[in_features / 32, out_features]`, the signs of the
//! transposed weight, the lowest bit first; `PATH.coeff`, one f32; and parameters that are carried whole by their names.
//! That file is a pickle, which is never read here; the same dictionary as safetensors is read and written.

use super::compress::{OUTPUT, embedding, is_plain, keeps, names};
use super::config::BitDeltaConfig;
use super::fingerprint::Fingerprint;
use super::stored::{StoredDelta, wrong_tensor};
use crate::{PeftError, Result};
use pt_model::{Architecture, Pretrained, is_block_linear};
use pt_tensor::io::{SafetensorsReader, save_safetensors};
use pt_tensor::{Device, Kind, ScaledSigns, Tensor};
use std::collections::BTreeSet;
use std::io::Read;
use std::path::Path;

const MASK: &str = ".mask";
const COEFF: &str = ".coeff";

impl StoredDelta {
    /// Reads a file in BitDelta's own packing for its base, of which `config.kept_whole` chooses among the parameters that
    /// it carries whole. `on_tensor` hears the name of each of the base's tensors, and how many there are.
    ///
    /// # Errors
    /// [`PeftError::NotAnAdapter`] for a pickle, with the way to convert it; [`PeftError::Config`] for scales that are not
    /// one for a matrix; [`PeftError::Keys`] with the difference to the base; those of reading.
    pub fn import(
        path: &Path,
        base: &Pretrained,
        config: BitDeltaConfig,
        mut on_tensor: impl FnMut(&str, usize),
    ) -> Result<Self> {
        check_sharing(&config)?;
        refuse_pickle(path)?;
        let reader = SafetensorsReader::open(path)?;
        let all = names(base.tensors.as_ref(), &base.config);
        let is_transposed = base.config.architecture == Architecture::Gpt2;
        let (mut signs, mut whole, mut print) = (Vec::new(), Vec::new(), Fingerprint::default());
        let (mut known, mut missing, mut shapes) = (BTreeSet::new(), Vec::new(), Vec::new());
        let output = (!all.contains(OUTPUT)).then(|| OUTPUT.to_string());
        for name in all.iter().chain(&output) {
            on_tensor(name, all.len());
            let of_base = if all.contains(name) { name } else { embedding(&base.config) };
            let value = base.tensors.tensor(of_base, Kind::Float, Device::Cpu)?;
            if is_block_linear(name, &value.size()) {
                let value = if is_transposed { value.tr().contiguous() } else { value };
                print.add_signed(name, &value)?;
                let module = name.strip_suffix(".weight").unwrap_or(name).to_string();
                let parts = [MASK, COEFF].map(|part| format!("{module}{part}"));
                let lacking = parts.iter().filter(|part| reader.shape(part).is_none()).cloned();
                let before = missing.len();
                missing.extend(lacking);
                if missing.len() == before {
                    let [mask, coeff] = [0, 1].map(|part| reader.tensor(&parts[part], Device::Cpu));
                    let (mask, size) = (mask?, value.size());
                    let expected = vec![size[1] / 32, size[0]];
                    if mask.size() == expected && size[1] % 32 == 0 {
                        let coeff = coeff?;
                        if coeff.isfinite().all().int64_value(&[]) == 0 {
                            return Err(wrong_tensor(path, &parts[1], "not finite".into(), "a finite scale"));
                        }
                        signs.push((module, ScaledSigns::from_bitdelta(&mask, &coeff)?));
                    } else {
                        shapes.push((parts[0].clone(), mask.size(), expected));
                    }
                }
                known.extend(parts);
                continue;
            }
            if is_plain(name) {
                print.add_plain(name, &value)?;
            }
            known.insert(name.clone());
            let Some(shape) = reader.shape(name) else { continue };
            if shape != value.size() {
                shapes.push((name.clone(), shape.to_vec(), value.size()));
                continue;
            }
            let tuned = reader.tensor(name, Device::Cpu)?;
            // A tied output layer that is stored beside its embedding is that embedding.
            let is_tied_copy = name == OUTPUT
                && output.is_some()
                && reader.shape(embedding(&base.config)) == Some(shape)
                && reader.tensor(embedding(&base.config), Device::Cpu)?.equal(&tuned);
            if !is_tied_copy && keeps(config.kept_whole, &value, &tuned.to_kind(Kind::Float)) {
                whole.push((name.clone(), tuned));
            }
        }
        let unexpected: Vec<String> = reader.names().filter(|name| !known.contains(*name)).map(String::from).collect();
        if missing.is_empty() && unexpected.is_empty() && shapes.is_empty() {
            return Ok(Self { config, signs, whole, base: print, origin: path.into() });
        }
        Err(PeftError::Keys { path: path.into(), missing, unexpected, shapes })
    }

    /// Writes the file of BitDelta's own packing; which base it is for is not said there.
    ///
    /// # Errors
    /// [`PeftError::Config`] for scales that are not one for a matrix; [`PeftError::Tensor`] for a layer whose
    /// `in_features` is no multiple of 32, and those of writing.
    pub fn export(&self, path: &Path) -> Result<()> {
        check_sharing(&self.config)?;
        let mut tensors: Vec<(String, Tensor)> = Vec::new();
        for (module, signs) in &self.signs {
            tensors.push((format!("{module}{MASK}"), signs.bitdelta_mask()?));
            tensors.push((format!("{module}{COEFF}"), signs.scale().detach().f_view([0i64; 0].as_slice())?));
        }
        tensors.extend(self.whole.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())));
        Ok(save_safetensors(path, &tensors, &[("format", "pt")])?)
    }
}

fn check_sharing(config: &BitDeltaConfig) -> Result<()> {
    if config.scale_sharing == super::ScaleSharing::Matrix {
        return Ok(());
    }
    let fault = format!(
        "scale_sharing is {}: BitDelta's own packing has one scale for a matrix",
        serde_json::to_value(config.scale_sharing).unwrap_or_default()
    );
    Err(PeftError::Config { faults: vec![fault] })
}

/// A file of `torch.save` is a zip archive, or, of old, a bare pickle.
fn refuse_pickle(path: &Path) -> Result<()> {
    let read = |source| PeftError::Read { path: path.into(), source };
    let mut start = [0u8; 4];
    let count = std::fs::File::open(path).and_then(|mut file| file.read(&mut start)).map_err(read)?;
    if !(start[..count].starts_with(b"PK\x03\x04") || start[..count].starts_with(&[0x80])) || is_header(path) {
        return Ok(());
    }
    Err(PeftError::NotAnAdapter {
        path: path.into(),
        reason: "a pickle of torch.save, which can run code when it is read".into(),
        hint: format!(
            "convert it where you trust it: python -c 'import torch; from safetensors.torch import save_file; \
             d = torch.load(\"{}\", weights_only=True); \
             save_file({{k: v.contiguous().clone() for k, v in d.items()}}, \"diff.safetensors\")'",
            path.display()
        ),
    })
}

/// Whether a file is safetensors after all: the first byte is that of a length.
fn is_header(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "safetensors") && SafetensorsReader::open(path).is_ok()
}
