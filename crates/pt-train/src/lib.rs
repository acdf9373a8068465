//! Training: data sets and their checks, schedules, run directories, metrics and reports.
#![forbid(unsafe_code)]

pub mod config;
pub mod data;
pub mod distill;
pub mod encoder;
mod error;
pub mod metrics;
pub mod objective;
pub mod report;
pub mod run_dir;
pub mod schedule;
pub mod settings;
pub mod sft;
pub mod step;
pub mod tensorboard;
pub mod train;

pub use error::{Origin, Result, TrainError};
