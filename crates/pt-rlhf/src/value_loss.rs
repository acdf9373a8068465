//! The clipped loss of the critic.

use crate::error::{Result, RlhfError};
use crate::packed::{check_floats, num_entries, wide};
use pt_tensor::Tensor;

/// What [`value_losses`] returns, one entry a value: f32, or f64 for f64 input.
#[derive(Debug)]
pub struct ValueOutput {
    /// The loss of each, not averaged; differentiable in the critic's values.
    pub losses: Tensor,
    /// 1 where clipping raised the loss, so that nothing is learned, else 0; no gradient.
    pub is_clipped: Tensor,
}

/// The loss of each value, ½·max((V − R)², (clip(V, V_old ± c) − R)²).
///
/// The value loss of OpenAI Baselines' PPO, also TRL's and torchtune's: a value that moved away from its old one by
/// more than `clip`, towards the return, is not moved further. Without `clip`, ½·(V − R)².
///
/// # Shapes and units
/// `values`, `old_values`, `returns`: `[num_values]` floats; the gradient goes into the first alone. f32 out, f64 for
/// f64 input, halves are widened.
///
/// # Errors
/// [`RlhfError::Shape`] for columns that do not fit or a `clip` that is not over 0.
///
/// # Example
/// The return is 1. From 0 to 0.5 counts as to 0.2, 0.8 away; from 0 to −0.5 is 1.5 away.
/// ```
/// use pt_tensor::Tensor;
/// let (values, old_values) = (Tensor::from_slice(&[0.5f32, -0.5]), Tensor::from_slice(&[0f32, 0.0]));
/// let out = pt_rlhf::value_losses(&values, &old_values, &Tensor::from_slice(&[1f32, 1.0]), Some(0.2))?;
/// assert!((out.losses - Tensor::from_slice(&[0.32f32, 1.125])).abs().max().double_value(&[]) < 1e-6);
/// assert_eq!(Vec::<f32>::try_from(out.is_clipped).unwrap(), [1.0, 0.0]);
/// # Ok::<(), pt_rlhf::RlhfError>(())
/// ```
pub fn value_losses(values: &Tensor, old_values: &Tensor, returns: &Tensor, clip: Option<f64>) -> Result<ValueOutput> {
    let num_values = num_entries(values);
    check_floats("values", values, num_values)?;
    check_floats("old_values", old_values, num_values)?;
    check_floats("returns", returns, num_values)?;
    if let Some(clip) = clip.filter(|clip| !(*clip > 0.0 && clip.is_finite())) {
        let found = clip.to_string();
        return Err(RlhfError::Shape { what: "clip", found, expected: "over 0, or none".into() });
    }
    let (values, old_values, returns) = (wide(values), wide(&old_values.detach()), wide(&returns.detach()));
    let unclipped = (&values - &returns).square();
    let Some(clip) = clip else {
        return Ok(ValueOutput { is_clipped: unclipped.detach().zeros_like(), losses: unclipped * 0.5 });
    };
    let near = values.clamp_tensor(Some(&old_values - clip), Some(&old_values + clip));
    let clipped = (near - returns).square();
    let is_clipped = clipped.gt_tensor(&unclipped).to_kind(unclipped.kind());
    Ok(ValueOutput { losses: unclipped.maximum(&clipped) * 0.5, is_clipped })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use pt_tensor::Kind;

    fn floats(tensor: &Tensor) -> Vec<f64> {
        Vec::try_from(tensor.detach().to_kind(Kind::Double)).unwrap()
    }

    /// Losses, slopes and clipped values against old values of 1.
    fn of(values: &[f64], returns: f64, clip: Option<f64>) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
        let leaf = Tensor::from_slice(values).set_requires_grad(true);
        let out = value_losses(&leaf, &leaf.ones_like(), &leaf.full_like(returns).detach(), clip).unwrap();
        assert!(!out.is_clipped.requires_grad());
        out.losses.sum(Kind::Double).backward();
        (floats(&out.losses), floats(&leaf.grad()), floats(&out.is_clipped))
    }

    /// The return is 3, values may be ½ to 1½. Moved towards it to 2: counts as 1½, ½·1½² and flat. To 1¼: ½·1¾², slope
    /// −1¾. Away from it to 0: counts as itself, ½·3², slope −3.
    #[test]
    fn a_value_that_moved_far_towards_a_high_return_is_not_moved_further() {
        let (losses, slopes, is_clipped) = of(&[2.0, 1.25, 0.0], 3.0, Some(0.5));
        assert_eq!(losses, [1.125, 1.53125, 4.5]);
        assert_eq!(slopes, [0.0, -1.75, -3.0]);
        assert_eq!(is_clipped, [1.0, 0.0, 0.0]);
    }

    /// The same below: the return is −1. Down to 0 counts as ½, ½·1½²; ¾ is 1¾ away; up to 2 is 3 away.
    #[test]
    fn a_value_that_moved_far_towards_a_low_return_is_not_moved_further() {
        let (losses, slopes, is_clipped) = of(&[0.0, 0.75, 2.0], -1.0, Some(0.5));
        assert_eq!(losses, [1.125, 1.53125, 4.5]);
        assert_eq!(slopes, [0.0, 1.75, 3.0]);
        assert_eq!(is_clipped, [1.0, 0.0, 0.0]);
    }

    /// The return is 1¼, within reach. A value of 4¼ went past it: it counts as itself, and comes back.
    #[test]
    fn a_value_that_went_past_the_return_comes_back() {
        let (losses, slopes, is_clipped) = of(&[4.25, 1.25], 1.25, Some(0.5));
        assert_eq!(losses, [4.5, 0.0]);
        assert_eq!(slopes, [3.0, 0.0]);
        assert_eq!(is_clipped, [0.0, 0.0]);
    }

    #[test]
    fn without_a_clip_it_is_half_the_square() {
        let (losses, slopes, is_clipped) = of(&[2.0, 0.0], 3.0, None);
        assert_eq!(losses, [0.5, 4.5]);
        assert_eq!(slopes, [-1.0, -3.0]);
        assert_eq!(is_clipped, [0.0, 0.0]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let column = |num: usize| Tensor::from_slice(&vec![0f32; num]);
        let error = |values: &Tensor, old: &Tensor, returns: &Tensor, clip| {
            value_losses(values, old, returns, clip).unwrap_err().to_string()
        };
        let (one, two) = (column(1), column(2));
        assert_eq!(error(&two, &one, &two, None), "`old_values` is [1] of Float, expected [2] of floats");
        assert_eq!(error(&two, &two, &one, None), "`returns` is [1] of Float, expected [2] of floats");
        assert_eq!(error(&two, &two, &two, Some(0.0)), "`clip` is 0, expected over 0, or none");
        let half = two.to_kind(Kind::BFloat16);
        assert_eq!(value_losses(&half, &half, &half, Some(0.2)).unwrap().losses.kind(), Kind::Float);
        assert_eq!(value_losses(&column(0), &column(0), &column(0), Some(0.2)).unwrap().losses.size(), [0]);
    }

    proptest! {
        /// Clipping never makes a loss smaller, and where it makes it larger there is no slope.
        #[test]
        fn the_clipped_loss_is_pessimistic(
            entries in prop::collection::vec((-3.0..3.0, -3.0..3.0, -3.0..3.0), 1..20), clip in 0.01..2.0,
        ) {
            let column = |which: fn(&(f64, f64, f64)) -> f64| {
                Tensor::from_slice(&entries.iter().map(which).collect::<Vec<_>>())
            };
            let (leaf, old, returns) = (column(|e| e.0).set_requires_grad(true), column(|e| e.1), column(|e| e.2));
            let out = value_losses(&leaf, &old, &returns, Some(clip)).unwrap();
            out.losses.sum(Kind::Double).backward();
            let plain = floats(&value_losses(&leaf, &old, &returns, None).unwrap().losses);
            let (losses, slopes, is_clipped) = (floats(&out.losses), floats(&leaf.grad()), floats(&out.is_clipped));
            for (index, (value, _, wanted)) in entries.iter().enumerate() {
                let is_raised = losses[index] > plain[index];
                prop_assert!(losses[index] >= plain[index] && is_raised == (is_clipped[index] == 1.0));
                let slope = if is_raised { 0.0 } else { value - wanted };
                prop_assert!((slopes[index] - slope).abs() < 1e-12);
            }
        }
    }
}
