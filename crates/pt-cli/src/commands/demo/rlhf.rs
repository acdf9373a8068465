//! `pt demo rlhf`: SFT, a reward model, PPO.
//!
//! The reward model learns from rankings of AlpacaEval (answers of eight assistants to an instruction, as several judges
//! order them) and from HaluEval's right and hallucinated answers. The policy then answers HaluEval's questions and sees
//! only what the reward model says of its answers. What is wanted, the right answer, is known and checked on held-out
//! questions, and never shown to it.

use super::percent;
use super::stages::{StageArgs, rows_of, spaced};
use crate::job::measured_before;
use crate::talk::say;
use anyhow::{Result, ensure};
use pt_rlhf::{ACCURACY, EVAL_SCORES, reward_metric};
use pt_train::run_dir::RunDir;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    stages: StageArgs,
    /// Folder of HaluEval's questions.
    #[arg(long)]
    data: PathBuf,
    /// Folder of AlpacaEval's rankings.
    #[arg(long)]
    rankings: PathBuf,
}

const STAGES: [&str; 3] = ["sft", "reward", "ppo"];
/// Questions with passages of at most so many words, so that a rollout takes seconds.
const MAX_WORDS: usize = 50;
/// Answers to shorter instructions, and shorter ones, are ranked.
const MAX_RANKED_WORDS: usize = 60;
/// Answers to an instruction that are ranked.
const NUM_RANKED: usize = 4;

pub(super) fn run(args: Args) -> Result<ExitCode> {
    let stages = &args.stages;
    stages.check(&STAGES)?;
    let is_short = |row: &Value| words(&row["prompt"]) <= MAX_WORDS;
    let pick = |file: &str| -> Result<Vec<Value>> {
        Ok(rows_of(&args.data, file, "halueval-qa")?.into_iter().filter(is_short).collect())
    };
    let (training, held_out) = (pick("train.jsonl")?, pick("validation.jsonl")?);
    ensure!(training.len() >= 4 && !held_out.is_empty(), "{}: holds too few short rows", args.data.display());
    let ranked = |file: &str| -> Result<Vec<Value>> {
        Ok(rows_of(&args.rankings, file, "alpaca-eval")?.iter().filter_map(short_ranking).collect())
    };

    // No question serves two purposes, and those that the policy is judged on are of the set's own held-out part.
    let part = |number: usize| training.iter().skip(number).step_by(4).cloned().collect::<Vec<_>>();
    let sft = stages.write_rows("sft.jsonl", &map(&spaced(&part(0), 48), "completion"))?;
    let pairs = stages.write_rows("pairs.jsonl", &map(&spaced(&part(1), 96), "chosen"))?;
    let held_out_pairs = stages.write_rows("held_out_pairs.jsonl", &map(&spaced(&part(2), 48), "chosen"))?;
    let rankings = stages.write_rows("rankings.jsonl", &spaced(&ranked("rankings_train.jsonl")?, 96))?;
    let held_out_rankings = stages.write_rows("held_out_rankings.jsonl", &ranked("rankings_validation.jsonl")?)?;
    let prompts = stages.write_rows("prompts.jsonl", &map(&part(3), "answer"))?;
    let held_out_prompts = stages.write_rows("held_out_prompts.jsonl", &map(&held_out, "answer"))?;

    // 1. Some answers to learn the task from.
    let chat = ("data.as_chat", "true");
    let settings = [chat, ("learning_rate", "2e-4"), ("batch.batch_size", "8")];
    let flags = [("data", sft.as_path()), ("samples", "0".as_ref())];
    if let Some(code) = stages.run("sft", &flags, &settings)?.early() {
        return Ok(code);
    }
    // 2. What people and judges prefer.
    let flags = [
        ("data", rankings.as_path()),
        ("data", &pairs),
        ("eval-data", &held_out_rankings),
        ("eval-data", &held_out_pairs),
    ];
    let settings = [chat, ("learning_rate", "1e-4"), ("batch.batch_size", "8")];
    if let Some(code) = stages.run("reward", &flags, &settings)?.early() {
        return Ok(code);
    }
    // 3. Answers that the reward model likes. F1 with the right answer is watched and not rewarded.
    let (policy, judge) = (stages.run_of("sft"), std::path::absolute(stages.run_of("reward"))?);
    let judge = judge.to_string_lossy().replace('\'', "''");
    let rewards = format!("[{{type: model, path: '{judge}'}}, {{type: f1, weight: 0}}]");
    let critic = format!("'{judge}'");
    let settings = [
        chat,
        ("rewards", rewards.as_str()),
        ("critic.path", &critic),
        ("batch.batch_size", "8"),
        ("num_samples", "4"),
        ("num_epochs", "1"),
        ("num_minibatches", "2"),
        ("rollout.max_new_tokens", "16"),
        ("learning_rate", "2e-4"),
        ("max_steps", "18"),
        ("eval_every", "0"),
    ];
    let flags = [("adapter", policy.as_path()), ("data", &prompts), ("eval-data", &held_out_prompts)];
    if let Some(code) = stages.run("ppo", &flags, &settings)?.early() {
        return Ok(code);
    }

    say("\nOn held-out questions and rankings, before -> after, and of the rollouts, first -> last:")?;
    let shown = |label: &str, ends: Option<(f64, f64)>, show: &dyn Fn(f64) -> String| match ends {
        Some((before, after)) => say(format_args!("{label:<30}{} -> {}", show(before), show(after))),
        None => Ok(()),
    };
    let before = measured_before(&RunDir::open(&stages.run_of("reward"))?)?.get(ACCURACY).copied();
    let after = stages.ends("reward", &format!("eval_{ACCURACY}"))?.map(|(_, after)| after);
    let plain = |value: f64| format!("{value:.3}");
    shown("reward model's accuracy", before.zip(after), &percent)?;
    shown("score by the reward model", stages.ends("ppo", EVAL_SCORES)?, &plain)?;
    shown("F1 with the right answer", stages.ends("ppo", &format!("eval_{}", reward_metric("f1")))?, &percent)?;
    shown("tokens of an answer", stages.ends("ppo", "eval_completions/mean_length")?, &|value| format!("{value:.1}"))?;
    shown("rollouts' KL to SFT, nats", stages.ends("ppo", "objective/kl")?, &plain)?;
    stages.close("ppo")?;
    Ok(ExitCode::SUCCESS)
}

fn words(text: &Value) -> usize {
    text.as_str().unwrap_or_default().split_whitespace().count()
}

/// Rows of HaluEval for a stage: their right answer under the stage's own name, beside the wrong one for pairs.
fn map(rows: &[Value], answer: &str) -> Vec<Value> {
    let text = |value: &Value| value.as_str().unwrap_or_default().trim().to_owned();
    let row = |row: &Value| {
        let mut mapped = json!({"prompt": row["prompt"], answer: text(&row["chosen"])});
        if answer == "chosen" {
            mapped["rejected"] = text(&row["rejected"]).into();
        }
        mapped
    };
    rows.iter().map(row).collect()
}

/// The first short answers of a ranking; `None` where too few are left, or all are as good.
fn short_ranking(row: &Value) -> Option<Value> {
    let (completions, ranks) = (row["completions"].as_array()?, row["ranks"].as_array()?);
    if words(&row["prompt"]) > MAX_RANKED_WORDS {
        return None;
    }
    let short = completions.iter().zip(ranks).filter(|(text, _)| words(text) <= MAX_RANKED_WORDS);
    let (completions, ranks): (Vec<&Value>, Vec<&Value>) = short.take(NUM_RANKED).unzip();
    let is_ranked = ranks.windows(2).any(|pair| pair[0] != pair[1]);
    (completions.len() > 2 && is_ranked)
        .then(|| json!({"prompt": row["prompt"], "completions": completions, "ranks": ranks}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_answers_of_different_ranks_make_a_ranking() {
        let long = "word ".repeat(MAX_RANKED_WORDS + 1);
        let row = |ranks: [u8; 4]| json!({"prompt": "p", "completions": ["a", long, "b", "c"], "ranks": ranks});
        let kept = short_ranking(&row([0, 1, 2, 0])).expect("three are left");
        assert_eq!(kept, json!({"prompt": "p", "completions": ["a", "b", "c"], "ranks": [0, 2, 0]}));
        assert!(short_ranking(&row([1, 0, 1, 1])).is_none(), "all as good");
        assert!(short_ranking(&json!({"prompt": long, "completions": ["a", "b", "c"], "ranks": [0, 1, 2]})).is_none());
    }

    #[test]
    fn pairs_keep_the_wrong_answer_and_prompts_do_not() {
        let rows = [json!({"prompt": "q", "chosen": " right", "rejected": " wrong"})];
        assert_eq!(map(&rows, "chosen"), [json!({"prompt": "q", "chosen": "right", "rejected": "wrong"})]);
        assert_eq!(map(&rows, "answer"), [json!({"prompt": "q", "answer": "right"})]);
    }
}
