//! Which losses, and their settings.

use crate::divergence::FDivergence;
use crate::error::{DpoError, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

/// A loss. Names are TRL 1.16's, but where `ipo` is concerned.
///
/// a is a completion's log-ratio log π − log π_ref, summed over its tokens; a_c and a_r those of a pair, d = a_c − a_r.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// DPO: −log σ(β·d); with `label_smoothing` the conservative cDPO, which TRL 1.16 no longer computes.
    #[default]
    Sigmoid,
    /// DPO on log-ratios averaged over tokens.
    SigmoidNorm,
    /// DPO that is unbiased when labels are wrong with the probability `label_smoothing`.
    Robust,
    /// SLiC's hinge: max(0, 1 − β·d).
    Hinge,
    /// IPO as in its paper: (d − 1/(2β))² with summed log-probs, which is OpenRLHF's.
    Ipo,
    /// IPO with log-probs averaged over tokens: what TRL calls `ipo`.
    IpoNorm,
    /// EXO for pairs: the reverse KL between the policy's and the smoothed label's choice; needs `label_smoothing`.
    ExoPair,
    /// NCA for pairs: chosen log-ratios are pulled up by noise contrast, not only away from the rejected.
    NcaPair,
    /// Binary classifier: −log σ(β·a_c) − log σ(−β·a_r).
    BcoPair,
    /// SPPO with hard labels: (a_c − 1/(2β))² + (a_r + 1/(2β))².
    SppoHard,
    /// AOT: DPO on sorted differences, so that one distribution dominates the other. Sorts the batch it is given.
    Aot,
    /// AOT on sorted a_c and a_r.
    AotUnpaired,
    /// APO-zero: the chosen up, the rejected down; for chosen completions better than the model's own.
    ApoZero,
    /// APO-down: both down, the rejected more; for chosen completions worse than the model's own.
    ApoDown,
    /// DiscoPOP: a logistic and an exponential loss mixed by how far the pair is apart.
    Discopop,
    /// −log p of the chosen completion, nothing else; for mixtures.
    Sft,
    /// SimPO: −log σ(β·(mean log π_c − mean log π_r) − γ), without a reference; its paper takes β of 2 to 2.5.
    Simpo,
    /// CPO: −log σ(β·(log π_c − log π_r)) and the chosen completion's −log p, without a reference.
    Cpo,
    /// ORPO: the chosen completion's −log p and β times −log σ of the log odds ratio, without a reference.
    Orpo,
    /// KTO, on single completions marked desirable or not.
    Kto,
    /// APO-zero on single completions.
    ApoZeroUnpaired,
}

impl Loss {
    /// Every loss, in the order of the documentation.
    pub const ALL: [Self; 21] = [
        Self::Sigmoid,
        Self::SigmoidNorm,
        Self::Robust,
        Self::Hinge,
        Self::Ipo,
        Self::IpoNorm,
        Self::ExoPair,
        Self::NcaPair,
        Self::BcoPair,
        Self::SppoHard,
        Self::Aot,
        Self::AotUnpaired,
        Self::ApoZero,
        Self::ApoDown,
        Self::Discopop,
        Self::Sft,
        Self::Simpo,
        Self::Cpo,
        Self::Orpo,
        Self::Kto,
        Self::ApoZeroUnpaired,
    ];

    /// The name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sigmoid => "sigmoid",
            Self::SigmoidNorm => "sigmoid_norm",
            Self::Robust => "robust",
            Self::Hinge => "hinge",
            Self::Ipo => "ipo",
            Self::IpoNorm => "ipo_norm",
            Self::ExoPair => "exo_pair",
            Self::NcaPair => "nca_pair",
            Self::BcoPair => "bco_pair",
            Self::SppoHard => "sppo_hard",
            Self::Aot => "aot",
            Self::AotUnpaired => "aot_unpaired",
            Self::ApoZero => "apo_zero",
            Self::ApoDown => "apo_down",
            Self::Discopop => "discopop",
            Self::Sft => "sft",
            Self::Simpo => "simpo",
            Self::Cpo => "cpo",
            Self::Orpo => "orpo",
            Self::Kto => "kto",
            Self::ApoZeroUnpaired => "apo_zero_unpaired",
        }
    }

    /// Whether it looks at the reference's log-probs. `sft` does not, and goes with either sort.
    pub fn needs_reference(self) -> bool {
        !(self.is_reference_free() || self == Self::Sft)
    }

    /// Whether its rewards are the policy's own log-probs: SimPO, CPO, ORPO.
    pub fn is_reference_free(self) -> bool {
        matches!(self, Self::Simpo | Self::Cpo | Self::Orpo)
    }

    /// Whether it takes single completions and not pairs.
    pub fn is_unpaired(self) -> bool {
        matches!(self, Self::Kto | Self::ApoZeroUnpaired)
    }

    /// Whether it is a function of the difference of the two scores alone, so that another divergence can give them.
    pub fn is_on_difference(self) -> bool {
        matches!(
            self,
            Self::Sigmoid
                | Self::SigmoidNorm
                | Self::Robust
                | Self::Hinge
                | Self::Ipo
                | Self::IpoNorm
                | Self::ExoPair
                | Self::Discopop
        )
    }

    /// Whether `length_penalty` and a row's margin have a difference to be taken from.
    pub fn takes_margin(self) -> bool {
        self.is_on_difference() || matches!(self, Self::Simpo | Self::Cpo)
    }

    /// Whether `label_smoothing` enters.
    pub fn smooths_labels(self) -> bool {
        matches!(
            self,
            Self::Sigmoid
                | Self::SigmoidNorm
                | Self::Robust
                | Self::ExoPair
                | Self::Aot
                | Self::AotUnpaired
                | Self::Simpo
                | Self::Cpo
        )
    }

    /// Whether it averages over tokens, and so needs lengths.
    pub fn needs_lengths(self) -> bool {
        matches!(self, Self::SigmoidNorm | Self::IpoNorm | Self::Simpo | Self::Orpo)
    }
}

/// What −log p of the chosen completions is a mean over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NllAverage {
    /// All chosen tokens alike, as in TRL.
    #[default]
    Tokens,
    /// The tokens of each completion, then completions alike, as in RPO's paper.
    Sequences,
}

/// The losses of a run and their settings. The part of a training configuration named `loss`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LossConfig {
    /// A loss, or a list of them to add up: `sigmoid`, `sigmoid_norm`, `robust`, `hinge`, `ipo`, `ipo_norm`, `exo_pair`, `nca_pair`, `bco_pair`,
    /// `sppo_hard`, `aot`, `aot_unpaired`, `apo_zero`, `apo_down`, `discopop`, `sft`, `simpo`, `cpo`, `orpo`, `kto`, `apo_zero_unpaired`.
    #[serde(deserialize_with = "one_or_many")]
    pub loss_type: Vec<Loss>,
    /// Weight of each loss of the list; null for 1 each.
    pub loss_weights: Option<Vec<f64>>,
    /// Strength of the tie to the reference; without one, the scale of the log-probs (for `orpo`, the weight of the odds ratio).
    pub beta: f64,
    /// Probability that a label is wrong, under 0.5; for `sigmoid`, `sigmoid_norm`, `robust`, `exo_pair`, `aot`, `aot_unpaired`, `simpo`, `cpo`.
    pub label_smoothing: f64,
    /// Divergence from the reference, for losses on the difference: `reverse_kl`, `forward_kl`, `js_divergence`, `alpha_divergence`.
    pub f_divergence: FDivergence,
    /// Order of `alpha_divergence`.
    pub f_alpha_divergence_coef: f64,
    /// Weight of the chosen completion's −log p beside the losses (RPO); null for 1 with `cpo` and `orpo`, else 0.
    pub nll_weight: Option<f64>,
    /// What that −log p, and that of `sft`, is a mean over: `tokens`, `sequences`.
    pub nll_average: NllAverage,
    /// Weight pairs by how probable the policy finds them (WPO).
    pub wpo: bool,
    /// Weight of tokens beyond the shorter completion's length (LD-DPO), 0 to 1; null counts all alike.
    pub ld_alpha: Option<f64>,
    /// Reward taken off per token (R-DPO), so that length alone is not preferred.
    pub length_penalty: f64,
    /// How much of the difference of a list's `scores` is taken as a margin; 0 leaves scores to say which completion is
    /// better. A row's own `margin` counts as it stands.
    pub margin_scale: f64,
    /// Width of `discopop`'s blend, over 0 to 1.
    pub discopop_tau: f64,
    /// Target margin of `simpo`.
    pub simpo_gamma: f64,
    /// Weight of desirable completions, for `kto`.
    pub desirable_weight: f64,
    /// Weight of undesirable completions, for `kto`.
    pub undesirable_weight: f64,
}

impl Default for LossConfig {
    fn default() -> Self {
        Self {
            loss_type: vec![Loss::Sigmoid],
            loss_weights: None,
            beta: 0.1,
            label_smoothing: 0.0,
            f_divergence: FDivergence::ReverseKl,
            f_alpha_divergence_coef: 0.5,
            nll_weight: None,
            nll_average: NllAverage::Tokens,
            wpo: false,
            ld_alpha: None,
            length_penalty: 0.0,
            margin_scale: 0.0,
            discopop_tau: 0.05,
            simpo_gamma: 0.5,
            desirable_weight: 1.0,
            undesirable_weight: 1.0,
        }
    }
}

impl LossConfig {
    /// A single loss, with the default settings.
    pub fn of(loss: Loss) -> Self {
        Self { loss_type: vec![loss], ..Self::default() }
    }

    /// Whether any loss looks at the reference's log-probs.
    pub fn needs_reference(&self) -> bool {
        self.loss_type.iter().any(|loss| loss.needs_reference())
    }

    /// Whether the losses take single completions and not pairs.
    pub fn is_unpaired(&self) -> bool {
        self.loss_type.iter().any(|loss| loss.is_unpaired())
    }

    /// The first loss that has no place for a margin.
    pub fn without_margin(&self) -> Option<Loss> {
        self.loss_type.iter().copied().find(|loss| !loss.takes_margin() && *loss != Loss::Sft)
    }

    /// Weight of the chosen completion's −log p beside the losses.
    pub fn nll_weight(&self) -> f64 {
        let has_own = self.loss_type.iter().any(|loss| matches!(loss, Loss::Cpo | Loss::Orpo));
        self.nll_weight.unwrap_or(if has_own { 1.0 } else { 0.0 })
    }

    /// The losses with their weights.
    pub(crate) fn weighted(&self) -> impl Iterator<Item = (Loss, f64)> + '_ {
        let weight = |index: usize| self.loss_weights.as_ref().map_or(1.0, |weights| weights[index]);
        self.loss_type.iter().enumerate().map(move |(index, loss)| (*loss, weight(index)))
    }

    /// As [`faults`](Self::faults).
    ///
    /// # Errors
    /// [`DpoError::Config`] when there is any.
    pub fn validate(&self) -> Result<()> {
        let faults = self.faults();
        if faults.is_empty() { Ok(()) } else { Err(DpoError::Config { faults }) }
    }

    /// Every fault, each naming its field, what it is and what was expected.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = self.number_faults();
        let names = |which: &dyn Fn(Loss) -> bool| -> Vec<&'static str> {
            self.loss_type.iter().filter(|loss| which(**loss)).map(|loss| loss.name()).collect()
        };
        let quoted = |names: &[&str]| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        if self.loss_type.is_empty() {
            faults.push("loss_type is empty, expected at least one loss".into());
        }
        if let Some(weights) = self.loss_weights.as_ref().filter(|weights| weights.len() != self.loss_type.len()) {
            let (found, expected) = (weights.len(), self.loss_type.len());
            faults.push(format!("loss_weights has {found} entries, expected {expected} as in loss_type"));
        }
        let (unpaired, paired) = (names(&|l| l.is_unpaired()), names(&|l| !l.is_unpaired()));
        if !unpaired.is_empty() && !paired.is_empty() {
            faults.push(format!(
                "loss_type mixes {}, which take single completions, with {}, which take pairs",
                quoted(&unpaired),
                quoted(&paired)
            ));
        }
        let (free, tied) = (names(&|l| l.is_reference_free()), names(&|l| l.needs_reference()));
        if !free.is_empty() && !tied.is_empty() {
            faults.push(format!(
                "loss_type mixes {}, which have no reference, with {}, which have one",
                quoted(&free),
                quoted(&tied)
            ));
        }
        if self.label_smoothing == 0.0 && self.loss_type.contains(&Loss::ExoPair) {
            faults.push("label_smoothing is 0, expected over 0 for `exo_pair` (its paper takes 0.001)".into());
        }
        if self.label_smoothing != 0.0 && !self.loss_type.iter().any(|l| l.smooths_labels()) {
            faults.push(format!(
                "label_smoothing is {}, expected 0: {} has no use for it",
                self.label_smoothing,
                quoted(&names(&|_| true))
            ));
        }
        let refuse = |setting: &str, which: &dyn Fn(Loss) -> bool, why: &str| {
            let refused = names(which);
            (!refused.is_empty()).then(|| format!("{setting} does not go with {}: {why}", quoted(&refused)))
        };
        if self.f_divergence != FDivergence::ReverseKl {
            let setting = format!("f_divergence {}", self.f_divergence.name());
            let why = "it is not built on the difference of two scores";
            faults.extend(refuse(&setting, &|l| !l.is_on_difference() && l != Loss::Sft, why));
        }
        if self.length_penalty != 0.0 {
            let why = "there is no difference of rewards to take it from";
            faults.extend(refuse("length_penalty", &|l| !l.takes_margin() && l != Loss::Sft, why));
        }
        if self.margin_scale != 0.0 {
            let why = "there is no difference of rewards to take a margin from";
            faults.extend(refuse("margin_scale", &|l| !l.takes_margin() && l != Loss::Sft, why));
        }
        if self.wpo {
            let sorts = |l: Loss| matches!(l, Loss::Aot | Loss::AotUnpaired);
            faults.extend(refuse("wpo", &sorts, "sorting parts the weights from their pairs"));
        }
        for (setting, is_set) in [
            ("wpo", self.wpo),
            ("ld_alpha", self.ld_alpha.is_some()),
            ("nll_weight", self.nll_weight.is_some_and(|weight| weight != 0.0)),
        ] {
            if is_set {
                faults.extend(refuse(setting, &|l| l.is_unpaired(), "it takes pairs"));
            }
        }
        faults
    }

    /// Settings that are not at their defaults and that none of the losses looks at, a fault each.
    pub fn unused(&self) -> Vec<String> {
        let default = Self::default();
        let has = |loss| self.loss_type.contains(&loss);
        let has_nll = self.nll_weight() > 0.0 || has(Loss::Sft);
        let is_alpha = self.f_divergence == FDivergence::AlphaDivergence;
        let average = |average| if average == NllAverage::Tokens { "tokens" } else { "sequences" }.to_string();
        let number = |value: f64| value.to_string();
        let of_kto = "a loss on single completions";
        [
            (
                "desirable_weight",
                number(self.desirable_weight),
                number(default.desirable_weight),
                self.is_unpaired(),
                of_kto,
            ),
            (
                "undesirable_weight",
                number(self.undesirable_weight),
                number(default.undesirable_weight),
                self.is_unpaired(),
                of_kto,
            ),
            ("simpo_gamma", number(self.simpo_gamma), number(default.simpo_gamma), has(Loss::Simpo), "`simpo`"),
            (
                "discopop_tau",
                number(self.discopop_tau),
                number(default.discopop_tau),
                has(Loss::Discopop),
                "`discopop`",
            ),
            (
                "f_alpha_divergence_coef",
                number(self.f_alpha_divergence_coef),
                number(default.f_alpha_divergence_coef),
                is_alpha,
                "f_divergence `alpha_divergence`",
            ),
            ("nll_average", average(self.nll_average), average(default.nll_average), has_nll, "nll_weight or `sft`"),
        ]
        .into_iter()
        .filter(|(_, value, default, is_used, _)| !is_used && value != default)
        .map(|(name, value, default, _, user)| {
            format!("{name} is {value}, expected {default}: only {user} has use for it")
        })
        .collect()
    }

    /// Numbers outside their ranges.
    fn number_faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut check = |name: &str, value: f64, is_good: bool, expected: &str| {
            if !is_good {
                faults.push(format!("{name} is {value}, expected {expected}"));
            }
        };
        let is_positive = |value: f64| value > 0.0 && value.is_finite();
        let is_at_least_0 = |value: f64| value >= 0.0 && value.is_finite();
        check("beta", self.beta, is_positive(self.beta), "over 0");
        let smoothing = self.label_smoothing;
        check("label_smoothing", smoothing, (0.0..0.5).contains(&smoothing), "from 0 to under 0.5");
        for (index, &weight) in self.loss_weights.iter().flatten().enumerate() {
            check(&format!("loss_weights[{index}]"), weight, weight.is_finite(), "a number");
        }
        let coef = self.f_alpha_divergence_coef;
        check("f_alpha_divergence_coef", coef, coef.is_finite(), "a number");
        if let Some(weight) = self.nll_weight {
            check("nll_weight", weight, is_at_least_0(weight), "at least 0");
        }
        if let Some(alpha) = self.ld_alpha {
            check("ld_alpha", alpha, (0.0..=1.0).contains(&alpha), "0 to 1");
        }
        let tau = self.discopop_tau;
        check("discopop_tau", tau, tau > 0.0 && tau <= 1.0, "over 0 to 1");
        let numbers = [
            ("length_penalty", self.length_penalty),
            ("margin_scale", self.margin_scale),
            ("simpo_gamma", self.simpo_gamma),
        ];
        for (name, value) in numbers {
            check(name, value, is_at_least_0(value), "at least 0");
        }
        for (name, value) in
            [("desirable_weight", self.desirable_weight), ("undesirable_weight", self.undesirable_weight)]
        {
            check(name, value, is_at_least_0(value), "at least 0");
        }
        faults
    }
}

/// `sigmoid` as well as `[sigmoid, sft]`.
fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Vec<Loss>, D::Error> {
    struct OneOrMany;
    impl<'de> serde::de::Visitor<'de> for OneOrMany {
        type Value = Vec<Loss>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a loss or a list of losses")
        }

        fn visit_str<E: serde::de::Error>(self, name: &str) -> std::result::Result<Self::Value, E> {
            Loss::deserialize(serde::de::value::StrDeserializer::new(name)).map(|loss| vec![loss])
        }

        fn visit_seq<A: serde::de::SeqAccess<'de>>(self, seq: A) -> std::result::Result<Self::Value, A::Error> {
            Vec::deserialize(serde::de::value::SeqAccessDeserializer::new(seq))
        }
    }
    deserializer.deserialize_any(OneOrMany)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(config: LossConfig) -> String {
        config.faults().join("; ")
    }

    #[test]
    fn the_defaults_are_those_of_dpo() {
        let config = LossConfig::default();
        assert!(config.faults().is_empty() && config.needs_reference() && !config.is_unpaired());
        assert_eq!(config.nll_weight(), 0.0);
        assert_eq!(LossConfig::of(Loss::Orpo).nll_weight(), 1.0);
        assert!(!LossConfig::of(Loss::Simpo).needs_reference());
    }

    #[test]
    fn every_loss_has_the_name_that_configurations_use() {
        for loss in Loss::ALL {
            assert_eq!(serde_json::to_string(&loss).unwrap(), format!("\"{}\"", loss.name()));
            let config: LossConfig = serde_json::from_str(&format!("{{\"loss_type\": \"{}\"}}", loss.name())).unwrap();
            assert_eq!(config.loss_type, [loss]);
        }
        let mixed: LossConfig = serde_json::from_str("{\"loss_type\": [\"sigmoid\", \"sft\"]}").unwrap();
        assert_eq!(mixed.loss_type, [Loss::Sigmoid, Loss::Sft]);
        let error = serde_json::from_str::<LossConfig>("{\"loss_type\": \"sigmoit\"}").unwrap_err().to_string();
        assert!(error.contains("sigmoit") && error.contains("`sigmoid_norm`"), "{error}");
        let docs = schemars::schema_for!(LossConfig);
        for name in Loss::ALL.map(Loss::name) {
            assert!(docs.as_value()["properties"]["loss_type"]["description"].as_str().unwrap().contains(name));
        }
    }

    #[test]
    fn all_faults_are_listed_at_once() {
        let config = LossConfig {
            beta: -0.1,
            label_smoothing: 0.5,
            ld_alpha: Some(1.5),
            loss_weights: Some(vec![1.0, f64::NAN]),
            discopop_tau: 0.0,
            ..LossConfig::default()
        };
        let faults = config.faults();
        assert_eq!(faults.len(), 6, "{faults:?}");
        let error = config.validate().unwrap_err().to_string();
        assert!(error.starts_with("loss: beta is -0.1, expected over 0; label_smoothing is 0.5, expected"), "{error}");
        assert!(error.contains("loss_weights has 2 entries, expected 1"), "{error}");
        assert!(fault(LossConfig { beta: f64::INFINITY, ..LossConfig::default() }).contains("beta is inf"));
    }

    #[test]
    fn losses_that_do_not_go_together_are_named() {
        let mix = |losses: &[Loss]| fault(LossConfig { loss_type: losses.to_vec(), ..LossConfig::default() });
        assert!(mix(&[]).contains("at least one"));
        assert!(mix(&[Loss::Kto, Loss::Sigmoid]).contains("`kto`, which take single completions"));
        assert!(mix(&[Loss::Simpo, Loss::Sigmoid]).contains("`simpo`, which have no reference, with `sigmoid`"));
        assert!(mix(&[Loss::Simpo, Loss::Sft]).is_empty() && mix(&[Loss::Sigmoid, Loss::Sft]).is_empty());
        assert!(mix(&[Loss::ExoPair]).contains("expected over 0 for `exo_pair`"));
        let smoothed = LossConfig { label_smoothing: 0.1, ..LossConfig::of(Loss::Hinge) };
        assert!(fault(smoothed).contains("`hinge` has no use for it"));
        let divergence = LossConfig { f_divergence: FDivergence::ForwardKl, ..LossConfig::of(Loss::ApoZero) };
        assert!(fault(divergence).contains("does not go with `apo_zero`"));
        let penalty = LossConfig { length_penalty: 0.1, ..LossConfig::of(Loss::Aot) };
        assert!(fault(penalty).contains("length_penalty does not go with `aot`"));
        assert!(fault(LossConfig { wpo: true, ..LossConfig::of(Loss::Aot) }).contains("sorting"));
        assert!(fault(LossConfig { wpo: true, ..LossConfig::of(Loss::Kto) }).contains("it takes pairs"));
        let scaled = LossConfig { margin_scale: 0.1, ..LossConfig::of(Loss::NcaPair) };
        assert!(fault(scaled).contains("margin_scale does not go with `nca_pair`"));
    }

    #[test]
    fn settings_that_no_loss_looks_at_are_told() {
        let config = LossConfig {
            desirable_weight: 2.0,
            undesirable_weight: 2.0,
            simpo_gamma: 1.0,
            discopop_tau: 0.1,
            f_alpha_divergence_coef: 0.3,
            nll_average: NllAverage::Sequences,
            ..LossConfig::default()
        };
        assert_eq!(config.unused().len(), 6, "{:?}", config.unused());
        assert_eq!(config.unused()[2], "simpo_gamma is 1, expected 0.5: only `simpo` has use for it");
        assert_eq!(LossConfig { nll_weight: Some(1.0), ..config.clone() }.unused().len(), 5);
        for loss in Loss::ALL {
            assert_eq!(LossConfig::of(loss).unused(), [""; 0], "{loss:?}");
        }
    }
}
