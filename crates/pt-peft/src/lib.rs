//! Parameter-efficient fine-tuning: methods behind one trait ([`Adapter`]), with adapter files in PEFT's format.
//!
//! A method is a [`pt_model::Sites`] value: the model asks it at every linear layer, branch and parameter that it may
//! change. Nothing is wrapped or copied, so the reference model is the same model with [`pt_model::Bare`]. On a tch model
//! of your own, [`LoraAdapter::new`] takes its linear layers.
//!
//! ```
//! use pt_peft::{LoraConfig, Modules};
//! let config = LoraConfig { rank: 16, lora_alpha: 32.0, ..LoraConfig::default() };
//! config.validate()?;
//! assert_eq!(config.scaling(config.rank, config.lora_alpha), 2.0);
//! let wrong = LoraConfig { rank: 0, target_modules: Modules::Names(vec![]), ..config };
//! assert!(wrong.validate().unwrap_err().to_string().contains("`rank` is 0, expected at least 1"));
//! # Ok::<(), pt_peft::PeftError>(())
//! ```
//!
//! | Module | |
//! | --- | --- |
//! | [`Method`], [`MethodConfig`] | every method by name, its settings, new and from a folder |
//! | `lora` | LoRA: forward and backward in one node; DoRA, LoRA+, PiSSA, OLoRA, embeddings, biases, tokens |
//! | `ia3` | IA3: vectors that scale outputs or inputs |
//! | `bitfit` | BitFit: biases alone |
//! | `bottleneck` | adapters of Houlsby, Pfeiffer and He, in AdapterHub's files |
//! | `prompt_tuning` | trained embeddings before every sequence |
//! | `prefix_tuning` | trained keys and values before every sequence |
//! | `tinytl` | TinyTL: biases and lite residual branches, little memory |
//! | `bitdelta` | BitDelta: a fine-tune as one bit a weight over its base, compressed, applied on the fly, several in one batch |
//! | `adapter` | the trait |
//! | `set` | several adapters over one model, one or several for all prompts or one for each |
//! | `target` | which layers a method goes on |
//! | `saved` | modules that are trained whole beside an adapter |
//! | `base` | what an adapter goes on: a model of ours, or layers of yours |
//! | `files` | adapter folders |
//! | `drift` | how far a merged model predicts from what was merged |
//! | [`testing`] | the laws that every method has to keep |
#![forbid(unsafe_code)]

mod adapter;
mod base;
mod bitdelta;
mod bitfit;
mod bottleneck;
mod config;
mod drift;
mod error;
mod files;
mod ia3;
mod init;
mod lora;
mod method;
mod prefix_tuning;
mod prompt_tuning;
mod saved;
mod set;
mod target;
pub mod testing;
mod tinytl;
mod virtual_tokens;

pub use adapter::Adapter;
pub use base::Base;
pub use bitdelta::{
    BitDeltaAdapter, BitDeltaConfig, DeltaBytes, FineTuned, KeptWhole, ScaleSharing, StoredDelta, compress,
    tenants_linear,
};
pub use bitfit::{BitfitAdapter, BitfitConfig};
pub use bottleneck::{
    BottleneckAdapter, BottleneckConfig, InitWeights, NonLinearity, Preset, ReductionFactor, Scaling, TrainedScaling,
};
pub use config::Modules;
pub use drift::{Drift, Predictions};
pub use error::{PeftError, Result};
pub use files::{CONFIG_FILE, TENSOR_FILE};
pub use ia3::{Ia3Adapter, Ia3Config};
pub use lora::{BiasMode, LoraAdapter, LoraConfig, LoraInit, TokenIndices, lora_linear};
pub use lora::{Combination, MajoritySign, Pruning, Sum};
pub use method::{Method, MethodConfig, load_adapter};
pub use prefix_tuning::{PrefixInit, PrefixTuningAdapter, PrefixTuningConfig};
pub use prompt_tuning::{PromptInit, PromptTuningAdapter, PromptTuningConfig};
pub use set::AdapterSet;
pub use target::{Strictness, Targets, pattern_value, saved_parameters, target_layers};
pub use tinytl::{TinytlAdapter, TinytlConfig, TinytlMode};
