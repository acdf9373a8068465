//! From log-probs of tokens to those of completions: sums, LD-DPO, WPO's weights.
//!
//! Tokens lie on one axis in any order, as a packed batch gives them, and `completion_ids` says whose each is.

use crate::error::{DpoError, Result};
use crate::loss::PairLogps;
use pt_tensor::{Kind, Tensor, no_grad};

/// Log-probs of completions, `[num_completions]` f32 (f64 for f64 input), nats: the sums over their scored tokens.
///
/// - `logprobs`: `[num_tokens]`, of the scored tokens, the end of the turn included and the prompt not; differentiable;
/// - `completion_ids`: `[num_tokens]`, i64, in `0..num_completions`.
///
/// # Errors
/// [`DpoError::Shape`] when the two do not fit.
///
/// # Example
/// ```
/// use pt_tensor::Tensor;
/// let logprobs = Tensor::from_slice(&[-1f32, -2.0, -4.0]);
/// let logps = pt_dpo::sum_logps(&logprobs, &Tensor::from_slice(&[0i64, 1, 1]), 2)?;
/// assert_eq!(Vec::<f32>::try_from(logps).unwrap(), [-1.0, -6.0]);
/// # Ok::<(), pt_dpo::DpoError>(())
/// ```
pub fn sum_logps(logprobs: &Tensor, completion_ids: &Tensor, num_completions: i64) -> Result<Tensor> {
    check_ids(completion_ids, num_completions)?;
    check_tokens("logprobs", logprobs, completion_ids)?;
    let kind = if logprobs.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let zeros = Tensor::zeros([num_completions], (kind, logprobs.device()));
    Ok(zeros.index_add(0, completion_ids, &logprobs.to_kind(kind)))
}

/// Scored tokens of each completion, `[num_completions]` i64.
///
/// # Errors
/// [`DpoError::Shape`] unless `completion_ids` is `[num_tokens]` of i64 in `0..num_completions`.
pub fn completion_lengths(completion_ids: &Tensor, num_completions: i64) -> Result<Tensor> {
    check_ids(completion_ids, num_completions)?;
    let zeros = Tensor::zeros([num_completions], (Kind::Int64, completion_ids.device()));
    Ok(zeros.index_add(0, completion_ids, &completion_ids.ones_like()))
}

/// Log-probs of pairs in which tokens beyond the shorter completion's length count `ld_alpha` times, `[num_pairs]` each.
///
/// LD-DPO, Liu et al. 2024, <https://arxiv.org/abs/2409.06411>, Eq. 8: `ld_alpha` 1 sums all tokens, 0 only as many as both completions have. A completion in several
/// pairs is cut at each pair's own length.
///
/// - `logprobs`, `completion_ids`: as for [`sum_logps`]; a completion's tokens in their order;
/// - `chosen`, `rejected`: the two completions of each pair.
///
/// # Errors
/// [`DpoError::Shape`] when the inputs do not fit.
pub fn ld_logps(
    logprobs: &Tensor,
    completion_ids: &Tensor,
    chosen: &[i64],
    rejected: &[i64],
    ld_alpha: f64,
) -> Result<PairLogps> {
    check_tokens("logprobs", logprobs, completion_ids)?;
    let ids = Vec::<i64>::try_from(completion_ids.to_kind(Kind::Int64)).map_err(pt_tensor::TensorError::from)?;
    let num_completions = ids.iter().chain(chosen).chain(rejected).max().map_or(0, |highest| highest + 1);
    check_ids(completion_ids, num_completions)?;
    if chosen.len() != rejected.len() || chosen.iter().chain(rejected).any(|completion| *completion < 0) {
        return Err(DpoError::Shape {
            what: "rejected",
            found: format!("{} completions", rejected.len()),
            expected: format!("as many as chosen ones, {}, none negative", chosen.len()),
        });
    }
    let mut tokens = vec![Vec::new(); num_completions as usize];
    ids.iter().enumerate().for_each(|(token, id)| tokens[*id as usize].push(token as i64));
    let kind = if logprobs.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let side = |completions: &[i64]| {
        let (mut taken, mut pair_of, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        for (pair, completion) in completions.iter().enumerate() {
            let shared = tokens[chosen[pair] as usize].len().min(tokens[rejected[pair] as usize].len());
            for (position, token) in tokens[*completion as usize].iter().enumerate() {
                taken.push(*token);
                pair_of.push(pair as i64);
                weights.push(if position < shared { 1.0 } else { ld_alpha });
            }
        }
        let on_device = |tensor: Tensor| tensor.to_device(logprobs.device());
        let weights = on_device(Tensor::from_slice(&weights).to_kind(kind));
        let weighted = logprobs.index_select(0, &on_device(Tensor::from_slice(&taken))).to_kind(kind) * weights;
        let zeros = Tensor::zeros([completions.len() as i64], (kind, logprobs.device()));
        zeros.index_add(0, &on_device(Tensor::from_slice(&pair_of)), &weighted)
    };
    Ok(PairLogps { chosen_logps: side(chosen), rejected_logps: side(rejected) })
}

/// WPO's weight of each completion, `[num_completions]`, without a gradient: exp of the mean over its tokens of
/// log p − log Σ p². A pair's weight is the product of both.
///
/// Zhou et al. 2024, <https://arxiv.org/abs/2406.11827>, Eq. 2 with the sampled alignment of Section 3.2: a completion that the policy would draw itself weighs 1 or so.
/// `log_collision` is [`LabelOutput::log_collision`](pt_tensor::LabelOutput::log_collision), `[num_tokens]`; the rest as for [`sum_logps`].
///
/// # Errors
/// [`DpoError::Shape`] when the inputs do not fit.
pub fn wpo_weights(
    logprobs: &Tensor,
    log_collision: &Tensor,
    completion_ids: &Tensor,
    num_completions: i64,
) -> Result<Tensor> {
    check_tokens("log_collision", log_collision, completion_ids)?;
    check_tokens("logprobs", logprobs, completion_ids)?;
    no_grad(|| {
        let sums = sum_logps(&(logprobs - log_collision), completion_ids, num_completions)?;
        let lengths = completion_lengths(completion_ids, num_completions)?.clamp_min(1);
        Ok((sums / lengths).exp())
    })
}

fn check_tokens(what: &'static str, column: &Tensor, completion_ids: &Tensor) -> Result<()> {
    if column.dim() == 1 && column.size() == completion_ids.size() && column.is_floating_point() {
        return Ok(());
    }
    Err(DpoError::shape(what, column, format!("{:?} of floats, as completion_ids", completion_ids.size())))
}

fn check_ids(completion_ids: &Tensor, num_completions: i64) -> Result<()> {
    let is_inside = || {
        completion_ids.numel() == 0
            || completion_ids.min().int64_value(&[]) >= 0 && completion_ids.max().int64_value(&[]) < num_completions
    };
    if completion_ids.dim() == 1 && completion_ids.kind() == Kind::Int64 && is_inside() {
        return Ok(());
    }
    Err(DpoError::shape("completion_ids", completion_ids, format!("[num_tokens] of i64 in 0..{num_completions}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floats(tensor: &Tensor) -> Vec<f64> {
        Vec::try_from(tensor.to_kind(Kind::Double)).unwrap()
    }

    #[test]
    fn tokens_are_summed_and_counted_wherever_they_stand() {
        let logprobs = Tensor::from_slice(&[-1f32, -2.0, -4.0, -8.0]).set_requires_grad(true);
        let ids = Tensor::from_slice(&[2i64, 0, 2, 2]);
        let logps = sum_logps(&logprobs, &ids, 3).unwrap();
        assert_eq!(floats(&logps), [-2.0, 0.0, -13.0]);
        assert_eq!(Vec::<i64>::try_from(completion_lengths(&ids, 3).unwrap()).unwrap(), [1, 0, 3]);
        (logps * Tensor::from_slice(&[1f32, 2.0, 3.0])).sum(Kind::Float).backward();
        assert_eq!(floats(&logprobs.grad()), [3.0, 1.0, 3.0, 3.0]);
    }

    /// Lengths 3 and 1, then 3 and 2: the tail of the first completion is cut at each pair's own length.
    #[test]
    fn ld_counts_the_tail_of_the_longer_completion_in_part() {
        let logprobs = Tensor::from_slice(&[-1f32, -2.0, -4.0, -8.0, -16.0, -32.0]);
        let ids = Tensor::from_slice(&[0i64, 0, 0, 1, 2, 2]);
        let pairs = |alpha| ld_logps(&logprobs, &ids, &[0, 2], &[1, 0], alpha).unwrap();
        let half = pairs(0.5);
        assert_eq!(floats(&half.chosen_logps), [-1.0 - 3.0, -48.0]);
        assert_eq!(floats(&half.rejected_logps), [-8.0, -3.0 - 2.0]);
        assert_eq!(floats(&pairs(1.0).chosen_logps), [-7.0, -48.0]);
        assert_eq!(floats(&pairs(0.0).rejected_logps), [-8.0, -3.0]);
    }

    /// Tokens as probable as a draw agrees with another one weigh 1; half as probable, ½.
    #[test]
    fn wpo_weighs_by_the_geometric_mean_of_the_tokens() {
        let logprobs = Tensor::from_slice(&[-1f64, -2.0, -3.0 - 2f64.ln()]).set_requires_grad(true);
        let log_collision = Tensor::from_slice(&[-1f64, -2.0, -3.0]);
        let weights = wpo_weights(&logprobs, &log_collision, &Tensor::from_slice(&[0i64, 1, 1]), 2).unwrap();
        assert!(!weights.requires_grad());
        let weights = floats(&weights);
        assert!((weights[0] - 1.0).abs() < 1e-12 && (weights[1] - 0.5f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn inputs_that_do_not_fit_are_refused() {
        let logprobs = Tensor::from_slice(&[-1f32, -2.0]);
        let ids = Tensor::from_slice(&[0i64, 3]);
        assert!(sum_logps(&logprobs, &ids, 3).unwrap_err().to_string().contains("0..3"));
        assert!(sum_logps(&logprobs, &ids.narrow(0, 0, 1), 1).unwrap_err().to_string().contains("`logprobs` is [2]"));
        assert!(completion_lengths(&logprobs, 2).is_err());
        assert!(ld_logps(&logprobs, &ids, &[0], &[3, 3], 0.5).unwrap_err().to_string().contains("2 completions"));
        assert!(ld_logps(&logprobs, &ids, &[-1], &[0], 0.5).is_err());
    }
}
