//! A delta as it is made, stored and exchanged: no model is needed to read or write it.

use super::config::BitDeltaConfig;
use super::fingerprint::Fingerprint;
use crate::files::{self, CONFIG_FILE, TENSOR_FILE};
use crate::{PeftError, Result};
use pt_tensor::io::SafetensorsReader;
use pt_tensor::{Device, Kind, ScaleAxis, ScaledSigns, Tensor};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Signs and scales by module path, parameters that are carried whole, and what base they are for.
///
/// # File
/// A folder with `adapter_config.json` (`"peft_type": "BITDELTA"` and the fields of [`BitDeltaConfig`]) and
/// `adapter_model.safetensors`, whose tensors are
/// - `PATH.signs`, u8, `[out_features, ceil(in_features / 8)]`: bit `k % 8` of byte `[n, k / 8]`, the lowest first, is set
///   where weight `[n, k]` is larger than the base's or equal to it; bits beyond the last weight are 0;
/// - `PATH.scale`, f32: `[1]`, `[out_features, 1]` or `[out_features, ceil(in_features / 128)]`;
/// - parameters that are carried whole by their names in the checkpoint, in its layout and in 16 or 32 bits.
///
/// `PATH` is the module's path in the Hugging Face checkpoint, and rows are outputs also where the checkpoint stores the
/// transpose (GPT-2). The metadata hold `format`: `pt`; `base_checksum`: two CRC-32C in hexadecimal, of the base's
/// weights that get signs and of its embeddings and norms; and `in_features`, a JSON object by path for widths that
/// are no multiple of 8.
#[derive(Debug)]
pub struct StoredDelta {
    pub(super) config: BitDeltaConfig,
    pub(super) signs: Vec<(String, ScaledSigns)>,
    pub(super) whole: Vec<(String, Tensor)>,
    pub(super) base: Fingerprint,
    /// Where it was read, for messages.
    pub(super) origin: PathBuf,
}

/// Bytes of a delta's parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeltaBytes {
    /// Of one bit a weight.
    pub signs: usize,
    /// Of scales.
    pub scales: usize,
    /// Of parameters that are carried whole.
    pub whole: usize,
}

impl DeltaBytes {
    /// Of all parts.
    pub fn total(self) -> usize {
        self.signs + self.scales + self.whole
    }
}

const SIGNS: &str = ".signs";
const SCALE: &str = ".scale";

impl StoredDelta {
    /// The settings.
    pub fn config(&self) -> &BitDeltaConfig {
        &self.config
    }

    /// Signs and scales by module path.
    pub fn signs(&self) -> impl Iterator<Item = (&str, &ScaledSigns)> {
        self.signs.iter().map(|(path, signs)| (path.as_str(), signs))
    }

    /// Parameters that are carried whole, by name.
    pub fn whole(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.whole.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Which base it is for, as the file's metadata have it.
    pub fn base_checksum(&self) -> String {
        self.base.to_string()
    }

    /// Bytes of its tensors as they are stored.
    pub fn bytes(&self) -> DeltaBytes {
        let bytes = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
        DeltaBytes {
            signs: self
                .signs
                .iter()
                .map(|(_, s)| ScaledSigns::signs_size(s.size()).iter().product::<i64>())
                .sum::<i64>() as usize,
            scales: self.signs.iter().map(|(_, s)| bytes(s.scale())).sum(),
            whole: self.whole.iter().map(|(_, tensor)| bytes(tensor)).sum(),
        }
    }

    /// Writes the folder. A new one appears whole or not at all.
    ///
    /// # Errors
    /// Those of the tensor layer.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let mut tensors = Vec::new();
        let mut widths = Map::new();
        for (path, signs) in &self.signs {
            tensors.push((format!("{path}{SIGNS}"), signs.signs()?));
            tensors.push((format!("{path}{SCALE}"), signs.scale().shallow_clone()));
            if signs.size().1 % 8 != 0 {
                widths.insert(path.clone(), signs.size().1.into());
            }
        }
        tensors.extend(self.whole.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())));
        let (checksum, widths) = (self.base.to_string(), Value::Object(widths).to_string());
        let metadata = [("format", "pt"), ("base_checksum", checksum.as_str()), ("in_features", widths.as_str())];
        files::write(folder, TENSOR_FILE, &self.config.to_text()?, &tensors, &metadata, &self.readme())
    }

    fn readme(&self) -> String {
        let base = self.config.base_model_name_or_path.as_deref().map_or(String::new(), |base| format!(" of `{base}`"));
        let DeltaBytes { signs, scales, whole } = self.bytes();
        format!(
            "# 1-bit delta\n\nA fine-tune{base} as one bit a weight and a scale (BitDelta): {signs} bytes of signs, \
             {scales} of scales, {whole} of parameters carried whole. `pt generate --adapter` applies it to its base, \
             `pt delta merge` makes a model of it.\n"
        )
    }

    /// Reads a folder that [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// [`PeftError::NotAnAdapter`] for a folder without a delta; those of [`BitDeltaConfig::from_file`];
    /// [`PeftError::Keys`] for signs without scales and the reverse; [`PeftError::Field`] for a tensor of another shape or
    /// kind.
    pub fn load(folder: &Path) -> Result<Self> {
        files::check_folder(folder)?;
        let config = BitDeltaConfig::from_file(&folder.join(CONFIG_FILE))?;
        let path = folder.join(TENSOR_FILE);
        let reader = SafetensorsReader::open(&path)?;
        let text = |key: &str| reader.metadata().get(key).map_or("", String::as_str);
        let base = Fingerprint::parse(text("base_checksum")).ok_or_else(|| PeftError::Field {
            path: path.clone(),
            field: "base_checksum".into(),
            found: format!("{:?}", text("base_checksum")),
            expected: "two numbers of 8 hexadecimal digits".into(),
        })?;
        let widths: Map<String, Value> = serde_json::from_str(text("in_features")).unwrap_or_default();
        check_pairs(&reader, &path)?;
        let axis = ScaleAxis::from(config.scale_sharing);
        let (mut signs, mut whole) = (Vec::new(), Vec::new());
        for name in reader.names() {
            if name.ends_with(SCALE) {
                continue;
            }
            let tensor = reader.tensor(name, Device::Cpu)?;
            let Some(module) = name.strip_suffix(SIGNS) else {
                let is_number = matches!(tensor.kind(), Kind::Float | Kind::BFloat16 | Kind::Half);
                if !is_number {
                    return Err(wrong_tensor(&path, name, format!("{:?}", tensor.kind()), "16 or 32-bit numbers"));
                }
                whole.push((name.to_string(), tensor));
                continue;
            };
            let [out_features, bytes] = tensor.size()[..] else {
                return Err(wrong_tensor(&path, name, format!("of shape {:?}", tensor.size()), "two axes"));
            };
            let in_features = widths.get(module).and_then(Value::as_i64).unwrap_or(bytes.saturating_mul(8));
            let scale = reader.tensor(&format!("{module}{SCALE}"), Device::Cpu)?;
            if scale.isfinite().all().int64_value(&[]) == 0 {
                return Err(wrong_tensor(&path, &format!("{module}{SCALE}"), "not finite".into(), "finite scales"));
            }
            let delta = ScaledSigns::from_tensors(&tensor, &scale, (out_features, in_features), axis);
            let delta = delta.map_err(|error| wrong_tensor(&path, name, error.to_string(), "the signs of a layer"))?;
            signs.push((module.to_string(), delta));
        }
        Ok(Self { config, signs, whole, base, origin: path })
    }
}

pub(super) fn wrong_tensor(path: &Path, name: &str, found: String, expected: &str) -> PeftError {
    PeftError::Field { path: path.into(), field: name.into(), found, expected: expected.into() }
}

/// Every layer with signs has scales, and the reverse.
fn check_pairs(reader: &SafetensorsReader, path: &Path) -> Result<()> {
    let partner = |name: &str| match (name.strip_suffix(SIGNS), name.strip_suffix(SCALE)) {
        (Some(module), _) => Some(format!("{module}{SCALE}")),
        (_, Some(module)) => Some(format!("{module}{SIGNS}")),
        _ => None,
    };
    let missing: Vec<String> = reader.names().filter_map(partner).filter(|name| reader.shape(name).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(PeftError::Keys { path: path.into(), missing, unexpected: vec![], shapes: vec![] })
}
