//! The laws that every method has to keep, as one suite.

use crate::{Adapter, PeftError, Result};
use pt_model::{
    Bare, CausalLm, Completion, GenerateConfig, Linear, PackedBatch, PromptGroup, RunOptions, Sites, generate,
};
use pt_tensor::{AdamW, AdamWConfig, Device, Kind, LabelLogprobs, Tensor, no_grad};
use std::path::Path;
use std::rc::Rc;

/// An adapter, or why there is none.
pub type Made = Result<Rc<dyn Adapter>>;

/// What the suite needs of a method.
pub struct Subject<'a> {
    /// Makes a new adapter.
    pub new: &'a dyn Fn(&CausalLm) -> Made,
    /// Loads one from a folder.
    pub load: &'a dyn Fn(&Path, &CausalLm) -> Made,
    /// Largest difference of logits that rounding may make, in merging, packing or decoding.
    pub tolerance: f64,
    /// Whether a new adapter is the bare model.
    pub starts_neutral: bool,
    /// Whether it goes into weights.
    pub is_mergeable: bool,
}

impl std::fmt::Debug for Subject<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { tolerance, starts_neutral, is_mergeable, .. } = self;
        f.debug_struct("Subject")
            .field("tolerance", tolerance)
            .field("starts_neutral", starts_neutral)
            .field("is_mergeable", is_mergeable)
            .finish_non_exhaustive()
    }
}

/// Logits of all tokens of `sequences`, `[total_tokens, vocab_size]`, f32, without a graph.
///
/// # Errors
/// Those of the model.
pub fn logits(model: &CausalLm, sites: &Rc<dyn Sites>, sequences: &[Vec<i64>]) -> Result<Tensor> {
    let groups: Vec<PromptGroup> =
        sequences.iter().map(|ids| PromptGroup::single(vec![], Completion::new(ids.clone()))).collect();
    let batch = PackedBatch::new(&groups, model.device())?;
    no_grad(|| {
        let hidden_states = model.hidden_states(&batch, sites, RunOptions::default())?;
        Ok(model.logits(&hidden_states, sites.as_ref())?.to_kind(Kind::Float).to_device(Device::Cpu))
    })
}

/// Moves every trained value by a fixed pattern of at most `amount`, so that a neutral start is neutral no more.
pub fn disturb(adapter: &dyn Adapter, amount: f64) {
    no_grad(|| {
        for (index, (_, mut tensor)) in adapter.parameters().into_iter().enumerate() {
            let count = Tensor::arange(tensor.numel() as i64, (Kind::Float, tensor.device()));
            let pattern = (count * 1.7 + index as f64).sin() * amount;
            let _ = tensor.g_add_(&pattern.view_as(&tensor));
        }
    });
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}

/// Checks the laws of [`Adapter`] for a method on a model; `folder` is empty and may be written to. `sequences` are two or
/// more, the first of at least 6 tokens.
///
/// # Errors
/// Those of the method.
///
/// # Panics
/// With the law's name, when one does not hold: this is a test.
pub fn adapter_laws(subject: &Subject<'_>, model: &mut CausalLm, sequences: &[Vec<i64>], folder: &Path) -> Result<()> {
    let bare_sites: Rc<dyn Sites> = Rc::new(Bare);
    let bare = logits(model, &bare_sites, sequences)?;

    let adapter = (subject.new)(model)?;
    let sites: Rc<dyn Sites> = adapter.clone();
    if subject.starts_neutral {
        let start = distance(&logits(model, &sites, sequences)?, &bare);
        assert!(start <= subject.tolerance, "a new adapter is the bare model; logits differ by {start:e}");
    }

    disturb(adapter.as_ref(), 0.1);
    let on = logits(model, &sites, sequences)?;
    let moved = distance(&on, &bare);
    assert!(moved > 100.0 * subject.tolerance, "trained values act; logits moved by {moved:e}");

    adapter.set_enabled(false);
    assert!(logits(model, &sites, sequences)?.equal(&bare), "switched off, it is the bare model");
    adapter.set_enabled(true);
    assert!(logits(model, &sites, sequences)?.equal(&on), "switched on again, it is as before");

    let alone: Vec<Tensor> =
        sequences.iter().map(|ids| logits(model, &sites, std::slice::from_ref(ids))).collect::<Result<_>>()?;
    let packed = distance(&Tensor::cat(&alone, 0), &on);
    assert!(packed <= subject.tolerance, "packed is as alone; logits differ by {packed:e}");
    decoding_laws(subject, model, &sites, sequences)?;
    training_laws(subject, adapter.as_ref(), &sites, model, sequences)?;

    let weights: Vec<(String, Tensor)> =
        model.named_parameters()?.into_iter().map(|(name, tensor)| (name, tensor.copy())).collect();
    if subject.is_mergeable {
        merging_laws(subject, adapter.as_ref(), &sites, model, sequences)?;
    } else {
        let error = adapter.merge_into(model).expect_err("a method that is no change of weights is not merged");
        assert!(matches!(error, PeftError::NotMergeable { .. }), "{error}");
    }
    for ((name, before), (_, after)) in weights.iter().zip(model.named_parameters()?) {
        assert!(before.equal(&after), "unmerged, `{name}` is what it was");
    }
    let on = logits(model, &sites, sequences)?;

    let saved = folder.join("adapter");
    adapter.save(&saved)?;
    let loaded = (subject.load)(&saved, model)?;
    let is_itself = !adapter.is_saved_converted();
    if is_itself {
        let (ours, theirs) = (adapter.parameters(), loaded.parameters());
        assert_eq!(ours.len(), theirs.len(), "as many tensors come back as were saved");
        for ((name, a), (other, b)) in ours.into_iter().zip(theirs) {
            assert!(name == other && a.equal(&b), "`{name}` survives saving and loading");
        }
    }
    let loaded: Rc<dyn Sites> = loaded;
    let off = distance(&logits(model, &loaded, sequences)?, &on);
    let allowed = if is_itself { 0.0 } else { subject.tolerance };
    assert!(off <= allowed, "saved and loaded, it gives the same values; off by {off:e}");

    // A step may have left the update small; the gradients are checked where it is not.
    disturb(adapter.as_ref(), 0.05);
    adapter_gradients(adapter.as_ref(), model)?;
    gradients_outside_layers(adapter.as_ref(), &sites, model, sequences)
}

/// Decoding with a key/value cache is running the whole sequence.
fn decoding_laws(subject: &Subject<'_>, model: &CausalLm, sites: &Rc<dyn Sites>, sequences: &[Vec<i64>]) -> Result<()> {
    let config = GenerateConfig { max_new_tokens: 5, with_logprobs: true, ..Default::default() };
    let rows = generate(model, None, sequences, &config, sites, |_, _| true)?;
    for (prompt, row) in sequences.iter().zip(&rows) {
        let group = PromptGroup::single(prompt.clone(), Completion::new(row.token_ids.clone()));
        let batch = PackedBatch::new(&[group], model.device())?;
        let whole = model.label_logprobs(&batch, sites, RunOptions::default(), &LabelLogprobs::default())?;
        let logprobs = row.logprobs.clone().unwrap_or_default();
        let off = distance(&Tensor::from_slice(&logprobs), &whole.logprobs.to_device(Device::Cpu));
        assert!(off <= subject.tolerance, "decoded is as computed whole; log-probs differ by {off:e}");
    }
    Ok(())
}

/// Minus the sum of all log-probs and the gradients of the adapter's values.
fn gradients(
    adapter: &dyn Adapter,
    sites: &Rc<dyn Sites>,
    model: &CausalLm,
    groups: &[PromptGroup],
    run: RunOptions,
) -> Result<(f64, Vec<(String, Tensor)>)> {
    adapter.parameters().iter_mut().for_each(|(_, tensor)| tensor.zero_grad());
    let batch = PackedBatch::new(groups, model.device())?;
    let loss = -model.label_logprobs(&batch, sites, run, &LabelLogprobs::default())?.logprobs.sum(Kind::Double);
    loss.backward();
    let grads = adapter.parameters().into_iter().map(|(name, tensor)| {
        let grad = tensor.grad();
        assert!(grad.defined(), "no gradient reaches `{name}`");
        (name, grad.copy())
    });
    Ok((loss.double_value(&[]), grads.collect()))
}

/// Every value of the adapter learns and nothing else does; how a batch is laid out and computed changes no gradient.
fn training_laws(
    subject: &Subject<'_>,
    adapter: &dyn Adapter,
    sites: &Rc<dyn Sites>,
    model: &CausalLm,
    sequences: &[Vec<i64>],
) -> Result<()> {
    let (prompt, rest) = sequences[0].split_at(3);
    let completions = [rest.to_vec(), sequences[1].clone()];
    let shared = PromptGroup {
        prompt: prompt.to_vec(),
        completions: completions.iter().cloned().map(Completion::new).collect(),
    };
    let repeated: Vec<PromptGroup> =
        completions.iter().map(|ids| PromptGroup::single(prompt.to_vec(), Completion::new(ids.clone()))).collect();
    let run = |groups: &[PromptGroup], is_checkpointed| {
        gradients(adapter, sites, model, groups, RunOptions { is_checkpointed })
    };
    let (loss, grads) = run(&repeated, false)?;
    for (name, grad) in &grads {
        assert!(grad.abs().max().double_value(&[]) > 0.0, "the gradient of `{name}` is zero");
    }
    for (name, tensor) in model.named_parameters()? {
        assert!(!tensor.requires_grad() && !tensor.grad().defined(), "`{name}` of the frozen model is trained");
    }
    let same = |what: &str, (other, others): (f64, Vec<(String, Tensor)>)| {
        let off = (loss - other).abs();
        assert!(off <= 10.0 * subject.tolerance, "{what}: the loss is off by {off:e}");
        for ((name, a), (_, b)) in grads.iter().zip(&others) {
            let (off, size) = (distance(a, b), a.abs().max().double_value(&[]));
            assert!(
                off <= 100.0 * subject.tolerance * size.max(1.0),
                "{what}: the gradient of `{name}` is off by {off:e}"
            );
        }
    };
    same("a shared prompt is as a repeated one", run(&[shared], false)?);
    same("activation checkpointing changes nothing", run(&repeated, true)?);
    let (first, second) = (run(&repeated[..1], false)?, run(&repeated[1..], false)?);
    let sums = first.1.into_iter().zip(second.1).map(|((name, a), (_, b))| (name, a + b)).collect();
    same("gradients accumulate over batches", (first.0 + second.0, sums));

    run(&repeated, false)?;
    let before: Vec<Tensor> = adapter.parameters().iter().map(|(_, tensor)| tensor.detach().copy()).collect();
    AdamW::new(adapter.parameters(), AdamWConfig::default())?.step(1e-3)?;
    for ((name, after), before) in adapter.parameters().iter().zip(&before) {
        assert!(!after.equal(before), "a step moves `{name}`");
    }
    Ok(())
}

/// Merged, the bare model gives the adapter's values; unmerged, it is the bare model again.
fn merging_laws(
    subject: &Subject<'_>,
    adapter: &dyn Adapter,
    sites: &Rc<dyn Sites>,
    model: &mut CausalLm,
    sequences: &[Vec<i64>],
) -> Result<()> {
    let bare_sites: Rc<dyn Sites> = Rc::new(Bare);
    let on = logits(model, sites, sequences)?;
    adapter.merge_into(model)?;
    assert!(adapter.merge_into(model).is_err(), "a second merge is refused");
    let merged = logits(model, &bare_sites, sequences)?;
    let off = distance(&merged, &on);
    assert!(off <= subject.tolerance, "merged, the bare model gives the adapter's values; off by {off:e}");
    assert!(logits(model, sites, sequences)?.equal(&merged), "merged, the adapter adds nothing more");
    adapter.unmerge_from(model)?;
    assert!(adapter.unmerge_from(model).is_err(), "a second unmerge is refused");
    assert!(logits(model, sites, sequences)?.equal(&on), "unmerged, the adapter acts as before");
    Ok(())
}

/// A method over another base, in bf16 or 4 bits: it computes finite values, and its own get finite f32 gradients; switched
/// off it is the bare model, and it survives saving to `folder` and loading.
///
/// # Errors
/// Those of the method.
///
/// # Panics
/// As [`adapter_laws`].
pub fn trains_over(subject: &Subject<'_>, model: &CausalLm, sequences: &[Vec<i64>], folder: &Path) -> Result<()> {
    let adapter = (subject.new)(model)?;
    disturb(adapter.as_ref(), 0.05);
    let sites: Rc<dyn Sites> = adapter.clone();
    let groups: Vec<PromptGroup> =
        sequences.iter().map(|ids| PromptGroup::single(vec![], Completion::new(ids.clone()))).collect();
    let (loss, grads) = gradients(adapter.as_ref(), &sites, model, &groups, RunOptions::default())?;
    assert!(loss.is_finite(), "the loss is {loss}");
    for (name, grad) in grads {
        let largest = grad.abs().max().double_value(&[]);
        assert!(grad.kind() == Kind::Float && largest.is_finite() && largest > 0.0, "`{name}`: {largest}");
    }
    let (bare, on) = (logits(model, &(Rc::new(Bare) as Rc<dyn Sites>), sequences)?, logits(model, &sites, sequences)?);
    assert!(!on.equal(&bare), "trained values act");
    adapter.set_enabled(false);
    assert!(logits(model, &sites, sequences)?.equal(&bare), "switched off, it is the bare model");
    adapter.set_enabled(true);
    let saved = folder.join("adapter");
    adapter.save(&saved)?;
    let loaded: Rc<dyn Sites> = (subject.load)(&saved, model)?;
    let is_same = logits(model, &loaded, sequences)?.equal(&on);
    assert!(is_same || adapter.is_saved_converted(), "saved and loaded, it gives the same values");
    Ok(())
}

/// Checks the gradients of all trained values and of the input at every linear layer: those of the layer's own values and
/// of the input must not vanish, and along each gradient finite differences must give its norm, unless the method says that
/// it is no exact gradient.
fn adapter_gradients(adapter: &dyn Adapter, model: &CausalLm) -> Result<()> {
    for layer in model.linear_layers() {
        let x = probe(5, layer, model);
        let upstream = (Tensor::arange(5 * layer.weight.size().0, (Kind::Float, model.device())) * 0.9).cos();
        let loss = |x: &Tensor| -> Result<Tensor> {
            let output = adapter.linear(layer, x)?;
            Ok((output.to_kind(Kind::Float).view(-1) * &upstream).sum(Kind::Double))
        };
        let mut targets: Vec<(String, Tensor)> = adapter.parameters();
        for (_, tensor) in &mut targets {
            tensor.zero_grad();
        }
        targets.push(("the input".into(), x.shallow_clone()));
        loss(&x)?.backward();
        for (name, mut tensor) in targets {
            let grad = tensor.grad();
            let is_of_layer = name.strip_prefix(layer.path.as_str()).is_some_and(|rest| rest.starts_with('.'));
            let is_input = name == "the input";
            assert!(grad.defined() || !(is_of_layer || is_input), "{}: no gradient reaches {name}", layer.path);
            if !grad.defined() {
                continue;
            }
            // Along the gradient itself, the slope is its norm.
            let norm = grad.norm().double_value(&[]);
            assert!(norm > 0.0 || !(is_of_layer || is_input), "{}: the gradient of {name} is zero", layer.path);
            if norm == 0.0 || !adapter.is_gradient_exact(&name) {
                continue;
            }
            let direction = &grad / norm;
            let before = tensor.detach().copy();
            let step = 1e-2;
            let mut at = |factor: f64| -> Result<f64> {
                no_grad(|| {
                    tensor.copy_(&(&before + &direction * factor));
                    let value = loss(&x)?.double_value(&[]);
                    tensor.copy_(&before);
                    Ok(value)
                })
            };
            let slope = (at(step)? - at(-step)?) / (2.0 * step);
            let error = (slope - norm).abs() / norm;
            assert!(error < 1e-2, "{}: gradient of {name} is {norm}, finite differences give {slope}", layer.path);
        }
    }
    Ok(())
}

/// Checks the gradients of values that belong to no linear layer, such as a norm's or virtual tokens': along each, finite
/// differences of the whole model's loss must give its norm.
fn gradients_outside_layers(
    adapter: &dyn Adapter,
    sites: &Rc<dyn Sites>,
    model: &CausalLm,
    sequences: &[Vec<i64>],
) -> Result<()> {
    let groups: Vec<PromptGroup> =
        sequences.iter().map(|ids| PromptGroup::single(vec![], Completion::new(ids.clone()))).collect();
    let batch = PackedBatch::new(&groups, model.device())?;
    let loss = || -> Result<f64> {
        let out = model.label_logprobs(&batch, sites, RunOptions::default(), &LabelLogprobs::default())?;
        Ok(-out.logprobs.sum(Kind::Double).double_value(&[]))
    };
    let (_, grads) = gradients(adapter, sites, model, &groups, RunOptions::default())?;
    for ((name, grad), (_, mut tensor)) in grads.iter().zip(adapter.parameters()) {
        let is_of = |layer: &Linear| name.strip_prefix(layer.path.as_str()).is_some_and(|rest| rest.starts_with('.'));
        if model.linear_layers().any(is_of) || !adapter.is_gradient_exact(name) {
            continue;
        }
        let norm = grad.norm().double_value(&[]);
        assert!(norm > 0.0, "the gradient of `{name}` is zero");
        let (direction, before) = (grad / norm, tensor.detach().copy());
        let mut at = |factor: f64| -> Result<f64> {
            no_grad(|| {
                tensor.copy_(&(&before + &direction * factor));
                let value = loss();
                tensor.copy_(&before);
                value
            })
        };
        // Far enough for f32 to tell the two losses apart, near enough for the loss to be straight.
        let step = (0.1 / norm).clamp(1e-3, 5e-3);
        let slope = (at(step)? - at(-step)?) / (2.0 * step);
        let error = (slope - norm).abs() / norm;
        assert!(error < 1e-2, "the gradient of `{name}` is {norm}, finite differences of the loss give {slope}");
    }
    Ok(())
}

fn probe(rows: i64, layer: &Linear, model: &CausalLm) -> Tensor {
    let width = layer.weight.size().1;
    let count = Tensor::arange(rows * width, (Kind::Float, model.device()));
    ((count * 0.7).sin().view([rows, width])).to_kind(model.kind()).set_requires_grad(true)
}
