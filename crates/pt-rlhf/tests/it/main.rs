//! What the crate promises of whole runs, and numbers of TRL and torchtune.
#![allow(clippy::unwrap_used)]

mod golden_rlhf;
mod reward;
mod rl;
mod toy;
