//! Opening models and adapters as the flags say; shared by the commands.

use crate::talk::Usage;
use anyhow::Result;
use clap::Args;
use pt_model::{Bare, CausalLm, ModelError, Pretrained, Sites};
use pt_peft::LoraAdapter;
use pt_tensor::{Device, Kind, parse_device, parse_kind};
use pt_train::TrainError;
use pt_train::encoder::ModelEncoder;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Which model, where and how.
#[derive(Args, Debug, Clone)]
pub(crate) struct ModelArgs {
    /// A Hugging Face folder, a .gguf file, or a name that `pt models` lists.
    #[arg(long)]
    pub(crate) model: String,
    /// An adapter folder in PEFT's format.
    #[arg(long)]
    pub(crate) adapter: Option<PathBuf>,
    /// auto, cpu, cuda, cuda:N or mps.
    #[arg(long, default_value = "auto")]
    pub(crate) device: String,
    /// Number format of weights and activations: auto, f32, bf16 or f16.
    #[arg(long, default_value = "auto")]
    pub(crate) dtype: String,
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
            Ok(_) => Ok(pt_fetch::fetch(&self.model)?),
            Err(unknown) if self.model.contains(['/', '\\', '.']) => {
                let _ = unknown;
                Err(ModelError::Read { path, source: std::io::ErrorKind::NotFound.into() }.into())
            }
            Err(unknown) => Err(unknown.into()),
        }
    }

    pub(crate) fn pretrained(&self) -> Result<Pretrained> {
        Ok(Pretrained::open(self.path()?)?)
    }

    pub(crate) fn open(&self) -> Result<Opened> {
        let (device, kind) = (self.device()?, self.kind()?);
        let pretrained = self.pretrained()?;
        let model = CausalLm::load(&pretrained, device, kind)?;
        let sites: Rc<dyn Sites> = match &self.adapter {
            Some(folder) => Rc::new(LoraAdapter::load(folder, &model)?),
            None => Rc::new(Bare),
        };
        Ok(Opened { pretrained, model, sites })
    }
}

/// Where JSON lines go: `--output`, written under its name only when whole, or stdout.
pub(crate) struct Lines {
    path: Option<PathBuf>,
    buffer: Vec<u8>,
}

impl Lines {
    /// Checks at once that the file can be written, not after the work.
    pub(crate) fn new(path: Option<&Path>) -> Result<Self> {
        if let Some(path) = path {
            let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let refused = |source| TrainError::Write { path: path.to_path_buf(), source };
            if path.is_dir() {
                return Err(refused(std::io::ErrorKind::IsADirectory.into()).into());
            }
            tempfile::tempfile_in(folder).map_err(refused)?;
        }
        Ok(Self { path: path.map(Path::to_path_buf), buffer: vec![] })
    }

    pub(crate) fn push(&mut self, value: &serde_json::Value) -> Result<()> {
        use std::io::Write;
        let mut line = value.to_string().into_bytes();
        line.push(b'\n');
        match self.path {
            Some(_) => self.buffer.extend(line),
            None => std::io::stdout().write_all(&line)?,
        }
        Ok(())
    }

    pub(crate) fn finish(self) -> Result<()> {
        if let Some(path) = self.path {
            pt_tensor::io::write_atomically(&path, |out| out.write_all(&self.buffer))?;
        }
        Ok(())
    }
}
