//! Against numbers that were worked out in f64.
#![allow(clippy::unwrap_used)]

mod golden_label_logprobs;
