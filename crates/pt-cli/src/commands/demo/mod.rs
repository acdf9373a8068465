//! `pt demo`: a main job on a real model and real data, measured before and after.

mod dpo;
mod grpo;
mod rlhf;
mod sft;
mod stages;

use crate::answers::answers;
use crate::interrupts;
use crate::job::{Finished, Job};
use crate::open::BaseFormat;
use crate::run_command::{RunCommand, absolute, dtype_name};
use crate::talk::say;
use crate::task::Task;
use anyhow::{Context, Result};
use pt_model::{Bare, CausalLm, Pretrained, Sites};
use pt_rlhf::reward::{Normalization, token_f1};
use pt_tensor::{Kind, parse_device, parse_kind};
use pt_train::data::{Encode, Message, Row};
use pt_train::encoder::ModelEncoder;
use pt_train::report::{Better, Headline, Sample};
use pt_train::run_dir::RunDir;
use pt_train::settings::TrainConfig;
use pt_train::train::Ending;
use std::path::PathBuf;
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
    Sft(sft::Args),
    /// Teach it to prefer right answers on a passage to hallucinated ones (HaluEval).
    Dpo(dpo::Args),
    /// SFT, a reward model from rankings, PPO: answers that it likes, judged by what is right.
    Rlhf(rlhf::Args),
    /// Teach it sums by rewards of rule.
    Grpo(grpo::Args),
}

/// What every demo is asked with.
#[derive(clap::Args)]
struct RunArgs {
    /// The model file.
    #[arg(long)]
    model: PathBuf,
    /// Folder with the data set.
    #[arg(long)]
    data: PathBuf,
    /// New folder for the run.
    #[arg(long)]
    output: PathBuf,
    /// auto, cpu, cuda or mps.
    #[arg(long, default_value = "auto")]
    device: String,
    /// auto, f32 or bf16.
    #[arg(long, default_value = "auto")]
    dtype: String,
    /// Set a field of the training configuration, as in the command that the demo shows.
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
    interrupts::watch();
    match args.demo {
        Demo::Sft(args) => sft::run(args),
        Demo::Dpo(args) => dpo::run(args),
        Demo::Rlhf(args) => rlhf::run(args),
        Demo::Grpo(args) => grpo::run(args),
    }
}

/// A question with its accepted answers.
struct Question {
    prompt: String,
    answers: Vec<String>,
}

/// Rows of a demo, as rows and as the lines of a file of `--data`.
struct DemoRows {
    rows: Vec<Row>,
    json_lines: String,
}

/// What is trained and what is asked before and after.
struct Plan<T> {
    task: T,
    /// Settings that differ from the command's own.
    settings: &'static [(&'static str, &'static str)],
    train: DemoRows,
    held_out: DemoRows,
    /// Of the held-out rows.
    questions: Vec<Question>,
    /// What the rows are and whose, in a line.
    about: String,
}

/// A demo that ran to its end.
struct Done<T: Task> {
    job: Job<T>,
    model: CausalLm,
    finished: Finished,
    exact: (f64, f64),
    f1: (f64, f64),
}

impl RunArgs {
    /// Refuses a folder that holds a run (or holds none to resume), before anything is read.
    fn check_output(&self) -> Result<()> {
        match self.resume {
            true => drop(RunDir::open(&self.output)?),
            false => RunDir::check_free(&self.output)?,
        }
        Ok(())
    }

    /// Answers, trains, answers again, and writes the report; `None` after an interrupt. `first` looks at the model before
    /// it is trained.
    fn carry_out<T: Task, F>(
        &self,
        plan: Plan<T>,
        first: impl FnOnce(&Job<T>, &Pretrained, &CausalLm) -> Result<F>,
    ) -> Result<Option<(Done<T>, F)>> {
        // A resumed run goes on with its own configuration.
        let saved = Some(self.output.join("config.yaml")).filter(|path| self.resume && path.exists());
        let mut sets: Vec<(String, String)> = Vec::new();
        if saved.is_none() {
            sets.extend(plan.settings.iter().map(|(key, value)| ((*key).to_string(), (*value).to_string())));
        }
        sets.extend(self.set.iter().map(|text| pt_train::config::parse_set(text)).collect::<Result<Vec<_>, _>>()?);
        let mut config: TrainConfig<T::Settings> = pt_train::config::load_config(saved.as_deref(), &sets)?;
        T::settle(&mut config);
        config.validate()?;
        let device = parse_device(&self.device)?;
        // All weights are trained in the number format of their masters.
        let kind = if config.peft.is_some() { parse_kind(&self.dtype)?.kind(device) } else { Kind::Float };
        // The rows are a choice of a larger set, so the run keeps them; `--resume` finds them there.
        let own_file = |name: &str| std::path::absolute(self.output.join(name)).map(|path| path.display().to_string());
        let command = RunCommand {
            task: T::COMMAND.into(),
            model: absolute(&self.model.to_string_lossy()),
            adapter: None,
            data: vec![own_file(TRAINING)?],
            eval_data: vec![own_file(HELD_OUT)?],
            device: self.device.clone(),
            dtype: dtype_name(kind).into(),
            weights: BaseFormat::AsStored.name().into(),
            samples: Some(0),
        };
        let job = Job {
            task: plan.task,
            model_path: self.model.clone(),
            adapter: None,
            device,
            kind,
            rows: plan.train.rows,
            eval_rows: plan.held_out.rows,
            config,
            output: self.output.clone(),
            resume: self.resume,
            // The demo measures its own answers, more of them.
            num_samples: 0,
            command: Some(command),
            files: vec![(TRAINING, plan.train.json_lines), (HELD_OUT, plan.held_out.json_lines)],
            again: again(std::env::args()),
        };
        eprintln!("{}", plan.about);
        let pretrained = Pretrained::open(&self.model)?;
        let encoder = ModelEncoder::new(&pretrained).context("the model carries no tokenizer")?;
        let checked = job.check(&pretrained)?;
        let mut model = CausalLm::load(&pretrained, job.device, job.kind)?;
        let first = first(&job, &pretrained, &model)?;
        let bare: Rc<dyn Sites> = Rc::new(Bare);
        let before = answer(&model, &bare, &encoder, &plan.questions, "before training")?;
        let finished = job.train(&pretrained, &mut model, checked)?;
        if finished.outcome.ending == Ending::Interrupted {
            return Ok(None);
        }
        let after = answer(&model, &finished.sites, &encoder, &plan.questions, "after training")?;
        drop(encoder);
        let answers = before.texts.iter().zip(&after.texts);
        let samples: Vec<Sample> = plan
            .questions
            .iter()
            .zip(answers)
            .take(12)
            .map(|(question, (before, after))| Sample {
                prompt: question.prompt.clone(),
                expected: Some(question.answers[0].clone()),
                before: Some(before.clone()),
                after: after.clone(),
            })
            .collect();
        tell(&samples);
        let (exact, f1) = ((before.exact, after.exact), (before.f1, after.f1));
        finished.report(&job, vec![headline("exact answers", exact), headline("answer F1", f1)], samples)?;
        Ok(Some((Done { job, model, finished, exact, f1 }, first)))
    }
}

impl<T: Task> Done<T> {
    /// The results that every demo closes with, after `own` ones.
    fn say(&self, own: &[String]) -> Result<()> {
        let (before, after) = self.finished.loss;
        let (before, after) = (before.unwrap_or(f64::NAN), after.unwrap_or(f64::NAN));
        let unit = T::LOSS_UNIT.replace('/', " per ");
        say(format_args!("held-out loss   {before:.4} -> {after:.4} {unit}"))?;
        own.iter().try_for_each(say)?;
        say(format_args!("exact answers   {}", moved(self.exact)))?;
        say(format_args!("answer F1       {}", moved(self.f1)))?;
        say(format_args!("report          {}", self.finished.run.report_path().display()))?;
        say(format_args!("adapter         {}", self.finished.chosen.display()))?;
        say("\nTalk with it:")?;
        say(format_args!(
            "  cargo run --release -p pt-cli -- chat --model {} --adapter {}",
            self.job.model_path.display(),
            self.finished.chosen.display()
        ))
    }
}

fn headline(label: &str, (before, after): (f64, f64)) -> Headline {
    Headline {
        label: label.into(),
        before: Some(before * 100.0),
        after: after * 100.0,
        unit: "%".into(),
        better: Better::Higher,
    }
}

/// A table of some answers.
fn tell(samples: &[Sample]) {
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
}

/// SQuAD's token F1 of an answer against the best of the accepted ones.
fn f1(answer: &str, accepted: &[String]) -> f64 {
    accepted.iter().map(|gold| token_f1(answer, gold)).fold(0.0, f64::max)
}

/// A share before and after.
fn moved((before, after): (f64, f64)) -> String {
    format!("{} -> {}", percent(before), percent(after))
}

/// A share in per cent.
fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// What a model answers.
struct Answers {
    /// Share of exact ones.
    exact: f64,
    /// Mean F1.
    f1: f64,
    texts: Vec<String>,
}

/// Asks the questions.
fn answer(
    model: &CausalLm,
    sites: &Rc<dyn Sites>,
    encoder: &ModelEncoder<'_>,
    questions: &[Question],
    what: &str,
) -> Result<Answers> {
    let prompts: Vec<Vec<i64>> = questions
        .iter()
        .map(|q| {
            let text =
                encoder.render(&[Message::new("user", q.prompt.as_str())], None, true).map_err(anyhow::Error::msg)?;
            encoder.encode(&text).map_err(anyhow::Error::msg)
        })
        .collect::<Result<_>>()?;
    let answers = answers(model, sites, encoder, &prompts, 32, what)?;
    let normal = |text: &str| Normalization::Squad.apply(text);
    let is_exact = |(q, answer): &(&Question, &String)| q.answers.iter().any(|gold| normal(gold) == normal(answer));
    let count = questions.len().max(1) as f64;
    let exact = questions.iter().zip(&answers).filter(is_exact).count() as f64 / count;
    let mean_f1 = questions.iter().zip(&answers).map(|(q, a)| f1(a, &q.answers)).sum::<f64>() / count;
    eprintln!("{what}: exact answers {:.1} %, F1 {:.1} %", exact * 100.0, mean_f1 * 100.0);
    Ok(Answers { exact, f1: mean_f1, texts: answers })
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
