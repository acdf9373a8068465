//! What the commands that train share: flags, resuming, the dry run.

use crate::checkpoints::{Checkpoints, adapter_folder};
use crate::interrupts;
use crate::job::Job;
use crate::open::{BaseFormat, ModelArgs};
use crate::run_command::{RunCommand, absolute, agreed, dtype_name};
use crate::talk::{self, Misused, Usage};
use crate::task::Task;
use anyhow::Result;
use pt_model::CausalLm;
use pt_peft::{Method, MethodConfig};
use pt_rlhf::RewardModel;
use pt_tensor::{Device, Kind, parse_kind};
use pt_train::config::{fields_text, load_config, parse_set, to_commented_yaml, to_yaml};
use pt_train::data::{ReadOptions, read_rows};
use pt_train::run_dir::RunDir;
use pt_train::settings::{ObjectiveConfig, TrainConfig};
use pt_train::train::{Ending, Standing, standing};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Flags of a command that trains.
#[derive(clap::Args)]
pub(crate) struct TrainArgs {
    /// A Hugging Face folder, a .gguf file, or a name that `pt models` lists.
    #[arg(long, required_unless_present_any = ["print_config", "resume"])]
    model: Option<String>,
    /// An adapter folder in PEFT's format, or a run (its best, else last checkpoint), to train on from there.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// auto, cpu, cuda, cuda:N or mps.
    #[arg(long)]
    device: Option<String>,
    /// Number format of weights and activations: auto, f32, bf16 or f16.
    #[arg(long)]
    dtype: Option<String>,
    /// How the weights of the linear layers under an adapter are held: as-stored when not given.
    #[arg(long, value_enum)]
    weights: Option<BaseFormat>,
    /// Training rows, JSONL or JSON, in a form listed below.
    #[arg(long, required_unless_present_any = ["print_config", "resume"])]
    data: Vec<PathBuf>,
    /// Held-out rows of the same forms.
    #[arg(long)]
    eval_data: Vec<PathBuf>,
    /// New folder for the run: configuration, metrics, checkpoints, the adapter and report.html.
    #[arg(long, required_unless_present = "print_config")]
    output: Option<PathBuf>,
    /// YAML file with any of the fields listed below; --print-config prints one to start from.
    #[arg(long)]
    config: Option<PathBuf>,
    /// Set one of the fields listed below, e.g. --set learning_rate=1e-4 or --set lora.rank=8.
    #[arg(long, value_name = "FIELD=VALUE")]
    set: Vec<String>,
    /// The parameter-efficient method, by one of the names below, or `none` to train all weights; lora when not given.
    #[arg(long, value_name = "METHOD")]
    peft: Option<String>,
    /// Held-out prompts that `pt sft` and `pt dpo` answer before and after training, for the report; 4 when not given, 0 for
    /// none.
    #[arg(long)]
    samples: Option<usize>,
    /// Continue the run in --output from its last checkpoint; it remembers model, data and settings.
    #[arg(long)]
    pub(crate) resume: bool,
    /// Check the data, show what would be trained, and stop.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print the resolved configuration, with a comment on each field, and stop.
    #[arg(long)]
    print_config: bool,
}

/// What a command that trains begins with, from its flags and from what a resumed run keeps.
pub(crate) struct Prepared<O> {
    pub(crate) config: TrainConfig<O>,
    /// What the run was started with.
    pub(crate) command: RunCommand,
    /// The same of the resumed run, as it was kept.
    pub(crate) kept: Option<RunCommand>,
    pub(crate) flags: ModelArgs,
    pub(crate) device: Device,
    pub(crate) kind: Kind,
    pub(crate) weights: BaseFormat,
    pub(crate) output: PathBuf,
    /// The run that is resumed.
    pub(crate) run: Option<RunDir>,
}

/// Settles flags, settings and folders before anything is loaded; `None` once --print-config is done.
pub(crate) fn prepare<O: ObjectiveConfig>(args: &TrainArgs, task: &str) -> Result<Option<Prepared<O>>> {
    let mut sets = args.set.iter().map(|text| parse_set(text)).collect::<Result<Vec<_>, _>>()?;
    if let Some(method) = &args.peft {
        let method = if method == "none" { "null".into() } else { method.replace('-', "_") };
        sets.insert(0, ("peft".into(), method));
    }
    let kept = match &args.output {
        Some(output) if args.resume => RunCommand::load(output)?,
        _ => None,
    };
    if let (Some(kept), Some(output)) = (kept.as_ref().filter(|kept| kept.task() != task), &args.output) {
        return Err(Misused {
            message: format!("{} is a run of `pt {}`", output.display(), kept.task()),
            hint: format!("go on with it by: {}", kept.resume(output)),
        }
        .into());
    }
    // A resumed run goes on with its own configuration unless another is named.
    let saved = args.output.as_ref().filter(|_| args.resume).map(|run| run.join("config.yaml"));
    let saved = saved.filter(|path| path.exists());
    let mut config: TrainConfig<O> = load_config(args.config.as_deref().or(saved.as_deref()), &sets)?;
    if args.print_config {
        config.validate()?;
        talk::put(to_commented_yaml(&config)?.as_bytes())?;
        return Ok(None);
    }
    let output = args.output.clone().ok_or_else(|| Usage("give --output, the folder of the run".into()))?;
    interrupts::watch();
    // Fails where no run stands, or where one would be overwritten: before anything is loaded.
    let run = if args.resume { Some(RunDir::open(&output)?) } else { None };
    if !args.resume && !args.dry_run {
        RunDir::check_free(&output)?;
    }
    let mut command = settle(task, args, kept.clone().unwrap_or_default(), &output)?;
    let adapter = command.adapter.clone().map(PathBuf::from);
    if let Some(folder) = &adapter {
        take_settings_of(folder, &mut config, &sets)?;
    }
    config.validate()?;
    let weights = BaseFormat::of_name(&command.weights);
    if config.peft.is_none() && weights == BaseFormat::Nf4 {
        let text =
            "--weights is nf4 and peft is null: weights in 4 bits are frozen, only a method over them is trained";
        return Err(Usage(text.into()).into());
    }
    let flags = ModelArgs {
        model: command.model.clone(),
        adapter,
        device: command.device.clone(),
        dtype: args.dtype.clone().unwrap_or("auto".into()),
    };
    let device = flags.device()?;
    let named = if flags.dtype == "auto" { None } else { Some(dtype_name(flags.kind()?)) };
    command.dtype = match (config.peft, named) {
        // The number format of the masters.
        (None, None | Some("f32")) => "f32".into(),
        (None, Some(other)) => {
            return Err(Usage(format!("--dtype is {other}: without a method all weights are trained, in f32")).into());
        }
        (Some(_), named) => {
            let kept = kept.as_ref().map(|kept| kept.dtype.as_str()).filter(|dtype| !dtype.is_empty());
            let auto = dtype_name(flags.kind()?);
            agreed("--dtype", named, kept, &output)?.unwrap_or(auto).into()
        }
    };
    let kind = parse_kind(&command.dtype)?.kind(device);
    Ok(Some(Prepared { config, command, kept, flags, device, kind, weights, output, run }))
}

/// Runs a command that trains.
pub(crate) fn run<T: Task>(args: TrainArgs, task: T) -> Result<ExitCode> {
    let Some(prepared) = prepare::<T::Settings>(&args, T::COMMAND)? else { return Ok(ExitCode::SUCCESS) };
    let Prepared { mut config, command, kept, flags, device, kind, weights, output, run } = prepared;
    T::settle(&mut config);
    let reading = ReadOptions { preferences: T::TAKES_LABELS, ..config.data.read_options() };
    let paths = |texts: &[String]| texts.iter().map(PathBuf::from).collect::<Vec<_>>();
    let job = Job {
        task,
        model_path: flags.path()?,
        adapter: flags.adapter.clone(),
        device,
        kind,
        rows: read_rows(&paths(&command.data), &reading)?,
        eval_rows: match command.eval_data.is_empty() {
            true => vec![],
            false => read_rows(&paths(&command.eval_data), &reading)?,
        },
        config,
        again: command.resume(&output),
        output,
        resume: args.resume,
        num_samples: if T::ANSWERS { command.samples.unwrap_or(0) } else { 0 },
        command: Some(command),
        files: vec![],
    };
    let pretrained = T::open(&job.model_path)?;
    let checked = job.check(&pretrained)?;
    if args.dry_run {
        let window = job.config.batch.batch_size.saturating_mul(job.config.batch.accumulation);
        let steps = checked.train.examples.len().div_ceil(window);
        eprintln!("{steps} steps an epoch; nothing was trained (--dry-run)");
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(run) = &run
        && let Some(standing) = standing(run, &checked.train.examples, &job.config)?
        && standing.is_complete()
        && job.command == kept
        && is_told(run, &job.config)?
    {
        say_complete(&job.output, &standing);
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("loading {}", job.model_path.display());
    let mut model = CausalLm::load_with(&pretrained, job.device, job.kind, weights.format())?;
    let finished = job.train(&pretrained, &mut model, checked)?;
    Ok(match finished.outcome.ending {
        Ending::Interrupted => ExitCode::from(130),
        _ => ExitCode::SUCCESS,
    })
}

/// Whether the run's report tells of its last checkpoint, and of these settings.
fn is_told(run: &RunDir, config: &impl Serialize) -> Result<bool> {
    let modified = |path: &Path| path.metadata().and_then(|metadata| metadata.modified()).ok();
    let last = run.latest()?.and_then(|(_, folder)| modified(&folder));
    let is_newer = modified(&run.report_path()).zip(last).is_some_and(|(report, last)| report >= last);
    Ok(is_newer
        && std::fs::read_to_string(run.config_path()).is_ok_and(|kept| to_yaml(config).is_ok_and(|it| it == kept)))
}

fn say_complete(run: &Path, standing: &Standing) {
    let Standing { steps, total_steps, is_early_stopped } = standing;
    let why = if *is_early_stopped { ", stopped early, since the held-out loss did not get better" } else { "" };
    eprintln!("{} is complete: {steps} of {total_steps} steps{why}; nothing was changed", run.display());
    if let Some(checkpoint) = Checkpoints::of(run).chosen() {
        let part = if checkpoint.join("adapter").exists() { "adapter" } else { "model" };
        eprintln!("result {}", checkpoint.join(part).display());
    }
    eprintln!("to train it further, give it more steps: --set epochs=N or --set max_steps=N");
}

/// What stands below the options of `--help`.
pub(crate) fn help_on_fields<T: Task>() -> String {
    help_on::<T::Settings>(T::ROWS)
}

/// The same of a command by its settings and the forms of its rows.
pub(crate) fn help_on<O: ObjectiveConfig>(rows: &str) -> String {
    format!(
        "Rows of --data: {}.\n\nMethods of --peft: {}.\n\nFields of --set and --config, with their defaults. \
         peft=null trains all weights.\n\n{}",
        rows,
        Method::ALL.map(Method::name).join(", "),
        fields_text::<TrainConfig<O>>()
    )
}

/// The flags, and for those not given what the resumed run was started with; `dtype` is left to the caller.
fn settle(task: &str, args: &TrainArgs, kept: RunCommand, run: &Path) -> Result<RunCommand> {
    let list = |paths: &[PathBuf]| paths.iter().map(|path| absolute(&path.to_string_lossy())).collect::<Vec<_>>();
    let some = |list: Vec<String>| Some(list).filter(|list| !list.is_empty());
    let kept_weights = kept.kept_weights();
    let kept_model = Some(kept.model).filter(|model| !model.is_empty());
    let missing = |flag| Usage(format!("give {flag}: {} does not say which it was", run.display()));
    let adapter = args.adapter.as_deref().map(adapter_folder).transpose()?;
    let adapter = adapter.map(|path| absolute(&path.to_string_lossy()));
    Ok(RunCommand {
        task: task.into(),
        model: agreed("--model", args.model.as_deref().map(absolute), kept_model, run)?
            .ok_or_else(|| missing("--model"))?,
        adapter: agreed("--adapter", adapter, kept.adapter, run)?,
        // Rows may have moved; that they are the same is checked when the checkpoint is read.
        data: some(list(&args.data)).or(some(kept.data)).ok_or_else(|| missing("--data"))?,
        eval_data: agreed("--eval-data", some(list(&args.eval_data)), some(kept.eval_data), run)?.unwrap_or_default(),
        device: args.device.clone().or(Some(kept.device).filter(|device| !device.is_empty())).unwrap_or("auto".into()),
        dtype: String::new(),
        weights: agreed("--weights", args.weights.map(|w| w.name().to_string()), kept_weights, run)?
            .unwrap_or_else(|| BaseFormat::AsStored.name().into()),
        samples: Some(args.samples.or(kept.samples).unwrap_or(4)),
    })
}

/// An adapter that is trained on brings its own settings, which the run's configuration then shows.
fn take_settings_of<O: ObjectiveConfig>(
    adapter: &Path,
    config: &mut TrainConfig<O>,
    sets: &[(String, String)],
) -> Result<()> {
    if config.peft.is_none() {
        let text = "peft is null, which trains all weights, and --adapter names an adapter to train: leave one out";
        return Err(Usage(text.into()).into());
    }
    let mut settings = match RewardModel::is_adapter(adapter)? {
        true => RewardModel::adapter_settings(adapter)?,
        false => MethodConfig::from_folder(adapter)?,
    };
    settings.check_can_go_on(adapter)?;
    // How it is trained is no part of an adapter's file.
    let of_training = "lora.loraplus_lr_ratio";
    let mut bare = TrainConfig::<O>::default();
    bare.lora.loraplus_lr_ratio = config.lora.loraplus_lr_ratio;
    if let MethodConfig::Lora(lora) = &mut settings {
        lora.loraplus_lr_ratio = config.lora.loraplus_lr_ratio;
    }
    let is_of_method = |key: &str| {
        let section = key.split('.').next().unwrap_or(key);
        key != of_training && (section == "peft" || Method::ALL.iter().any(|method| method.name() == section))
    };
    if let Some((key, value)) = sets.iter().find(|(key, _)| is_of_method(key)) {
        return Err(Usage(format!(
            "--set {key}={value} beside --adapter: the settings of {} hold; leave one out",
            adapter.display()
        ))
        .into());
    }
    // A resumed run's configuration shows the adapter's own settings.
    let section = config.settings_of(settings.method());
    if section != settings && section != bare.settings_of(settings.method()) {
        return Err(Usage(format!(
            "the configuration has settings in `{}`, and --adapter is given: those of {} hold; leave them out",
            settings.method().name(),
            adapter.display()
        ))
        .into());
    }
    config.set_method(settings);
    Ok(())
}
