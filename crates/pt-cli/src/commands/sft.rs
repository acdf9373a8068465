//! `pt sft`

use crate::open::{ModelArgs, no_tokenizer};
use crate::talk;
use anyhow::{Context, Result, bail};
use pt_model::{Bare, CausalLm, Pretrained, Sites};
use pt_peft::{Adapter, LoraAdapter};
use pt_tensor::{Device, Kind};
use pt_train::config::{flatten, load_config, parse_set, to_yaml};
use pt_train::data::{Preflight, PreflightSummary, Row, overlap, preflight, read_rows};
use pt_train::encoder::ModelEncoder;
use pt_train::report::{Better, Headline, Report, Sample};
use pt_train::run_dir::RunDir;
use pt_train::sft::{Ending, Evaluation, Observer, Outcome, SftConfig, StepRecord, Trained, evaluate, train};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Training rows, JSONL or JSON: `messages`; `prompt`, `completion`; `instruction`, `input`, `output`; or `text`.
    #[arg(long, required = true)]
    data: Vec<PathBuf>,
    /// Held-out rows of the same forms.
    #[arg(long)]
    eval_data: Vec<PathBuf>,
    /// New folder for the run: configuration, metrics, checkpoints, the adapter and report.html.
    #[arg(long)]
    output: PathBuf,
    /// YAML file with any of the fields that --print-config shows.
    #[arg(long)]
    config: Option<PathBuf>,
    /// Set one field, e.g. --set learning_rate=1e-4 or --set lora.rank=8 (--set lora=null trains all weights).
    #[arg(long, value_name = "FIELD=VALUE")]
    set: Vec<String>,
    /// Continue the run in --output from its last checkpoint.
    #[arg(long)]
    resume: bool,
    /// Check the data, show what would be trained, and stop.
    #[arg(long)]
    dry_run: bool,
    /// Print the resolved configuration and stop.
    #[arg(long)]
    print_config: bool,
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    let sets = args.set.iter().map(|text| parse_set(text)).collect::<Result<Vec<_>, _>>()?;
    // A resumed run goes on with its own configuration unless another is named.
    let saved = args.resume.then(|| args.output.join("config.yaml")).filter(|path| path.exists());
    let config: SftConfig = load_config(args.config.as_deref().or(saved.as_deref()), &sets)?;
    config.validate()?;
    if args.print_config {
        print!("{}", to_yaml(&config)?);
        return Ok(ExitCode::SUCCESS);
    }
    let device = args.model.device()?;
    let job = Job {
        model_path: args.model.path()?,
        adapter: args.model.adapter.clone(),
        device,
        // The compute kind of full fine-tuning is that of the masters.
        kind: if config.lora.is_none() { Kind::Float } else { args.model.kind()? },
        rows: read_rows(&args.data, &config.data.read_options())?,
        eval_rows: if args.eval_data.is_empty() {
            vec![]
        } else {
            read_rows(&args.eval_data, &config.data.read_options())?
        },
        config,
        output: args.output,
        resume: args.resume,
    };
    let pretrained = Pretrained::open(&job.model_path)?;
    let checked = job.check(&pretrained)?;
    if args.dry_run {
        let steps = checked.train.groups.len().div_ceil(job.config.batch.batch_size * job.config.batch.accumulation);
        eprintln!("{steps} steps an epoch; nothing was trained (--dry-run)");
        return Ok(ExitCode::SUCCESS);
    }
    let mut model = CausalLm::load(&pretrained, job.device, job.kind)?;
    let finished = job.train(&pretrained, &mut model, checked, vec![])?;
    Ok(match finished.outcome.ending {
        Ending::Interrupted => ExitCode::from(130),
        _ => ExitCode::SUCCESS,
    })
}

/// One run of fine-tuning; `pt demo` runs the same.
pub(crate) struct Job {
    pub(crate) model_path: PathBuf,
    pub(crate) adapter: Option<PathBuf>,
    pub(crate) device: Device,
    pub(crate) kind: Kind,
    pub(crate) rows: Vec<Row>,
    pub(crate) eval_rows: Vec<Row>,
    pub(crate) config: SftConfig,
    pub(crate) output: PathBuf,
    pub(crate) resume: bool,
}

/// Data that passed the pre-flight.
pub(crate) struct Checked {
    pub(crate) train: Preflight,
    pub(crate) eval: Option<Preflight>,
}

/// What stands after training.
pub(crate) struct Finished {
    pub(crate) outcome: Outcome,
    pub(crate) before: Option<Evaluation>,
    pub(crate) adapter: PathBuf,
    pub(crate) sites: Rc<dyn Sites>,
    pub(crate) run: RunDir,
    summaries: Vec<(String, PreflightSummary)>,
    seconds: f64,
}

impl Job {
    /// Tokenizes and checks all rows, and shows what will be trained.
    pub(crate) fn check(&self, pretrained: &Pretrained) -> Result<Checked> {
        let encoder = ModelEncoder::new(pretrained).ok_or_else(|| no_tokenizer(pretrained))?;
        let context = pretrained.config.max_position_embeddings as usize;
        if self.config.data.max_length > context {
            bail!(talk::Usage(format!(
                "data.max_length is {}, the model's context is {context}",
                self.config.data.max_length
            )));
        }
        let train = preflight(&self.rows, &encoder, &self.config.data)?;
        eprintln!("{}", train.summary.to_text());
        for example in train.examples(&self.rows, &encoder, talk::is_terminal()) {
            eprintln!("{example}\n");
        }
        let eval = (!self.eval_rows.is_empty())
            .then(|| preflight(&self.eval_rows, &encoder, &self.config.data))
            .transpose()?;
        if let Some(eval) = &eval {
            let shared = overlap(&train.groups, &eval.groups);
            if shared > 0 {
                eprintln!("warning: {shared} held-out rows stand in the training data too");
            }
        }
        Ok(Checked { train, eval })
    }

    /// Trains and saves the adapter (or the model) under `output`.
    pub(crate) fn train(
        &self,
        pretrained: &Pretrained,
        model: &mut CausalLm,
        checked: Checked,
        samples: Vec<Sample>,
    ) -> Result<Finished> {
        let started = Instant::now();
        let eval_groups = checked.eval.as_ref().map_or(vec![], |eval| eval.groups.clone());
        let mut summaries = vec![("training".to_string(), checked.train.summary)];
        summaries.extend(checked.eval.map(|eval| ("held out".to_string(), eval.summary)));

        let (sites, parameters, adapter): (Rc<dyn Sites>, _, Option<Rc<LoraAdapter>>) = match &self.config.lora {
            Some(lora) => {
                let mut lora = lora.clone();
                lora.base_model_name_or_path.get_or_insert_with(|| self.model_path.display().to_string());
                let adapter = match &self.adapter {
                    Some(folder) => LoraAdapter::load(folder, model)?,
                    None => LoraAdapter::new(lora, model, self.config.seed)?,
                };
                adapter.set_training(true);
                let adapter = Rc::new(adapter);
                (adapter.clone(), adapter.parameters(), Some(adapter))
            }
            None => (Rc::new(Bare), model.train_all()?, None),
        };
        // After the settings have proved to fit the model, so that a refused run leaves no folder behind.
        let run = match self.resume {
            true => RunDir::open(&self.output)?,
            false => RunDir::create(&self.output, &to_yaml(&self.config)?)?,
        };
        let num_trained: usize = parameters.iter().map(|(_, p)| p.numel()).sum();
        eprintln!(
            "training {num_trained} parameters in {} tensors, {:?} on {:?}",
            parameters.len(),
            self.kind,
            self.device
        );
        let before = match (eval_groups.is_empty(), self.resume) {
            (false, false) => {
                let bare: Rc<dyn Sites> = Rc::new(Bare);
                let before = evaluate(model, &bare, &eval_groups, 4096)?;
                eprintln!(
                    "held out before training: loss {:.4}, token accuracy {:.1} %",
                    before.loss,
                    before.accuracy * 100.0
                );
                Some(before)
            }
            _ => None,
        };
        let model = &*model;
        let save = |folder: &Path| -> pt_train::Result<()> {
            match &adapter {
                Some(adapter) => Ok(adapter.save(&folder.join("adapter"))?),
                None => save_model(&folder.join("model"), pretrained, model, 5_000_000_000),
            }
        };
        let trained = Trained { model, sites: sites.clone(), parameters, save: Box::new(save) };
        let stop = Arc::new(AtomicBool::new(false));
        watch_interrupts(stop.clone());
        let mut progress = Progress::default();
        let outcome = train(&trained, checked.train.groups, &eval_groups, &self.config, &run, &stop, &mut progress)?;
        progress.finish();
        if let Some(adapter) = &adapter {
            adapter.set_training(false);
        }
        let (_, checkpoint) = run.latest()?.context("the run saved no checkpoint")?;
        let adapter = checkpoint.join(if adapter.is_some() { "adapter" } else { "model" });
        let finished = Finished {
            outcome,
            before,
            adapter,
            sites: sites.clone(),
            run,
            summaries,
            seconds: started.elapsed().as_secs_f64(),
        };
        finished.report(self, vec![], samples)?;
        match outcome.ending {
            Ending::Interrupted => eprintln!("stopped at step {}; continue with --resume", outcome.steps),
            _ => eprintln!("saved {}\nreport {}", finished.adapter.display(), finished.run.report_path().display()),
        }
        Ok(finished)
    }
}

impl Finished {
    /// Writes report.html, with more numbers and samples where a caller has them.
    pub(crate) fn report(&self, job: &Job, mut headlines: Vec<Headline>, samples: Vec<Sample>) -> Result<()> {
        if let Some(after) = self.outcome.evaluation {
            headlines.push(Headline {
                label: "held-out loss".into(),
                before: self.before.map(|e| e.loss),
                after: after.loss,
                unit: "nats/token".into(),
                better: Better::Lower,
            });
        }
        let adapter = self.adapter.display();
        let model = job.model_path.display();
        let mut commands = vec![format!("tensorboard --logdir {}", self.run.tensorboard_path().display())];
        if job.config.lora.is_some() {
            commands.insert(0, format!("pt chat --model {model} --adapter {adapter}"));
            commands.insert(1, format!("pt merge --model {model} --adapter {adapter} --output merged"));
        } else {
            commands.insert(0, format!("pt chat --model {adapter}"));
        }
        let report = Report {
            title: "Supervised fine-tuning".into(),
            subtitle: format!("{model}, {:?} on {:?}", job.kind, job.device),
            headlines,
            series: pt_train::metrics::read_series(&self.run.metrics_path())?,
            data: self.summaries.clone(),
            samples,
            facts: vec![
                ("steps".into(), self.outcome.steps.to_string()),
                ("seconds".into(), format!("{:.0}", self.seconds)),
                ("peak memory".into(), format!("{:.2} GB", pt_tensor::peak_memory_bytes().unwrap_or(0) as f64 / 1e9)),
                ("pt".into(), env!("CARGO_PKG_VERSION").into()),
            ],
            config: flatten(&job.config),
            commands,
        };
        Ok(report.write(&self.run.report_path())?)
    }
}

/// A model folder as Hugging Face has it.
pub(crate) fn save_model(
    folder: &Path,
    pretrained: &Pretrained,
    model: &CausalLm,
    max_shard_bytes: usize,
) -> pt_train::Result<()> {
    std::fs::create_dir_all(folder).map_err(|source| pt_tensor::TensorError::Write { path: folder.into(), source })?;
    let parameters = model.named_parameters()?;
    pt_tensor::io::save_sharded(folder, &parameters, max_shard_bytes)?;
    let mut config = pretrained.config.raw.clone();
    config.insert("tie_word_embeddings".into(), (!parameters.iter().any(|(name, _)| name == "lm_head.weight")).into());
    let kind = match model.kind() {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "float32",
    };
    config.insert("dtype".into(), kind.into());
    config.remove("torch_dtype");
    pt_tensor::io::write_atomically(&folder.join("config.json"), |out| {
        Ok(serde_json::to_writer_pretty(out, &config)?)
    })?;
    if let Some(tokenizer) = &pretrained.tokenizer {
        tokenizer.save(folder)?;
    }
    Ok(())
}

/// The first Ctrl-C asks for a stop after the step; a second one ends at once.
fn watch_interrupts(stop: Arc<AtomicBool>) {
    let handler = move || {
        if stop.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("\nstopping after this step and saving; Ctrl-C again ends at once");
    };
    // A second run in one process keeps the first handler, which is fine for a command-line tool.
    let _ = ctrlc::set_handler(handler);
}

/// A bar with loss and speed on a terminal, a line every so often elsewhere.
#[derive(Default)]
struct Progress {
    bar: Option<indicatif::ProgressBar>,
    last_line: Option<Instant>,
    speed: f64,
}

impl Progress {
    fn finish(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) if talk::is_terminal() => bar.println(line),
            _ => eprintln!("{line}"),
        }
    }
}

impl Observer for Progress {
    fn on_step(&mut self, record: &StepRecord) {
        self.speed = if self.speed == 0.0 {
            record.tokens_per_second
        } else {
            0.9 * self.speed + 0.1 * record.tokens_per_second
        };
        let bar = self.bar.get_or_insert_with(|| talk::bar(record.total_steps, "steps"));
        bar.set_position(record.step);
        bar.set_message(format!("loss {:.3}  {:.0} tokens/s", record.loss, self.speed));
        let is_due = self.last_line.is_none_or(|at| at.elapsed().as_secs() >= 10) || record.step == record.total_steps;
        if !talk::is_terminal() && is_due {
            self.last_line = Some(Instant::now());
            self.say(&format!(
                "step {}/{}  loss {:.4}  grad norm {:.3}  lr {:.2e}  {:.0} tokens/s",
                record.step, record.total_steps, record.loss, record.grad_norm, record.learning_rate, self.speed
            ));
        }
    }

    fn on_evaluation(&mut self, step: u64, evaluation: &Evaluation, is_best: bool) {
        let mark = if is_best { " (best so far)" } else { "" };
        self.say(&format!(
            "step {step}: held-out loss {:.4}, token accuracy {:.1} %{mark}",
            evaluation.loss,
            evaluation.accuracy * 100.0
        ));
    }
}
