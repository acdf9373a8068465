//! Adapters on the tiny models of `fixtures/`, against what PEFT wrote and computed.
#![allow(clippy::unwrap_used)]

mod bitdelta;
mod bitfit;
mod bottleneck;
mod combine;
mod files;
mod golden;
mod golden_methods;
mod laws;
mod set;
mod tinytl;
mod virtual_tokens;

use pt_model::{CausalLm, LinearFormat, Pretrained};
use pt_tensor::{Device, Kind, Nf4Arithmetic, Nf4Options};
use std::path::{Path, PathBuf};

/// `fixtures/`.
pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

/// A tiny model by its name under `fixtures/models/`.
pub(crate) fn tiny(name: &str) -> CausalLm {
    load(name, Kind::Float, LinearFormat::AsStored)
}

/// It in bf16.
pub(crate) fn bf16(name: &str) -> CausalLm {
    load(name, Kind::BFloat16, LinearFormat::AsStored)
}

/// It with its linear layers in 4 bits.
pub(crate) fn nf4(name: &str) -> CausalLm {
    let (options, arithmetic) = (Nf4Options::default(), Nf4Arithmetic::Exact);
    load(name, Kind::Float, LinearFormat::Nf4 { options, arithmetic, with_output: false })
}

fn load(name: &str, kind: Kind, format: LinearFormat) -> CausalLm {
    let pretrained = Pretrained::open(fixtures().join("models").join(name).join("model")).unwrap();
    CausalLm::load_with(&pretrained, Device::Cpu, kind, format).unwrap()
}

/// Splits `input_ids` of a case into its sequences.
pub(crate) fn sequences(case: &Path) -> Vec<Vec<i64>> {
    let reader = pt_tensor::io::SafetensorsReader::open(case.join("inputs.safetensors")).unwrap();
    let read = |name| Vec::<i64>::try_from(reader.tensor(name, Device::Cpu).unwrap()).unwrap();
    let mut ids = read("input_ids").into_iter();
    read("lengths").into_iter().map(|len| ids.by_ref().take(len as usize).collect()).collect()
}
