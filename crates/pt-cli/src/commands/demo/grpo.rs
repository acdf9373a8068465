//! `pt demo grpo`: sums of two numbers, rewarded by rule.

use super::moved;
use super::stages::StageArgs;
use crate::talk::say;
use anyhow::Result;
use pt_rlhf::{SCORES, reward_metric};
use serde_json::{Value, json};
use std::process::ExitCode;

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    stages: StageArgs,
}

/// The largest summand.
const LARGEST: u64 = 30;
/// Sums that are held out.
const HELD_OUT: usize = 64;

pub(super) fn run(args: Args) -> Result<ExitCode> {
    let stages = &args.stages;
    stages.check(&["grpo"])?;
    let mut sums = sums();
    let held_out = stages.write_rows("held_out.jsonl", &sums.split_off(sums.len() - HELD_OUT))?;
    let training = stages.write_rows("train.jsonl", &sums)?;
    let settings = [
        // The right number, and it alone: a rule each.
        ("rewards", "[{type: number}, {type: length, max: 3, falloff: 4, weight: 0.3}]"),
        ("batch.batch_size", "8"),
        ("num_samples", "8"),
        ("rollout.max_new_tokens", "12"),
        ("learning_rate", "2e-4"),
        ("max_steps", "30"),
        ("eval_every", "0"),
    ];
    let flags = [("data", training.as_path()), ("eval-data", &held_out)];
    if let Some(code) = stages.run("grpo", &flags, &settings)?.early() {
        return Ok(code);
    }
    say("\nOn held-out sums, before -> after:")?;
    if let Some(ends) = stages.ends("grpo", &format!("eval_{}", reward_metric("number")))? {
        say(format_args!("right sums      {}", moved(ends)))?;
    }
    if let Some((before, after)) = stages.ends("grpo", "eval_completions/mean_length")? {
        say(format_args!("tokens          {before:.1} -> {after:.1}"))?;
    }
    if let Some((before, after)) = stages.ends("grpo", SCORES)? {
        say(format_args!("score sampled   {before:.3} -> {after:.3}"))?;
    }
    stages.close("grpo")?;
    Ok(ExitCode::SUCCESS)
}

/// Questions for all sums of two numbers up to the largest, in an order that mixes them and is the same everywhere.
fn sums() -> Vec<Value> {
    let count = LARGEST * LARGEST;
    let row = |number: u64| {
        // 607 shares no factor with the count, so every sum comes once.
        let mixed = number * 607 % count;
        let (one, other) = (mixed / LARGEST + 1, mixed % LARGEST + 1);
        let question = format!("What is {one} + {other}? Reply with the number alone.");
        json!({"prompt": [{"role": "user", "content": question}], "answer": one + other})
    };
    (0..count).map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sum_is_asked_once_with_its_answer() {
        let rows = sums();
        let questions: std::collections::HashSet<String> =
            rows.iter().map(|row| row["prompt"][0]["content"].to_string()).collect();
        assert_eq!((rows.len(), questions.len()), (900, 900));
        assert_eq!(rows[0]["answer"], 2);
        assert!(rows.iter().all(|row| (2..=60).contains(&row["answer"].as_u64().expect("a number"))));
    }
}
