//! Rewards of tokens: the price of the divergence on each, the score at the end.

use crate::error::{Result, RlhfError};
use crate::packed::{check_count, check_total, ranges};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where a response's score is paid.
///
/// TRL 1.12 and torchtune pay it one entry *after* the token that ends the response (questioned in trl#3750 and #1893).
/// Nothing is decided there, the critic is asked for one value more, and the score reaches the end token only by way of
/// that value. So the default here pays it on the last token itself, as TRL 0.9.6 and OpenRLHF do: the decision to stop
/// is what completes a response.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScorePlacement {
    /// On the response's last token: the end-of-turn token, or the last before it was cut off.
    #[default]
    LastToken,
    /// On an entry of its own after the last token of a response that ended, as in TRL 1.12 and torchtune; on the last
    /// token of one that was cut off.
    AfterEnd,
}

impl ScorePlacement {
    /// Whether a response has an entry after its last token.
    fn has_entry_after(self, ended: bool) -> bool {
        self == Self::AfterEnd && ended
    }
}

/// Rewards of packed responses: −`kl_coef`·KL on every token, and the response's score where `placement` says.
///
/// Ziegler et al. 2019, <https://arxiv.org/abs/1909.08593>, Eq. 2, token by token as InstructGPT has it.
///
/// # Shapes and units
/// - `kl`: an estimate for each token, in nats, response after response, `lengths` tokens each;
/// - `scores`, `ended`: one for each response; `ended` where the policy ended it by itself and was not cut off. TRL's
///   rows have no room after a response that ends in their last place: for its numbers, say that this one did not end;
/// - returns one reward a token, and one more after each response that ended under [`ScorePlacement::AfterEnd`]:
///   [`value_lengths`] counts them. A response without tokens and without such an entry has no place for its score.
///
/// # Errors
/// [`RlhfError::Shape`] when lengths do not fit, or when a score is not a finite number.
///
/// # Example
/// ```
/// use pt_rlhf::{ScorePlacement, token_rewards};
/// let (kl, lengths, scores, ended) = ([1.0, -2.0, 4.0], [2, 1], [10.0, 20.0], [true, false]);
/// let rewards = token_rewards(&kl, &lengths, &scores, 0.5, ScorePlacement::LastToken, &ended)?;
/// assert_eq!(rewards, [-0.5, 11.0, 18.0]);
/// let rewards = token_rewards(&kl, &lengths, &scores, 0.5, ScorePlacement::AfterEnd, &ended)?;
/// assert_eq!(rewards, [-0.5, 1.0, 10.0, 18.0]);
/// # Ok::<(), pt_rlhf::RlhfError>(())
/// ```
pub fn token_rewards(
    kl: &[f32],
    lengths: &[usize],
    scores: &[f32],
    kl_coef: f64,
    placement: ScorePlacement,
    ended: &[bool],
) -> Result<Vec<f32>> {
    check_total("kl", kl.len(), lengths)?;
    check_count("scores", scores.len(), lengths.len())?;
    check_count("ended", ended.len(), lengths.len())?;
    if let Some((response, score)) = scores.iter().enumerate().find(|(_, score)| !score.is_finite()) {
        let found = format!("{score} for response {response}");
        return Err(RlhfError::Shape { what: "scores", found, expected: "numbers".into() });
    }
    let mut rewards = Vec::with_capacity(kl.len() + lengths.len());
    for (response, tokens) in ranges(lengths).enumerate() {
        let start = rewards.len();
        rewards.extend(kl[tokens].iter().map(|kl| -kl_coef * f64::from(*kl)));
        if placement.has_entry_after(ended[response]) {
            rewards.push(0.0);
        }
        if let Some(last) = rewards[start..].last_mut() {
            *last += f64::from(scores[response]);
        }
    }
    Ok(rewards.into_iter().map(|reward| reward as f32).collect())
}

/// Entries of each response in what [`token_rewards`] returns, and so values that it needs of the critic: one a token,
/// of the state before it, and one more where the score has an entry of its own, of the state after the last token.
pub fn value_lengths(lengths: &[usize], ended: &[bool], placement: ScorePlacement) -> Vec<usize> {
    lengths.iter().zip(ended).map(|(length, ended)| length + usize::from(placement.has_entry_after(*ended))).collect()
}

/// The entries of tokens out of those that [`value_lengths`] counts: the advantages that the policy learns from.
///
/// # Errors
/// [`RlhfError::Shape`] when the lengths do not fit each other or the entries.
pub fn at_tokens(entries: &[f32], lengths: &[usize], value_lengths: &[usize]) -> Result<Vec<f32>> {
    check_total("entries", entries.len(), value_lengths)?;
    check_count("value_lengths", value_lengths.len(), lengths.len())?;
    let mut tokens = Vec::with_capacity(entries.len());
    for (range, length) in ranges(value_lengths).zip(lengths) {
        if range.len() < *length {
            let found = format!("{} entries of a response of {length} tokens", range.len());
            return Err(RlhfError::Shape { what: "value_lengths", found, expected: "one a token or more".into() });
        }
        tokens.extend_from_slice(&entries[range.start..range.start + length]);
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gae::gae;
    use proptest::prelude::*;

    /// Two tokens that ended, one that was cut off, one that ended; a quarter of a nat each costs 0.5 · 0.25.
    const LENGTHS: [usize; 3] = [2, 1, 1];
    const ENDED: [bool; 3] = [true, false, true];
    const SCORES: [f32; 3] = [1.0, 2.0, -4.0];

    fn rewards(placement: ScorePlacement) -> Vec<f32> {
        token_rewards(&[0.25; 4], &LENGTHS, &SCORES, 0.5, placement, &ENDED).unwrap()
    }

    #[test]
    fn by_default_the_score_is_paid_on_the_last_token_ended_or_not() {
        assert_eq!(rewards(ScorePlacement::default()), [-0.125, 0.875, 1.875, -4.125]);
        assert_eq!(value_lengths(&LENGTHS, &ENDED, ScorePlacement::default()), LENGTHS);
    }

    #[test]
    fn after_the_end_it_has_an_entry_of_its_own_unless_the_response_was_cut_off() {
        assert_eq!(rewards(ScorePlacement::AfterEnd), [-0.125, -0.125, 1.0, 1.875, -0.125, -4.0]);
        let value_lengths = value_lengths(&LENGTHS, &ENDED, ScorePlacement::AfterEnd);
        assert_eq!(value_lengths, [3, 1, 2]);
        let entries = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        assert_eq!(at_tokens(&entries, &LENGTHS, &value_lengths).unwrap(), [1.0, 2.0, 4.0, 5.0]);
        assert_eq!(at_tokens(&entries[..4], &LENGTHS, &LENGTHS).unwrap(), entries[..4]);
    }

    /// γ = λ = ½: of a score of 1, a critic that says 0 throughout lets a quarter through to the token, and one that
    /// knows the score after the end, half.
    #[test]
    fn what_is_paid_after_the_end_reaches_the_token_through_the_critic() {
        let rewards = token_rewards(&[0.0], &[1], &[1.0], 0.0, ScorePlacement::AfterEnd, &[true]).unwrap();
        assert_eq!(gae(&rewards, &[0.0, 0.0], &[2], 0.5, 0.5).unwrap().advantages, [0.25, 1.0]);
        // δ₀ = ½·1 and δ₁ = 1 − 1.
        assert_eq!(gae(&rewards, &[0.0, 1.0], &[2], 0.5, 0.5).unwrap().advantages, [0.5, 0.0]);
    }

    #[test]
    fn responses_without_tokens_are_stepped_over() {
        let of = |placement| token_rewards(&[1.0], &[0, 1, 0], &[5.0, 6.0, 7.0], 1.0, placement, &[true; 3]).unwrap();
        assert_eq!(of(ScorePlacement::LastToken), [5.0]);
        assert_eq!(of(ScorePlacement::AfterEnd), [5.0, -1.0, 6.0, 7.0]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let error = |kl: &[f32], scores: &[f32], ended: &[bool]| {
            token_rewards(kl, &[1, 1], scores, 0.1, ScorePlacement::LastToken, ended).unwrap_err().to_string()
        };
        assert_eq!(error(&[0.0], &[0.0; 2], &[true; 2]), "`kl` is of length 1, expected length 2");
        assert_eq!(error(&[0.0; 2], &[0.0], &[true; 2]), "`scores` is of length 1, expected length 2");
        assert_eq!(error(&[0.0; 2], &[0.0; 2], &[true]), "`ended` is of length 1, expected length 2");
        let nan = error(&[0.0; 2], &[0.0, f32::NAN], &[true; 2]);
        assert_eq!(nan, "`scores` is NaN for response 1, expected numbers");
        assert!(at_tokens(&[0.0; 2], &[1, 1], &[2]).is_err() && at_tokens(&[0.0; 2], &[2], &[1]).is_err());
        let error = at_tokens(&[0.0; 2], &[2, 0], &[1, 1]).unwrap_err().to_string();
        assert!(error.contains("1 entries of a response of 2 tokens"), "{error}");
    }

    proptest! {
        #[test]
        fn either_placement_pays_the_same_in_sum(
            responses in prop::collection::vec((1usize..5, -3f32..3.0, prop::bool::ANY), 0..6), kl_coef in 0.0..1.0,
        ) {
            let lengths: Vec<usize> = responses.iter().map(|(length, ..)| *length).collect();
            let scores: Vec<f32> = responses.iter().map(|(_, score, _)| *score).collect();
            let ended: Vec<bool> = responses.iter().map(|(.., ended)| *ended).collect();
            let kl: Vec<f32> = (0..lengths.iter().sum::<usize>()).map(|token| token as f32 * 0.125 - 0.5).collect();
            let owed = scores.iter().sum::<f32>() as f64 - kl_coef * f64::from(kl.iter().sum::<f32>());
            for placement in [ScorePlacement::LastToken, ScorePlacement::AfterEnd] {
                let rewards = token_rewards(&kl, &lengths, &scores, kl_coef, placement, &ended).unwrap();
                prop_assert_eq!(rewards.len(), value_lengths(&lengths, &ended, placement).iter().sum::<usize>());
                prop_assert!((rewards.iter().map(|reward| f64::from(*reward)).sum::<f64>() - owed).abs() < 1e-4);
            }
        }
    }
}
