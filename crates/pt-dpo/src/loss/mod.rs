//! The losses over a batch of pairs or of single completions; one file a family.

mod aot;
mod apo;
mod bco;
mod discopop;
mod dpo;
mod exo;
mod ipo;
mod kto;
mod nca;
mod orpo;
mod simpo;
mod slic;
mod sppo;
mod stable;

pub use kto::{UnpairedBatch, UnpairedOutput, kl_estimate, unpaired_loss};

use crate::config::{Loss, LossConfig, NllAverage};
use crate::error::{DpoError, Result};
use pt_tensor::{Kind, Tensor};

/// Log-probs of pairs, each `[num_pairs]`: f32 (f64 stays f64, halves are widened), nats, **summed** over the scored
/// tokens of a completion, its end-of-turn token included and the prompt excluded.
#[derive(Debug)]
pub struct PairLogps {
    /// Of the chosen completions.
    pub chosen_logps: Tensor,
    /// Of the rejected ones.
    pub rejected_logps: Tensor,
}

impl PairLogps {
    /// Pairs of numbers, in f32.
    ///
    /// # Errors
    /// [`DpoError::Shape`] when the two differ in length.
    pub fn from_slices(chosen: &[f32], rejected: &[f32]) -> Result<Self> {
        let pairs = Self { chosen_logps: Tensor::from_slice(chosen), rejected_logps: Tensor::from_slice(rejected) };
        check_column("rejected_logps", &pairs.rejected_logps, chosen.len() as i64)?;
        Ok(pairs)
    }

    /// The pairs of completions that two index lists name, out of `logps: [num_completions]`: chosen and rejected may
    /// stand in any order, and one completion in several pairs.
    ///
    /// # Errors
    /// [`DpoError::Shape`] when the lists differ in length or name a completion that is not there.
    pub fn select(logps: &Tensor, chosen: &[i64], rejected: &[i64]) -> Result<Self> {
        let take = |what, indices: &[i64]| -> Result<Tensor> {
            let num = logps.size().first().copied().unwrap_or(0);
            let index = Tensor::from_slice(indices).to_device(logps.device());
            let is_inside = indices.iter().all(|i| (0..num).contains(i)) && indices.len() == chosen.len();
            if !is_inside || logps.dim() != 1 {
                return Err(DpoError::shape(what, &index, format!("{} indices in 0..{num}", chosen.len())));
            }
            Ok(logps.index_select(0, &index))
        };
        Ok(Self { chosen_logps: take("chosen", chosen)?, rejected_logps: take("rejected", rejected)? })
    }

    /// The same tensors once more, not a copy.
    pub fn shallow_clone(&self) -> Self {
        Self { chosen_logps: self.chosen_logps.shallow_clone(), rejected_logps: self.rejected_logps.shallow_clone() }
    }
}

/// What the losses of pairs are computed from. Columns are `[num_pairs]`.
#[derive(Debug)]
pub struct PairBatch {
    /// Log-probs under the policy; they carry the gradient.
    pub policy: PairLogps,
    /// Log-probs under the reference; no gradient flows into them.
    pub reference: Option<PairLogps>,
    /// Scored tokens of the chosen and of the rejected completions, of any kind.
    pub lengths: Option<(Tensor, Tensor)>,
    /// −log p of the chosen completions where it is not to be that of `policy`: with the prompt's tokens, say, as TRL's
    /// ORPO has it. Averaged by the caller; its mean over pairs is the term's value.
    pub chosen_nll: Option<Tensor>,
    /// Mean chosen length over the pairs of the whole optimizer step, so that a mean over tokens does not depend on
    /// micro-batches; that of these pairs when absent.
    pub mean_chosen_length: Option<f64>,
    /// Reward by which the chosen completion should lead, taken off β·d (ODPO, <https://arxiv.org/abs/2402.10571>).
    pub margins: Option<Tensor>,
    /// Factors on each pair's loss.
    pub weights: Option<Tensor>,
    /// WPO's weights, the product of those of both completions; for [`LossConfig::wpo`].
    pub wpo_weights: Option<Tensor>,
}

impl PairBatch {
    /// Pairs with nothing but the policy's log-probs.
    pub fn new(policy: PairLogps) -> Self {
        Self {
            policy,
            reference: None,
            lengths: None,
            chosen_nll: None,
            mean_chosen_length: None,
            margins: None,
            weights: None,
            wpo_weights: None,
        }
    }

    /// With the reference's log-probs.
    #[must_use]
    pub fn with_reference(self, reference: PairLogps) -> Self {
        Self { reference: Some(reference), ..self }
    }

    /// With the completions' lengths in tokens.
    #[must_use]
    pub fn with_lengths(self, chosen: Tensor, rejected: Tensor) -> Self {
        Self { lengths: Some((chosen, rejected)), ..self }
    }

    fn check(&self) -> Result<()> {
        let num_pairs = self.policy.chosen_logps.size().first().copied().unwrap_or(-1);
        check_column("chosen_logps", &self.policy.chosen_logps, num_pairs)?;
        check_column("rejected_logps", &self.policy.rejected_logps, num_pairs)?;
        for (what, column) in [
            ("reference.chosen_logps", self.reference.as_ref().map(|reference| &reference.chosen_logps)),
            ("reference.rejected_logps", self.reference.as_ref().map(|reference| &reference.rejected_logps)),
            ("chosen_nll", self.chosen_nll.as_ref()),
            ("margins", self.margins.as_ref()),
            ("weights", self.weights.as_ref()),
            ("wpo_weights", self.wpo_weights.as_ref()),
        ] {
            column.map_or(Ok(()), |column| check_column(what, column, num_pairs))?;
        }
        for lengths in self.lengths.iter().flat_map(|(chosen, rejected)| [chosen, rejected]) {
            if lengths.size() != [num_pairs] {
                return Err(DpoError::shape("lengths", lengths, format!("[{num_pairs}]")));
            }
            if num_pairs > 0 && lengths.min().double_value(&[]) < 1.0 {
                return Err(DpoError::Shape {
                    what: "lengths",
                    found: format!("{} at the least", lengths.min().double_value(&[])),
                    expected: "at least one scored token each".into(),
                });
            }
        }
        Ok(())
    }
}

/// That a tensor is `[num_rows]` and holds floats.
fn check_column(what: &'static str, column: &Tensor, num_rows: i64) -> Result<()> {
    let is_float = matches!(column.kind(), Kind::Float | Kind::Double | Kind::BFloat16 | Kind::Half);
    if column.size() == [num_rows] && is_float {
        return Ok(());
    }
    let expected = if num_rows < 0 { "[num_pairs] of floats".into() } else { format!("[{num_rows}] of floats") };
    Err(DpoError::shape(what, column, expected))
}

/// f32, or f64 where it was.
fn wide(tensor: &Tensor) -> Tensor {
    if tensor.kind() == Kind::Double { tensor.shallow_clone() } else { tensor.to_kind(Kind::Float) }
}

/// What [`preference_loss`] returns, each `[num_pairs]` f32 (f64 for f64 input).
#[derive(Debug)]
pub struct LossOutput {
    /// The loss of each pair, not averaged; differentiable.
    pub losses: Tensor,
    /// β·a of the chosen completions (reference-free losses: β·log π, averaged over tokens where the loss is); no
    /// gradient.
    pub chosen_rewards: Tensor,
    /// The same of the rejected ones.
    pub rejected_rewards: Tensor,
}

/// The losses of pairs, added up by their weights, one value per pair.
///
/// The mean over pairs is left to the caller, who knows the whole accumulation window. `aot` and `aot_unpaired` sort the
/// pairs given here, so their value depends on which pairs are given together, as in TRL on the micro-batch; a sorted
/// difference counts as the loss of the pair whose policy (chosen) log-ratio is in it.
///
/// A row's margin and `length_penalty` shift d by (α·(length_c − length_r) − margin) / β (R-DPO, Park et al. 2024,
/// <https://arxiv.org/abs/2403.19159>). WPO's weights multiply the losses but not the added −log p; row weights multiply all.
///
/// # Shapes and units
/// As [`PairBatch`] and [`LossOutput`] say.
///
/// # Errors
/// [`DpoError::Config`] for a configuration with faults or for unpaired losses, [`DpoError::Shape`] for columns that differ in length,
/// [`DpoError::Missing`] for an absent input.
pub fn preference_loss(config: &LossConfig, pairs: &PairBatch) -> Result<LossOutput> {
    config.validate()?;
    if config.is_unpaired() {
        let fault = format!("loss_type is `{}`, expected a loss on pairs", config.loss_type[0].name());
        return Err(DpoError::Config { faults: vec![fault] });
    }
    pairs.check()?;
    let terms = Terms::new(config, pairs)?;
    let mut losses = terms.policy.0.zeros_like().detach();
    for (loss, weight) in config.weighted() {
        losses += terms.loss(loss)? * weight;
    }
    if config.wpo {
        let weights = pairs.wpo_weights.as_ref().ok_or_else(|| DpoError::missing("wpo_weights", "wpo"))?;
        losses *= wide(&weights.detach());
    }
    if config.nll_weight() > 0.0 {
        losses += terms.chosen_nll("nll_weight")? * config.nll_weight();
    }
    if let Some(weights) = &pairs.weights {
        losses *= wide(weights);
    }
    let (chosen_rewards, rejected_rewards) = terms.rewards()?;
    Ok(LossOutput { losses, chosen_rewards, rejected_rewards })
}

/// Chosen and rejected, `[num_pairs]` each.
type Pair = (Tensor, Tensor);

/// What the families are computed from, widened.
struct Terms<'a> {
    config: &'a LossConfig,
    pairs: &'a PairBatch,
    policy: Pair,
    /// a of both, where there is a reference.
    log_ratios: Option<Pair>,
    lengths: Option<Pair>,
    /// What is added to β·d.
    offset: Option<Tensor>,
}

impl<'a> Terms<'a> {
    fn new(config: &'a LossConfig, pairs: &'a PairBatch) -> Result<Self> {
        let policy = (wide(&pairs.policy.chosen_logps), wide(&pairs.policy.rejected_logps));
        let log_ratios = pairs.reference.as_ref().map(|reference| {
            (&policy.0 - wide(&reference.chosen_logps.detach()), &policy.1 - wide(&reference.rejected_logps.detach()))
        });
        let kind = policy.0.kind();
        let lengths = pairs.lengths.as_ref().map(|(chosen, rejected)| (chosen.to_kind(kind), rejected.to_kind(kind)));
        let mut terms = Self { config, pairs, policy, log_ratios, lengths, offset: None };
        if config.length_penalty > 0.0 {
            let (chosen, rejected) = terms.lengths("length_penalty")?;
            terms.offset = Some((chosen - rejected) * config.length_penalty);
        }
        if let Some(margins) = &pairs.margins {
            if let Some(loss) = config.without_margin() {
                let fault = format!("`{}` has no difference of rewards, but rows have margins", loss.name());
                return Err(DpoError::Config { faults: vec![fault] });
            }
            let margins = -wide(&margins.detach());
            terms.offset = Some(terms.offset.take().map_or(margins.shallow_clone(), |offset| offset + margins));
        }
        Ok(terms)
    }

    fn loss(&self, loss: Loss) -> Result<Tensor> {
        let &LossConfig { beta, label_smoothing, .. } = self.config;
        Ok(match loss {
            Loss::Sigmoid => dpo::sigmoid(&(self.difference(loss)? * beta), label_smoothing),
            Loss::SigmoidNorm => dpo::sigmoid(&(self.mean_difference(loss)? * beta), label_smoothing),
            Loss::Robust => dpo::robust(&(self.difference(loss)? * beta), label_smoothing),
            Loss::Hinge => slic::hinge(&(self.difference(loss)? * beta)),
            Loss::Ipo => ipo::squared(&self.difference(loss)?, beta),
            Loss::IpoNorm => ipo::squared(&self.mean_difference(loss)?, beta),
            Loss::ExoPair => exo::pair(&(self.difference(loss)? * beta), label_smoothing),
            Loss::NcaPair => self.on_log_ratios(loss, |chosen, rejected| nca::pair(chosen, rejected, beta))?,
            Loss::BcoPair => self.on_log_ratios(loss, |chosen, rejected| bco::pair(chosen, rejected, beta))?,
            Loss::SppoHard => self.on_log_ratios(loss, |chosen, rejected| sppo::hard(chosen, rejected, beta))?,
            Loss::AotUnpaired => {
                self.on_log_ratios(loss, |chosen, rejected| aot::sorted(chosen, rejected, beta, label_smoothing))?
            }
            Loss::Aot => {
                let reference = self.pairs.reference.as_ref();
                let reference = reference.ok_or_else(|| DpoError::missing("reference", loss.name()))?;
                let (chosen, rejected) = (wide(&reference.chosen_logps), wide(&reference.rejected_logps));
                let policy = &self.policy.0 - &self.policy.1;
                aot::sorted(&policy, &(chosen - rejected).detach(), beta, label_smoothing)
            }
            Loss::ApoZero => self.on_log_ratios(loss, |chosen, rejected| apo::zero(chosen, rejected, beta))?,
            Loss::ApoDown => self.on_log_ratios(loss, |chosen, rejected| apo::down(chosen, rejected, beta))?,
            Loss::Discopop => discopop::blend(&(self.difference(loss)? * beta), self.config.discopop_tau),
            Loss::Sft => self.chosen_nll(loss.name())?,
            Loss::Simpo => {
                let (chosen, rejected) = self.mean_logps(loss)?;
                simpo::simpo(&self.shifted(chosen - rejected), beta, self.config.simpo_gamma, label_smoothing)
            }
            Loss::Cpo => simpo::cpo(&self.shifted(&self.policy.0 - &self.policy.1), beta, label_smoothing),
            Loss::Orpo => {
                let (chosen, rejected) = self.mean_logps(loss)?;
                orpo::odds_ratio(&chosen, &rejected) * beta
            }
            Loss::Kto | Loss::ApoZeroUnpaired => unreachable!("refused by preference_loss"),
        })
    }

    fn ratios(&self, needed_by: &str) -> Result<&Pair> {
        self.log_ratios.as_ref().ok_or_else(|| DpoError::missing("reference", needed_by))
    }

    fn lengths(&self, needed_by: &str) -> Result<&Pair> {
        self.lengths.as_ref().ok_or_else(|| DpoError::missing("lengths", needed_by))
    }

    fn on_log_ratios(&self, loss: Loss, function: impl Fn(&Tensor, &Tensor) -> Tensor) -> Result<Tensor> {
        let (chosen, rejected) = self.ratios(loss.name())?;
        Ok(function(chosen, rejected))
    }

    fn scores(&self, loss: Loss) -> Result<Pair> {
        let score = |log_ratios| self.config.f_divergence.score(log_ratios, self.config.f_alpha_divergence_coef);
        let (chosen, rejected) = self.ratios(loss.name())?;
        Ok((score(chosen), score(rejected)))
    }

    /// d with its offset.
    fn difference(&self, loss: Loss) -> Result<Tensor> {
        let (chosen, rejected) = self.scores(loss)?;
        Ok(self.shifted(chosen - rejected))
    }

    /// The same of scores averaged over tokens.
    fn mean_difference(&self, loss: Loss) -> Result<Tensor> {
        let (chosen, rejected) = self.scores(loss)?;
        let (chosen_lengths, rejected_lengths) = self.lengths(loss.name())?;
        Ok(self.shifted(chosen / chosen_lengths - rejected / rejected_lengths))
    }

    fn shifted(&self, difference: Tensor) -> Tensor {
        match &self.offset {
            Some(offset) => difference + offset / self.config.beta,
            None => difference,
        }
    }

    /// The policy's log-probs averaged over tokens.
    fn mean_logps(&self, loss: Loss) -> Result<Pair> {
        let (chosen, rejected) = self.lengths(loss.name())?;
        Ok((&self.policy.0 / chosen, &self.policy.1 / rejected))
    }

    /// −log p of the chosen completions, such that its mean over pairs is the mean that `nll_average` names.
    ///
    /// RPO: Pang et al. 2024, <https://arxiv.org/abs/2404.19733>, Eq. 1, which averages each completion by itself.
    fn chosen_nll(&self, needed_by: &str) -> Result<Tensor> {
        if let Some(nll) = &self.pairs.chosen_nll {
            return Ok(wide(nll));
        }
        let chosen = &self.lengths(needed_by)?.0;
        Ok(match (self.config.nll_average, self.pairs.mean_chosen_length) {
            (NllAverage::Sequences, _) => -&self.policy.0 / chosen,
            (NllAverage::Tokens, Some(mean_length)) => -&self.policy.0 / mean_length,
            (NllAverage::Tokens, None) => -&self.policy.0 / chosen.mean(chosen.kind()),
        })
    }

    fn rewards(&self) -> Result<Pair> {
        let beta = self.config.beta;
        let is_averaged = self.config.loss_type.iter().find(|loss| matches!(loss, Loss::Simpo | Loss::Orpo)).copied();
        let of = |(chosen, rejected): &Pair| (chosen.detach() * beta, rejected.detach() * beta);
        if let Some(loss) = is_averaged {
            return Ok(of(&self.mean_logps(loss)?));
        }
        let is_free = self.config.loss_type.iter().any(|loss| loss.is_reference_free());
        Ok(of(self.log_ratios.as_ref().filter(|_| !is_free).unwrap_or(&self.policy)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs() -> PairBatch {
        let logps = PairLogps::from_slices(&[-4.0, -9.0], &[-6.0, -8.0]).unwrap();
        PairBatch::new(logps.shallow_clone())
            .with_reference(logps)
            .with_lengths(Tensor::from_slice(&[2i64, 4]), Tensor::from_slice(&[3i64, 4]))
    }

    fn losses(config: &LossConfig, pairs: &PairBatch) -> Vec<f32> {
        Vec::try_from(preference_loss(config, pairs).unwrap().losses).unwrap()
    }

    fn check(found: Vec<f32>, expected: [f64; 2]) {
        for (found, expected) in found.iter().zip(expected) {
            assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} is not {expected}");
        }
    }

    /// −log σ(z).
    fn logistic(z: f64) -> f64 {
        (-z).exp().ln_1p()
    }

    #[test]
    fn mixtures_add_up_by_their_weights() {
        let config = LossConfig {
            loss_type: vec![Loss::Sigmoid, Loss::Hinge, Loss::Sft],
            loss_weights: Some(vec![0.5, 2.0, 10.0]),
            ..LossConfig::default()
        };
        // d = 0: ln 2 and 1; 13 nats over 6 chosen tokens, shared out as 4 and 9 over their mean length of 3.
        let common = 0.5 * 2f64.ln() + 2.0;
        check(losses(&config, &pairs()), [common + 10.0 * 4.0 / 3.0, common + 10.0 * 9.0 / 3.0]);
    }

    #[test]
    fn the_chosen_nll_is_a_mean_over_tokens_or_over_sequences() {
        let mut config = LossConfig { nll_weight: Some(1.0), ..LossConfig::default() };
        let mut pairs = pairs();
        check(losses(&config, &pairs), [2f64.ln() + 4.0 / 3.0, 2f64.ln() + 3.0]);
        // A window in which chosen completions are 8 tokens long.
        pairs.mean_chosen_length = Some(8.0);
        check(losses(&config, &pairs), [2f64.ln() + 0.5, 2f64.ln() + 9.0 / 8.0]);
        config.nll_average = NllAverage::Sequences;
        check(losses(&config, &pairs), [2f64.ln() + 2.0, 2f64.ln() + 9.0 / 4.0]);
        pairs.chosen_nll = Some(Tensor::from_slice(&[7f32, 8.0]));
        check(losses(&config, &pairs), [2f64.ln() + 7.0, 2f64.ln() + 8.0]);
    }

    #[test]
    fn margins_length_penalties_and_weights_enter_where_they_should() {
        // Lengths 2 and 3, then 4 and 4; α = 0.5 shifts the first pair by −0.5.
        let config = LossConfig { length_penalty: 0.5, ..LossConfig::default() };
        let mut pairs = pairs();
        check(losses(&config, &pairs), [logistic(-0.5), logistic(0.0)]);
        pairs.margins = Some(Tensor::from_slice(&[0f32, 2.0]));
        check(losses(&config, &pairs), [logistic(-0.5), logistic(-2.0)]);
        pairs.weights = Some(Tensor::from_slice(&[3f32, 0.0]));
        check(losses(&config, &pairs), [3.0 * logistic(-0.5), 0.0]);
        // In reward units for IPO as well: d becomes −2/β.
        pairs.weights = None;
        let config = LossConfig { beta: 0.5, ..LossConfig::of(Loss::Ipo) };
        check(losses(&config, &pairs), [1.0, 25.0]);
        // SimPO's γ adds to the row's own margin.
        let config = LossConfig { beta: 2.0, ..LossConfig::of(Loss::Simpo) };
        check(losses(&config, &pairs), [logistic(-0.5), logistic(2.0 * (-9.0 / 4.0 + 8.0 / 4.0) - 2.5)]);
        let error = preference_loss(&LossConfig::of(Loss::Aot), &pairs).unwrap_err().to_string();
        assert!(error.contains("`aot` has no difference of rewards"), "{error}");
    }

    #[test]
    fn wpo_weighs_the_preference_and_not_the_added_nll() {
        let config = LossConfig { wpo: true, nll_weight: Some(1.0), ..LossConfig::default() };
        let mut pairs = pairs();
        let error = preference_loss(&config, &pairs).unwrap_err();
        assert_eq!(error.to_string(), "`wpo` needs `wpo_weights`, which is absent");
        assert!(error.hint().unwrap().contains("with_collision"));
        pairs.wpo_weights = Some(Tensor::from_slice(&[0.5f32, 0.25]));
        check(losses(&config, &pairs), [0.5 * 2f64.ln() + 4.0 / 3.0, 0.25 * 2f64.ln() + 3.0]);
    }

    #[test]
    fn rewards_are_those_of_trls_trainers_and_carry_no_gradient() {
        let pairs = pairs();
        let _ = pairs.policy.chosen_logps.shallow_clone().set_requires_grad(true);
        for (loss, chosen, rejected) in [
            (Loss::Sigmoid, [0.0, 0.0], [0.0, 0.0]),
            (Loss::Cpo, [-0.4, -0.9], [-0.6, -0.8]),
            (Loss::Simpo, [-0.2, -0.225], [-0.2, -0.2]),
            (Loss::Orpo, [-0.2, -0.225], [-0.2, -0.2]),
        ] {
            let out = preference_loss(&LossConfig::of(loss), &pairs).unwrap();
            assert!(!out.chosen_rewards.requires_grad() && out.losses.requires_grad());
            check(Vec::try_from(out.chosen_rewards).unwrap(), chosen);
            check(Vec::try_from(out.rejected_rewards).unwrap(), rejected);
        }
    }

    #[test]
    fn pairs_are_taken_from_completions_in_any_order() {
        let logps = Tensor::from_slice(&[-1f32, -2.0, -3.0]);
        let pairs = PairLogps::select(&logps, &[2, 2], &[0, 1]).unwrap();
        assert_eq!(Vec::<f32>::try_from(&pairs.chosen_logps).unwrap(), [-3.0, -3.0]);
        assert_eq!(Vec::<f32>::try_from(&pairs.rejected_logps).unwrap(), [-1.0, -2.0]);
        assert!(PairLogps::select(&logps, &[3], &[0]).unwrap_err().to_string().contains("0..3"));
        assert!(PairLogps::select(&logps, &[1], &[0, 2]).is_err());
    }

    #[test]
    fn inputs_that_do_not_fit_are_refused_by_name() {
        let error = |config: &LossConfig, pairs: &PairBatch| preference_loss(config, pairs).unwrap_err().to_string();
        let config = LossConfig::default();
        let logps = || PairLogps::from_slices(&[-1.0], &[-2.0]).unwrap();
        assert_eq!(error(&config, &PairBatch::new(logps())), "`sigmoid` needs `reference`, which is absent");
        assert!(error(&LossConfig::of(Loss::Orpo), &PairBatch::new(logps())).contains("`orpo` needs `lengths`"));
        assert!(error(&LossConfig::of(Loss::Kto), &PairBatch::new(logps())).contains("expected a loss on pairs"));
        assert!(error(&LossConfig { beta: 0.0, ..config.clone() }, &pairs()).contains("beta is 0, expected over 0"));
        let mut bad = pairs();
        bad.weights = Some(Tensor::from_slice(&[1f32]));
        assert_eq!(error(&config, &bad), "`weights` is [1] of Float, expected [2] of floats");
        let bad = pairs().with_lengths(Tensor::from_slice(&[2i64, 0]), Tensor::from_slice(&[3i64, 4]));
        assert!(error(&config, &bad).contains("at least one scored token"));
        assert!(PairLogps::from_slices(&[-1.0], &[]).is_err());
        let twice = PairBatch::new(logps()).with_reference(PairLogps::from_slices(&[-1.0, 0.0], &[-2.0, 0.0]).unwrap());
        assert!(error(&config, &twice).contains("`reference.chosen_logps` is [2] of Float, expected [1]"));
    }

    #[test]
    fn halves_are_widened_and_no_pairs_give_no_losses() {
        let half = |logps: &PairLogps| PairLogps {
            chosen_logps: logps.chosen_logps.to_kind(Kind::BFloat16),
            rejected_logps: logps.rejected_logps.to_kind(Kind::BFloat16),
        };
        let pairs = PairBatch { policy: half(&pairs().policy), ..pairs() };
        assert_eq!(preference_loss(&LossConfig::default(), &pairs).unwrap().losses.kind(), Kind::Float);
        let nothing = || PairLogps::from_slices(&[], &[]).unwrap();
        let pairs = PairBatch::new(nothing()).with_reference(nothing());
        for loss in [Loss::Sigmoid, Loss::Aot, Loss::AotUnpaired] {
            assert_eq!(preference_loss(&LossConfig::of(loss), &pairs).unwrap().losses.size(), [0]);
        }
    }
}
