//! `pt`: post-training for language models, from one binary.
#![forbid(unsafe_code)]

mod answers;
mod checkpoints;
mod commands;
mod dpo_task;
mod interrupts;
mod job;
mod memory;
mod open;
mod reward_task;
mod rl;
mod run_command;
mod talk;
mod task;
mod training;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "pt", version, about = "Post-training for language models", long_about = None, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Fine-tune a model on prompts and completions (LoRA, another parameter-efficient method, or all weights).
    Sft(commands::sft::Args),
    /// Train on preferences: DPO and its family, ORPO, SimPO, KTO.
    Dpo(commands::dpo::Args),
    /// Train a reward model on pairs and ranked lists.
    Reward(commands::reward::Args),
    /// Reinforcement learning with a critic: PPO on rewards by rule, by a command, or by a reward model.
    Ppo(commands::ppo::Args),
    /// The same with groups of responses in the critic's place: GRPO, RLOO.
    Grpo(commands::grpo::Args),
    /// Complete the prompts of a file, one JSON line per row.
    Generate(commands::generate::Args),
    /// Talk with a model.
    Chat(commands::chat::Args),
    /// Log-probs of given completions, or a reward model's scores of them, one JSON line per row.
    Score(commands::score::Args),
    /// Fold an adapter into its model and save a Hugging Face folder.
    Merge(commands::merge::Args),
    /// Fine-tunes as one bit a weight over their base: compress, distill, inspect, merge, import, export.
    Delta(commands::delta::Args),
    /// Make one LoRA adapter of several, with weights.
    Combine(commands::combine::Args),
    /// Save a model with its linear layers in 4 bits, as transformers and bitsandbytes load it.
    Quantize(commands::quantize::Args),
    /// Show what a model, an adapter, a run or a data set holds.
    Inspect(commands::inspect::Args),
    /// List the models and data sets that can be fetched by name.
    Models(commands::models::Args),
    /// Fetch a model or data set by name.
    Fetch(commands::fetch::Args),
    /// Run a whole worked example.
    Demo(commands::demo::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Sft(args) => commands::sft::run(args),
        Command::Dpo(args) => commands::dpo::run(args),
        Command::Reward(args) => commands::reward::run(args),
        Command::Ppo(args) => commands::ppo::run(args),
        Command::Grpo(args) => commands::grpo::run(args),
        Command::Generate(args) => commands::generate::run(args),
        Command::Chat(args) => commands::chat::run(args),
        Command::Score(args) => commands::score::run(args),
        Command::Merge(args) => commands::merge::run(args),
        Command::Delta(args) => commands::delta::run(args),
        Command::Combine(args) => commands::combine::run(args),
        Command::Quantize(args) => commands::quantize::run(args),
        Command::Inspect(args) => commands::inspect::run(args),
        Command::Models(args) => commands::models::run(args),
        Command::Fetch(args) => commands::fetch::run(args),
        Command::Demo(args) => commands::demo::run(args),
    };
    match result {
        Ok(code) => code,
        Err(error) => talk::report(&error),
    }
}
