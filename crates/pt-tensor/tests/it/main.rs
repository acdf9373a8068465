//! Against numbers that were worked out elsewhere, and under a limit on memory.
#![allow(clippy::unwrap_used)]

mod golden_adamw8bit;
mod golden_label_logprobs;
#[cfg(target_os = "linux")]
mod memory_limit;
