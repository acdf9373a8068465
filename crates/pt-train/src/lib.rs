//! Training: data sets and their checks, schedules, run directories, metrics and reports.
#![forbid(unsafe_code)]

pub mod config;
mod error;
pub mod metrics;
pub mod run_dir;
pub mod schedule;
pub mod tensorboard;

pub use error::{Origin, Result, TrainError};
