//! Fine-tuning against TRL, and the equalities that a run must keep.
#![allow(clippy::unwrap_used)]

mod common;
mod encoder;
mod equalities;
mod evaluation;
mod failures;
mod golden_distill;
mod golden_sft;
mod resume;
