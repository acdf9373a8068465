//! Against transformers' numbers, and equalities that every batch must keep.
#![allow(clippy::unwrap_used)]

mod chat_template;
mod common;
mod gguf;
mod golden;
mod golden_nf4;
mod invariance;
mod pretrained;
mod smollm2;
mod stopping;
mod tokenizer;

use pt_model::{Bare, CausalLm, Pretrained, Sites};
use pt_tensor::{Device, Kind, Tensor};
use std::path::PathBuf;
use std::rc::Rc;

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

fn tiny(case: &str, kind: Kind) -> CausalLm {
    let pretrained = Pretrained::open(fixtures().join("models").join(case).join("model")).unwrap();
    CausalLm::load(&pretrained, Device::Cpu, kind).unwrap()
}

fn bare() -> Rc<dyn Sites> {
    Rc::new(Bare)
}

fn max_error(a: &Tensor, b: &Tensor) -> f64 {
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}
