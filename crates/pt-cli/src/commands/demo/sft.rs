//! `pt demo sft`: SQuAD's questions, answered with words of the passage.

use super::{DemoRows, Plan, Question, RunArgs};
use crate::task::SftTask;
use anyhow::{Context, Result};
use pt_train::Origin;
use pt_train::data::{Message, Row, RowContent, Text};
use serde_json::{Value, json};
use std::path::Path;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    run: RunArgs,
    /// Questions to train on.
    #[arg(long, default_value_t = 640)]
    train_rows: usize,
    /// Held-out questions, from other articles.
    #[arg(long, default_value_t = 120)]
    eval_rows: usize,
}

/// SQuAD's articles, each a list of its answerable questions, in file order.
fn read_squad(path: &Path) -> Result<Vec<Vec<Question>>> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}: run `pt fetch squad`", path.display()))?;
    let squad: Value = serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
    let list = |value: &Value, field: &str| value[field].as_array().cloned().unwrap_or_default();
    let articles = list(&squad, "data");
    let articles = articles.iter().map(|article| {
        let mut questions = Vec::new();
        for paragraph in list(article, "paragraphs") {
            let context = paragraph["context"].as_str().unwrap_or_default();
            for question in list(&paragraph, "qas") {
                let answers: Vec<String> =
                    list(&question, "answers").iter().filter_map(|a| a["text"].as_str().map(str::to_string)).collect();
                if question["is_impossible"] == true || answers.is_empty() {
                    continue;
                }
                let ask = question["question"].as_str().unwrap_or_default().trim();
                questions.push(Question {
                    prompt: format!("{context}\n\nQuestion: {ask}\nAnswer with a few words taken from the text."),
                    answers,
                });
            }
        }
        questions
    });
    Ok(articles.collect())
}

/// About `count` questions, an equal number of evenly spaced ones from each article, article by article in turn.
fn pick(articles: &[Vec<Question>], count: usize) -> Vec<&Question> {
    let each = count.div_ceil(articles.len().max(1));
    let mut picked: Vec<&Question> = Vec::new();
    for round in 0..each {
        for article in articles {
            let index = round * article.len() / each;
            picked.extend(article.get(index));
        }
    }
    picked.truncate(count);
    picked
}

fn row(question: &Question, index: usize) -> Row {
    let turn = |role: &str, text: &str| Text::Chat(vec![Message::new(role, text)]);
    Row {
        source: "squad".into(),
        adapter: None,
        origin: Origin { path: "squad.json".into(), position: index, is_line: false },
        content: RowContent::Completion {
            prompt: turn("user", &question.prompt),
            completion: turn("assistant", &question.answers[0]),
            tools: None,
        },
    }
}

/// The same rows as a file of `--data`.
fn json_lines(questions: &[&Question]) -> String {
    let turn = |role: &str, text: &str| json!([{"role": role, "content": text}]);
    let line =
        |q: &&Question| json!({"prompt": turn("user", &q.prompt), "completion": turn("assistant", &q.answers[0])});
    questions.iter().map(|question| format!("{}\n", line(question))).collect()
}

pub(super) fn run(args: Args) -> Result<ExitCode> {
    let RunArgs { data, .. } = &args.run;
    args.run.check_output()?;
    let articles = read_squad(&data.join("squad.json"))?;
    anyhow::ensure!(articles.len() > 8, "{}: holds {} articles, expected over 8", data.display(), articles.len());
    // Held out by article, so that no passage is seen in training.
    let (held_out, training) = articles.split_at(7);
    let (train_questions, eval_questions) = (pick(training, args.train_rows), pick(held_out, args.eval_rows));
    let plan = Plan {
        task: SftTask,
        settings: &[("save_every", "50"), ("data.max_length", "768"), ("data.too_long", "drop")],
        train: rows(&train_questions),
        held_out: rows(&eval_questions),
        about: format!(
            "{} questions to train on, {} held out from {} other articles (SQuAD, CC BY-SA 4.0)",
            train_questions.len(),
            eval_questions.len(),
            held_out.len()
        ),
        questions: eval_questions
            .into_iter()
            .map(|q| Question { prompt: q.prompt.clone(), answers: q.answers.clone() })
            .collect(),
    };
    match args.run.carry_out(plan, |_, _, _| Ok(()))? {
        Some((done, ())) => done.say(&[])?,
        None => return Ok(ExitCode::from(130)),
    }
    Ok(ExitCode::SUCCESS)
}

/// Questions as rows.
fn rows(questions: &[&Question]) -> DemoRows {
    let rows = questions.iter().enumerate().map(|(index, question)| row(question, index)).collect();
    DemoRows { rows, json_lines: json_lines(questions) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_picked_evenly_from_all_articles() {
        let article = |n: usize| {
            (0..n).map(|i| Question { prompt: i.to_string(), answers: vec!["x".into()] }).collect::<Vec<_>>()
        };
        let articles = [article(10), article(4)];
        let picked: Vec<&str> = pick(&articles, 4).iter().map(|q| q.prompt.as_str()).collect();
        assert_eq!(picked, ["0", "0", "5", "2"]);
    }
}
