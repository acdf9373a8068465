//! Laws that every loss keeps, and numbers of TRL.
#![allow(clippy::unwrap_used)]

mod common;
mod golden_dpo;
mod golden_dpo_train;
mod laws;
mod trainer;
