//! Direct preference optimization: every loss of the family as a pure function of summed log-probs.
//!
//! A pair's loss needs four numbers, the log-probs of its two completions under the policy and under the reference;
//! where they come from is no business of [`preference_loss`]. A policy equal to its reference pays ln 2:
//!
//! ```
//! use pt_dpo::{LossConfig, PairBatch, PairLogps, preference_loss};
//! let logps = PairLogps::from_slices(&[-11.0, -30.0], &[-12.0, -25.0])?;
//! let config = LossConfig::default();
//! let pairs = PairBatch::new(logps.shallow_clone()).with_reference(logps);
//! let out = preference_loss(&config, &pairs)?;
//! assert!((out.losses.double_value(&[0]) - 2f64.ln()).abs() < 1e-6);
//!
//! // Two nats towards the chosen completion, at β = 0.1: −log σ(0.2) = 0.598.
//! let moved = PairLogps::from_slices(&[-10.0, -30.0], &[-13.0, -25.0])?;
//! let out = preference_loss(&config, &PairBatch { policy: moved, ..pairs })?;
//! assert!((out.losses.double_value(&[0]) - 0.598).abs() < 1e-3);
//! assert!((out.chosen_rewards.double_value(&[0]) - 0.1).abs() < 1e-6);
//! # Ok::<(), pt_dpo::DpoError>(())
//! ```
//!
//! # Map
//! - [`LossConfig`], [`Loss`], [`FDivergence`]: what is computed, with every fault of a configuration listed at once;
//! - [`preference_loss`] over a [`PairBatch`]; [`unpaired_loss`] over an [`UnpairedBatch`] (KTO) with [`kl_estimate`];
//!   one file a family in `loss/`, each with its equation and paper;
//! - [`sum_logps`], [`completion_lengths`], [`ld_logps`], [`wpo_weights`]: from log-probs of tokens, packed in any
//!   order, to those of completions;
//! - [`preference_metrics`], [`unpaired_metrics`]: numbers under TRL's names.
//!
//! With the feature `trainer`, which is on by default and brings `pt-model` and `pt-train`:
//! - [`Dpo`], the losses as an objective of [`pt_train::train`], over [`DpoExample`]s;
//! - [`Reference`]: the model without its adapter, another model, a copy that follows the policy, or log-probs computed
//!   once ([`precompute`]) and kept ([`save_reference`], [`load_reference`]);
//! - [`DpoConfig`]: the part of a run's settings that is theirs.
#![forbid(unsafe_code)]

mod config;
mod divergence;
mod error;
#[cfg(feature = "trainer")]
mod example;
mod logps;
mod loss;
mod metrics;
#[cfg(feature = "trainer")]
mod reference;
#[cfg(feature = "trainer")]
mod settings;
#[cfg(feature = "trainer")]
mod trainer;

pub use config::{Loss, LossConfig, NllAverage};
pub use divergence::FDivergence;
pub use error::{DpoError, Result};
#[cfg(feature = "trainer")]
pub use example::{DpoExample, ReferenceLogprobs};
pub use logps::{completion_lengths, ld_logps, sum_logps, wpo_weights};
pub use loss::{
    LossOutput, PairBatch, PairLogps, UnpairedBatch, UnpairedOutput, kl_estimate, preference_loss, unpaired_loss,
};
pub use metrics::{preference_metrics, unpaired_metrics};
#[cfg(feature = "trainer")]
pub use reference::{PolicyCopy, Reference, load_reference, precompute, save_reference};
#[cfg(feature = "trainer")]
pub use settings::{DpoConfig, ReferenceConfig};
#[cfg(feature = "trainer")]
pub use trainer::{ACCURACY, Dpo, LOGPS_ACCURACY};
