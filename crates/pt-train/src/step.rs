//! The gradient step: the one place where a loss becomes an update.
//!
//! Every trainer accumulates gradients of its own loss and then calls [`Optimization::step`], which checks that
//! everything is finite, clips, and updates. A data-parallel run would plug its all-reduce in here.

use crate::error::{Result, TrainError};
use crate::schedule::Schedule;
use pt_tensor::{AdamW, AdamWConfig, Kind, Tensor, clip_grad_norm_, global_grad_norm};
use std::collections::BTreeSet;
use std::path::Path;

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
    /// Optimizes named leaf tensors; `learning_rate` is the highest of the schedule. A paged optimizer keeps its file in `folder`.
    ///
    /// # Errors
    /// When there is no memory or no room on the disk for the optimizer's state.
    pub fn new(
        parameters: Vec<(String, Tensor)>,
        adamw: AdamWConfig,
        folder: &Path,
        schedule: Schedule,
        learning_rate: f64,
        max_grad_norm: Option<f64>,
    ) -> Result<Self> {
        let optimizer = AdamW::new_in(folder, parameters, adamw)?;
        Ok(Self { optimizer, schedule, learning_rate, max_grad_norm })
    }

    /// Gives tensors learning rates of their own: `factor` says, by name, how many times the schedule's.
    #[must_use]
    pub fn with_lr_factors(mut self, factor: impl Fn(&str) -> f64) -> Self {
        self.optimizer = self.optimizer.with_lr_factors(factor);
        self
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

    /// Drops the accumulated gradients: an update that is not to be made.
    pub fn discard(&mut self) {
        self.optimizer.zero_grad();
    }

    /// Refuses trained values that are not finite: such a checkpoint would be no good to resume from.
    ///
    /// # Errors
    /// [`TrainError::NonFinite`] naming the first tensor and entry.
    pub fn check_finite(&self, step: u64) -> Result<()> {
        self.optimizer.parameters().try_for_each(|(name, p)| finite(step, &format!("parameter {name}"), p).map(drop))
    }

    /// Parameters and optimizer state by name, for a checkpoint.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let parameters = self.optimizer.parameters().map(|(name, p)| (format!("parameter.{name}"), p.detach()));
        let moments = self.optimizer.state().into_iter().map(|(name, t)| (format!("optimizer.{name}"), t));
        parameters.chain(moments).collect()
    }

    /// Restores what [`state`](Self::state) gave: `names` are all that there are, `get` finds a tensor by name.
    ///
    /// # Errors
    /// [`TrainError::StateMismatch`] when the names are not those of [`state`](Self::state), those of `get`, and for a
    /// tensor of another shape.
    pub fn load_state<'a>(
        &mut self,
        names: impl IntoIterator<Item = &'a str>,
        get: impl Fn(&str) -> pt_tensor::Result<Tensor>,
    ) -> Result<()> {
        let found: BTreeSet<String> = names.into_iter().map(str::to_owned).collect();
        let expected: BTreeSet<String> = self.state().into_iter().map(|(name, _)| name).collect();
        if found != expected {
            let less = |one: &BTreeSet<String>, other| one.difference(other).cloned().collect();
            let (missing, unexpected) = (less(&expected, &found), less(&found, &expected));
            return Err(TrainError::StateMismatch { missing, unexpected });
        }
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

/// The sum of values that are all finite.
///
/// # Errors
/// [`TrainError::NonFinite`] with the first bad entry.
pub fn finite(step: u64, what: &str, values: &Tensor) -> Result<f64> {
    let sum = values.sum(Kind::Double).double_value(&[]);
    if sum.is_finite() {
        return Ok(sum);
    }
    let place = format!("entry {} of {what} {:?}", first_not_finite(values), values.size());
    Err(TrainError::NonFinite { step, what: what.into(), place })
}

/// Position of the first value that is not finite, in the order of memory; 0 when there is none.
pub(crate) fn first_not_finite(values: &Tensor) -> usize {
    let bad = values.isfinite().logical_not().flatten(0, -1).nonzero();
    if bad.numel() > 0 { bad.int64_value(&[0, 0]) as usize } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::ScheduleConfig;

    fn optimization(names: &[&str]) -> Optimization {
        let leaf = |name: &&str| (name.to_string(), Tensor::from_slice(&[1f32, 2.0]).view([1, 2]));
        let schedule = ScheduleConfig::default().build(10).expect("good");
        let (leaves, folder) = (names.iter().map(leaf).collect(), std::env::temp_dir());
        Optimization::new(leaves, AdamWConfig::default(), &folder, schedule, 1e-3, None).expect("memory for it")
    }

    #[test]
    fn a_state_of_other_tensors_is_refused_with_the_differences() {
        let saved = optimization(&["q", "k"]).state();
        let load = |names: &[&str]| {
            let get = |name: &str| Ok(saved.iter().find(|(known, _)| known == name).expect("known").1.shallow_clone());
            optimization(names).load_state(saved.iter().map(|(name, _)| name.as_str()), get)
        };
        load(&["k", "q"]).expect("the same tensors");
        let text = load(&["q"]).expect_err("k would be dropped").to_string();
        assert!(
            text.contains("not trained here are `optimizer.k.exp_avg`, `optimizer.k.exp_avg_sq`, `parameter.k`"),
            "{text}"
        );
        let error = load(&["q", "k", "v"]).expect_err("v is new");
        assert!(error.to_string().contains("it lacks `optimizer.v.exp_avg`"), "{error}");
        assert!(error.hint().expect("a hint").contains("config.yaml"));
    }

    #[test]
    fn a_parameter_that_is_not_finite_is_named() {
        let optimization = optimization(&["q", "k"]);
        optimization.check_finite(1).expect("sound");
        let _ = optimization.state()[1].1.get(0).get(1).fill_(f64::INFINITY);
        let text = optimization.check_finite(7).expect_err("an infinity").to_string();
        assert_eq!(text, "step 7: parameter k is not finite; the first bad place is entry 1 of parameter k [1, 2]");
    }
}
