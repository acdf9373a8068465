//! Advantages and returns from rewards and values.

use crate::error::{Result, RlhfError};
use crate::packed::{check_total, ranges};
use crate::whiten::Moments;

/// What [`gae`] returns: packed like the rewards, one entry each.
#[derive(Clone, Debug, PartialEq)]
pub struct Advantages {
    /// A: how much better each token turned out than the critic expected.
    pub advantages: Vec<f32>,
    /// A + V: what the critic is trained to predict.
    pub returns: Vec<f32>,
}

/// Generalized advantage estimation over packed responses.
///
/// δₜ = rₜ + γ·Vₜ₊₁ − Vₜ and Aₜ = δₜ + γ·λ·Aₜ₊₁: Schulman et al. 2016, <https://arxiv.org/abs/1506.02438>, Eq. 16. A
/// response is an episode, so V and A after its last entry are 0; one that was cut off for its length counts as ended,
/// as in TRL. λ = 0 gives the error of one step, λ = 1 what came after, less what was expected.
///
/// # Shapes and units
/// - `rewards`, `values`: response after response, as many entries each as `lengths` says, none for an empty response;
///   `values` are the critic's of the state *before* each token;
/// - computed in f64.
///
/// # Errors
/// [`RlhfError::Shape`] when `rewards` or `values` are not as many as `lengths` add up to, or when `gamma` or `lam` is
/// outside 0 to 1.
///
/// # Example
/// ```
/// // A score of 1 at the end of three tokens, of which the critic expected a half throughout.
/// let out = pt_rlhf::gae(&[0.0, 0.0, 1.0], &[0.5, 0.5, 0.5], &[3], 1.0, 0.5)?;
/// assert_eq!(out.advantages, [0.125, 0.25, 0.5]);
/// assert_eq!(out.returns, [0.625, 0.75, 1.0]);
/// # Ok::<(), pt_rlhf::RlhfError>(())
/// ```
pub fn gae(rewards: &[f32], values: &[f32], lengths: &[usize], gamma: f64, lam: f64) -> Result<Advantages> {
    check_total("rewards", rewards.len(), lengths)?;
    check_total("values", values.len(), lengths)?;
    for (what, factor) in [("gamma", gamma), ("lam", lam)] {
        if !(0.0..=1.0).contains(&factor) {
            return Err(RlhfError::Shape { what, found: factor.to_string(), expected: "0 to 1".into() });
        }
    }
    let mut out = Advantages { advantages: vec![0.0; rewards.len()], returns: vec![0.0; rewards.len()] };
    for range in ranges(lengths) {
        let (mut next_value, mut next_advantage) = (0.0, 0.0);
        for t in range.rev() {
            let value = f64::from(values[t]);
            let delta = f64::from(rewards[t]) + gamma * next_value - value;
            let advantage = delta + gamma * lam * next_advantage;
            out.advantages[t] = advantage as f32;
            out.returns[t] = (advantage + value) as f32;
            (next_value, next_advantage) = (value, advantage);
        }
    }
    Ok(out)
}

/// How much of the returns' variance the values account for: 1 − Var(returns − values) / Var(returns).
///
/// 1 is perfect, 0 no better than a constant, less than that worse than none. NaN where returns do not vary, or where
/// the two differ in length.
pub fn explained_variance(values: &[f32], returns: &[f32]) -> f64 {
    let of_returns = Moments::of(returns.iter().map(|value| f64::from(*value)));
    let errors = returns.iter().zip(values).map(|(wanted, value)| f64::from(*wanted) - f64::from(*value));
    if values.len() != returns.len() || of_returns.squares <= 0.0 {
        return f64::NAN;
    }
    1.0 - Moments::of(errors).squares / of_returns.squares
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Two responses, of three tokens and of one. γ = ½, so every step is exact in f32.
    const REWARDS: [f32; 4] = [1.0, -1.0, 2.0, 3.0];
    const VALUES: [f32; 4] = [0.5, 2.0, -1.0, 4.0];

    fn of(lam: f64) -> Advantages {
        gae(&REWARDS, &VALUES, &[3, 1], 0.5, lam).unwrap()
    }

    /// The errors of one step are 1 + ½·2 − ½ = 1½, −1 + ½·(−1) − 2 = −3½, 2 + 0 − (−1) = 3, and 3 − 4 = −1.
    #[test]
    fn at_lambda_0_advantages_are_the_errors_of_one_step() {
        let out = of(0.0);
        assert_eq!(out.advantages, [1.5, -3.5, 3.0, -1.0]);
        assert_eq!(out.returns, [2.0, -1.5, 2.0, 3.0]);
    }

    /// From the first token on there came 1 + ½·(−1) + ¼·2 = 1, from the second −1 + ½·2 = 0, from the third 2.
    #[test]
    fn at_lambda_1_returns_are_what_came_after() {
        let out = of(1.0);
        assert_eq!(out.returns, [1.0, 0.0, 2.0, 3.0]);
        assert_eq!(out.advantages, [0.5, -2.0, 3.0, -1.0]);
    }

    /// γλ = ¼: the third is 3, the second −3½ + ¾ = −2¾, the first 1½ − 2¾/4 = 13/16.
    #[test]
    fn in_between_later_errors_count_by_powers_of_gamma_and_lambda() {
        let out = of(0.5);
        assert_eq!(out.advantages, [0.8125, -2.75, 3.0, -1.0]);
        assert_eq!(out.returns, [1.3125, -0.75, 2.0, 3.0]);
    }

    #[test]
    fn each_response_ends_where_it_ends() {
        let together = gae(&[1.0, 2.0, 4.0], &[0.0; 3], &[1, 0, 2, 0], 1.0, 1.0).unwrap();
        assert_eq!(together.returns, [1.0, 6.0, 4.0]);
        let nothing = gae(&[], &[], &[0, 0], 1.0, 0.95).unwrap();
        assert!(nothing.advantages.is_empty() && nothing.returns.is_empty());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let error = |rewards: &[f32], values: &[f32], gamma, lam| {
            gae(rewards, values, &[2], gamma, lam).unwrap_err().to_string()
        };
        assert_eq!(error(&[0.0], &[0.0; 2], 1.0, 1.0), "`rewards` is of length 1, expected length 2");
        assert_eq!(error(&[0.0; 2], &[0.0; 3], 1.0, 1.0), "`values` is of length 3, expected length 2");
        assert_eq!(error(&[0.0; 2], &[0.0; 2], 1.5, 1.0), "`gamma` is 1.5, expected 0 to 1");
        assert_eq!(error(&[0.0; 2], &[0.0; 2], 1.0, f64::NAN), "`lam` is NaN, expected 0 to 1");
    }

    /// Returns of 1, 2, 3 and 4 have a mean square deviation of 1¼; errors of ±½ have one of ¼.
    #[test]
    fn explained_variance_is_1_for_the_returns_0_for_a_constant_and_negative_for_worse() {
        let returns = [1.0, 2.0, 3.0, 4.0];
        assert_eq!(explained_variance(&returns, &returns), 1.0);
        assert_eq!(explained_variance(&[7.0; 4], &returns), 0.0);
        assert!((explained_variance(&[1.5, 1.5, 3.5, 3.5], &returns) - 0.8).abs() < 1e-12);
        assert_eq!(explained_variance(&[4.0, 3.0, 2.0, 1.0], &returns), -3.0);
        assert!(explained_variance(&[1.0, 2.0], &[3.0, 3.0]).is_nan());
        assert!(explained_variance(&[], &[]).is_nan() && explained_variance(&[1.0], &[1.0, 2.0]).is_nan());
    }

    proptest! {
        /// The sum over k of (γλ)^k δₜ₊ₖ, as the paper writes it.
        #[test]
        fn the_recursion_equals_the_sum(
            responses in prop::collection::vec(prop::collection::vec((-3f32..3.0, -3f32..3.0), 0..7), 0..5),
            gamma in 0.0..1.0, lam in 0.0..1.0,
        ) {
            let lengths: Vec<usize> = responses.iter().map(Vec::len).collect();
            let (rewards, values): (Vec<f32>, Vec<f32>) = responses.iter().flatten().copied().unzip();
            let found = gae(&rewards, &values, &lengths, gamma, lam).unwrap();
            let mut expected = Vec::new();
            for response in &responses {
                let value = |t: usize| response.get(t).map_or(0.0, |(_, value)| f64::from(*value));
                let delta = |t: usize| f64::from(response[t].0) + gamma * value(t + 1) - value(t);
                for t in 0..response.len() {
                    let later = (t..response.len()).map(|k| (gamma * lam).powi((k - t) as i32) * delta(k));
                    expected.push(later.sum::<f64>());
                }
            }
            for (index, expected) in expected.iter().enumerate() {
                prop_assert!((f64::from(found.advantages[index]) - expected).abs() < 1e-5);
                prop_assert!((f64::from(found.returns[index]) - expected - f64::from(values[index])).abs() < 1e-5);
            }
        }
    }
}
