//! `pt demo dpo`: right answers preferred to hallucinated ones.

use super::{DemoRows, Plan, Question, RunArgs};
use crate::dpo_task::{DpoTask, accuracy_on};
use anyhow::{Context, Result};
use pt_train::data::{ReadOptions, read_rows};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    run: RunArgs,
    /// Pairs to train on.
    #[arg(long, default_value_t = 320)]
    train_rows: usize,
    /// Held-out pairs, on other passages.
    #[arg(long, default_value_t = 100)]
    eval_rows: usize,
    /// A file of other pairs to judge once trained, such as test.jsonl of hhh-alignment.
    #[arg(long)]
    test_data: Option<PathBuf>,
}

pub(super) fn run(args: Args) -> Result<ExitCode> {
    args.run.check_output()?;
    let pick = |name: &str, count| pick(&args.run.data.join(name), count);
    let (train, held_out) = (pick("train.jsonl", args.train_rows)?, pick("validation.jsonl", args.eval_rows)?);
    let plan = Plan {
        task: DpoTask,
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
    let Some(done) = args.run.carry_out(plan)? else { return Ok(ExitCode::from(130)) };
    let held_out = done.finished.held_out()?;
    let mut own = Vec::new();
    for (name, label) in [(pt_dpo::ACCURACY, "pairs told apart"), (pt_dpo::LOGPS_ACCURACY, "more probable  ")] {
        own.extend(held_out.get(name).map(|share| format!("{label}{} % of the held-out ones", percent(*share))));
    }
    if let Some(path) = &args.test_data {
        let rows = read_rows(std::slice::from_ref(path), &done.job.config.data.read_options())?;
        let accuracy = accuracy_on(&done.job, &done.pretrained, &done.model, &done.finished.sites, &rows)?;
        own.push(format!("pairs told apart{} % of {}", percent(accuracy), path.display()));
    }
    done.say(&own)?;
    Ok(ExitCode::SUCCESS)
}

fn percent(share: f64) -> String {
    format!(" {:.1}", share * 100.0)
}

/// About `count` pairs of a file, evenly spaced, and what they ask.
fn pick(path: &Path, count: usize) -> Result<(DemoRows, Vec<Question>)> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read {}: run `pt fetch halueval-qa`", path.display()))?;
    let lines: Vec<&str> = text.lines().collect();
    let count = count.min(lines.len());
    let lines: Vec<&str> = (0..count).map(|number| lines[number * lines.len() / count]).collect();
    let json_lines: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let folder = tempfile::tempdir()?;
    let picked = folder.path().join("pairs.jsonl");
    std::fs::write(&picked, &json_lines)?;
    let rows = read_rows(&[picked], &ReadOptions { as_chat: true, ..ReadOptions::default() })?;
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
