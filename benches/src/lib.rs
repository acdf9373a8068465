//! Inputs, roofs and records shared by the benchmarks.
//!
//! The feature `models` (on by default) is what measures models, over libtorch; without it the package holds only the
//! suite of `pt-quant`.
#![forbid(unsafe_code)]

#[cfg(feature = "models")]
mod models;
mod record;
#[cfg(feature = "models")]
mod rollouts;
#[cfg(feature = "models")]
mod squad;

#[cfg(feature = "models")]
pub use models::{
    PAIR_PROMPTS, matmul_roof, measure_pairs, model_path, pair_prompts, pairs, peer_model, process_age, rows,
    step_flops,
};
pub use record::{Measure, Record, compare, cpu_name, date, json_of, llama_cpp_python, median, medians, ratios};
#[cfg(feature = "models")]
pub use rollouts::{Judge, measure, prompt_ids};
#[cfg(feature = "models")]
pub use squad::{Part, answer_rows};
