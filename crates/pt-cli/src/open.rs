//! Opening models and adapters as the flags say; shared by the commands.

use crate::checkpoints::{adapter_folder, run_of};
use crate::commands::generate::at_least_one;
use crate::run_command::RunCommand;
use crate::talk::{self, Misused, Refused, Usage};
use anyhow::{Context, Result};
use clap::Args;
use pt_model::{Bare, CausalLm, LinearFormat, ModelError, Pretrained, Sites};
use pt_peft::{AdapterSet, load_adapter};
use pt_rlhf::{RewardModel, trunk_of};
use pt_tensor::io::create_folder_atomically;
use pt_tensor::{Device, Kind, Nf4Arithmetic, Nf4Options, parse_device, parse_kind};
use pt_train::TrainError;
use pt_train::config::{load_config, parse_set};
use pt_train::data::{DataConfig, Row};
use pt_train::encoder::ModelEncoder;
use pt_train::run_dir::check_place;
use pt_train::sft::SftConfig;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Which model, where and how.
#[derive(Args, Debug, Clone)]
pub(crate) struct ModelArgs {
    /// A Hugging Face folder, a .gguf file, or a name that `pt models` lists.
    #[arg(long)]
    pub(crate) model: String,
    /// An adapter folder in PEFT's format, a 1-bit delta, or a run that trained one, for that of its best (else last)
    /// checkpoint.
    #[arg(long)]
    pub(crate) adapter: Option<PathBuf>,
    /// auto, cpu, cuda, cuda:N or mps.
    #[arg(long, default_value = "auto")]
    pub(crate) device: String,
    /// Number format of weights and activations: auto (f32 on the CPU, bf16 on CUDA), f32, bf16 or f16.
    #[arg(long, default_value = "auto")]
    pub(crate) dtype: String,
}

/// How the weights of the linear layers are held.
#[derive(clap::ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
enum WeightFormat {
    /// As the checkpoint has them
    AsStored,
    /// In 4 bits (NF4, blocks of 64 with double quantization) but for the output layer, multiplied in --dtype
    Nf4,
    /// In 4 bits with the output layer, and activations in 8 bits on the CPU: fastest, less exact
    Nf4Int8,
}

/// How the base of an adapter holds its linear layers: for commands that train it or merge into it, where products are to be exact.
#[derive(clap::ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BaseFormat {
    /// As the checkpoint has them
    AsStored,
    /// QLoRA: in 4 bits (NF4, blocks of 64 with double quantization) but for the output layer, quantized tensor by tensor on load
    Nf4,
}

impl BaseFormat {
    pub(crate) fn format(self) -> LinearFormat {
        match self {
            Self::AsStored => LinearFormat::AsStored,
            Self::Nf4 => LinearFormat::Nf4 {
                options: Nf4Options::default(),
                arithmetic: Nf4Arithmetic::Exact,
                with_output: false,
            },
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::AsStored => "as-stored",
            Self::Nf4 => "nf4",
        }
    }

    /// The format of a name that a run kept.
    pub(crate) fn of_name(name: &str) -> Self {
        if name == Self::Nf4.name() { Self::Nf4 } else { Self::AsStored }
    }
}

/// For commands that only read a model.
#[derive(Args, Debug, Clone)]
pub(crate) struct WeightArgs {
    /// How the weights of the linear layers are held.
    #[arg(long, value_enum, default_value = "as-stored")]
    weights: WeightFormat,
}

impl WeightArgs {
    fn format(&self) -> LinearFormat {
        let nf4 =
            |arithmetic, with_output| LinearFormat::Nf4 { options: Nf4Options::default(), arithmetic, with_output };
        match self.weights {
            WeightFormat::AsStored => LinearFormat::AsStored,
            WeightFormat::Nf4 => nf4(Nf4Arithmetic::Exact, false),
            WeightFormat::Nf4Int8 => nf4(Nf4Arithmetic::Int8, true),
        }
    }
}

/// Adapters that rows choose among.
#[derive(Args, Debug, Clone)]
pub(crate) struct RowAdapterArgs {
    /// An adapter that rows may ask for by name, in their field `adapter`; may be given several times. Rows of one
    /// batch may ask for different ones, and those that ask for none get the model alone.
    #[arg(long = "row-adapter", value_name = "NAME=FOLDER", conflicts_with = "adapter")]
    row_adapters: Vec<String>,
}

impl RowAdapterArgs {
    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.row_adapters.is_empty()
    }

    /// Loads the adapters into the sites of a model, and finds each row's among them; `None` where there are none.
    pub(crate) fn open(&self, opened: &mut Opened, rows: &[Row]) -> Result<Option<RowAdapters>> {
        if self.row_adapters.is_empty() {
            return Ok(None);
        }
        let set = Rc::new(AdapterSet::new());
        for text in &self.row_adapters {
            let Some((name, folder)) =
                text.split_once('=').filter(|(name, folder)| !name.is_empty() && !folder.is_empty())
            else {
                return Err(Usage(format!("--row-adapter {text}: expected NAME=FOLDER")).into());
            };
            if set.get(name).is_ok() {
                return Err(Usage(format!("--row-adapter {text}: there are two of the name `{name}`")).into());
            }
            let folder = adapter_folder(Path::new(folder))?;
            warn_of_other_weights(&folder, &opened.model);
            set.insert(name, load_adapter(&folder, &opened.model)?)?;
        }
        for row in rows {
            row.adapter
                .as_deref()
                .map_or(Ok(()), |name| set.get(name).map(drop))
                .with_context(|| row.origin.to_string())?;
        }
        opened.sites = set.clone();
        Ok(Some(RowAdapters { set, of_row: rows.iter().map(|row| row.adapter.clone()).collect() }))
    }
}

/// The adapter of each row.
pub(crate) struct RowAdapters {
    set: Rc<AdapterSet>,
    of_row: Vec<Option<String>>,
}

impl RowAdapters {
    /// What acts on a row: its adapter, or nothing.
    pub(crate) fn sites_of(&self, row: usize) -> Result<Rc<dyn Sites>> {
        Ok(match &self.of_row[row] {
            Some(name) => self.set.get(name)?,
            None => Rc::new(Bare),
        })
    }

    /// Gives the prompts of the next batch the adapters of these rows.
    pub(crate) fn choose(&self, rows: impl IntoIterator<Item = usize>) -> Result<()> {
        let names: Vec<Option<&str>> = rows.into_iter().map(|row| self.of_row[row].as_deref()).collect();
        Ok(self.set.set_routes(&names)?)
    }
}

/// A loaded model with what is switched on at its sites.
pub(crate) struct Opened {
    pub(crate) pretrained: Pretrained,
    pub(crate) model: CausalLm,
    pub(crate) sites: Rc<dyn Sites>,
}

impl Opened {
    /// Tokenizer, template and stop ids.
    pub(crate) fn encoder(&self) -> Result<ModelEncoder<'_>> {
        ModelEncoder::new(&self.pretrained).ok_or_else(|| no_tokenizer(&self.pretrained).into())
    }
}

/// The error of a checkpoint without a tokenizer.
pub(crate) fn no_tokenizer(pretrained: &Pretrained) -> ModelError {
    ModelError::NotAModel { path: pretrained.path.clone(), reason: "it carries no tokenizer (tokenizer.json)".into() }
}

impl ModelArgs {
    pub(crate) fn device(&self) -> Result<Device> {
        parse_device(&self.device).map_err(|e| Usage(e.to_string()).into())
    }

    pub(crate) fn kind(&self) -> Result<Kind> {
        Ok(parse_kind(&self.dtype).map_err(|e| Usage(e.to_string()))?.kind(self.device()?))
    }

    /// The path of the model, fetched first where a known name is given.
    pub(crate) fn path(&self) -> Result<PathBuf> {
        let path = PathBuf::from(&self.model);
        if path.exists() {
            return Ok(path);
        }
        match pt_fetch::find(&self.model) {
            Ok(entry) if entry.kind == pt_fetch::Kind::Model => {
                Ok(pt_fetch::fetch_entry(entry, &mut |line| eprintln!("{line}"))?)
            }
            Ok(entry) => Err(Refused {
                message: format!("`{}` is a data set, expected a model", entry.name),
                hint: "`pt models` lists models and data sets; `pt fetch` brings either".into(),
            }
            .into()),
            // A path that is not there, rather than a name.
            Err(_) if self.model.contains(['/', '\\', '.']) => {
                Err(ModelError::Read { path, source: std::io::ErrorKind::NotFound.into() }.into())
            }
            Err(unknown) => Err(unknown.into()),
        }
    }

    /// The folder of the adapter, where one is asked for.
    pub(crate) fn adapter_folder(&self) -> Result<Option<PathBuf>> {
        self.adapter.as_deref().map(adapter_folder).transpose()
    }

    pub(crate) fn pretrained(&self) -> Result<Pretrained> {
        Ok(Pretrained::open(self.path()?)?)
    }

    /// The kind to save a checkpoint in: the one that `--dtype` or the checkpoint itself names; `otherwise` for files that name none (GGUF).
    pub(crate) fn saved_kind(&self, pretrained: &Pretrained, otherwise: Kind) -> Result<Kind> {
        if self.dtype != "auto" {
            return self.kind();
        }
        let is_gguf = pretrained.path.is_file();
        let named = ["dtype", "torch_dtype"].iter().find_map(|key| pretrained.config.raw.get(*key)?.as_str());
        Ok(match named.filter(|_| !is_gguf) {
            Some("bfloat16") => Kind::BFloat16,
            Some("float16") => Kind::Half,
            Some(_) => Kind::Float,
            None => otherwise,
        })
    }

    pub(crate) fn open(&self, weights: &WeightArgs) -> Result<Opened> {
        let (opened, reward) = self.open_as(weights, false)?;
        debug_assert!(reward.is_none());
        Ok(opened)
    }

    /// As [`open`](Self::open), also of a reward model: with the head of the adapter or of the model, where one has it.
    pub(crate) fn open_scorer(&self, weights: &WeightArgs) -> Result<(Opened, Option<RewardModel>)> {
        self.open_as(weights, true)
    }

    fn open_as(&self, weights: &WeightArgs, takes_rewards: bool) -> Result<(Opened, Option<RewardModel>)> {
        let device = self.device()?;
        // Training keeps f32 masters beside bf16; an answer has nothing to fall back on, and a small model's best
        // and second best token lie closer than bf16 tells apart.
        let kind = if self.dtype == "auto" && device == Device::Cpu { Kind::Float } else { self.kind()? };
        let adapter = self.adapter_folder()?;
        let mut pretrained = self.pretrained()?;
        let is_adapter = adapter.as_deref().map_or(Ok(false), RewardModel::is_adapter)?;
        let of_model = RewardModel::of_pretrained(&pretrained, device)?;
        if is_adapter || of_model.is_some() {
            if !takes_rewards {
                let what = adapter.as_deref().filter(|_| is_adapter).unwrap_or(&pretrained.path);
                return Err(Refused {
                    message: format!("{} is a reward model, which writes no answers", what.display()),
                    hint: "`pt score` gives its scores of completions".into(),
                }
                .into());
            }
            pretrained = trunk_of(pretrained)?;
        }
        let model = CausalLm::load_with(&pretrained, device, kind, weights.format())?;
        if let Some(folder) = &adapter {
            warn_of_other_weights(folder, &model);
        }
        let (reward, sites): (_, Rc<dyn Sites>) = match &adapter {
            Some(folder) if is_adapter => {
                let (reward, adapter) = RewardModel::load_adapter(folder, &model)?;
                (Some(reward), adapter)
            }
            Some(folder) => (of_model, load_adapter(folder, &model)?),
            None => (of_model, Rc::new(Bare)),
        };
        Ok((Opened { pretrained, model, sites }, reward))
    }
}

/// Says so where a run trained its adapter over weights in 4 bits, and the model's are not: it answers over others then.
fn warn_of_other_weights(adapter: &Path, model: &CausalLm) {
    let command = run_of(adapter).and_then(|run| RunCommand::load(&run).ok().flatten());
    let was_nf4 = command.is_some_and(|command| BaseFormat::of_name(&command.weights) == BaseFormat::Nf4);
    if was_nf4 && model.linear_layers().all(|layer| layer.weight.as_nf4().is_none()) {
        eprintln!(
            "warning: {} was trained over weights in 4 bits, and the model's are as stored: to answer over those that it \
             was trained on, --weights nf4",
            adapter.display()
        );
    }
}

/// Refuses a new folder's name where something stands or nothing can be written, before the work.
pub(crate) fn check_free(folder: &Path) -> Result<()> {
    let is_free = |mut entries: std::fs::ReadDir| entries.next().is_none();
    if folder.exists() && !std::fs::read_dir(folder).is_ok_and(is_free) {
        return Err(Refused {
            message: format!("{} already exists and is not an empty folder", folder.display()),
            hint: "choose another --output, or remove it first".into(),
        }
        .into());
    }
    Ok(check_place(folder)?)
}

/// Where a command writes a new model.
#[derive(Args, Debug, Clone)]
pub(crate) struct FolderArgs {
    /// New folder for the model.
    #[arg(long)]
    output: PathBuf,
    /// Largest size of one weight file, in MB.
    #[arg(long, default_value_t = 5000, value_parser = at_least_one())]
    max_shard_mb: usize,
}

impl FolderArgs {
    /// Refuses a folder that holds something or cannot be written, before the work.
    pub(crate) fn check(&self) -> Result<()> {
        check_free(&self.output)
    }

    /// Lets `fill(folder, max_shard_bytes)` write the model; it appears whole or not at all.
    pub(crate) fn fill(&self, fill: impl FnOnce(&Path, usize) -> pt_train::Result<()>) -> Result<()> {
        let parent = self.output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::create_dir_all(parent).with_context(|| format!("cannot write {}", parent.display()))?;
        let max_shard_bytes = self.max_shard_mb.saturating_mul(1_000_000);
        create_folder_atomically(&self.output, |folder| fill(folder, max_shard_bytes))?;
        eprintln!("saved to {}", self.output.display());
        Ok(())
    }
}

/// How the rows of a data set are read, where no training configuration says it.
#[derive(Args, Debug, Clone)]
pub(crate) struct DataArgs {
    /// Set one field of `data`, e.g. --set data.max_rows=100 or --set data.columns.prompt=question.
    #[arg(long, value_name = "data.FIELD=VALUE")]
    set: Vec<String>,
}

impl DataArgs {
    /// The settings: `defaults`, then what was set.
    pub(crate) fn config(&self, defaults: &[(&str, String)]) -> Result<DataConfig> {
        let given = self.set.iter().map(|text| parse_set(text)).collect::<Result<Vec<_>, _>>()?;
        if let Some((key, _)) = given.iter().find(|(key, _)| !key.starts_with("data.")) {
            return Err(Usage(format!(
                "--set {key}: only fields of `data` are set here, as in --set data.max_rows=100"
            ))
            .into());
        }
        let defaults = defaults.iter().map(|(key, value)| ((*key).to_string(), value.clone()));
        let sets: Vec<_> = defaults.chain(given).collect();
        // Through the whole configuration, so that names and messages are those of `pt sft`.
        Ok(load_config::<SftConfig>(None, &sets)?.data)
    }
}

/// Where the results of a command go.
#[derive(Args, Debug, Clone)]
pub(crate) struct OutputArgs {
    /// File for the results, one JSON line per row in order; stdout when absent. A file that holds something is not
    /// overwritten, unless --overwrite says so.
    #[arg(long)]
    output: Option<PathBuf>,
    /// Replace the file in --output.
    #[arg(long, requires = "output")]
    overwrite: bool,
}

impl OutputArgs {
    /// Checks at once that the file can be written, not after the work.
    pub(crate) fn open(&self) -> Result<Lines> {
        let Some(path) = self.output.as_deref() else { return Ok(Lines::Stdout) };
        // Through a link, too. What is empty (a file that `mktemp` made, say) holds nothing to lose.
        let holds_something = std::fs::metadata(path).is_ok_and(|file| file.is_file() && file.len() > 0);
        if holds_something && !self.overwrite {
            return Err(Misused {
                message: format!("{} already exists", path.display()),
                hint: "choose another --output, or replace it with --overwrite".into(),
            }
            .into());
        }
        Lines::to_file(path)
    }
}

/// Where JSON lines go.
pub(crate) enum Lines {
    /// Stdout, line by line.
    Stdout,
    /// What is no ordinary file (`/dev/null`, a named pipe, a link): written to as it stands, never replaced.
    Special { path: PathBuf, file: File },
    /// A file that gets its name when it is whole.
    Whole { path: PathBuf, buffer: Vec<u8> },
}

impl Lines {
    fn to_file(path: &Path) -> Result<Self> {
        let refused = |source| TrainError::Write { path: path.to_path_buf(), source };
        if path.is_dir() {
            return Err(refused(std::io::ErrorKind::IsADirectory.into()).into());
        }
        let path = path.to_path_buf();
        if std::fs::symlink_metadata(&path).is_ok_and(|metadata| !metadata.is_file()) {
            let file = File::create(&path).map_err(refused)?;
            return Ok(Self::Special { path, file });
        }
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        tempfile::tempfile_in(folder).map_err(refused)?;
        Ok(Self::Whole { path, buffer: vec![] })
    }

    pub(crate) fn push(&mut self, value: &serde_json::Value) -> Result<()> {
        let line = format!("{value}\n");
        match self {
            Self::Stdout => talk::put(line.as_bytes()),
            Self::Special { path, file } => {
                let written = file.write_all(line.as_bytes());
                Ok(written.map_err(|source| TrainError::Write { path: path.clone(), source })?)
            }
            Self::Whole { buffer, .. } => {
                buffer.extend(line.into_bytes());
                Ok(())
            }
        }
    }

    pub(crate) fn finish(self) -> Result<()> {
        if let Self::Whole { path, buffer } = self {
            pt_tensor::io::write_atomically(&path, |out| out.write_all(&buffer))?;
        }
        Ok(())
    }
}
