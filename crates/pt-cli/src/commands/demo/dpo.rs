//! `pt demo dpo`: right answers preferred to hallucinated ones.

use super::{DemoRows, Plan, Question, RunArgs, moved, percent};
use crate::dpo_task::{DpoTask, TestRows};
use crate::job::Job;
use anyhow::{Context, Result, ensure};
use pt_model::{CausalLm, Pretrained};
use pt_train::data::{ReadOptions, Row, read_rows};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    run: RunArgs,
    /// Pairs to train on.
    #[arg(long, default_value_t = 192, value_parser = clap::value_parser!(u64).range(1..))]
    train_rows: u64,
    /// Held-out pairs, on other passages.
    #[arg(long, default_value_t = 80, value_parser = clap::value_parser!(u64).range(1..))]
    eval_rows: u64,
    /// A file of other pairs to judge once trained, such as test.jsonl of hhh-alignment.
    #[arg(long)]
    test_data: Option<PathBuf>,
}

pub(super) fn run(args: Args) -> Result<ExitCode> {
    args.run.check_output()?;
    let pick = |name: &str, count| pick(&args.run.data.join(name), count);
    let (train, held_out) = (pick("train.jsonl", args.train_rows)?, pick("validation.jsonl", args.eval_rows)?);
    let plan = Plan {
        task: DpoTask::default(),
        settings: &[
            ("save_every", "50"),
            ("data.as_chat", "true"),
            ("data.max_length", "512"),
            ("data.too_long", "drop"),
            ("learning_rate", "1e-4"),
            ("nll_weight", "0.2"),
        ],
        about: format!(
            "{} pairs to train on, {} held out on other passages (HaluEval, MIT)",
            train.1.len(),
            held_out.1.len()
        ),
        train: train.0,
        held_out: held_out.0,
        questions: held_out.1,
    };
    let test = args.test_data.as_deref();
    let first = |job: &Job<DpoTask>, pretrained: &Pretrained, model: &CausalLm| {
        test.map(|path| TestRows::new(job, pretrained, model, path)).transpose()
    };
    let Some((done, test_rows)) = args.run.carry_out(plan, first)? else { return Ok(ExitCode::from(130)) };
    let held_out = done.finished.held_out()?;
    let mut own = Vec::new();
    if let Some(after) = held_out.get(pt_dpo::LOGPS_ACCURACY) {
        let before = done.finished.before.get(pt_dpo::LOGPS_ACCURACY).copied().unwrap_or(f64::NAN);
        own.push(format!("right answers the more probable {} of the held-out pairs", moved((before, *after))));
    }
    // Before training the policy is its reference, which leaves nothing to tell apart by.
    let apart = |share: f64, rows: &str| format!("pairs told apart {} of {rows}", percent(share));
    own.extend(held_out.get(pt_dpo::ACCURACY).map(|share| apart(*share, "the held-out ones")));
    if let Some((rows, path)) = test_rows.zip(test) {
        let [told_apart, more_probable] = rows.after(&done.job, &done.model, &done.finished.sites)?;
        let name = path.display().to_string();
        own.push(format!("right answers the more probable {} of {name}", moved((rows.before, more_probable))));
        own.push(apart(told_apart, &name));
    }
    done.say(&own)?;
    Ok(ExitCode::SUCCESS)
}

/// About `count` pairs of a file, evenly spaced, and what they ask.
fn pick(path: &Path, count: u64) -> Result<(DemoRows, Vec<Question>)> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read {}: run `pt fetch halueval-qa`", path.display()))?;
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    // From the file itself, so that a fault names its line there.
    let all = read_rows(&[path.to_path_buf()], &ReadOptions { as_chat: true, ..ReadOptions::default() })?;
    let (found, num_lines) = (all.len(), lines.len());
    ensure!(found == num_lines, "{}: {num_lines} lines hold {found} rows, expected one row a line", path.display());
    let count = (count as usize).min(num_lines);
    let picked = |number: usize| number * num_lines / count;
    let rows: Vec<Row> = (0..count).map(|number| all[picked(number)].clone()).collect();
    let lines: Vec<&str> = (0..count).map(|number| lines[picked(number)]).collect();
    let json_lines: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let question = |line: &&str| -> Result<Question> {
        let row: Value = serde_json::from_str(line).with_context(|| path.display().to_string())?;
        let field = |name: &str| row[name].as_str().map(str::to_string);
        let (prompt, chosen) =
            field("prompt").zip(field("chosen")).context("a row has no prompt or no chosen answer")?;
        Ok(Question { prompt, answers: vec![chosen] })
    };
    let questions = lines.iter().map(question).collect::<Result<_>>()?;
    Ok((DemoRows { rows, json_lines }, questions))
}
