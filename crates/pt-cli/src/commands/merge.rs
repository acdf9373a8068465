//! `pt merge`

use crate::checkpoints::run_of;
use crate::job::{give_new_biases_a_place, save_checkpoint, save_model};
use crate::open::{BaseFormat, DataArgs, FolderArgs, ModelArgs, no_tokenizer};
use crate::run_command::{RunCommand, agreed, dtype_name};
use crate::talk::{Refused, say};
use anyhow::Result;
use pt_model::{Bare, CausalLm, Pretrained, Sites, quantized_config};
use pt_peft::{Drift, Predictions, load_adapter};
use pt_tensor::{Kind, Nf4Options, Nf4Weight};
use pt_train::data::{read_rows, row_to_group};
use pt_train::encoder::ModelEncoder;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;

#[derive(clap::Args)]
#[command(after_long_help = ABOUT_4_BITS)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// How the base's linear layers were held while the adapter was trained on them: when not given, as the adapter's run
    /// kept it, else as-stored.
    #[arg(long, value_enum)]
    weights: Option<BaseFormat>,
    #[command(flatten)]
    folder: FolderArgs,
    /// Write layers that were in 4 bits in 4 bits again (NF4); without it they are decoded and the result is dense.
    #[arg(long)]
    requantize: bool,
    /// Rows to measure the drift on instead of the built-in texts, as `pt sft --data` reads them; the first 8 are taken.
    #[arg(long)]
    data: Vec<PathBuf>,
    #[command(flatten)]
    read: DataArgs,
}

/// What stands below the options.
const ABOUT_4_BITS: &str = "\
Merging into a 4-bit base decodes it: the update is added to the dequantized weights that the adapter was trained on, and the sum is rounded \
to --dtype, or with --requantize to 4 bits again. What either costs is measured before anything is written: the largest difference of a \
logit and the mean KL divergence (nats) between the adapter on its base and the merged model, over a few texts. 4 bits again round much of \
a small update away; where that shows, keep the adapter beside its base.";

/// Texts of several kinds, for a drift that nobody gave rows for.
const TEXTS: [&str; 6] = [
    "The capital of France is Paris, and the capital of Japan is Tokyo.",
    "Question: A train covers 120 kilometres in 2 hours. How fast is it? Answer: 60 kilometres an hour.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Once upon a time there was a small house at the edge of a large forest, and nobody remembered who had built it.",
    "To make tea, boil water, pour it over the leaves, wait for three minutes, and take the leaves out.",
    "Dear Ms Okafor, thank you for your letter of 3 May. We will send the spare part this week.",
];

/// Tokens of a row at most, and rows: enough to see a drift, few enough for a CPU.
const MAX_TOKENS: usize = 256;
const MAX_ROWS: usize = 8;

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    args.folder.check()?;
    let adapter = args.model.adapter_folder()?;
    let pretrained = args.model.pretrained()?;
    // Nothing is rounded in f32.
    let kind = args.model.saved_kind(&pretrained, Kind::Float)?;
    let weights = weights_of(args.weights, adapter.as_deref())?;
    let mut model = CausalLm::load_with(&pretrained, args.model.device()?, kind, weights.format())?;
    let in_4_bits: Vec<(usize, Nf4Options)> =
        model.linear_layers().filter_map(|layer| Some((layer.index, layer.weight.as_nf4()?.options()))).collect();
    if args.requantize && in_4_bits.is_empty() {
        return Err(Refused {
            message: format!("--requantize: no weight of {} is in 4 bits", pretrained.path.display()),
            hint: "merge without it, and `pt quantize` the result; or say --weights nf4, if the adapter was trained so"
                .into(),
        }
        .into());
    }
    if let Some(folder) = &adapter {
        let sequences = sequences(&args, &pretrained, &model)?;
        let adapter = load_adapter(folder, &model)?;
        let with_adapter = Predictions::of(&model, &(adapter.clone() as Rc<dyn Sites>), &sequences)?;
        adapter.merge_into(&mut model)?;
        let bare: Rc<dyn Sites> = Rc::new(Bare);
        let merged = with_adapter.drift_to(&Predictions::of(&model, &bare, &sequences)?)?;
        let base = if in_4_bits.is_empty() { "its base" } else { "its 4-bit base" };
        say(format_args!(
            "drift from the adapter on {base}, over {} tokens of {} texts:",
            merged.num_tokens,
            sequences.len()
        ))?;
        say_drift(&format!("merged, {}", dtype_name(kind)), &merged)?;
        if args.requantize {
            requantize(&mut model, &in_4_bits)?;
            let again = with_adapter.drift_to(&Predictions::of(&model, &bare, &sequences)?)?;
            say_drift("merged, NF4 again", &again)?;
        }
    }
    args.folder.fill(|folder, max_shard_bytes| {
        if !args.requantize {
            return save_model(folder, &pretrained, &model, max_shard_bytes);
        }
        let mut parameters = model.named_parameters_in_4_bits()?;
        let has_double_quant = in_4_bits.iter().any(|(_, options)| options.double_quant);
        let mut config = quantized_config(&pretrained.config.raw, kind, has_double_quant);
        give_new_biases_a_place(&mut parameters, &mut config, &pretrained, &model)?;
        let has_output = parameters.iter().any(|(name, _)| name == "lm_head.weight");
        config.insert("tie_word_embeddings".into(), (!has_output).into());
        save_checkpoint(folder, &pretrained, &parameters, &config, max_shard_bytes)
    })?;
    Ok(ExitCode::SUCCESS)
}

/// What the adapter was trained over: as its run kept it, where it stands in one, else as the flag says.
fn weights_of(given: Option<BaseFormat>, adapter: Option<&Path>) -> Result<BaseFormat> {
    let given = given.map(|weights| weights.name().to_string());
    let agreed = match adapter.and_then(run_of) {
        Some(run) => {
            let kept = RunCommand::load(&run)?.and_then(|command| command.kept_weights());
            agreed("--weights", given, kept, &run)?
        }
        None => given,
    };
    Ok(agreed.map_or(BaseFormat::AsStored, |name| BaseFormat::of_name(&name)))
}

fn say_drift(what: &str, drift: &Drift) -> Result<()> {
    let Drift { max_logit, mean_kl, .. } = drift;
    say(format_args!("  {what:<18} max |Δlogit| {max_logit:.3e}, mean KL {mean_kl:.3e} nats"))
}

/// Puts the layers that a merge has made dense into 4 bits again, as they were; those that it left alone keep their codes.
fn requantize(model: &mut CausalLm, in_4_bits: &[(usize, Nf4Options)]) -> Result<()> {
    for layer in model.linear_layers_mut()? {
        let before = in_4_bits.iter().find(|(index, _)| *index == layer.index);
        if let (Some((_, options)), None) = (before, layer.weight.as_nf4()) {
            layer.weight = Rc::new(Nf4Weight::quantize(&layer.weight.dense()?, *options)?);
        }
    }
    Ok(())
}

/// What the drift is measured on: the rows in --data, else the built-in texts.
fn sequences(args: &Args, pretrained: &Pretrained, model: &CausalLm) -> Result<Vec<Vec<i64>>> {
    let longest = MAX_TOKENS.min(model.config().max_position_embeddings as usize);
    let encoder = ModelEncoder::new(pretrained);
    let mut sequences: Vec<Vec<i64>> = if !args.data.is_empty() {
        let config = args.read.config(&[])?;
        let encoder = encoder.ok_or_else(|| no_tokenizer(pretrained))?;
        let rows = read_rows(&args.data, &config.read_options())?;
        let ids = |row| -> Result<Vec<i64>> {
            let group = row_to_group(row, &encoder, config.train_turns)?;
            let completion = group.completions.into_iter().next().unwrap_or_default();
            Ok(group.prompt.into_iter().chain(completion.token_ids).collect())
        };
        rows.iter().take(MAX_ROWS).map(ids).collect::<Result<_>>()?
    } else if let Some(tokenizer) = &pretrained.tokenizer {
        TEXTS.iter().map(|text| Ok(tokenizer.encode(text)?)).collect::<Result<_>>()?
    } else {
        // Without a tokenizer any tokens have to do.
        let vocab_size = model.config().vocab_size;
        (1..=4).map(|step| (0..24).map(|i| (7 + i * 13 * step) % vocab_size).collect()).collect()
    };
    sequences.iter_mut().for_each(|ids| ids.truncate(longest));
    sequences.retain(|ids| !ids.is_empty());
    Ok(sequences)
}
