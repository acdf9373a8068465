//! `pt demo`: the main job on a real model and real data, measured before and after.

use crate::answers::answers;
use crate::interrupts;
use crate::job::Job;
use crate::open::BaseFormat;
use crate::run_command::{RunCommand, absolute, dtype_name};
use crate::talk::say;
use crate::task::SftTask;
use anyhow::{Context, Result};
use pt_model::{Bare, CausalLm, Pretrained, Sites};
use pt_tensor::{Kind, parse_device, parse_kind};
use pt_train::Origin;
use pt_train::data::{Encode, Message, Row, RowContent, Text};
use pt_train::encoder::ModelEncoder;
use pt_train::report::{Better, Headline, Sample};
use pt_train::run_dir::RunDir;
use pt_train::sft::SftConfig;
use pt_train::train::Ending;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    demo: Demo,
}

#[derive(clap::Subcommand)]
enum Demo {
    /// Teach SmolLM2-135M to answer questions on a passage with the words of the passage (SQuAD).
    Sft(SftArgs),
}

#[derive(clap::Args)]
struct SftArgs {
    /// The model file.
    #[arg(long)]
    model: PathBuf,
    /// Folder with squad.json.
    #[arg(long)]
    data: PathBuf,
    /// New folder for the run.
    #[arg(long)]
    output: PathBuf,
    /// Questions to train on.
    #[arg(long, default_value_t = 640)]
    train_rows: usize,
    /// Held-out questions, from other articles.
    #[arg(long, default_value_t = 120)]
    eval_rows: usize,
    /// auto, cpu, cuda or mps.
    #[arg(long, default_value = "auto")]
    device: String,
    /// auto, f32 or bf16.
    #[arg(long, default_value = "auto")]
    dtype: String,
    /// Set a field of the training configuration, as in `pt sft`.
    #[arg(long, value_name = "FIELD=VALUE")]
    set: Vec<String>,
    /// Continue the run in --output from its last checkpoint.
    #[arg(long)]
    resume: bool,
}

/// Where the run keeps its rows.
const TRAINING: &str = "train.jsonl";
const HELD_OUT: &str = "held_out.jsonl";

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    match args.demo {
        Demo::Sft(args) => sft(args),
    }
}

/// A question with its accepted answers.
struct Question {
    prompt: String,
    answers: Vec<String>,
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

/// SQuAD's normalisation: lower case, no punctuation, no articles, single spaces.
fn normalise(text: &str) -> Vec<String> {
    let text: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    text.split_whitespace().filter(|word| !["a", "an", "the"].contains(word)).map(str::to_string).collect()
}

/// SQuAD's token F1 of an answer against the best of the accepted ones.
fn f1(answer: &str, accepted: &[String]) -> f64 {
    let words = normalise(answer);
    let score = |gold: &String| {
        let mut left = normalise(gold);
        let (num_words, num_gold) = (words.len(), left.len());
        let same = words
            .iter()
            .filter(|word| left.iter().position(|g| g == *word).map(|at| left.swap_remove(at)).is_some())
            .count();
        if num_words == 0 || num_gold == 0 {
            f64::from(num_words == num_gold)
        } else {
            2.0 * same as f64 / (num_words + num_gold) as f64
        }
    };
    accepted.iter().map(score).fold(0.0, f64::max)
}

/// Share of exact answers, mean F1, and the answers.
fn answer(
    model: &CausalLm,
    sites: &Rc<dyn Sites>,
    encoder: &ModelEncoder<'_>,
    questions: &[&Question],
    what: &str,
) -> Result<(f64, f64, Vec<String>)> {
    let prompts: Vec<Vec<i64>> = questions
        .iter()
        .map(|q| {
            let text =
                encoder.render(&[Message::new("user", q.prompt.as_str())], None, true).map_err(anyhow::Error::msg)?;
            encoder.encode(&text).map_err(anyhow::Error::msg)
        })
        .collect::<Result<_>>()?;
    let answers = answers(model, sites, encoder, &prompts, 32, what)?;
    let accepted = |q: &Question| q.answers.iter().map(|a| normalise(a)).collect::<HashSet<_>>();
    let count = questions.len() as f64;
    let exact =
        questions.iter().zip(&answers).filter(|(q, a)| accepted(q).contains(&normalise(a))).count() as f64 / count;
    let mean_f1 = questions.iter().zip(&answers).map(|(q, a)| f1(a, &q.answers)).sum::<f64>() / count;
    eprintln!("{what}: exact answers {:.1} %, F1 {:.1} %", exact * 100.0, mean_f1 * 100.0);
    Ok((exact, mean_f1, answers))
}

fn sft(args: SftArgs) -> Result<ExitCode> {
    interrupts::watch();
    // Before anything is loaded, and before the answers of the untrained model.
    match args.resume {
        true => drop(RunDir::open(&args.output)?),
        false => RunDir::check_free(&args.output)?,
    }
    let articles = read_squad(&args.data.join("squad.json"))?;
    anyhow::ensure!(articles.len() > 8, "{}: holds {} articles, expected over 8", args.data.display(), articles.len());
    // Held out by article, so that no passage is seen in training.
    let (held_out, training) = articles.split_at(7);
    let (train_questions, eval_questions) = (pick(training, args.train_rows), pick(held_out, args.eval_rows));
    let rows =
        |questions: &[&Question]| questions.iter().enumerate().map(|(index, q)| row(q, index)).collect::<Vec<_>>();

    // A resumed run goes on with its own configuration.
    let saved = Some(args.output.join("config.yaml")).filter(|path| args.resume && path.exists());
    let mut sets: Vec<(String, String)> = Vec::new();
    if saved.is_none() {
        let own = [("save_every", "50"), ("data.max_length", "768"), ("data.too_long", "drop")];
        sets.extend(own.map(|(key, value)| (key.to_string(), value.to_string())));
    }
    sets.extend(args.set.iter().map(|text| pt_train::config::parse_set(text)).collect::<Result<Vec<_>, _>>()?);
    let config: SftConfig = pt_train::config::load_config(saved.as_deref(), &sets)?;
    config.validate()?;
    let device = parse_device(&args.device)?;
    // All weights are trained in the number format of their masters.
    let kind = if config.peft.is_some() { parse_kind(&args.dtype)?.kind(device) } else { Kind::Float };
    // The rows are a choice of questions, so the run keeps them; `pt sft --resume` finds them there.
    let own_file = |name: &str| std::path::absolute(args.output.join(name)).map(|path| path.display().to_string());
    let command = RunCommand {
        model: absolute(&args.model.to_string_lossy()),
        adapter: None,
        data: vec![own_file(TRAINING)?],
        eval_data: vec![own_file(HELD_OUT)?],
        device: args.device.clone(),
        dtype: dtype_name(kind).into(),
        weights: BaseFormat::AsStored.name().into(),
        samples: Some(0),
    };
    let job = Job {
        task: SftTask,
        model_path: args.model.clone(),
        adapter: None,
        device,
        kind,
        rows: rows(&train_questions),
        eval_rows: rows(&eval_questions),
        config,
        output: args.output.clone(),
        resume: args.resume,
        // The demo measures its own answers, more of them.
        num_samples: 0,
        command: Some(command),
        files: vec![(TRAINING, json_lines(&train_questions)), (HELD_OUT, json_lines(&eval_questions))],
        again: again(std::env::args()),
    };
    eprintln!(
        "{} questions to train on, {} held out from {} other articles (SQuAD, CC BY-SA 4.0)",
        train_questions.len(),
        eval_questions.len(),
        held_out.len()
    );
    let pretrained = Pretrained::open(&args.model)?;
    let encoder = ModelEncoder::new(&pretrained).context("the model carries no tokenizer")?;
    let checked = job.check(&pretrained)?;
    let mut model = CausalLm::load(&pretrained, job.device, job.kind)?;
    let bare: Rc<dyn Sites> = Rc::new(Bare);
    let before = answer(&model, &bare, &encoder, &eval_questions, "before training")?;
    let finished = job.train(&pretrained, &mut model, checked)?;
    if finished.outcome.ending == Ending::Interrupted {
        return Ok(ExitCode::from(130));
    }
    let after = answer(&model, &finished.sites, &encoder, &eval_questions, "after training")?;

    let samples: Vec<Sample> = eval_questions
        .iter()
        .zip(before.2.iter().zip(&after.2))
        .take(12)
        .map(|(question, (before, after))| Sample {
            prompt: question.prompt.clone(),
            expected: Some(question.answers[0].clone()),
            before: Some(before.clone()),
            after: after.clone(),
        })
        .collect();
    let headline = |label: &str, before: f64, after: f64| Headline {
        label: label.into(),
        before: Some(before * 100.0),
        after: after * 100.0,
        unit: "%".into(),
        better: Better::Higher,
    };
    eprintln!("\n{:<46} | {:<22} | {:<40} | after", "question", "expected", "before");
    for sample in samples.iter().take(6) {
        let ask = sample.prompt.lines().find_map(|line| line.strip_prefix("Question: ")).unwrap_or_default();
        let cut = |text: &str, width: usize| text.replace('\n', " ").chars().take(width).collect::<String>();
        let (expected, before) =
            (sample.expected.as_deref().unwrap_or_default(), sample.before.as_deref().unwrap_or_default());
        eprintln!(
            "{:<46} | {:<22} | {:<40} | {}",
            cut(ask, 46),
            cut(expected, 22),
            cut(before, 40),
            cut(&sample.after, 40)
        );
    }
    finished.report(
        &job,
        vec![headline("exact answers", before.0, after.0), headline("answer F1", before.1, after.1)],
        samples,
    )?;
    let (loss_before, loss_after) = (finished.loss.0.unwrap_or(f64::NAN), finished.loss.1.unwrap_or(f64::NAN));
    say(format_args!("held-out loss   {loss_before:.4} -> {loss_after:.4} nats per token"))?;
    say(format_args!("exact answers   {:.1} % -> {:.1} %", before.0 * 100.0, after.0 * 100.0))?;
    say(format_args!("answer F1       {:.1} % -> {:.1} %", before.1 * 100.0, after.1 * 100.0))?;
    say(format_args!("report          {}", finished.run.report_path().display()))?;
    say(format_args!("adapter         {}", finished.chosen.display()))?;
    say("\nTalk with it:")?;
    say(format_args!(
        "  cargo run --release -p pt-cli -- chat --model {} --adapter {}",
        args.model.display(),
        finished.chosen.display()
    ))?;
    Ok(ExitCode::SUCCESS)
}

/// This command once more, with `--resume`.
fn again(words: impl Iterator<Item = String>) -> String {
    let words = words.map(|word| if word.contains(' ') { format!("'{word}'") } else { word });
    let mut words: Vec<String> = words.collect();
    if !words.iter().any(|word| word == "--resume") {
        words.push("--resume".into());
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f1_counts_shared_words_of_the_best_answer() {
        let accepted = vec!["the 10th century".to_string(), "10th and 11th".into()];
        assert_eq!(f1("10th century.", &accepted), 1.0);
        assert!((f1("in the 10th century", &accepted) - 0.8).abs() < 1e-12);
        assert_eq!(f1("France", &accepted), 0.0);
        assert_eq!(f1("", &accepted), 0.0);
    }

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
