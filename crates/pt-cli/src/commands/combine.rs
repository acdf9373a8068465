//! `pt combine`

use crate::checkpoints::adapter_folder;
use crate::open::{ModelArgs, check_free};
use crate::talk::Usage;
use anyhow::Result;
use pt_model::CausalLm;
use pt_peft::{Adapter, Combination, LoraAdapter, MajoritySign, Pruning, Sum};
use pt_tensor::{Device, Kind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The model that the adapters were trained on: a Hugging Face folder, a .gguf file, or a name that `pt models` lists.
    #[arg(long)]
    model: String,
    /// A LoRA adapter (or a run that trained one) and its weight, which may be negative; given once for each.
    #[arg(long = "adapter", value_name = "FOLDER=WEIGHT", required = true)]
    adapters: Vec<String>,
    /// linear sums the factors; cat is exact, its rank the sum of theirs; svd sums the updates and cuts to a rank; ties elects
    /// signs; dare_linear and dare_ties drop values at random; magnitude_prune drops the smallest; each of these also with _svd.
    #[arg(long = "type", default_value = "cat")]
    how: Combination,
    /// Share of values that stay, for those that drop some.
    #[arg(long)]
    density: Option<f64>,
    /// Rank of the result, for svd; the largest of theirs when not given.
    #[arg(long)]
    rank: Option<i64>,
    /// Elect signs by their number instead of by the sum of the values.
    #[arg(long)]
    by_frequency: bool,
    /// Seed of the values that are dropped at random.
    #[arg(long)]
    seed: Option<u64>,
    /// New folder for the adapter.
    #[arg(long)]
    output: PathBuf,
}

impl Args {
    /// The named combination with what was set; a flag that does not bear on it is refused.
    fn combination(&self) -> Result<Combination> {
        let mut how = self.how;
        let unused = |flag: &str| Usage(format!("{flag} does not bear on --type {}: leave it out", self.how));
        match (&mut how.pruning, self.density) {
            (Some(Pruning::Magnitude { density } | Pruning::Random { density, .. }), Some(given)) => *density = given,
            (None, Some(_)) => return Err(unused("--density").into()),
            (_, None) => {}
        }
        match (&mut how.pruning, self.seed) {
            (Some(Pruning::Random { seed, .. }), Some(given)) => *seed = given,
            (_, Some(_)) => return Err(unused("--seed").into()),
            (_, None) => {}
        }
        match &mut how.sum {
            Sum::Products { rank } => *rank = self.rank,
            _ if self.rank.is_some() => return Err(unused("--rank").into()),
            _ => {}
        }
        match &mut how.sign {
            Some(sign) if self.by_frequency => *sign = MajoritySign::Frequency,
            None if self.by_frequency => return Err(unused("--by-frequency").into()),
            _ => {}
        }
        Ok(how)
    }
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    let how = args.combination()?;
    check_free(&args.output)?;
    let mut parts = Vec::new();
    for text in &args.adapters {
        let parsed = text.rsplit_once('=').and_then(|(folder, weight)| Some((folder, weight.parse::<f64>().ok()?)));
        let Some((folder, weight)) = parsed else {
            return Err(Usage(format!("--adapter {text}: expected FOLDER=WEIGHT, as in runs/a=0.7")).into());
        };
        parts.push((adapter_folder(Path::new(folder))?, weight));
    }
    let model = ModelArgs { model: args.model, adapter: None, device: "cpu".into(), dtype: "f32".into() };
    let model = CausalLm::load(&model.pretrained()?, Device::Cpu, Kind::Float)?;
    let loaded = parts
        .iter()
        .map(|(folder, weight)| Ok((LoraAdapter::load(folder, &model)?, *weight)))
        .collect::<Result<Vec<_>>>()?;
    let weighted: Vec<(&LoraAdapter, f64)> = loaded.iter().map(|(adapter, weight)| (adapter, *weight)).collect();
    let combined = LoraAdapter::combined(&model, &weighted, how)?;
    combined.save(&args.output)?;
    eprintln!(
        "saved {}: {how}, rank {}, {} layers",
        args.output.display(),
        combined.config().rank,
        combined.targets().count()
    );
    Ok(ExitCode::SUCCESS)
}
