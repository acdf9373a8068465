//! What ails a run of reinforcement learning, in plain words: from the numbers of its iterations.
//!
//! Each diagnosis looks at the last few iterations, so that one odd batch is no finding, and says what was seen and
//! what to try. All of them are signs and no proofs: a response length that rises with the score is what a reward for
//! long responses asks for.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

/// Iterations in a row that make a lasting state.
const LASTING: usize = 5;
/// Iterations over which a course is looked at.
const COURSE: usize = 10;
/// Iterations that show how a run began.
const BEGINNING: usize = 3;

/// Mean KL of a response, in nats, below which a negative estimate is no rounding error.
const KL_NEGATIVE: f64 = -0.01;
/// Share of clipped tokens above which an update mostly throws its gradient away; 0.1 to 0.2 is usual.
const CLIPPED: f64 = 0.3;
/// Distance of the mean ratio from 1. Its expectation under the policy that sampled is exactly 1.
const RATIO_OFF: f64 = 0.1;
/// Share of the first entropy under which little is left to explore with.
const ENTROPY_LEFT: f64 = 0.1;
/// Correlation of length and score within a batch above which the score is mostly a length.
const LENGTH_CORRELATION: f64 = 0.8;
/// Growth of the length, and fall of the end rate, that count as a course.
const LENGTH_GROWTH: f64 = 1.1;
const END_RATE_FALL: f64 = 0.05;
/// Share of groups without any difference of scores above which most samples teach nothing.
const NO_SIGNAL: f64 = 0.8;
/// Share of the first spread of scores under which all responses count as equally good.
const SPREAD_LEFT: f64 = 0.05;

/// What the diagnoses look at, of one iteration. NaN where a number could not be had: it gives no finding.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct IterationStats {
    /// KL of the policy from its reference as estimated on the samples: nats, summed over a response's tokens, mean
    /// over responses.
    #[serde(deserialize_with = "number_or_null")]
    pub kl: f64,
    /// Mean entropy of the policy's next-token distribution, in nats per token.
    #[serde(deserialize_with = "number_or_null")]
    pub entropy: f64,
    /// 1 − Var(returns − values)/Var(returns); `None` without a critic.
    pub explained_variance: Option<f64>,
    /// Mean score, before the KL penalty and before normalization.
    #[serde(deserialize_with = "number_or_null")]
    pub score_mean: f64,
    /// Standard deviation of the scores.
    #[serde(deserialize_with = "number_or_null")]
    pub score_std: f64,
    /// Mean length of a response, in tokens.
    #[serde(deserialize_with = "number_or_null")]
    pub length_mean: f64,
    /// Pearson correlation of length and score over the iteration's responses; `None` where either does not vary.
    pub length_score_correlation: Option<f64>,
    /// Share of responses that the model ended itself.
    #[serde(deserialize_with = "number_or_null")]
    pub end_rate: f64,
    /// Share of response tokens (or sequences) whose ratio was clipped, mean over the iteration's updates.
    #[serde(deserialize_with = "number_or_null")]
    pub clip_fraction: f64,
    /// Mean ratio of the policy to the one that sampled, over the iteration's updates.
    #[serde(deserialize_with = "number_or_null")]
    pub ratio: f64,
    /// Share of groups whose scores are all equal; `None` where each prompt has one response.
    pub zero_std_share: Option<f64>,
}

/// JSON has no NaN: it is written as null.
fn number_or_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// A way in which such runs go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Diagnosis {
    /// The estimated KL to the reference stays below 0, which no KL is.
    NegativeKl,
    /// The critic predicts worse than a constant would.
    UnexplainedVariance,
    /// Responses get longer, and that is what scores.
    LengthHacking,
    /// The policy has become nearly deterministic.
    EntropyCollapse,
    /// Most of an update is clipped away.
    ClippedTooOften,
    /// The updates go far from the policy that sampled.
    RatioOff,
    /// The scores of a group, or of a batch, do not differ, so nothing can be learnt from them.
    NoSignal,
    /// The score has stopped where it cannot rise further.
    RewardSaturated,
}

impl Diagnosis {
    /// The name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::NegativeKl => "negative_kl",
            Self::UnexplainedVariance => "unexplained_variance",
            Self::LengthHacking => "length_hacking",
            Self::EntropyCollapse => "entropy_collapse",
            Self::ClippedTooOften => "clipped_too_often",
            Self::RatioOff => "ratio_off",
            Self::NoSignal => "no_signal",
            Self::RewardSaturated => "reward_saturated",
        }
    }
}

/// A diagnosis with the numbers behind it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// Which.
    pub diagnosis: Diagnosis,
    /// What was seen, with numbers.
    pub message: String,
    /// What to try.
    pub advice: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; try: {}", self.message, self.advice)
    }
}

/// What ails the run at the end of `history` (one entry per iteration, the first one first); empty when nothing does.
///
/// # Example
/// ```
/// use pt_rlhf::{Diagnosis, IterationStats, diagnose};
/// let good = IterationStats {
///     kl: 2.0, entropy: 1.5, explained_variance: Some(0.6), score_mean: 0.3, score_std: 0.4, length_mean: 40.0,
///     length_score_correlation: Some(0.1), end_rate: 0.9, clip_fraction: 0.1, ratio: 1.0, zero_std_share: None,
/// };
/// assert!(diagnose(&[good; 10]).is_empty());
/// let findings = diagnose(&[IterationStats { kl: -0.5, ..good }; 10]);
/// assert_eq!(findings[0].diagnosis, Diagnosis::NegativeKl);
/// assert!(findings[0].message.starts_with("KL to the reference has been negative for 10 iterations, -0.500 nats"));
/// ```
pub fn diagnose(history: &[IterationStats]) -> Vec<Finding> {
    let checks = [
        negative_kl,
        unexplained_variance,
        length_hacking,
        entropy_collapse,
        clipped_too_often,
        ratio_off,
        no_signal,
        reward_saturated,
    ];
    checks.iter().filter_map(|check| check(history)).collect()
}

fn negative_kl(history: &[IterationStats]) -> Option<Finding> {
    let count = streak(history, |stats| stats.kl < 0.0)?;
    let kl = mean(last(history, LASTING)?, |stats| stats.kl);
    (kl < KL_NEGATIVE).then(|| Finding {
        diagnosis: Diagnosis::NegativeKl,
        message: format!(
            "KL to the reference has been negative for {count} iterations, {kl:.3} nats a response over the last \
             {LASTING}; a KL is never below 0, so the samples do not come from the policy whose log-probs are compared"
        ),
        advice: "sample without top_k, top_p, min_p and repetition penalty, compare log-probs at the temperature of \
                 sampling, switch dropout off; or estimate the KL with k3, which is never negative"
            .into(),
    })
}

fn unexplained_variance(history: &[IterationStats]) -> Option<Finding> {
    let explained = |stats: &IterationStats| stats.explained_variance.unwrap_or(f64::NAN);
    let count = streak(history, |stats| explained(stats) < 0.0)?;
    let value = mean(last(history, LASTING)?, explained);
    Some(Finding {
        diagnosis: Diagnosis::UnexplainedVariance,
        message: format!(
            "the critic's explained variance has been below 0 for {count} iterations, {value:.2} over the last \
             {LASTING}: a constant would predict the returns better than it does"
        ),
        advice: "train the critic alone for some iterations first, raise its learning rate, start it from the reward \
                 model, or normalize the scores; GRPO and RLOO need no critic"
            .into(),
    })
}

fn length_hacking(history: &[IterationStats]) -> Option<Finding> {
    let advice = "read the longest responses; add a length window to the rewards, raise the penalty for a missing end \
                  or kl_coef, or train the reward model on pairs of equal length; nothing, if length is what is \
                  asked for";
    let finding = |message| Some(Finding { diagnosis: Diagnosis::LengthHacking, message, advice: advice.into() });
    if let Some(course) = last(history, COURSE) {
        let (early, late) = course.split_at(COURSE / 2);
        let both = |value: fn(&IterationStats) -> f64| (mean(early, value), mean(late, value));
        let (length, score) = (both(|stats| stats.length_mean), both(|stats| stats.score_mean));
        let ends = both(|stats| stats.end_rate);
        // A rise of the score has to stand out from its spread over the responses.
        let rises = score.1 - score.0 > 0.1 * mean(course, |stats| stats.score_std);
        if length.1 > LENGTH_GROWTH * length.0 && rises && ends.1 < ends.0 - END_RATE_FALL {
            return finding(format!(
                "length and score rise together while fewer responses end: within {COURSE} iterations the length went \
                 from {:.0} to {:.0} tokens, the score from {:.3} to {:.3}, the share that ends from {:.0} % to \
                 {:.0} %",
                length.0,
                length.1,
                score.0,
                score.1,
                100.0 * ends.0,
                100.0 * ends.1
            ));
        }
    }
    let correlation = |stats: &IterationStats| stats.length_score_correlation.unwrap_or(f64::NAN);
    let value = mean(last(history, LASTING)?, correlation);
    if value > LENGTH_CORRELATION {
        return finding(format!(
            "the score follows the length of a response: their correlation is {value:.2} over the last {LASTING} \
             iterations"
        ));
    }
    None
}

fn entropy_collapse(history: &[IterationStats]) -> Option<Finding> {
    let recent = last(history, BEGINNING).filter(|_| history.len() >= 2 * BEGINNING)?;
    // Iterations that train the critic alone measure none.
    let measured: Vec<f64> = history.iter().map(|stats| stats.entropy).filter(|entropy| entropy.is_finite()).collect();
    let first = measured.get(..BEGINNING)?.iter().sum::<f64>() / BEGINNING as f64;
    let now = mean(recent, |stats| stats.entropy);
    (first > 0.0 && now < ENTROPY_LEFT * first).then(|| Finding {
        diagnosis: Diagnosis::EntropyCollapse,
        message: format!(
            "the policy's entropy has fallen from {first:.3} to {now:.3} nats a token: it writes nearly the same \
             response every time and explores no more"
        ),
        advice: "lower the learning rate, raise kl_coef, add an entropy bonus, raise the upper clip range, or sample \
                 at a higher temperature; nothing, if the score is at its best"
            .into(),
    })
}

fn clipped_too_often(history: &[IterationStats]) -> Option<Finding> {
    let share = mean(last(history, LASTING)?, |stats| stats.clip_fraction);
    (share > CLIPPED).then(|| Finding {
        diagnosis: Diagnosis::ClippedTooOften,
        message: format!(
            "{:.0} % of the ratios were clipped over the last {LASTING} iterations, where 10 to 20 % is usual: the \
             updates want to go further than one batch of samples allows",
            100.0 * share
        ),
        advice: "lower the learning rate, take fewer epochs or fewer minibatches per rollout, or set a target KL that \
                 ends an update early"
            .into(),
    })
}

fn ratio_off(history: &[IterationStats]) -> Option<Finding> {
    let is_off = |stats: &IterationStats| (stats.ratio - 1.0).abs() > RATIO_OFF;
    let recent = last(history, BEGINNING).filter(|recent| recent.iter().all(is_off))?;
    let ratio = mean(recent, |stats| stats.ratio);
    Some(Finding {
        diagnosis: Diagnosis::RatioOff,
        message: format!(
            "the mean ratio of the policy to the one that sampled is {ratio:.3} over the last {BEGINNING} iterations, \
             expected near 1: the samples no longer stand for the policy that learns from them"
        ),
        advice: "lower the learning rate or take fewer epochs per rollout; if the ratio is off in the first update \
                 already, sampling and training compute log-probs differently (dtype, temperature, dropout)"
            .into(),
    })
}

fn no_signal(history: &[IterationStats]) -> Option<Finding> {
    let recent = last(history, LASTING)?;
    let share = mean(recent, |stats| stats.zero_std_share.unwrap_or(f64::NAN));
    let score = mean(recent, |stats| stats.score_mean);
    let message = if share >= NO_SIGNAL {
        format!(
            "in {:.0} % of the groups all responses score the same (mean score {score:.3} over the last {LASTING} \
             iterations): their advantages are 0 and teach nothing",
            100.0 * share
        )
    } else if recent.iter().all(|stats| stats.score_std == 0.0) {
        format!(
            "all responses of the last {LASTING} iterations score the same, {score:.3} on the mean: nothing tells good \
             from bad"
        )
    } else {
        return None;
    };
    Some(Finding {
        diagnosis: Diagnosis::NoSignal,
        message,
        advice: "take prompts that the model gets right sometimes, give points for parts of an answer (format, \
                 length), sample more responses per prompt or at a higher temperature, and check the reward on some \
                 responses by hand"
            .into(),
    })
}

fn reward_saturated(history: &[IterationStats]) -> Option<Finding> {
    let recent = last(history, LASTING).filter(|_| history.len() >= BEGINNING + LASTING)?;
    let beginning = history.get(..BEGINNING)?;
    let (first, now) = (mean(beginning, |stats| stats.score_mean), mean(recent, |stats| stats.score_mean));
    let (first_std, now_std) = (mean(beginning, |stats| stats.score_std), mean(recent, |stats| stats.score_std));
    let best = history.iter().map(|stats| stats.score_mean).fold(f64::NEG_INFINITY, f64::max);
    // Risen, and at its height all the time.
    let is_at_best = recent.iter().all(|stats| best - stats.score_mean <= 0.05 * (best - first));
    (now > first && is_at_best && now_std < SPREAD_LEFT * first_std).then(|| Finding {
        diagnosis: Diagnosis::RewardSaturated,
        message: format!(
            "the score has risen from {first:.3} to {now:.3} and stays there, and its spread over the responses has \
             fallen from {first_std:.3} to {now_std:.4}: the reward tells them apart no more"
        ),
        advice: "stop here if the responses are as good as the score says; else the reward has been gamed: read some, \
                 and take a harder reward or one more part"
            .into(),
    })
}

/// The last `count` iterations, where there are as many.
fn last(history: &[IterationStats], count: usize) -> Option<&[IterationStats]> {
    history.get(history.len().checked_sub(count)?..)
}

/// How many iterations up to the last one something has held, if that is long.
fn streak(history: &[IterationStats], holds: impl Fn(&IterationStats) -> bool) -> Option<usize> {
    let count = history.iter().rev().take_while(|stats| holds(stats)).count();
    (count >= LASTING).then_some(count)
}

fn mean(history: &[IterationStats], value: impl Fn(&IterationStats) -> f64) -> f64 {
    history.iter().map(value).sum::<f64>() / history.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: IterationStats = IterationStats {
        kl: 2.0,
        entropy: 1.5,
        explained_variance: Some(0.6),
        score_mean: 0.3,
        score_std: 0.4,
        length_mean: 40.0,
        length_score_correlation: Some(0.1),
        end_rate: 0.9,
        clip_fraction: 0.1,
        ratio: 1.01,
        zero_std_share: Some(0.3),
    };

    /// `count` iterations, each made from its number.
    fn run(count: usize, make: impl Fn(usize) -> IterationStats) -> Vec<IterationStats> {
        (0..count).map(make).collect()
    }

    fn found(history: &[IterationStats]) -> Vec<Diagnosis> {
        diagnose(history).into_iter().map(|finding| finding.diagnosis).collect()
    }

    /// The one finding, which must hold `part`.
    fn only(history: &[IterationStats], diagnosis: Diagnosis, part: &str) {
        let findings = diagnose(history);
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert_eq!(findings[0].diagnosis, diagnosis);
        assert!(findings[0].message.contains(part), "{}", findings[0]);
        assert!(findings[0].to_string().contains("; try: ") && !findings[0].advice.is_empty());
    }

    #[test]
    fn a_healthy_or_a_short_run_has_no_findings() {
        assert!(found(&[]).is_empty());
        assert!(found(&[GOOD; 50]).is_empty());
        // Learning well: the score rises, the length too, and the responses end.
        let learning = run(30, |i| IterationStats {
            score_mean: 0.3 + 0.02 * i as f64,
            length_mean: 40.0 + i as f64,
            entropy: 1.5 - 0.03 * i as f64,
            ..GOOD
        });
        assert!(found(&learning).is_empty());
        let bad = IterationStats { kl: -1.0, explained_variance: Some(-1.0), clip_fraction: 0.9, ..GOOD };
        assert!(found(&[bad; 4]).is_empty(), "too short to tell");
    }

    #[test]
    fn kl_below_0_for_long_is_found_and_rounding_is_not() {
        let history = run(12, |i| IterationStats { kl: if i < 5 { 1.0 } else { -0.25 }, ..GOOD });
        only(&history, Diagnosis::NegativeKl, "negative for 7 iterations, -0.250 nats");
        assert!(found(&[IterationStats { kl: -1e-6, ..GOOD }; 9]).is_empty(), "the policy is its reference still");
        let once_positive = run(9, |i| IterationStats { kl: if i == 7 { 0.1 } else { -0.25 }, ..GOOD });
        assert!(found(&once_positive).is_empty());
    }

    #[test]
    fn a_critic_worse_than_a_constant_is_found() {
        let history = [IterationStats { explained_variance: Some(-0.4), ..GOOD }; 6];
        only(&history, Diagnosis::UnexplainedVariance, "below 0 for 6 iterations, -0.40");
        assert!(found(&[IterationStats { explained_variance: None, ..GOOD }; 6]).is_empty());
    }

    #[test]
    fn length_hacking_is_a_course_or_a_correlation() {
        let course = |end_rate: f64| {
            run(10, |i| IterationStats {
                length_mean: 40.0 + 4.0 * i as f64,
                score_mean: 0.3 + 0.05 * i as f64,
                end_rate: 0.9 - end_rate * i as f64,
                ..GOOD
            })
        };
        only(&course(0.03), Diagnosis::LengthHacking, "from 48 to 68 tokens, the score from 0.400 to 0.650");
        assert!(found(&course(0.0)).is_empty(), "longer, better and ended");
        let correlated = [IterationStats { length_score_correlation: Some(0.95), ..GOOD }; 5];
        only(&correlated, Diagnosis::LengthHacking, "correlation is 0.95");
        assert!(found(&[IterationStats { length_score_correlation: None, ..GOOD }; 5]).is_empty());
    }

    #[test]
    fn a_collapsed_entropy_is_measured_against_the_first() {
        let history = run(8, |i| IterationStats { entropy: if i < 4 { 1.5 } else { 0.1 }, ..GOOD });
        only(&history, Diagnosis::EntropyCollapse, "from 1.500 to 0.100 nats a token");
        assert!(found(&[IterationStats { entropy: 0.1, ..GOOD }; 8]).is_empty(), "it began there");
        let after_warmup = run(10, |i| IterationStats { entropy: [f64::NAN, 1.5, 0.1][(i + 2) / 4], ..GOOD });
        assert!(!found(&after_warmup).is_empty());
    }

    #[test]
    fn clipping_and_ratios_are_found() {
        only(&[IterationStats { clip_fraction: 0.45, ..GOOD }; 5], Diagnosis::ClippedTooOften, "45 % of the ratios");
        only(&[IterationStats { ratio: 1.4, ..GOOD }; 3], Diagnosis::RatioOff, "is 1.400 over the last 3");
        only(&[IterationStats { ratio: 0.8, ..GOOD }; 3], Diagnosis::RatioOff, "is 0.800");
        let once = run(9, |i| IterationStats { ratio: if i == 8 { 3.0 } else { 1.0 }, ..GOOD });
        assert!(found(&once).is_empty(), "one odd batch");
    }

    #[test]
    fn scores_without_differences_are_no_signal() {
        let groups = [IterationStats { zero_std_share: Some(0.9), ..GOOD }; 5];
        only(&groups, Diagnosis::NoSignal, "in 90 % of the groups");
        let batch = IterationStats { zero_std_share: None, score_std: 0.0, length_score_correlation: None, ..GOOD };
        only(&[batch; 5], Diagnosis::NoSignal, "all responses of the last 5 iterations score the same, 0.300");
    }

    #[test]
    fn a_saturated_reward_has_risen_and_lost_its_spread() {
        let history = |spread: f64, end: f64| {
            run(14, |i| match i {
                0..4 => GOOD,
                _ => IterationStats { score_mean: end, score_std: spread, ..GOOD },
            })
        };
        only(&history(0.01, 0.99), Diagnosis::RewardSaturated, "from 0.300 to 0.990 and stays there");
        assert!(found(&history(0.2, 0.99)).is_empty(), "it tells responses apart still");
        assert!(found(&history(0.01, 0.1)).is_empty(), "it fell");
    }

    #[test]
    fn numbers_that_are_none_give_no_finding_and_no_panic() {
        let nan = IterationStats {
            kl: f64::NAN,
            entropy: f64::NAN,
            explained_variance: Some(f64::NAN),
            score_mean: f64::NAN,
            score_std: f64::NAN,
            length_mean: f64::NAN,
            length_score_correlation: Some(f64::NAN),
            end_rate: f64::NAN,
            clip_fraction: f64::NAN,
            ratio: f64::NAN,
            zero_std_share: Some(f64::NAN),
        };
        let json = serde_json::to_string(&nan).expect("has a JSON form");
        let again: IterationStats = serde_json::from_str(&json).expect("reads what it wrote");
        assert!(again.kl.is_nan() && again.ratio.is_nan() && again.explained_variance.is_none());
        let json = serde_json::to_string(&GOOD).expect("has a JSON form");
        assert_eq!(serde_json::from_str::<IterationStats>(&json).expect("reads what it wrote"), GOOD);
        for count in 0..20 {
            assert!(found(&vec![nan; count]).is_empty());
            found(&vec![IterationStats { score_mean: f64::INFINITY, kl: f64::NEG_INFINITY, ..GOOD }; count]);
        }
    }

    #[test]
    fn names_are_those_of_files() {
        for diagnosis in [Diagnosis::NegativeKl, Diagnosis::RatioOff, Diagnosis::RewardSaturated] {
            assert_eq!(serde_json::to_string(&diagnosis).expect("a name"), format!("\"{}\"", diagnosis.name()));
        }
    }
}
