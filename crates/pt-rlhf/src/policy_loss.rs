//! The clipped policy loss of PPO, GRPO and RLOO, and what it is averaged over.

use crate::error::{Result, RlhfError};
use crate::packed::{check_floats, check_total, num_entries, ranges, sequence_ids, sum_by_sequence, wide};
use pt_tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Log-ratios are cut at ±20 before they are raised, as in OpenRLHF: e²⁰ is far outside every trust region, and a ratio
/// stays a number.
const MAX_LOG_RATIO: f64 = 20.0;

/// How far the ratio π/π_old may go before a token stops to count. The part of a training configuration named `clip`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyClip {
    /// ε below: a bad token is pushed down until its ratio is 1 − low.
    pub low: f64,
    /// ε above: a good token is pushed up until its ratio is 1 + high. DAPO takes 0.28 with a low of 0.2.
    pub high: f64,
    /// Dual clip: a bad token that has become this many times as likely is not pushed at all, 3 in its paper; null for
    /// none. What TRL's GRPO calls `delta`.
    pub dual: Option<f64>,
}

impl Default for PolicyClip {
    /// PPO's 0.2 on both sides.
    fn default() -> Self {
        Self { low: 0.2, high: 0.2, dual: None }
    }
}

impl PolicyClip {
    /// Every fault, each naming its field, what it is and what was expected.
    pub fn faults(&self) -> Vec<String> {
        let Self { low, high, dual } = *self;
        let mut faults = Vec::new();
        if !(0.0..=1.0).contains(&low) {
            faults.push(format!("clip.low is {low}, expected 0 to 1"));
        }
        if !(high >= 0.0 && high.is_finite()) {
            faults.push(format!("clip.high is {high}, expected at least 0"));
        }
        if let Some(dual) = dual.filter(|dual| !(*dual > 1.0 + high && dual.is_finite())) {
            faults.push(format!("clip.dual is {dual}, expected over 1 + clip.high or null"));
        }
        faults
    }
}

/// What [`policy_losses`] returns, one entry a token: f32, or f64 for f64 log-probs.
#[derive(Debug)]
pub struct PolicyOutput {
    /// The loss of each, not averaged; differentiable in the policy's log-probs.
    pub losses: Tensor,
    /// ρ = π/π_old; no gradient.
    pub ratio: Tensor,
    /// 1 where clipping raised the loss (TRL's `clipfrac`) or the dual clip cut it, so that nothing is learned, else 0;
    /// no gradient.
    pub is_clipped: Tensor,
}

/// The clipped loss of each token, max(−A·ρ, −A·clip(ρ, 1 − low, 1 + high)).
///
/// Schulman et al. 2017, <https://arxiv.org/abs/1707.06347>, Eq. 7, as a loss. With a dual clip c the loss of a token
/// with A < 0 is −A·c at the most (Ye et al. 2020, <https://arxiv.org/abs/1912.09729>). Log-ratios beyond ±20 are cut
/// there and have no slope.
///
/// # Shapes and units
/// - `logprobs`, `old_logprobs`: `[num_tokens]` floats, nats, of the policy as it is and as it was when it sampled; the
///   gradient goes into the first alone;
/// - `advantages`: `[num_tokens]` floats;
/// - f32 out, f64 where the log-probs are, halves are widened. [`token_weights`] averages.
///
/// # Errors
/// [`RlhfError::Config`] for a clip with faults, [`RlhfError::Shape`] for columns that do not fit.
///
/// # Example
/// A good token that is half as likely again as before is clipped at 1.2, a bad one is not.
/// ```
/// use pt_rlhf::{PolicyClip, policy_losses};
/// use pt_tensor::Tensor;
/// let logprobs = Tensor::from_slice(&[1.5f32.ln(), 1.5f32.ln()]);
/// let advantages = Tensor::from_slice(&[1f32, -1.0]);
/// let out = policy_losses(&logprobs, &logprobs.zeros_like(), &advantages, &PolicyClip::default())?;
/// assert!((out.losses - Tensor::from_slice(&[-1.2f32, 1.5])).abs().max().double_value(&[]) < 1e-6);
/// assert_eq!(Vec::<f32>::try_from(out.is_clipped).unwrap(), [1.0, 0.0]);
/// # Ok::<(), pt_rlhf::RlhfError>(())
/// ```
pub fn policy_losses(
    logprobs: &Tensor,
    old_logprobs: &Tensor,
    advantages: &Tensor,
    clip: &PolicyClip,
) -> Result<PolicyOutput> {
    let num_tokens = num_entries(logprobs);
    check_floats("logprobs", logprobs, num_tokens)?;
    check_floats("old_logprobs", old_logprobs, num_tokens)?;
    clipped_losses(&(wide(logprobs) - wide(&old_logprobs.detach())), advantages, clip)
}

/// The clipped loss of each log-ratio that [`log_ratio`] gives, of tokens or of sequences: as [`policy_losses`], for
/// GSPO and RLOO.
///
/// # Errors
/// [`RlhfError::Config`] for a clip with faults, [`RlhfError::Shape`] unless both are floats of one length.
pub fn clipped_losses(log_ratio: &Tensor, advantages: &Tensor, clip: &PolicyClip) -> Result<PolicyOutput> {
    let faults = clip.faults();
    if !faults.is_empty() {
        return Err(RlhfError::Config { place: "policy loss".into(), faults });
    }
    let num_ratios = num_entries(log_ratio);
    check_floats("log_ratio", log_ratio, num_ratios)?;
    check_floats("advantages", advantages, num_ratios)?;
    let ratio = wide(log_ratio).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp();
    let advantages = advantages.detach().to_kind(ratio.kind());
    let unclipped = -&advantages * &ratio;
    let clipped = -&advantages * ratio.clamp(1.0 - clip.low, 1.0 + clip.high);
    let mut losses = unclipped.maximum(&clipped);
    let mut is_clipped = clipped.gt_tensor(&unclipped);
    if let Some(dual) = clip.dual {
        let most = -&advantages * dual;
        let is_over = advantages.lt(0.0).logical_and(&losses.gt_tensor(&most));
        losses = most.where_self(&is_over, &losses);
        is_clipped = is_clipped.logical_or(&is_over);
    }
    let is_clipped = is_clipped.to_kind(losses.kind());
    Ok(PolicyOutput { losses, ratio: ratio.detach(), is_clipped })
}

/// What one importance ratio is of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ImportanceLevel {
    /// A token: PPO, GRPO.
    #[default]
    Token,
    /// A sequence, by the mean over its tokens: GSPO. A clip of 3e-4 to 4e-4 goes with it.
    Sequence,
    /// A sequence, by the sum over its tokens, which is its probability's: RLOO.
    Sum,
}

/// Log-ratios log π − log π_old of packed sequences, in nats.
///
/// - [`Token`](ImportanceLevel::Token): of each token, `[num_tokens]`;
/// - [`Sequence`](ImportanceLevel::Sequence): of each token, `[num_tokens]`, the mean over its sequence, Zheng et al.
///   2025, <https://arxiv.org/abs/2507.18071>. Tokens stay the entries that are averaged, and terms of tokens can be
///   added, as in TRL 1.16. The slope is the mean's, shared by the sequence. (GSPO-token gives each token its own
///   instead; as long as a sequence has one advantage and one weight, that is the same.)
/// - [`Sum`](ImportanceLevel::Sum): of each sequence, `[num_sequences]`, 0 of an empty one; Ahmadian et al. 2024,
///   <https://arxiv.org/abs/2402.14740>.
///
/// The gradient goes into `logprobs` alone.
///
/// # Errors
/// [`RlhfError::Shape`] unless both are `[num_tokens]` floats of as many tokens as `lengths` add up to.
pub fn log_ratio(
    level: ImportanceLevel,
    logprobs: &Tensor,
    old_logprobs: &Tensor,
    lengths: &[usize],
) -> Result<Tensor> {
    let num_tokens = num_entries(logprobs);
    check_floats("logprobs", logprobs, num_tokens)?;
    check_floats("old_logprobs", old_logprobs, num_tokens)?;
    check_total("logprobs", num_tokens as usize, lengths)?;
    let ratios = wide(logprobs) - wide(&old_logprobs.detach()); // [num_tokens]
    Ok(match level {
        ImportanceLevel::Token => ratios,
        ImportanceLevel::Sum => sum_by_sequence(&ratios, lengths),
        ImportanceLevel::Sequence => {
            let counts: Vec<i64> = lengths.iter().map(|length| (*length).max(1) as i64).collect();
            let counts = Tensor::from_slice(&counts).to_device(ratios.device());
            let means = sum_by_sequence(&ratios, lengths) / counts; // [num_sequences]
            means.index_select(0, &sequence_ids(lengths, ratios.device())) // [num_tokens]
        }
    })
}

/// What the losses of tokens are averaged over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LossAverage {
    /// The tokens of each sequence, then sequences alike, so a token of a short one counts more: Shao et al. 2024,
    /// <https://arxiv.org/abs/2402.03300>.
    Grpo,
    /// All tokens of the optimizer step alike: Yu et al. 2025, <https://arxiv.org/abs/2503.14476>.
    #[default]
    Dapo,
    /// The tokens of each micro-batch, then micro-batches by their sequences, so the loss depends on how the step is
    /// split; what TRL's PPO does, too.
    Bnpo,
    /// The longest allowed length times the number of sequences, so that no token counts for its sequence's length: Liu
    /// et al. 2025, <https://arxiv.org/abs/2503.20783>.
    DrGrpo,
}

/// What all micro-batches of one optimizer step hold together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LossWindow {
    /// Sequences, empty ones included.
    pub num_sequences: usize,
    /// Tokens that are trained on.
    pub num_tokens: usize,
    /// The longest a sequence may be; for [`LossAverage::DrGrpo`].
    pub max_length: usize,
}

impl LossWindow {
    /// Of these sequences.
    pub fn of(lengths: &[usize], max_length: usize) -> Self {
        Self { num_sequences: lengths.len(), num_tokens: lengths.iter().sum(), max_length }
    }
}

/// Weights of a micro-batch's tokens, `[num_tokens]`, so that the loss of the optimizer step is Σ weight·loss over the
/// tokens of all its micro-batches.
///
/// `lengths` are those of the micro-batch's sequences, `window` counts those of the whole step. Under
/// [`ImportanceLevel::Sum`] there is one loss a sequence, and the weight is 1/`num_sequences`.
pub fn token_weights(lengths: &[usize], average: LossAverage, window: &LossWindow) -> Vec<f32> {
    let of_sequence = 1.0 / window.num_sequences.max(1) as f64;
    let num_tokens: usize = lengths.iter().sum();
    let weight = |length: usize| match average {
        LossAverage::Grpo => of_sequence / length as f64,
        LossAverage::Dapo => 1.0 / window.num_tokens.max(1) as f64,
        LossAverage::Bnpo => of_sequence * lengths.len() as f64 / num_tokens as f64,
        LossAverage::DrGrpo => of_sequence / window.max_length.max(1) as f64,
    };
    ranges(lengths).flat_map(|range| std::iter::repeat_n(weight(range.len()) as f32, range.len())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use pt_tensor::{Device, Kind};

    fn floats(tensor: &Tensor) -> Vec<f64> {
        Vec::try_from(tensor.detach().to_kind(Kind::Double)).unwrap()
    }

    fn assert_close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        let is_close = |(one, other): (&f64, &f64)| (one - other).abs() < 1e-6 * other.abs().max(1.0);
        assert!(found.iter().zip(expected).all(is_close), "{found:?}, expected {expected:?}");
    }

    /// Losses, slopes in log π and clipped tokens for ratios that π/π_old has.
    fn of(ratios: &[f64], advantages: &[f64], clip: PolicyClip) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
        let old_logprobs = Tensor::from_slice(ratios).zeros_like() - 3.0;
        let logprobs = (Tensor::from_slice(ratios).log() - 3.0).set_requires_grad(true);
        let out = policy_losses(&logprobs, &old_logprobs, &Tensor::from_slice(advantages), &clip).unwrap();
        assert!(!out.ratio.requires_grad() && !out.is_clipped.requires_grad());
        assert_close(&floats(&out.ratio), ratios);
        out.losses.sum(Kind::Double).backward();
        (floats(&out.losses), floats(&logprobs.grad()), floats(&out.is_clipped))
    }

    /// A = 2, clipped at 0.8 and 1.2: −2ρ with the slope −2ρ, but flat at −2.4 above.
    #[test]
    fn a_good_token_is_pushed_up_until_it_is_1_2_times_as_likely() {
        let (losses, slopes, is_clipped) = of(&[0.5, 1.0, 1.1, 1.5], &[2.0; 4], PolicyClip::default());
        assert_close(&losses, &[-1.0, -2.0, -2.2, -2.4]);
        assert_close(&slopes, &[-1.0, -2.0, -2.2, 0.0]);
        assert_eq!(is_clipped, [0.0, 0.0, 0.0, 1.0]);
    }

    /// A = −2: 2ρ with the slope 2ρ, but flat at 1.6 below.
    #[test]
    fn a_bad_token_is_pushed_down_until_it_is_0_8_times_as_likely() {
        let (losses, slopes, is_clipped) = of(&[0.5, 0.9, 1.0, 1.5], &[-2.0; 4], PolicyClip::default());
        assert_close(&losses, &[1.6, 1.8, 2.0, 3.0]);
        assert_close(&slopes, &[0.0, 1.8, 2.0, 3.0]);
        assert_eq!(is_clipped, [1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn the_two_sides_have_clips_of_their_own() {
        let clip = PolicyClip { low: 0.1, high: 0.4, dual: None };
        let (losses, slopes, _) = of(&[1.3, 1.5, 0.95, 0.85], &[1.0, 1.0, -1.0, -1.0], clip);
        assert_close(&losses, &[-1.3, -1.4, 0.95, 0.9]);
        assert_close(&slopes, &[-1.3, 0.0, 0.95, 0.0]);
    }

    /// c = 3: a bad token four times as likely costs what one three times as likely does; a good one is as before.
    #[test]
    fn the_dual_clip_bounds_the_loss_of_a_bad_token_that_became_likely() {
        let clip = PolicyClip { dual: Some(3.0), ..PolicyClip::default() };
        let (losses, slopes, is_clipped) = of(&[2.5, 4.0, 4.0, 0.5], &[-2.0, -2.0, 2.0, -2.0], clip);
        assert_close(&losses, &[5.0, 6.0, -2.4, 1.6]);
        assert_close(&slopes, &[5.0, 0.0, 0.0, 0.0]);
        assert_eq!(is_clipped, [0.0, 1.0, 1.0, 1.0]);
        let (losses, ..) = of(&[2.5, 4.0], &[-2.0, -2.0], PolicyClip::default());
        assert_close(&losses, &[5.0, 8.0]);
    }

    #[test]
    fn a_policy_that_has_not_moved_pays_minus_the_advantage_with_its_full_slope() {
        let (losses, slopes, is_clipped) = of(&[1.0, 1.0, 1.0], &[1.5, -0.5, 0.0], PolicyClip::default());
        assert_eq!(losses, [-1.5, 0.5, 0.0]);
        assert_eq!(slopes, [-1.5, 0.5, 0.0]);
        assert_eq!(is_clipped, [0.0; 3]);
    }

    #[test]
    fn log_ratios_beyond_20_are_cut_and_give_numbers() {
        let logprobs = Tensor::from_slice(&[500f32, -500.0]).set_requires_grad(true);
        let advantages = Tensor::from_slice(&[-1f32, 1.0]);
        let out = policy_losses(&logprobs, &logprobs.zeros_like(), &advantages, &PolicyClip::default()).unwrap();
        assert_close(&floats(&out.losses), &[20f64.exp(), -(-20f64).exp()]);
        out.losses.sum(Kind::Float).backward();
        assert_eq!(floats(&logprobs.grad()), [0.0, 0.0]);
    }

    /// Two tokens that are e and e³ times as likely, and one that is 1/e: means 2 and −1, sums 4 and −1.
    #[test]
    fn levels_take_tokens_their_mean_or_their_sum() {
        let logprobs = Tensor::from_slice(&[-1f64, -2.0, -4.0]).set_requires_grad(true);
        let old_logprobs = Tensor::from_slice(&[-2f64, -5.0, -3.0]);
        let of = |level| log_ratio(level, &logprobs, &old_logprobs, &[2, 0, 1]).unwrap();
        assert_eq!(floats(&of(ImportanceLevel::Token)), [1.0, 3.0, -1.0]);
        assert_eq!(floats(&of(ImportanceLevel::Sequence)), [2.0, 2.0, -1.0]);
        assert_eq!(floats(&of(ImportanceLevel::Sum)), [4.0, 0.0, -1.0]);
        let upstream = Tensor::from_slice(&[1f64, 10.0, 100.0]);
        let slopes = |level| {
            let total = (of(level) * &upstream).sum(Kind::Double);
            floats(&Tensor::run_backward(&[&total], &[&logprobs], false, false)[0])
        };
        assert_eq!(slopes(ImportanceLevel::Token), [1.0, 10.0, 100.0]);
        assert_eq!(slopes(ImportanceLevel::Sequence), [5.5, 5.5, 100.0]);
        assert_eq!(slopes(ImportanceLevel::Sum), [1.0, 1.0, 100.0]);
    }

    /// One sequence of two tokens: the loss −2·exp(mean), and half of its slope for each token.
    #[test]
    fn a_sequences_ratio_is_averaged_over_its_tokens_like_a_loss_of_theirs() {
        let logprobs = Tensor::from_slice(&[0.3f64, -0.1]).set_requires_grad(true);
        let ratios = log_ratio(ImportanceLevel::Sequence, &logprobs, &logprobs.zeros_like(), &[2]).unwrap();
        let advantages = Tensor::from_slice(&[2f64, 2.0]);
        let losses = clipped_losses(&ratios, &advantages, &PolicyClip::default()).unwrap().losses;
        let loss = losses.mean(Kind::Double);
        assert_close(&[loss.double_value(&[])], &[-2.0 * 0.1f64.exp()]);
        loss.backward();
        assert_close(&floats(&logprobs.grad()), &[-(0.1f64.exp()); 2]);
    }

    /// Sequences of 1 and 3 tokens, then one of 1, in two micro-batches; losses of 6, 3, 3, 3 and 12. Five tokens,
    /// three sequences.
    #[test]
    fn weights_average_over_what_they_say() {
        let micro_batches: [(&[usize], &[f64]); 2] = [(&[1, 3], &[6.0, 3.0, 3.0, 3.0]), (&[1], &[12.0])];
        let window = LossWindow::of(&[1, 3, 1], 10);
        let loss = |average| -> f64 {
            let part = |(lengths, losses): (&[usize], &[f64])| -> f64 {
                let weights = token_weights(lengths, average, &window);
                assert_eq!(weights.len(), losses.len());
                weights.iter().zip(losses).map(|(weight, loss)| f64::from(*weight) * loss).sum()
            };
            micro_batches.into_iter().map(part).sum()
        };
        // (6 + 3 + 12)/3, 27/5, ⅔ of 15/4 and ⅓ of 12, 27/30.
        let expected = [7.0, 5.4, 6.5, 0.9];
        let averages = [LossAverage::Grpo, LossAverage::Dapo, LossAverage::Bnpo, LossAverage::DrGrpo];
        assert_close(&averages.map(loss), &expected);
        assert_eq!(serde_json::to_string(&averages).unwrap(), r#"["grpo","dapo","bnpo","dr_grpo"]"#);
    }

    #[test]
    fn only_bnpo_depends_on_how_the_step_is_split() {
        let window = LossWindow::of(&[1, 3], 10);
        let split = |average| [token_weights(&[1], average, &window), token_weights(&[3], average, &window)].concat();
        for average in [LossAverage::Grpo, LossAverage::Dapo, LossAverage::DrGrpo] {
            assert_eq!(split(average), token_weights(&[1, 3], average, &window));
        }
        assert_eq!(token_weights(&[1, 3], LossAverage::Bnpo, &window), [0.25; 4]);
        assert_eq!(split(LossAverage::Bnpo)[..2], [0.5, 0.5 / 3.0]);
    }

    #[test]
    fn empty_sequences_count_and_nothing_divides_by_0() {
        let window = LossWindow::of(&[0, 2], 4);
        assert_eq!(token_weights(&[0, 2], LossAverage::Grpo, &window), [0.25; 2]);
        for average in [LossAverage::Grpo, LossAverage::Dapo, LossAverage::Bnpo, LossAverage::DrGrpo] {
            assert!(token_weights(&[0], average, &LossWindow::of(&[0], 0)).is_empty());
        }
        let nothing = Tensor::zeros([0], (Kind::Float, Device::Cpu));
        for level in [ImportanceLevel::Token, ImportanceLevel::Sequence, ImportanceLevel::Sum] {
            assert_eq!(log_ratio(level, &nothing, &nothing, &[]).unwrap().size(), [0]);
        }
        let out = policy_losses(&nothing, &nothing, &nothing, &PolicyClip::default()).unwrap();
        assert_eq!(out.losses.size(), [0]);
    }

    #[test]
    fn halves_are_widened() {
        let half = Tensor::from_slice(&[-1f32]).to_kind(Kind::BFloat16);
        let out = policy_losses(&half, &half, &half, &PolicyClip::default()).unwrap();
        assert_eq!([out.losses.kind(), out.ratio.kind(), out.is_clipped.kind()], [Kind::Float; 3]);
        assert_eq!(log_ratio(ImportanceLevel::Sequence, &half, &half, &[1]).unwrap().kind(), Kind::Float);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let column = |num: i64| Tensor::zeros([num], (Kind::Float, Device::Cpu));
        let clip = PolicyClip::default();
        let error = |result: Result<PolicyOutput>| result.unwrap_err().to_string();
        let found = error(policy_losses(&column(2), &column(3), &column(2), &clip));
        assert_eq!(found, "`old_logprobs` is [3] of Float, expected [2] of floats");
        let found = error(policy_losses(&column(2), &column(2), &column(1), &clip));
        assert_eq!(found, "`advantages` is [1] of Float, expected [2] of floats");
        assert!(policy_losses(&column(2).view([1, 2]), &column(2), &column(2), &clip).is_err());
        let bad = PolicyClip { low: 1.5, high: -0.1, dual: Some(0.5) };
        assert_eq!(
            error(policy_losses(&column(1), &column(1), &column(1), &bad)),
            "policy loss: clip.low is 1.5, expected 0 to 1; clip.high is -0.1, expected at least 0; \
             clip.dual is 0.5, expected over 1 + clip.high or null"
        );
        let found = log_ratio(ImportanceLevel::Token, &column(2), &column(2), &[1]).unwrap_err().to_string();
        assert_eq!(found, "`logprobs` is of length 2, expected length 1");
    }

    proptest! {
        /// The loss as the papers write it, min(ρA, clip(ρ)A) and for A < 0 at least cA, and its slope by differences.
        #[test]
        fn losses_and_slopes_are_those_of_the_papers(
            tokens in prop::collection::vec((-2.0..2.0, -3.0..3.0), 1..20), low in 0.0..0.9, high in 0.0..1.5,
            dual in prop::option::of(2.6..4.0),
        ) {
            let clip = PolicyClip { low, high, dual };
            let surrogate = |log_ratio: f64, advantage: f64| {
                let ratio = log_ratio.exp();
                let plain = (ratio * advantage).min(ratio.clamp(1.0 - low, 1.0 + high) * advantage);
                dual.filter(|_| advantage < 0.0).map_or(plain, |dual| plain.max(dual * advantage))
            };
            let (ratios, advantages): (Vec<f64>, Vec<f64>) = tokens.into_iter().unzip();
            let leaf = Tensor::from_slice(&ratios).set_requires_grad(true);
            let out = policy_losses(&leaf, &leaf.zeros_like(), &Tensor::from_slice(&advantages), &clip).unwrap();
            out.losses.sum(Kind::Double).backward();
            let slopes = floats(&leaf.grad());
            for (index, loss) in floats(&out.losses).into_iter().enumerate() {
                let value = |step: f64| -surrogate(ratios[index] + step, advantages[index]);
                prop_assert!((loss - value(0.0)).abs() < 1e-12);
                let (before, after) = ((value(0.0) - value(-1e-6)) / 1e-6, (value(1e-6) - value(0.0)) / 1e-6);
                // Away from the corners, where both sides agree.
                if (before - after).abs() < 1e-3 {
                    prop_assert!((slopes[index] - before).abs() < 1e-3, "{} is not {}", slopes[index], before);
                }
            }
        }
    }
}
