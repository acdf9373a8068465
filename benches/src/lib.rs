//! Inputs, roofs and records shared by the benchmarks.
//!
//! The feature `models` (on by default) is what measures models, over libtorch; without it the package holds only the
//! suite of `pt-quant`.
#![forbid(unsafe_code)]

#[cfg(feature = "models")]
mod models;
mod record;
#[cfg(feature = "models")]
mod squad;

#[cfg(feature = "models")]
pub use models::{matmul_roof, model_path, pairs, peer_model, process_age, rows, step_flops};
pub use record::{Record, cpu_name, date, json_of, llama_cpp_python, median, medians, ratios};
#[cfg(feature = "models")]
pub use squad::{Part, answer_rows};
