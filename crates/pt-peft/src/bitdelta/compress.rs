//! From two models to a delta, tensor by tensor.

use super::config::{BitDeltaConfig, KeptWhole};
use super::fingerprint::Fingerprint;
use super::stored::StoredDelta;
use crate::{PeftError, Result};
use pt_model::{Architecture, CausalLm, ModelConfig, Pretrained, TensorSource, is_block_linear};
use pt_tensor::{Device, Kind, ScaledSigns, Tensor, fit_delta, no_grad};
use std::collections::BTreeSet;
use std::path::PathBuf;

/// Where the fine-tuned parameters come from: a checkpoint, read tensor by tensor, or a model in memory (a base with its
/// adapter merged, say).
#[derive(Debug, Clone, Copy)]
pub enum FineTuned<'a> {
    /// A checkpoint.
    Checkpoint(&'a Pretrained),
    /// A model in memory.
    Model(&'a CausalLm),
}

impl FineTuned<'_> {
    fn config(&self) -> &ModelConfig {
        match self {
            Self::Checkpoint(pretrained) => &pretrained.config,
            Self::Model(model) => model.config(),
        }
    }

    /// Names of parameters; a tied output layer is left out.
    fn names(&self) -> Result<BTreeSet<String>> {
        match self {
            Self::Checkpoint(pretrained) => Ok(names(pretrained.tensors.as_ref(), &pretrained.config)),
            Self::Model(model) => Ok(model.named_parameters()?.into_iter().map(|(name, _)| name).collect()),
        }
    }

    /// A parameter in f32 on the CPU, in the checkpoint's layout.
    fn tensor(&self, name: &str) -> Result<Tensor> {
        match self {
            Self::Checkpoint(pretrained) => Ok(pretrained.tensors.tensor(name, Kind::Float, Device::Cpu)?),
            Self::Model(model) => {
                let tensor = model.parameter(name).ok_or_else(|| {
                    PeftError::State(format!("the fine-tuned model has no parameter `{name}`, which its base has"))
                })?;
                Ok(no_grad(|| tensor.to_kind(Kind::Float).to_device(Device::Cpu)))
            }
        }
    }

    /// For messages.
    fn path(&self) -> PathBuf {
        match self {
            Self::Checkpoint(pretrained) => pretrained.path.clone(),
            Self::Model(_) => "the fine-tuned model".into(),
        }
    }
}

pub(super) const OUTPUT: &str = "lm_head.weight";

/// Parameters of a checkpoint; a tied output layer is left out, whether or not it is stored.
pub(super) fn names(tensors: &dyn TensorSource, config: &ModelConfig) -> BTreeSet<String> {
    tensors.names().into_iter().filter(|name| name != OUTPUT || !config.tie_word_embeddings).collect()
}

pub(super) fn embedding(config: &ModelConfig) -> &'static str {
    if config.architecture == Architecture::Gpt2 { "transformer.wte.weight" } else { "model.embed_tokens.weight" }
}

/// Compresses a fine-tune into a 1-bit delta over its base: signs of W_fine_tuned − W_base and the mean of its magnitudes
/// for each linear layer of the decoder blocks (BitDelta, section 3.1), and `config.kept_whole` of the rest in
/// `whole_kind`.
///
/// One tensor of each model is in memory at a time where both are checkpoints; `on_tensor` hears the name of each, and how
/// many there are.
///
/// # Errors
/// [`PeftError::NotAnAdapter`] when the two models do not have the same parameters, [`PeftError::Tensor`] with the row when
/// a difference is not finite; those of reading.
pub fn compress(
    base: &Pretrained,
    fine_tuned: FineTuned<'_>,
    config: BitDeltaConfig,
    whole_kind: Kind,
    mut on_tensor: impl FnMut(&str, usize),
) -> Result<StoredDelta> {
    let differs = |reason: String| PeftError::NotAnAdapter {
        path: fine_tuned.path(),
        reason: format!("{reason}, so it is no fine-tune of {}", base.path.display()),
        hint: "both must be the same architecture, vocabulary included; give the model that it was tuned from".into(),
    };
    let (of_base, of_tuned) = (names(base.tensors.as_ref(), &base.config), fine_tuned.names()?);
    // A fine-tune may have untied its output layer, or the reverse.
    if let Some(name) = of_base.symmetric_difference(&of_tuned).find(|name| *name != OUTPUT) {
        let which = if of_base.contains(name) { "it lacks" } else { "it alone has" };
        return Err(differs(format!("{which} `{name}`")));
    }
    let all: BTreeSet<&String> = of_base.union(&of_tuned).collect();
    let is_transposed = base.config.architecture == Architecture::Gpt2;
    let read = |name: &String| -> Result<(Tensor, Tensor)> {
        // A tied output layer is the embedding.
        let known = |names: &BTreeSet<String>, config: &ModelConfig| {
            if names.contains(name) { name.clone() } else { embedding(config).to_string() }
        };
        let base = base.tensors.tensor(&known(&of_base, &base.config), Kind::Float, Device::Cpu)?;
        let tuned = fine_tuned.tensor(&known(&of_tuned, fine_tuned.config()))?;
        if base.size() != tuned.size() {
            return Err(differs(format!("its `{name}` has shape {:?}, not {:?}", tuned.size(), base.size())));
        }
        Ok((base, tuned))
    };
    let (mut signs, mut whole) = (Vec::new(), Vec::new());
    let mut print = Fingerprint::default();
    for &name in &all {
        on_tensor(name, all.len());
        let (base, tuned) = read(name)?;
        if is_block_linear(name, &base.size()) {
            let turned = |tensor: Tensor| if is_transposed { tensor.tr().contiguous() } else { tensor };
            let (base, tuned) = (turned(base), turned(tuned));
            print.add_signed(name, &base)?;
            let delta = fit_delta(&base, &tuned, config.scale_sharing.into())?;
            let path = name.strip_suffix(".weight").unwrap_or(name).to_string();
            signs.push((path, ScaledSigns::new(delta.as_ref(), Device::Cpu)?));
            continue;
        }
        if is_plain(name) {
            print.add_plain(name, &base)?;
        }
        if keeps(config.kept_whole, &base, &tuned) {
            whole.push((name.clone(), tuned.to_kind(whole_kind)));
        }
    }
    Ok(StoredDelta { config, signs, whole, base: print, origin: "the delta".into() })
}

/// Whether a parameter is an embedding or a norm, no part of a linear layer.
pub(super) fn is_plain(name: &str) -> bool {
    let (module, part) = name.rsplit_once('.').unwrap_or((name, ""));
    let last = module.rsplit('.').next().unwrap_or(module);
    // A linear layer's weight gets signs, so a bias that is no norm's is a linear layer's.
    name != OUTPUT && (part == "weight" || last.contains("norm") || last.starts_with("ln_"))
}

pub(super) fn keeps(kept: KeptWhole, base: &Tensor, tuned: &Tensor) -> bool {
    match kept {
        KeptWhole::All => true,
        KeptWhole::None => false,
        KeptWhole::Changed => !base.equal(tuned),
    }
}
