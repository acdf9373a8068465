//! How far the predictions of two models are apart: what merging and quantizing cost.

use crate::{PeftError, Result};
use pt_model::{CausalLm, Completion, PackedBatch, PromptGroup, RunOptions, Sites};
use pt_tensor::{Kind, Tensor, no_grad};
use std::rc::Rc;

/// Logits of a model at every token of some sequences.
#[derive(Debug)]
pub struct Predictions(Vec<Tensor>);

/// How far predictions are from those of a reference.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drift {
    /// The largest difference of two logits, max |Δlogit|.
    pub max_logit: f64,
    /// Mean over tokens of KL(reference ‖ other), nats.
    pub mean_kl: f64,
    /// Tokens predicted from.
    pub num_tokens: usize,
}

impl Predictions {
    /// Logits of `model` with `sites` at every token of `sequences`, each by itself, in f32: 4 · tokens · vocabulary bytes.
    ///
    /// # Errors
    /// Those of the model; an empty sequence is one of them.
    pub fn of(model: &CausalLm, sites: &Rc<dyn Sites>, sequences: &[Vec<i64>]) -> Result<Self> {
        let logits = |ids: &Vec<i64>| -> Result<Tensor> {
            let group = PromptGroup::single(vec![], Completion::new(ids.clone()));
            let batch = PackedBatch::new(&[group], model.device())?;
            let hidden_states = model.hidden_states(&batch, sites, RunOptions::default())?;
            Ok(model.logits(&hidden_states, sites.as_ref())?.to_kind(Kind::Float)) // [tokens, vocab_size]
        };
        no_grad(|| sequences.iter().map(logits).collect::<Result<_>>().map(Self))
    }

    /// How far `other` is from this reference.
    ///
    /// # Errors
    /// [`PeftError::State`] when the two are not of the same tokens, or of none.
    pub fn drift_to(&self, other: &Self) -> Result<Drift> {
        let sizes = |all: &Self| all.0.iter().map(Tensor::size).collect::<Vec<_>>();
        if sizes(self) != sizes(other) || self.0.is_empty() {
            let text = "predictions are compared with others of the same tokens, at least one";
            return Err(PeftError::State(text.into()));
        }
        let mut drift = Drift { max_logit: 0.0, mean_kl: 0.0, num_tokens: 0 };
        no_grad(|| {
            for (reference, other) in self.0.iter().zip(&other.0) {
                let largest = (reference - other).abs().max().double_value(&[]);
                // NaN is farther than any number, and stays.
                drift.max_logit = if largest > drift.max_logit || largest.is_nan() { largest } else { drift.max_logit };
                // KL(p ‖ q) = Σ p · (log p − log q), in f64: it is a small difference of large sums.
                let [reference, other] = [reference, other].map(|logits| logits.log_softmax(-1, Kind::Double));
                let kl = reference.exp() * (&reference - other);
                drift.mean_kl += kl.sum(Kind::Double).double_value(&[]);
                drift.num_tokens += reference.size()[0] as usize;
            }
        });
        drift.mean_kl /= drift.num_tokens as f64;
        Ok(drift)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn predictions(logits: &[&[f32]]) -> Predictions {
        Predictions(logits.iter().map(|row| Tensor::from_slice(row).view([-1, 2])).collect())
    }

    #[test]
    fn drift_is_the_largest_logit_and_the_mean_divergence() {
        let even = predictions(&[&[0., 0.], &[1., 1., 5., 5.]]);
        assert_eq!(even.drift_to(&even).unwrap(), Drift { max_logit: 0.0, mean_kl: 0.0, num_tokens: 3 });
        // p = (1/2, 1/2), q = (3/4, 1/4) at one token of three: KL = ln(2) − ln(3)/2 there.
        let other = predictions(&[&[0., 0.], &[1., 1., 5. + 3f32.ln(), 5.]]);
        let drift = even.drift_to(&other).unwrap();
        assert!((drift.max_logit - 3f64.ln()).abs() < 1e-6, "{drift:?}");
        assert!((drift.mean_kl - (2f64.ln() - 3f64.ln() / 2.0) / 3.0).abs() < 1e-6, "{drift:?}");
    }

    #[test]
    fn a_constant_on_all_logits_moves_them_and_no_probability() {
        let drift = predictions(&[&[1., 2.]]).drift_to(&predictions(&[&[4., 5.]])).unwrap();
        assert!(drift.max_logit == 3.0 && drift.mean_kl.abs() < 1e-12, "{drift:?}");
    }

    #[test]
    fn predictions_of_other_tokens_are_refused() {
        assert!(predictions(&[&[1., 2.]]).drift_to(&predictions(&[&[1., 2., 3., 4.]])).is_err());
        assert!(predictions(&[]).drift_to(&predictions(&[])).is_err());
        let drift = predictions(&[&[1., 2.]]).drift_to(&predictions(&[&[f32::NAN, 2.]])).unwrap();
        assert!(drift.max_logit.is_nan());
    }
}
