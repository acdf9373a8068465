//! Divergence from the reference: estimators of single tokens, and controllers of its price.

use crate::packed::wide;
use pt_tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where `k3` is cut: a token that the reference finds e²⁰ times as likely counts no more than that.
const MAX_LOG_RATIO: f64 = 20.0;

/// Estimators of KL(policy ‖ reference) from the log-probs of one sampled token: Schulman 2020, "Approximating KL
/// Divergence", <http://joschu.net/blog/kl-approx.html>.
///
/// Let d = log π − log π_ref. As a penalty on rewards, take `k1`, whose mean is the divergence, or `k3`. As a term of
/// the loss, take `k2` or `k3`: the gradient of `k1` is that of log π, whose mean over the policy's own samples is 0,
/// while that of `k2`, d·∇log π, is the divergence's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KlEstimator {
    /// d: unbiased, either sign.
    #[default]
    K1,
    /// d²/2: biased, never negative; its gradient is unbiased.
    K2,
    /// exp(−d) − 1 + d: unbiased, never negative, GRPO's. Cut where d is under −20.
    K3,
}

impl KlEstimator {
    /// The estimate of each token, in nats; computed in f64.
    ///
    /// # Panics
    /// When the two differ in length.
    pub fn values(self, logprobs: &[f32], reference: &[f32]) -> Vec<f32> {
        assert_eq!(logprobs.len(), reference.len(), "the reference needs as many log-probs");
        let value = |(policy, reference): (&f32, &f32)| {
            let d = f64::from(*policy) - f64::from(*reference);
            let estimate = match self {
                Self::K1 => d,
                Self::K2 => 0.5 * d * d,
                Self::K3 => {
                    let d = d.max(-MAX_LOG_RATIO);
                    (-d).exp_m1() + d
                }
            };
            estimate as f32
        };
        logprobs.iter().zip(reference).map(value).collect()
    }

    /// The estimate of each token, `[num_tokens]` f32 (f64 for f64 input), differentiable in `logprobs` alone.
    ///
    /// # Panics
    /// When the two differ in shape.
    pub fn tensor(self, logprobs: &Tensor, reference: &Tensor) -> Tensor {
        assert_eq!(logprobs.size(), reference.size(), "the reference needs as many log-probs");
        let d = wide(logprobs) - wide(&reference.detach());
        match self {
            Self::K1 => d,
            Self::K2 => d.square() * 0.5,
            Self::K3 => {
                let d = d.clamp_min(-MAX_LOG_RATIO);
                (-&d).expm1() + d
            }
        }
    }
}

/// Whether the price of the divergence is moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KlControlKind {
    /// The coefficient stays as it is.
    #[default]
    Fixed,
    /// It is moved so that the divergence comes to a target.
    Adaptive,
}

/// How the coefficient of the KL penalty is controlled. The part of a training configuration named `kl_control`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct KlControl {
    /// `fixed` or `adaptive`.
    pub kind: KlControlKind,
    /// Divergence that `adaptive` aims at, in nats a response.
    pub target: f64,
    /// Responses over which `adaptive` may move the coefficient by a fifth.
    pub horizon: f64,
}

impl Default for KlControl {
    /// Fixed; target and horizon are those of TRL 0.9.6.
    fn default() -> Self {
        Self { kind: KlControlKind::Fixed, target: 6.0, horizon: 10_000.0 }
    }
}

impl KlControl {
    /// Every fault, each naming its field, what it is and what was expected.
    pub fn faults(&self) -> Vec<String> {
        [("target", self.target), ("horizon", self.horizon)]
            .into_iter()
            .filter(|(_, value)| !(*value > 0.0 && value.is_finite()))
            .map(|(name, value)| format!("kl_control.{name} is {value}, expected over 0"))
            .collect()
    }
}

/// The coefficient of the KL penalty, as it stands. Part of a run's state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KlController {
    coef: f64,
    control: KlControl,
}

impl KlController {
    /// Starts at a coefficient.
    pub fn new(init: f64, control: KlControl) -> Self {
        Self { coef: init, control }
    }

    /// This controller, of a run that goes on with `settings`: a fixed coefficient is theirs, one that adapts stays where
    /// it has come to.
    #[must_use]
    pub fn continued(self, settings: Self) -> Self {
        match settings.control.kind {
            KlControlKind::Fixed => settings,
            KlControlKind::Adaptive => Self { coef: self.coef, control: settings.control },
        }
    }

    /// The coefficient for the next rollout.
    pub fn coef(&self) -> f64 {
        self.coef
    }

    /// Takes in the divergence of a rollout: `kl_per_sequence` nats a response, tokens summed, the mean over its
    /// `num_sequences` responses.
    ///
    /// Adaptive: coef ← coef · (1 + clip(KL/target − 1, ±0.2) · n/horizon), Ziegler et al. 2019,
    /// <https://arxiv.org/abs/1909.08593>, Section 2.2, whose K is n/horizon. More responses than the horizon count as
    /// many, so that a rollout moves it by a fifth at most and never below 0. A divergence that is no number moves
    /// nothing.
    pub fn update(&mut self, kl_per_sequence: f64, num_sequences: usize) {
        let KlControl { kind, target, horizon } = self.control;
        if kind == KlControlKind::Fixed || kl_per_sequence.is_nan() {
            return;
        }
        let error = (kl_per_sequence / target - 1.0).clamp(-0.2, 0.2);
        self.coef *= 1.0 + error * (num_sequences as f64 / horizon).min(1.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use pt_tensor::{Device, Kind};

    const ALL: [KlEstimator; 3] = [KlEstimator::K1, KlEstimator::K2, KlEstimator::K3];

    fn assert_close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        let is_close = |(one, other): (&f64, &f64)| (one - other).abs() < 1e-6 * other.abs().max(1.0);
        assert!(found.iter().zip(expected).all(is_close), "{found:?}, expected {expected:?}");
    }

    /// Estimates, their values by tensor and their slopes in log π, of tokens that the policy finds as likely, twice
    /// and half as likely as the reference.
    fn check(estimator: KlEstimator, expected: [f64; 3], slopes: [f64; 3]) {
        let ln_2 = 2f32.ln();
        let (policy, reference) = ([-1.5f32, -1.5, -1.5], [-1.5f32, -1.5 - ln_2, -1.5 + ln_2]);
        let values = estimator.values(&policy, &reference);
        assert_close(&values.iter().map(|value| f64::from(*value)).collect::<Vec<_>>(), &expected);
        let leaf = Tensor::from_slice(&policy).set_requires_grad(true);
        let other = Tensor::from_slice(&reference).set_requires_grad(true);
        let tensor = estimator.tensor(&leaf, &other);
        assert_eq!(tensor.kind(), Kind::Float);
        assert_close(&Vec::<f64>::try_from(tensor.detach().to_kind(Kind::Double)).unwrap(), &expected);
        tensor.sum(Kind::Float).backward();
        assert_close(&Vec::<f64>::try_from(leaf.grad().to_kind(Kind::Double)).unwrap(), &slopes);
        assert!(!other.grad().defined());
    }

    #[test]
    fn k1_is_the_log_ratio_and_its_slope_is_1() {
        let ln_2 = 2f64.ln();
        check(KlEstimator::K1, [0.0, ln_2, -ln_2], [1.0, 1.0, 1.0]);
    }

    #[test]
    fn k2_is_half_the_square_and_its_slope_is_the_log_ratio() {
        let ln_2 = 2f64.ln();
        check(KlEstimator::K2, [0.0, ln_2 * ln_2 / 2.0, ln_2 * ln_2 / 2.0], [0.0, ln_2, -ln_2]);
    }

    /// Twice as likely: ½ − 1 + ln 2, half as likely: 2 − 1 − ln 2. The slope is 1 − exp(−d).
    #[test]
    fn k3_is_never_negative_and_its_slope_is_1_less_the_references_ratio() {
        let ln_2 = 2f64.ln();
        check(KlEstimator::K3, [0.0, ln_2 - 0.5, 1.0 - ln_2], [0.0, 0.5, -1.0]);
    }

    #[test]
    fn a_token_that_only_the_reference_finds_likely_gives_a_number() {
        let cut = (20f64.exp() - 21.0) as f32;
        assert_eq!(KlEstimator::K3.values(&[-200.0, 0.0], &[0.0, -200.0]), [cut, 199.0]);
        let leaf = Tensor::from_slice(&[-200f32, 0.0]).set_requires_grad(true);
        KlEstimator::K3.tensor(&leaf, &Tensor::from_slice(&[0f32, -200.0])).sum(Kind::Float).backward();
        assert_eq!(Vec::<f32>::try_from(leaf.grad()).unwrap(), [0.0, 1.0]);
    }

    /// Over a policy of (¾, ¼) and a reference of (½, ½), means of values and of slopes by their probabilities: `k1`
    /// and `k3` give the divergence, `k2` gives its slope in the logit of the first token, π₁π₂·(d₁ − d₂).
    #[test]
    fn means_over_the_policy_are_those_of_the_divergence() {
        let logit = Tensor::from_slice(&[3f64.ln()]).set_requires_grad(true);
        let logprobs = Tensor::cat(&[logit.log_sigmoid(), (-&logit).log_sigmoid()], 0);
        let reference = Tensor::full([2], 0.5f64.ln(), (Kind::Double, Device::Cpu));
        let divergence = 0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln();
        let slope = 0.75 * 0.25 * 3f64.ln();
        let probs = Tensor::from_slice(&[0.75f64, 0.25]);
        for (estimator, mean_slope) in
            [(KlEstimator::K1, Some(0.0)), (KlEstimator::K2, Some(slope)), (KlEstimator::K3, None)]
        {
            let mean = (estimator.tensor(&logprobs, &reference) * &probs).sum(Kind::Double);
            let gradient = Tensor::run_backward(&[&mean], &[&logit], true, false).remove(0).double_value(&[0]);
            if estimator != KlEstimator::K2 {
                assert!((mean.double_value(&[]) - divergence).abs() < 1e-12, "{estimator:?}");
            }
            if let Some(expected) = mean_slope {
                assert!((gradient - expected).abs() < 1e-12, "{estimator:?}: {gradient}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "as many log-probs")]
    fn other_numbers_of_tokens_are_a_fault_of_the_caller() {
        KlEstimator::K1.values(&[0.0], &[0.0, 0.0]);
    }

    fn adaptive(target: f64, horizon: f64) -> KlController {
        KlController::new(0.2, KlControl { kind: KlControlKind::Adaptive, target, horizon })
    }

    /// Target 6, 100 of 1000 responses: a tenth of the error, which is cut at a fifth.
    #[test]
    fn the_coefficient_follows_the_divergence_by_a_fifth_of_its_error_at_most() {
        for (kl, factor) in [(6.0, 1.0), (6.6, 1.01), (5.4, 0.99), (7.2, 1.02), (60.0, 1.02), (0.0, 0.98), (-3.0, 0.98)]
        {
            let mut controller = adaptive(6.0, 1000.0);
            controller.update(kl, 100);
            assert!((controller.coef() - 0.2 * factor).abs() < 1e-12, "{kl}: {}", controller.coef());
        }
        let mut controller = adaptive(6.0, 1000.0);
        controller.update(12.0, 100);
        controller.update(12.0, 50);
        assert!((controller.coef() - 0.2 * 1.02 * 1.01).abs() < 1e-12);
    }

    #[test]
    fn neither_nan_nor_a_huge_rollout_breaks_the_coefficient() {
        let mut controller = adaptive(6.0, 10.0);
        controller.update(f64::NAN, 100);
        assert_eq!(controller.coef(), 0.2);
        controller.update(0.0, 1000);
        assert!((controller.coef() - 0.16).abs() < 1e-12);
        controller.update(f64::INFINITY, 1000);
        assert!((controller.coef() - 0.192).abs() < 1e-12);
    }

    #[test]
    fn a_fixed_coefficient_stays() {
        let mut controller = KlController::new(0.05, KlControl::default());
        controller.update(1e6, 1000);
        assert_eq!(controller.coef(), 0.05);
    }

    #[test]
    fn settings_are_read_and_their_faults_named() {
        let control: KlControl = serde_json::from_str(r#"{"kind": "adaptive", "target": 3.0}"#).unwrap();
        assert_eq!(control, KlControl { kind: KlControlKind::Adaptive, target: 3.0, ..KlControl::default() });
        assert!(control.faults().is_empty());
        assert!(serde_json::from_str::<KlControl>(r#"{"targt": 3.0}"#).is_err());
        let faults = KlControl { target: 0.0, horizon: f64::NAN, ..control }.faults();
        assert_eq!(faults, ["kl_control.target is 0, expected over 0", "kl_control.horizon is NaN, expected over 0"]);
        assert_eq!(serde_json::to_string(&ALL).unwrap(), r#"["k1","k2","k3"]"#);
    }

    proptest! {
        #[test]
        fn slices_and_tensors_agree(pairs in prop::collection::vec((-30f32..0.0, -30f32..0.0), 0..20)) {
            let (policy, reference): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            for estimator in ALL {
                let values = estimator.values(&policy, &reference);
                let doubles = |values: &[f32]| Tensor::from_slice(values).to_kind(Kind::Double);
                let tensor = estimator.tensor(&doubles(&policy), &doubles(&reference));
                let tensor = Vec::<f64>::try_from(tensor).unwrap();
                for (one, other) in values.iter().zip(&tensor) {
                    prop_assert!((f64::from(*one) - other).abs() <= 1e-6 * other.abs());
                    prop_assert!(estimator == KlEstimator::K1 || *one >= 0.0);
                }
            }
        }

        #[test]
        fn a_controllers_state_comes_back_bit_for_bit(
            updates in prop::collection::vec((0.0..20.0, 1usize..500), 1..20),
        ) {
            let mut controller = adaptive(6.0, 10_000.0);
            for (kl, num_sequences) in updates {
                controller.update(kl, num_sequences);
                let again: KlController = serde_json::from_str(&serde_json::to_string(&controller).unwrap()).unwrap();
                prop_assert_eq!(&again, &controller);
            }
        }
    }
}
