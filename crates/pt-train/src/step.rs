//! The gradient step: the one place where a loss becomes an update.
//!
//! Every trainer accumulates gradients of its own loss and then calls [`Optimization::step`], which checks that
//! everything is finite, clips, and updates. A data-parallel run would plug its all-reduce in here.

use crate::error::{Result, TrainError};
use crate::schedule::Schedule;
use pt_tensor::{AdamW, AdamWConfig, Kind, Tensor, clip_grad_norm_, global_grad_norm};

/// Trained tensors, their optimizer and the learning-rate schedule.
#[derive(Debug)]
pub struct Optimization {
    optimizer: AdamW,
    schedule: Schedule,
    learning_rate: f64,
    max_grad_norm: Option<f64>,
}

/// What one update was.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Update {
    /// Learning rate used.
    pub learning_rate: f64,
    /// 2-norm of all gradients before clipping.
    pub grad_norm: f64,
}

impl Optimization {
    /// Optimizes named leaf tensors; `learning_rate` is the highest of the schedule.
    pub fn new(
        parameters: Vec<(String, Tensor)>,
        adamw: AdamWConfig,
        schedule: Schedule,
        learning_rate: f64,
        max_grad_norm: Option<f64>,
    ) -> Self {
        Self { optimizer: AdamW::new(parameters, adamw), schedule, learning_rate, max_grad_norm }
    }

    /// Trained tensors by name.
    pub fn parameters(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.optimizer.parameters()
    }

    /// Clips and applies the accumulated gradients, then drops them.
    ///
    /// # Errors
    /// [`TrainError::NonFinite`] naming the first tensor whose gradient is not finite; nothing is updated then.
    pub fn step(&mut self, step: u64) -> Result<Update> {
        let parameters: Vec<Tensor> = self.optimizer.parameters().map(|(_, p)| p.shallow_clone()).collect();
        let grad_norm = match self.max_grad_norm {
            Some(max_norm) => clip_grad_norm_(&parameters, max_norm),
            None => global_grad_norm(&parameters),
        };
        if !grad_norm.is_finite() {
            let is_bad = |p: &Tensor| p.grad().defined() && p.grad().isfinite().all().int64_value(&[]) == 0;
            let place = self.optimizer.parameters().find(|(_, p)| is_bad(p));
            let place = place.map_or("the norm of all gradients".into(), |(name, p)| {
                format!("the gradient of {name} {:?}", p.size())
            });
            return Err(TrainError::NonFinite { step, what: "gradient".into(), place });
        }
        let learning_rate = self.learning_rate * self.schedule.factor(self.optimizer.num_steps() as usize);
        self.optimizer.step(learning_rate)?;
        self.optimizer.zero_grad();
        Ok(Update { learning_rate, grad_norm })
    }

    /// Parameters and optimizer state by name, for a checkpoint.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let parameters = self.optimizer.parameters().map(|(name, p)| (format!("parameter.{name}"), p.detach()));
        let moments = self.optimizer.state().into_iter().map(|(name, t)| (format!("optimizer.{name}"), t));
        parameters.chain(moments).collect()
    }

    /// Restores what [`state`](Self::state) gave; `get` finds a tensor by name.
    ///
    /// # Errors
    /// Those of `get`, and for a tensor of another shape.
    pub fn load_state(&mut self, get: impl Fn(&str) -> pt_tensor::Result<Tensor>) -> Result<()> {
        for (name, parameter) in self.optimizer.parameters() {
            let value = get(&format!("parameter.{name}"))?;
            if value.size() != parameter.size() {
                return Err(TrainError::Config {
                    place: "checkpoint".into(),
                    message: format!(
                        "`{name}` has shape {:?} there and {:?} here: the configuration changed",
                        value.size(),
                        parameter.size()
                    ),
                });
            }
            pt_tensor::no_grad(|| parameter.shallow_clone().copy_(&value));
        }
        self.optimizer.load_state(|name| get(&format!("optimizer.{name}")))?;
        Ok(())
    }
}

/// Reads a scalar loss and refuses one that is not finite.
///
/// # Errors
/// [`TrainError::NonFinite`] with what the first bad entry belongs to.
pub fn finite(step: u64, what: &str, values: &Tensor) -> Result<f64> {
    let sum = values.sum(Kind::Double).double_value(&[]);
    if sum.is_finite() {
        return Ok(sum);
    }
    let first = values.isfinite().logical_not().nonzero();
    let at = if first.numel() > 0 { first.get(0).int64_value(&[0]) } else { 0 };
    Err(TrainError::NonFinite { step, what: what.into(), place: format!("entry {at} of {what} {:?}", values.size()) })
}
