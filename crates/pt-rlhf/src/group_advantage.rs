//! Advantages from the other completions of the same prompt: GRPO and RLOO, without a critic.

use crate::error::{Result, RlhfError};
use crate::packed::{check_total, ranges};
use crate::whiten::{Moments, Variance};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Added to the standard deviation, as in TRL 1.16.
const EPSILON: f64 = 1e-4;

/// What GRPO's advantages are divided by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScaleRewards {
    /// The standard deviation of the prompt's rewards, as in GRPO's paper. Makes the most of prompts whose completions
    /// hardly differ.
    #[default]
    Group,
    /// The standard deviation of all rewards.
    Batch,
    /// Nothing, as in Dr. GRPO.
    None,
}

/// GRPO's advantage of each completion: (r − mean of its group) / (standard deviation + 1e-4).
///
/// Shao et al. 2024, <https://arxiv.org/abs/2402.03300>, Section 4.1.2; [`ScaleRewards::None`] is Dr. GRPO, Liu et al.
/// 2025, <https://arxiv.org/abs/2503.20783>. The standard deviation is unbiased, as torch's; epsilon is TRL's.
///
/// - `rewards`: one for each completion, those of a prompt side by side; `group_sizes`: completions of each prompt;
/// - a reward that is no finite number (nobody could score the completion) gives an advantage of 0 and is left out of
///   means and deviations, as in TRL 1.16; the only reward of a group gives 0, too.
///
/// # Panics
/// When `rewards` are not as many as `group_sizes` add up to.
///
/// # Example
/// ```
/// use pt_rlhf::{ScaleRewards, group_advantages};
/// let rewards = [1.0, 3.0, 5.0, f32::NAN];
/// assert_eq!(group_advantages(&rewards, &[2, 2], ScaleRewards::None), [-1.0, 1.0, 0.0, 0.0]);
/// ```
pub fn group_advantages(rewards: &[f32], group_sizes: &[usize], scale: ScaleRewards) -> Vec<f32> {
    assert_eq!(rewards.len(), group_sizes.iter().sum::<usize>(), "as many rewards as completions in groups");
    let of_batch = moments(rewards);
    let advantages = ranges(group_sizes).flat_map(|group| {
        let of_group = moments(&rewards[group.clone()]);
        let deviation = match scale {
            ScaleRewards::Group => of_group.variance(Variance::Unbiased).sqrt() + EPSILON,
            ScaleRewards::Batch => of_batch.variance(Variance::Unbiased).sqrt() + EPSILON,
            ScaleRewards::None => 1.0,
        };
        rewards[group].iter().map(move |reward| number_or_0((f64::from(*reward) - of_group.mean) / deviation))
    });
    advantages.collect()
}

/// RLOO's advantage of each completion: its reward less the mean of the others' of its prompt.
///
/// Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al. 2024,
/// <https://arxiv.org/abs/2402.14740>. Inputs as for [`group_advantages`], rewards with the price of the divergence
/// already taken off. A reward that is no finite number gives 0 and is left out of the others' means; one whose others
/// are all none gives 0, too.
///
/// # Errors
/// [`RlhfError::Shape`] when lengths do not fit, or for a group of fewer than 2: there is nobody to compare with.
///
/// # Example
/// ```
/// // 6 against the mean of 0 and 3, and so on.
/// assert_eq!(pt_rlhf::leave_one_out_advantages(&[6.0, 0.0, 3.0], &[3])?, [4.5, -4.5, 0.0]);
/// # Ok::<(), pt_rlhf::RlhfError>(())
/// ```
pub fn leave_one_out_advantages(rewards: &[f32], group_sizes: &[usize]) -> Result<Vec<f32>> {
    check_total("rewards", rewards.len(), group_sizes)?;
    if let Some((group, size)) = group_sizes.iter().enumerate().find(|(_, size)| **size < 2) {
        let found = format!("{size} for prompt {group}");
        return Err(RlhfError::Shape { what: "group_sizes", found, expected: "2 completions or more".into() });
    }
    let advantages = ranges(group_sizes).flat_map(|group| {
        let of_group = moments(&rewards[group.clone()]);
        let sum = of_group.mean * of_group.count as f64;
        let others = of_group.count as f64 - 1.0;
        rewards[group].iter().map(move |reward| {
            let reward = f64::from(*reward);
            number_or_0(reward - (sum - reward) / others)
        })
    });
    Ok(advantages.collect())
}

/// Of those that are numbers.
fn moments(rewards: &[f32]) -> Moments {
    Moments::of(rewards.iter().map(|reward| f64::from(*reward)).filter(|reward| reward.is_finite()))
}

fn number_or_0(advantage: f64) -> f32 {
    if advantage.is_finite() { advantage as f32 } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn assert_close(found: &[f32], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (one, other) in found.iter().zip(expected) {
            assert!((f64::from(*one) - other).abs() < 1e-6, "{found:?}, expected {expected:?}");
        }
    }

    /// 1, 2, 3 have the mean 2 and the deviation 1; 0 and 4 have 2 and √8; all five have 2 and √(10/4).
    const REWARDS: [f32; 5] = [1.0, 2.0, 3.0, 0.0, 4.0];

    #[test]
    fn rewards_are_compared_with_their_groups_mean_and_divided_as_asked() {
        let of = |scale| group_advantages(&REWARDS, &[3, 2], scale);
        let (group, wide, batch) = (1.0 + 1e-4, 8f64.sqrt() + 1e-4, 2.5f64.sqrt() + 1e-4);
        assert_close(&of(ScaleRewards::Group), &[-1.0 / group, 0.0, 1.0 / group, -2.0 / wide, 2.0 / wide]);
        assert_close(&of(ScaleRewards::Batch), &[-1.0 / batch, 0.0, 1.0 / batch, -2.0 / batch, 2.0 / batch]);
        assert_eq!(of(ScaleRewards::None), [-1.0, 0.0, 1.0, -2.0, 2.0]);
    }

    /// The third completion of 1, 3, NaN cannot be scored: the others are ±1 about 2, with the deviation √2.
    #[test]
    fn what_nobody_could_score_counts_for_nothing() {
        for unscored in [f32::NAN, f32::INFINITY] {
            let found = group_advantages(&[1.0, 3.0, unscored], &[3], ScaleRewards::Group);
            let deviation = 2f64.sqrt() + 1e-4;
            assert_close(&found, &[-1.0 / deviation, 1.0 / deviation, 0.0]);
            let rewards = [1.0, 3.0, unscored, unscored, unscored, 5.0];
            assert_eq!(leave_one_out_advantages(&rewards, &[3, 3]).unwrap(), [-2.0, 2.0, 0.0, 0.0, 0.0, 0.0]);
            for scale in [ScaleRewards::Group, ScaleRewards::Batch, ScaleRewards::None] {
                assert_eq!(group_advantages(&[unscored, unscored, 7.0, unscored], &[2, 2], scale), [0.0; 4]);
            }
        }
    }

    #[test]
    fn a_group_of_one_reward_or_of_one_completion_teaches_nothing() {
        for scale in [ScaleRewards::Group, ScaleRewards::Batch, ScaleRewards::None] {
            assert_eq!(group_advantages(&[0.1, 0.1, 0.1, 5.0], &[3, 1], scale), [0.0; 4]);
            assert_eq!(group_advantages(&[], &[], scale), [0f32; 0]);
        }
        assert_eq!(leave_one_out_advantages(&[0.1, 0.1, 0.1], &[3]).unwrap(), [0.0; 3]);
    }

    /// 1 against (2 + 3)/2, 2 against 2, 3 against 1½; 0 against 4 and the other way round.
    #[test]
    fn a_completion_is_compared_with_the_mean_of_the_others() {
        assert_eq!(leave_one_out_advantages(&REWARDS, &[3, 2]).unwrap(), [-1.5, 0.0, 1.5, -4.0, 4.0]);
    }

    #[test]
    fn a_group_without_others_is_refused() {
        let error = |group_sizes: &[usize]| leave_one_out_advantages(&REWARDS, group_sizes).unwrap_err().to_string();
        assert_eq!(error(&[4, 1]), "`group_sizes` is 1 for prompt 1, expected 2 completions or more");
        assert_eq!(error(&[5, 0]), "`group_sizes` is 0 for prompt 1, expected 2 completions or more");
        assert_eq!(error(&[4]), "`rewards` is of length 5, expected length 4");
    }

    #[test]
    #[should_panic(expected = "as many rewards")]
    fn other_numbers_of_rewards_are_a_fault_of_the_caller() {
        group_advantages(&REWARDS, &[4], ScaleRewards::Group);
    }

    proptest! {
        /// Leaving one out is the difference from the mean of all, n/(n − 1) times as large; and advantages of a prompt
        /// add up to 0, however it is scaled.
        #[test]
        fn both_kinds_are_differences_from_the_mean(
            groups in prop::collection::vec(prop::collection::vec(-5f32..5.0, 2..6), 1..5),
        ) {
            let sizes: Vec<usize> = groups.iter().map(Vec::len).collect();
            let rewards = groups.concat();
            let plain = group_advantages(&rewards, &sizes, ScaleRewards::None);
            let scaled = group_advantages(&rewards, &sizes, ScaleRewards::Batch);
            let left_out = leave_one_out_advantages(&rewards, &sizes).unwrap();
            for (range, size) in ranges(&sizes).zip(&sizes) {
                let factor = *size as f32 / (*size as f32 - 1.0);
                for index in range.clone() {
                    prop_assert!((left_out[index] - plain[index] * factor).abs() < 1e-5);
                }
                for advantages in [&plain, &scaled, &left_out] {
                    prop_assert!(advantages[range.clone()].iter().sum::<f32>().abs() < 1e-4);
                }
            }
        }
    }
}
