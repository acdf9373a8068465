//! One run of training, from checked rows to the report; the commands that train and `pt demo` run the same.

use crate::answers::{Question, answers, questions};
use crate::interrupts;
use crate::memory::Memory;
use crate::open::no_tokenizer;
use crate::run_command::RunCommand;
use crate::talk;
use crate::task::{Checked, Findings, Task};
use anyhow::{Context, Result, bail};
use pt_model::{Architecture, Bare, CausalLm, Pretrained, RunOptions, Sites};
use pt_peft::Adapter;
use pt_tensor::{Device, Kind, Tensor};
use pt_train::config::{flatten, to_yaml};
use pt_train::data::Row;
use pt_train::encoder::ModelEncoder;
use pt_train::metrics::{Series, names, read_series};
use pt_train::objective::{Evaluation, Objective, Pass, evaluate};
use pt_train::report::{Better, DataTable, Headline, Report, Sample};
use pt_train::run_dir::{Best, RunDir, write_atomic};
use pt_train::settings::TrainConfig;
use pt_train::train::{Ending, Observer, Outcome, StepRecord, Trained};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Instant;

/// Tokens of a sample answer: enough to judge it, few enough for a CPU.
const SAMPLE_TOKENS: usize = 64;

/// What a run is to do.
pub(crate) struct Job<T: Task> {
    /// What kind of training it is.
    pub(crate) task: T,
    pub(crate) model_path: PathBuf,
    pub(crate) adapter: Option<PathBuf>,
    pub(crate) device: Device,
    pub(crate) kind: Kind,
    pub(crate) rows: Vec<Row>,
    pub(crate) eval_rows: Vec<Row>,
    pub(crate) config: TrainConfig<T::Settings>,
    pub(crate) output: PathBuf,
    pub(crate) resume: bool,
    /// Held-out prompts that are answered before and after.
    pub(crate) num_samples: usize,
    /// Kept in the run's folder: from it `--resume` restores the command.
    pub(crate) command: Option<RunCommand>,
    /// Files kept beside it, by name: rows that stand nowhere else.
    pub(crate) files: Vec<(&'static str, String)>,
    /// What to type to go on after an interrupt.
    pub(crate) again: String,
}

/// What was measured before training, kept in the run's `samples.json`: a resumed run has it, too.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Measured {
    /// Held-out loss before training.
    loss: Option<f64>,
    /// The other numbers of that evaluation, by the name of their metric.
    #[serde(default)]
    values: BTreeMap<String, f64>,
    samples: Vec<Answered>,
}

/// What a run measured on its held-out rows before training, by the name of the metric.
pub(crate) fn measured_before(run: &RunDir) -> Result<BTreeMap<String, f64>> {
    Ok(Measured::load(run)?.unwrap_or_default().values)
}

/// A held-out prompt with its answers.
#[derive(Debug, Serialize, Deserialize)]
struct Answered {
    prompt: String,
    expected: String,
    before: String,
    after: Option<String>,
}

/// What stands after training.
pub(crate) struct Finished {
    pub(crate) outcome: Outcome,
    /// Held-out loss before training, and that of the checkpoint which is handed on.
    pub(crate) loss: (Option<f64>, Option<f64>),
    /// The adapter (or model) to use: of the best checkpoint where one is named, else of the last.
    pub(crate) chosen: PathBuf,
    /// Those of the last checkpoint, where it is not the best.
    pub(crate) last: Option<PathBuf>,
    /// Other numbers of the evaluation before training.
    pub(crate) before: BTreeMap<String, f64>,
    /// With the weights of `chosen`; all weights trained, with those of the last step.
    pub(crate) sites: Rc<dyn Sites>,
    pub(crate) run: RunDir,
    best: Option<Best>,
    tables: Vec<DataTable>,
    findings: Findings,
    seconds: f64,
}

impl<T: Task> Job<T> {
    /// Tokenizes and checks all rows, and shows what will be trained.
    pub(crate) fn check(&self, pretrained: &Pretrained) -> Result<Checked<T::Example>> {
        let encoder = ModelEncoder::new(pretrained).ok_or_else(|| no_tokenizer(pretrained))?;
        let context = pretrained.config.max_position_embeddings as usize;
        let virtual_tokens = self.config.method().map_or(0, |method| method.num_virtual_tokens());
        if self.config.data.max_length.saturating_add(virtual_tokens) > context {
            let beside = match virtual_tokens {
                0 => String::new(),
                count => format!(", of which {count} are for the adapter's virtual tokens"),
            };
            bail!(talk::Usage(format!(
                "data.max_length is {}, the model's context is {context}{beside}",
                self.config.data.max_length
            )));
        }
        eprintln!("checking {} rows", self.rows.len() + self.eval_rows.len());
        T::check(&self.rows, &self.eval_rows, pretrained, &encoder, &self.config)
    }

    /// Trains and saves the adapter (or the model) under `output`.
    pub(crate) fn train(
        &self,
        pretrained: &Pretrained,
        model: &mut CausalLm,
        checked: Checked<T::Example>,
    ) -> Result<Finished> {
        let started = Instant::now();
        let (sites, mut parameters, adapter): (Rc<dyn Sites>, _, Option<Rc<dyn Adapter>>) = match self.config.method() {
            Some(mut method) => {
                method.note_base_model(&self.model_path.display().to_string());
                let adapter = match &self.adapter {
                    Some(folder) => self.task.load_adapter(folder, model)?,
                    None => method.create(model, pretrained.tokenizer.as_ref(), self.config.seed)?,
                };
                (adapter.clone(), adapter.parameters(), Some(adapter))
            }
            None => (Rc::new(Bare), model.train_all()?, None),
        };
        parameters.extend(self.task.leaves_beside(pretrained, model, self.config.seed)?);
        self.task.prepare(self, pretrained, model, (&sites, &parameters))?;
        // After the settings have proved to fit the model, so that a refused run leaves no folder behind.
        let run = match self.resume {
            true => RunDir::open(&self.output)?,
            false => RunDir::create(&self.output, &to_yaml(&self.config)?)?,
        };
        interrupts::can_continue_with(&self.again);
        let keep = || -> Result<()> {
            run.save_config(&to_yaml(&self.config)?)?;
            for (name, text) in &self.files {
                write_atomic(&run.root().join(name), text.as_bytes())?;
            }
            self.command.as_ref().map_or(Ok(()), |command| command.save(run.root()))
        };
        let mut progress = Progress::default();
        match self.resume {
            true => progress.keep = Some(Box::new(keep)),
            false => keep()?,
        }
        let num_trained: usize = parameters.iter().map(|(_, p)| p.numel()).sum();
        eprintln!(
            "training {num_trained} parameters in {} tensors, {:?} on {:?}",
            parameters.len(),
            self.kind,
            self.device
        );
        if let Some(note) = adapter.as_ref().and_then(|adapter| adapter.note()) {
            eprintln!("{note}");
        }
        let model = &*model;
        let memory = Memory {
            weights: model.memory(),
            trained: parameters.iter().map(|(_, parameter)| parameter.shallow_clone()).collect(),
            is_adapter: adapter.is_some(),
            variant: self.config.adamw.variant,
            device: self.device,
        };
        eprintln!("{}", memory.to_text());
        let encoder = ModelEncoder::new(pretrained).ok_or_else(|| no_tokenizer(pretrained))?;
        let Checked { mut train, mut eval, tables } = checked;
        let mut objective =
            self.task.objective(self, &run, pretrained, model, (&sites, &parameters), [&mut train, &mut eval])?;
        let eval_rows: Vec<&Row> = eval.row_of_example.iter().map(|&row| &self.eval_rows[row]).collect();
        let questions = questions(&eval_rows, self.num_samples, &encoder, model, sites.as_ref())?;
        let pass = Pass { step: 0, model, sites: &sites, options: RunOptions::default() };
        let mut measured = self.before(&run, objective.as_mut(), &pass, &encoder, &eval.examples, &questions)?;
        if let Some(adapter) = &adapter {
            adapter.set_training(true);
        }
        let save = |folder: &Path| -> pt_train::Result<()> {
            match &adapter {
                Some(adapter) => self.task.save_adapter(adapter.as_ref(), &folder.join("adapter")),
                None => self.task.save_model(&folder.join("model"), pretrained, model),
            }
        };
        let lr_factor = |name: &str| adapter.as_ref().map_or(1.0, |adapter| adapter.lr_factor(name));
        let trained =
            Trained { model, sites: sites.clone(), parameters, lr_factor: Box::new(lr_factor), save: Box::new(save) };
        let outcome = interrupts::while_training(|stop| {
            let rows = (train.examples, &eval.examples[..]);
            pt_train::train::train(&trained, objective.as_mut(), rows, &self.config, &run, stop, &mut progress)
        })?;
        progress.finish();
        progress.kept.take().transpose()?;
        drop(progress);
        if let Some(adapter) = &adapter {
            adapter.set_training(false);
        }

        let (last_step, last) = run.latest()?.context("the run saved no checkpoint")?;
        let part = if adapter.is_some() { "adapter" } else { "model" };
        let best = run.best()?;
        // Early stopping, say, leaves a best checkpoint behind the last one: that is the one to use and to report on.
        let earlier = best.as_ref().filter(|best| best.step != last_step).map(|best| run.checkpoint_path(best.step));
        let chosen = earlier.as_ref().unwrap_or(&last).join(part);
        let sites: Rc<dyn Sites> = match (&earlier, &adapter) {
            (Some(_), Some(_)) => self.task.load_adapter(&chosen, model)?,
            _ => sites,
        };
        let step_of_sites = best.as_ref().filter(|_| adapter.is_some()).map_or(last_step, |best| best.step);
        let pass = Pass { step: step_of_sites, model, sites: &sites, options: RunOptions::default() };
        let findings = match outcome.ending {
            Ending::Interrupted => Findings::default(),
            _ => self.task.findings(self, objective.as_mut(), &pass, &eval)?,
        };
        let series = read_series(&run.metrics_path())?;
        let last_loss = series.get(names::EVAL_LOSS).and_then(|points| points.last()).map(|(_, loss)| *loss);
        let after = best.as_ref().map(|best| best.value).or(last_loss);
        if outcome.ending != Ending::Interrupted && !measured.samples.is_empty() {
            let prompts: Vec<Vec<i64>> = questions.iter().map(|question| question.token_ids.clone()).collect();
            let texts = answers(model, &sites, &encoder, &prompts, SAMPLE_TOKENS, "answers after training")?;
            measured.samples.iter_mut().zip(texts).for_each(|(sample, text)| sample.after = Some(text));
            measured.save(&run)?;
        }
        let finished = Finished {
            outcome,
            loss: (measured.loss, after),
            before: measured.values,
            chosen,
            last: earlier.map(|_| last.join(part)),
            sites,
            run,
            best,
            tables,
            findings,
            seconds: started.elapsed().as_secs_f64(),
        };
        finished.report(self, vec![], measured.samples.into_iter().filter_map(Answered::into_sample).collect())?;
        if finished.outcome.ending == Ending::Interrupted {
            eprintln!("stopped at step {}; continue with: {}", finished.outcome.steps, self.again);
            return Ok(finished);
        }
        match (&finished.last, &finished.best) {
            (Some(last), Some(best)) => eprintln!(
                "saved {} (step {}, the best held-out loss {:.4})\nlast  {}",
                finished.chosen.display(),
                best.step,
                best.value,
                last.display()
            ),
            _ => eprintln!("saved {}", finished.chosen.display()),
        }
        eprintln!("report {}", finished.run.report_path().display());
        Ok(finished)
    }

    /// Held-out loss and answers of the weights that training starts from; as the run kept them, where it did.
    fn before(
        &self,
        run: &RunDir,
        objective: &mut dyn Objective<Example = T::Example>,
        pass: &Pass<'_>,
        encoder: &ModelEncoder<'_>,
        eval_examples: &[T::Example],
        questions: &[Question],
    ) -> Result<Measured> {
        if eval_examples.is_empty() {
            return Ok(Measured::default());
        }
        let prompts = || questions.iter().map(|question| question.prompt.as_str());
        if let Some(kept) = Measured::load(run)?
            && kept.samples.iter().map(|sample| sample.prompt.as_str()).eq(prompts())
        {
            return Ok(kept);
        }
        let mut work = talk::Work::new("held-out loss before training", eval_examples.len(), "rows");
        let max_tokens = self.config.batch.max_tokens.unwrap_or(4096);
        let held_out = evaluate(objective, pass, eval_examples, max_tokens, &mut |done| work.set(done))?;
        work.finish();
        eprintln!("held out before training: {}", shown(&held_out));
        let token_ids: Vec<Vec<i64>> = questions.iter().map(|question| question.token_ids.clone()).collect();
        let texts = answers(pass.model, pass.sites, encoder, &token_ids, SAMPLE_TOKENS, "answers before training")?;
        let samples = questions.iter().zip(texts).map(|(question, before)| Answered {
            prompt: question.prompt.clone(),
            expected: question.expected.clone(),
            before,
            after: None,
        });
        let values = held_out.values.iter().map(|(name, value)| (name.to_string(), *value)).collect();
        let measured = Measured { loss: Some(held_out.loss), values, samples: samples.collect() };
        measured.save(run)?;
        Ok(measured)
    }
}

impl Measured {
    fn path(run: &RunDir) -> PathBuf {
        run.root().join("samples.json")
    }

    fn load(run: &RunDir) -> Result<Option<Self>> {
        let path = Self::path(run);
        if !path.exists() {
            return Ok(None);
        }
        let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Some(serde_json::from_slice(&text).with_context(|| format!("{} is damaged: delete it", path.display()))?))
    }

    fn save(&self, run: &RunDir) -> Result<()> {
        Ok(write_atomic(&Self::path(run), &serde_json::to_vec_pretty(self)?)?)
    }
}

impl Answered {
    /// For the report; nothing while there is no answer after training.
    fn into_sample(self) -> Option<Sample> {
        let Self { prompt, expected, before, after } = self;
        Some(Sample { prompt, expected: Some(expected), before: Some(before), after: after? })
    }
}

impl Finished {
    /// Held-out numbers of the checkpoint that is handed on, by the name of their metric.
    pub(crate) fn held_out(&self) -> Result<BTreeMap<String, f64>> {
        let step = self.best.as_ref().map(|best| best.step);
        let series = read_series(&self.run.metrics_path())?;
        let of_step = |(name, points): (&String, &Series)| {
            let at = points.iter().find(|(at, _)| Some(*at) == step).or(points.last())?;
            Some((name.strip_prefix("eval_")?.to_string(), at.1))
        };
        Ok(series.iter().filter_map(of_step).collect())
    }

    /// Writes report.html, with more numbers and samples where a caller has them.
    pub(crate) fn report<T: Task>(
        &self,
        job: &Job<T>,
        mut headlines: Vec<Headline>,
        samples: Vec<Sample>,
    ) -> Result<()> {
        if let (before, Some(after)) = self.loss {
            headlines.push(Headline {
                label: "held-out loss".into(),
                before,
                after,
                unit: T::LOSS_UNIT.into(),
                better: Better::Lower,
            });
        }
        for (name, after) in self.held_out()?.into_iter().filter(|(name, _)| name.contains("accurac")) {
            // A policy that is its own reference has no rewards before training, so that nothing is told apart.
            let before = self.before.get(&name).filter(|before| **before > 0.0);
            headlines.push(Headline {
                label: format!("held-out {name}"),
                before: before.map(|before| before * 100.0),
                after: after * 100.0,
                unit: "%".into(),
                better: Better::Higher,
            });
        }
        let adapter = self.chosen.display();
        let model = job.model_path.display();
        let mut commands = vec![format!("tensorboard --logdir {}", self.run.tensorboard_path().display())];
        let is_nf4 = job.command.as_ref().is_some_and(|command| command.weights == "nf4");
        let weights = if is_nf4 { " --weights nf4" } else { "" };
        if !T::ANSWERS {
            let of = match job.config.peft {
                Some(_) => format!("--model {model} --adapter {adapter}{weights}"),
                None => format!("--model {adapter}"),
            };
            commands.insert(0, format!("pt score {of} --data rows.jsonl --output scores.jsonl"));
        } else if let Some(method) = job.config.peft {
            commands.insert(0, format!("pt chat --model {model} --adapter {adapter}{weights}"));
            if job.config.settings_of(method).is_mergeable() {
                commands.insert(1, format!("pt merge --model {model} --adapter {adapter}{weights} --output merged"));
            }
        } else {
            commands.insert(0, format!("pt chat --model {adapter}"));
        }
        let report = Report {
            title: T::TITLE.into(),
            subtitle: format!("{model}, {:?} on {:?}", job.kind, job.device),
            headlines,
            series: read_series(&self.run.metrics_path())?,
            figures: self.findings.figures.clone(),
            findings: self.findings.tables.clone(),
            data: self.tables.clone(),
            samples,
            facts: vec![
                ("result".into(), self.chosen.display().to_string()),
                ("last checkpoint".into(), self.last.as_ref().unwrap_or(&self.chosen).display().to_string()),
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
    let mut parameters = model.named_parameters()?;
    let mut config = pretrained.config.raw.clone();
    give_new_biases_a_place(&mut parameters, &mut config, pretrained, model)?;
    config.insert("tie_word_embeddings".into(), (!parameters.iter().any(|(name, _)| name == "lm_head.weight")).into());
    let kind = match model.kind() {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "float32",
    };
    config.insert("dtype".into(), kind.into());
    config.remove("torch_dtype");
    // The parameters are dense, whatever the weights were read from.
    config.remove("quantization_config");
    save_checkpoint(folder, pretrained, &parameters, &config, max_shard_bytes)
}

/// Says in the configuration that there are biases which a merge has added (BitFit), where the architecture can say so: a
/// Llama has them on all parts of its attention or none, and so its MLP, so that those without get zeros.
pub(crate) fn give_new_biases_a_place(
    parameters: &mut Vec<(String, Tensor)>,
    config: &mut serde_json::Map<String, serde_json::Value>,
    pretrained: &Pretrained,
    model: &CausalLm,
) -> pt_train::Result<()> {
    let known = &pretrained.config;
    let has_place = |path: &str| match path.rsplit('.').next() {
        _ if known.architecture == Architecture::Gpt2 => true,
        Some("q_proj" | "k_proj" | "v_proj") => known.qkv_bias,
        Some("o_proj") => known.attention_output_bias,
        _ => known.mlp_bias,
    };
    for (part, flag) in [(".self_attn.", "attention_bias"), (".mlp.", "mlp_bias")] {
        let layers: Vec<_> = model.linear_layers().filter(|layer| layer.path.contains(part)).collect();
        let Some(new) = layers.iter().find(|layer| layer.bias.is_some() && !has_place(&layer.path)) else { continue };
        if known.architecture != Architecture::Llama {
            let place = known.architecture.model_type();
            let message = format!(
                "`{}` has a bias that the adapter added, and a {place} checkpoint has no place for it: expected an \
                 adapter that is kept beside the model (--adapter)",
                new.path
            );
            return Err(pt_train::TrainError::Config { place: "merging".into(), message });
        }
        config.insert(flag.into(), true.into());
        for layer in layers.iter().filter(|layer| layer.bias.is_none()) {
            let zeros = Tensor::zeros([layer.weight.size().0], (model.kind(), model.device()));
            parameters.push((format!("{}.bias", layer.path), zeros));
        }
    }
    Ok(())
}

/// Weights, configuration and tokenizer; the folder may exist.
pub(crate) fn save_checkpoint(
    folder: &Path,
    pretrained: &Pretrained,
    tensors: &[(String, Tensor)],
    config: &serde_json::Map<String, serde_json::Value>,
    max_shard_bytes: usize,
) -> pt_train::Result<()> {
    std::fs::create_dir_all(folder).map_err(|source| pt_tensor::TensorError::Write { path: folder.into(), source })?;
    pt_tensor::io::save_sharded(folder, tensors, max_shard_bytes)?;
    pt_tensor::io::write_atomically(&folder.join("config.json"), |out| Ok(serde_json::to_writer_pretty(out, config)?))?;
    if let Some(tokenizer) = &pretrained.tokenizer {
        tokenizer.save(folder)?;
    }
    Ok(())
}

/// An evaluation in words: its loss and its first other number.
fn shown(evaluation: &Evaluation) -> String {
    let first = evaluation.values.first().map(|&(name, value)| match name {
        names::ACCURACY => format!(", token accuracy {:.1} %", value * 100.0),
        _ if name.contains("accurac") => format!(", pair accuracy {:.1} %", value * 100.0),
        _ => format!(", {name} {value:.4}"),
    });
    format!("loss {:.4}{}", evaluation.loss, first.unwrap_or_default())
}

/// Keeps a resumed run's settings once a step was done with them: those that its checkpoint refuses are not kept.
type Keep<'a> = Box<dyn FnOnce() -> Result<()> + 'a>;

/// A bar with loss and speed on a terminal, a line every so often elsewhere.
#[derive(Default)]
struct Progress<'a> {
    keep: Option<Keep<'a>>,
    kept: Option<Result<()>>,
    bar: Option<indicatif::ProgressBar>,
    last_line: Option<Instant>,
    speed: f64,
}

impl Progress<'_> {
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

impl Observer for Progress<'_> {
    fn on_step(&mut self, record: &StepRecord) {
        if let Some(keep) = self.keep.take() {
            self.kept = Some(keep());
        }
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

    fn on_evaluating(&mut self, step: u64, done: usize, total: usize) {
        if let Some(bar) = &self.bar {
            bar.set_message(format!("evaluating {done}/{total}"));
        }
        if !talk::is_terminal() && self.last_line.is_none_or(|at| at.elapsed().as_secs() >= 10) {
            self.last_line = Some(Instant::now());
            eprintln!("step {step}: evaluating {done}/{total}");
        }
    }

    fn on_evaluation(&mut self, step: u64, evaluation: &Evaluation, is_best: bool) {
        let mark = if is_best { " (best so far)" } else { "" };
        self.say(&format!("step {step}: held-out {}{mark}", shown(evaluation)));
    }
}
