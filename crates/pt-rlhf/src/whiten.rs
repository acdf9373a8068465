//! Values brought to a variance of 1: those of one batch, and scores by all that were seen so far.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Added to the variance under the square root, as in TRL 1.12.
const EPSILON: f64 = 1e-8;

/// What the sum of squares is divided by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Variance {
    /// n − 1, as in TRL and torchtune.
    #[default]
    Unbiased,
    /// n, as in OpenRLHF.
    Biased,
}

/// Divides values by their standard deviation, in place, about their mean: (x − mean) / √(variance + 1e-8).
///
/// With `shift_mean` the mean is taken off, otherwise it is kept. Implementations differ:
///
/// | | mean of advantages | variance |
/// | --- | --- | --- |
/// | TRL 1.12 | off (`shift_mean=True`) | unbiased |
/// | torchtune | kept: its `whiten(shift_mean=True)` **adds the mean back**, the inverse of TRL's flag | unbiased |
/// | OpenRLHF | off | biased |
///
/// The flag here has TRL's meaning, and ours of the choices is TRL's: an advantage is a comparison with what was
/// expected, so a mean that is not 0 pushes all that was sampled up or down alike. TRL's whitening of *rewards* keeps
/// the mean (`shift_mean` false): taking it off would pay or charge for length.
///
/// Packed values need no mask: what stands in the slice counts. Computed in f64. A single value has no variance (TRL's
/// becomes NaN): it is taken for 0, so the value becomes 0, or stays where the mean is kept.
///
/// # Example
/// ```
/// let mut advantages = [1.0, 3.0];
/// pt_rlhf::whiten(&mut advantages, true, pt_rlhf::Variance::Biased);
/// assert_eq!(advantages, [-1.0, 1.0]);
/// ```
pub fn whiten(values: &mut [f32], shift_mean: bool, variance: Variance) {
    let moments = Moments::of(values.iter().map(|value| f64::from(*value)));
    let scale = 1.0 / (moments.variance(variance) + EPSILON).sqrt();
    let kept = if shift_mean { 0.0 } else { moments.mean };
    for value in values {
        *value = ((f64::from(*value) - moments.mean) * scale + kept) as f32;
    }
}

/// Mean and spread of some values.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Moments {
    pub(crate) count: usize,
    pub(crate) mean: f64,
    /// Sum of squared deviations from the mean.
    pub(crate) squares: f64,
}

impl Moments {
    pub(crate) fn of(values: impl Iterator<Item = f64> + Clone) -> Self {
        let count = values.clone().count();
        if count == 0 {
            return Self::default();
        }
        let mean = values.clone().sum::<f64>() / count as f64;
        Self { count, mean, squares: values.map(|value| (value - mean).powi(2)).sum() }
    }

    /// 0 of a single value.
    pub(crate) fn variance(self, variance: Variance) -> f64 {
        let divisor = match variance {
            Variance::Unbiased => self.count.saturating_sub(1),
            Variance::Biased => self.count,
        };
        self.squares / divisor.max(1) as f64
    }
}

/// Mean and variance of all scores so far, for scaling the next ones: TRL 0.9.6's `use_score_scaling` and
/// `use_score_norm`. Part of a run's state.
///
/// Welford's update, for whole batches (Chan, Golub and LeVeque 1979).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunningMoments {
    /// Mean of the scores.
    pub mean: f64,
    /// Their mean squared deviation from it.
    pub variance: f64,
    /// How many there were.
    pub count: u64,
}

impl RunningMoments {
    /// Of no scores.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in a batch of scores; what is not a finite number is left out.
    pub fn update(&mut self, scores: &[f32]) {
        let batch = Moments::of(scores.iter().map(|score| f64::from(*score)).filter(|score| score.is_finite()));
        if batch.count == 0 {
            return;
        }
        let (old, new) = (self.count as f64, batch.count as f64);
        let (total, step) = (old + new, batch.mean - self.mean);
        self.variance = (self.variance * old + batch.squares + step.powi(2) * old * new / total) / total;
        self.mean += step * new / total;
        self.count += batch.count as u64;
    }

    /// Standard deviation, unbiased; 1 as long as scores have not differed, so that dividing by it does nothing (TRL
    /// divides by 1e-7 then).
    pub fn std(&self) -> f64 {
        let count = self.count as f64;
        if self.count < 2 || self.variance == 0.0 { 1.0 } else { (self.variance * count / (count - 1.0)).sqrt() }
    }

    /// Divides scores by the [standard deviation](Self::std), in place, with `shift_mean` after taking the mean off.
    pub fn normalize(&self, scores: &mut [f32], shift_mean: bool) {
        let mean = if shift_mean { self.mean } else { 0.0 };
        // TRL adds the epsilon of f32.
        let std = self.std() + f64::from(f32::EPSILON);
        for score in scores {
            *score = ((f64::from(*score) - mean) / std) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn whitened(values: &[f32], shift_mean: bool, variance: Variance) -> Vec<f32> {
        let mut values = values.to_vec();
        whiten(&mut values, shift_mean, variance);
        values
    }

    fn assert_close(found: &[f32], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (one, other) in found.iter().zip(expected) {
            assert!((f64::from(*one) - other).abs() < 1e-6, "{found:?}, expected {expected:?}");
        }
    }

    /// 2, 4, 6 and 8: mean 5, squares of 9 + 1 + 1 + 9 = 20, so a variance of 20/3 or of 5.
    #[test]
    fn deviations_are_divided_by_either_standard_deviation_and_the_mean_goes_or_stays() {
        let values = [2.0, 4.0, 6.0, 8.0];
        let deviations = [-3.0, -1.0, 1.0, 3.0];
        let by = |variance: f64, mean: f64| deviations.map(|deviation: f64| deviation / variance.sqrt() + mean);
        assert_close(&whitened(&values, true, Variance::Unbiased), &by(20.0 / 3.0, 0.0));
        assert_close(&whitened(&values, true, Variance::Biased), &by(5.0, 0.0));
        assert_close(&whitened(&values, false, Variance::Unbiased), &by(20.0 / 3.0, 5.0));
        assert_close(&whitened(&values, false, Variance::Biased), &by(5.0, 5.0));
    }

    #[test]
    fn values_that_do_not_vary_become_the_mean_or_0() {
        for variance in [Variance::Unbiased, Variance::Biased] {
            assert_eq!(whitened(&[3.0, 3.0], true, variance), [0.0, 0.0]);
            assert_eq!(whitened(&[3.0, 3.0], false, variance), [3.0, 3.0]);
            assert_eq!(whitened(&[3.0], true, variance), [0.0]);
            assert_eq!(whitened(&[3.0], false, variance), [3.0]);
            assert_eq!(whitened(&[], true, variance), [0f32; 0]);
        }
    }

    /// A spread of 1e-4 has a variance of 1e-8 (biased), as much as the epsilon: √2 smaller than without.
    #[test]
    fn epsilon_stands_under_the_root() {
        let found = whitened(&[-1e-4, 1e-4], true, Variance::Biased);
        assert_close(&found, &[-(0.5f64.sqrt()), 0.5f64.sqrt()]);
    }

    /// 1, 3 then 5, 7, 9 then 5: six scores of mean 5, squares of 16 + 4 + 0 + 4 + 16 + 0 = 40.
    #[test]
    fn running_moments_are_those_of_all_scores() {
        let mut moments = RunningMoments::new();
        moments.update(&[1.0, 3.0]);
        assert_eq!((moments.mean, moments.variance, moments.count), (2.0, 1.0, 2));
        moments.update(&[]);
        moments.update(&[5.0, f32::NAN, 7.0, f32::INFINITY, 9.0]);
        moments.update(&[5.0]);
        assert!((moments.mean - 5.0).abs() < 1e-12 && (moments.variance - 40.0 / 6.0).abs() < 1e-12);
        assert_eq!(moments.count, 6);
        assert!((moments.std() - 8f64.sqrt()).abs() < 1e-12);
        let mut scores = [5.0, 5.0 + 8f32.sqrt()];
        moments.normalize(&mut scores, true);
        assert_close(&scores, &[0.0, 1.0]);
        let mut scores = [8f32.sqrt()];
        moments.normalize(&mut scores, false);
        assert_close(&scores, &[1.0]);
    }

    #[test]
    fn scores_that_have_not_differed_yet_scale_nothing() {
        let mut moments = RunningMoments::new();
        assert_eq!(moments.std(), 1.0);
        for scores in [&[4.0][..], &[4.0, 4.0]] {
            moments.update(scores);
            assert_eq!(moments.std(), 1.0);
            let mut next = [6.0];
            moments.normalize(&mut next, true);
            assert_close(&next, &[2.0]);
        }
    }

    proptest! {
        #[test]
        fn whitened_values_have_no_mean_and_a_variance_of_1(values in prop::collection::vec(-100f32..100.0, 2..50)) {
            let before = Moments::of(values.iter().map(|value| f64::from(*value)));
            prop_assume!(before.variance(Variance::Unbiased) > 0.1);
            let whitened = whitened(&values, true, Variance::Unbiased);
            let after = Moments::of(whitened.iter().map(|value| f64::from(*value)));
            prop_assert!(after.mean.abs() < 1e-5 && (after.variance(Variance::Unbiased) - 1.0).abs() < 1e-4);
        }

        #[test]
        fn batches_add_up_and_the_state_comes_back_bit_for_bit(
            batches in prop::collection::vec(prop::collection::vec(-10f32..10.0, 0..6), 1..8),
        ) {
            let mut running = RunningMoments::new();
            for batch in &batches {
                running.update(batch);
                let text = serde_json::to_string(&running).unwrap();
                running = {
                    let again: RunningMoments = serde_json::from_str(&text).unwrap();
                    prop_assert_eq!(&again, &running);
                    again
                };
            }
            let all = Moments::of(batches.iter().flatten().map(|score| f64::from(*score)));
            prop_assert_eq!(running.count, all.count as u64);
            prop_assert!((running.mean - all.mean).abs() < 1e-9);
            prop_assert!((running.variance - all.variance(Variance::Biased)).abs() < 1e-9);
        }
    }
}
