//! The laws that every method has to keep, as one suite.

use crate::{Adapter, Result};
use pt_model::{Bare, CausalLm, Completion, Linear, PackedBatch, PromptGroup, RunOptions, Sites};
use pt_tensor::{Device, Kind, Tensor, no_grad};
use std::path::Path;
use std::rc::Rc;

/// An adapter, or why there is none.
pub type Made = Result<Rc<dyn Adapter>>;

/// What the suite needs of a method.
pub struct Method<'a> {
    /// Makes an adapter at its neutral start.
    pub new: &'a dyn Fn(&CausalLm) -> Made,
    /// Loads one from a folder.
    pub load: &'a dyn Fn(&Path, &CausalLm) -> Made,
    /// Largest difference of logits that merging may make: rounding.
    pub tolerance: f64,
}

impl std::fmt::Debug for Method<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Method").field("tolerance", &self.tolerance).finish_non_exhaustive()
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

/// Checks the laws of [`Adapter`] for a method on a model; `folder` is empty and may be written to.
///
/// # Errors
/// Those of the method.
///
/// # Panics
/// With the law's name, when one does not hold: this is a test.
pub fn adapter_laws(method: &Method<'_>, model: &mut CausalLm, sequences: &[Vec<i64>], folder: &Path) -> Result<()> {
    let bare_sites: Rc<dyn Sites> = Rc::new(Bare);
    let distance = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
    let bare = logits(model, &bare_sites, sequences)?;

    let adapter = (method.new)(model)?;
    let sites: Rc<dyn Sites> = adapter.clone();
    let start = distance(&logits(model, &sites, sequences)?, &bare);
    assert!(start <= method.tolerance, "a method at its neutral start is the bare model; logits differ by {start:e}");

    disturb(adapter.as_ref(), 0.1);
    let on = logits(model, &sites, sequences)?;
    let moved = distance(&on, &bare);
    assert!(moved > 100.0 * method.tolerance, "trained values act; logits moved by {moved:e}");

    adapter.set_enabled(false);
    assert!(logits(model, &sites, sequences)?.equal(&bare), "switched off, it is the bare model");
    adapter.set_enabled(true);
    assert!(logits(model, &sites, sequences)?.equal(&on), "switched on again, it is as before");

    let weights: Vec<(String, Tensor)> =
        model.named_parameters()?.into_iter().map(|(name, tensor)| (name, tensor.copy())).collect();
    adapter.merge_into(model)?;
    assert!(adapter.merge_into(model).is_err(), "a second merge is refused");
    let merged = logits(model, &bare_sites, sequences)?;
    let difference = distance(&merged, &on);
    assert!(difference <= method.tolerance, "merged, the bare model gives the adapter's values; off by {difference:e}");
    assert!(logits(model, &sites, sequences)?.equal(&merged), "merged, the adapter adds nothing more");
    adapter.unmerge_from(model)?;
    assert!(adapter.unmerge_from(model).is_err(), "a second unmerge is refused");
    for ((name, before), (_, after)) in weights.iter().zip(model.named_parameters()?) {
        assert!(before.equal(&after), "unmerged, `{name}` is what it was");
    }
    assert!(logits(model, &sites, sequences)?.equal(&on), "unmerged, the adapter acts as before");

    let saved = folder.join("adapter");
    adapter.save(&saved)?;
    let loaded = (method.load)(&saved, model)?;
    for ((name, a), (other, b)) in adapter.parameters().into_iter().zip(loaded.parameters()) {
        assert!(name == other && a.equal(&b), "`{name}` survives saving and loading");
    }
    let sites: Rc<dyn Sites> = loaded;
    assert!(logits(model, &sites, sequences)?.equal(&on), "saved and loaded, it gives the same values");

    adapter_gradients(adapter.as_ref(), model)
}

/// Checks the gradients of all trained values and of the input at every linear layer: those of the layer's own values and
/// of the input must not vanish, and along each gradient finite differences must give its norm.
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
            if norm == 0.0 {
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

fn probe(rows: i64, layer: &Linear, model: &CausalLm) -> Tensor {
    let width = layer.weight.size().1;
    let count = Tensor::arange(rows * width, (Kind::Float, model.device()));
    ((count * 0.7).sin().view([rows, width])).to_kind(model.kind()).set_requires_grad(true)
}
