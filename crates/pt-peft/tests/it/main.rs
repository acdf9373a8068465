//! Adapters on the tiny models of `fixtures/`, against what PEFT wrote and computed.
#![allow(clippy::unwrap_used)]

mod files;
mod golden;
mod laws;

use pt_model::{CausalLm, Pretrained};
use pt_tensor::{Device, Kind};
use std::path::{Path, PathBuf};

/// `fixtures/`.
pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

/// A tiny model by its name under `fixtures/models/`.
pub(crate) fn tiny(name: &str) -> CausalLm {
    let pretrained = Pretrained::open(fixtures().join("models").join(name).join("model")).unwrap();
    CausalLm::load(&pretrained, Device::Cpu, Kind::Float).unwrap()
}

/// Splits `input_ids` of a case into its sequences.
pub(crate) fn sequences(case: &Path) -> Vec<Vec<i64>> {
    let reader = pt_tensor::io::SafetensorsReader::open(case.join("inputs.safetensors")).unwrap();
    let read = |name| Vec::<i64>::try_from(reader.tensor(name, Device::Cpu).unwrap()).unwrap();
    let mut ids = read("input_ids").into_iter();
    read("lengths").into_iter().map(|len| ids.by_ref().take(len as usize).collect()).collect()
}
