//! One file a subcommand.

pub(crate) mod chat;
pub(crate) mod combine;
pub(crate) mod delta;
pub(crate) mod demo;
pub(crate) mod dpo;
pub(crate) mod fetch;
pub(crate) mod generate;
pub(crate) mod grpo;
pub(crate) mod inspect;
pub(crate) mod merge;
pub(crate) mod models;
pub(crate) mod ppo;
pub(crate) mod quantize;
pub(crate) mod reward;
pub(crate) mod score;
pub(crate) mod sft;
