//! Tokens pooled by two along their sequences, and a causal convolution over what that gives.

use crate::Result;
use pt_model::TokenOrder;
use pt_tensor::autograd::attach_backward;
use pt_tensor::{Device, TchError, Tensor, no_grad};

/// Which tokens are pooled, which pooled tokens stand before others, and where they act.
///
/// The tokens at the positions 2j and 2j + 1 of a sequence are its pooled token j. It is complete with the second, so
/// the token at position t may see those with 2j + 1 ≤ t. In a batch where several completions share a prompt of odd
/// length, the pair across the border is each completion's own.
#[derive(Debug)]
pub(super) struct Pools {
    /// `[pools]`: rows of the first and the second token.
    first: Tensor,
    second: Tensor,
    /// For i in 0..kernel_size, `[pools]`: the pooled token i places before; `pools` where a sequence has none.
    taps: Vec<Tensor>,
    /// `[tokens]`: the last pooled token that each token of the pass sees; `pools` where it sees none.
    last: Tensor,
    is_empty: bool,
}

impl Pools {
    /// Of the rows of a pass.
    pub(super) fn new(order: &TokenOrder, kernel_size: i64, device: Device) -> Self {
        let TokenOrder { previous, positions, own } = order;
        let num_rows = previous.len();
        let mut pool_of: Vec<Option<i64>> = vec![None; num_rows];
        let (mut first, mut second) = (Vec::new(), Vec::new());
        for row in 0..num_rows {
            if let (1, Some(before)) = (positions[row] % 2, previous[row]) {
                pool_of[row] = Some(first.len() as i64);
                first.push(before as i64);
                second.push(row as i64);
            }
        }
        let num_pools = first.len() as i64;
        // The pooled token before each: that of the row before its first.
        let before: Vec<i64> = first
            .iter()
            .map(|&row| previous[row as usize].and_then(|row| pool_of[row]).unwrap_or(num_pools))
            .chain([num_pools])
            .collect();
        let mut tap: Vec<i64> = (0..num_pools).collect();
        let mut taps = Vec::new();
        for _ in 0..kernel_size {
            taps.push(Tensor::from_slice(&tap).to_device(device));
            tap = tap.iter().map(|&pool| before[pool as usize]).collect();
        }
        let mut last = Vec::new();
        let num_own = own.as_ref().map_or(num_rows, Vec::len);
        for token in 0..num_own {
            let row = own.as_ref().map_or(token, |own| own[token]);
            let seen = pool_of[row].or_else(|| previous[row].and_then(|row| pool_of[row]));
            last.push(seen.unwrap_or(num_pools));
        }
        let index = |values: &[i64]| Tensor::from_slice(values).to_device(device);
        let is_empty = last.iter().all(|&pool| pool == num_pools);
        Self { first: index(&first), second: index(&second), taps, last: index(&last), is_empty }
    }

    /// Whether no token sees any pooled one.
    pub(super) fn is_empty(&self) -> bool {
        self.is_empty
    }

    /// Means of pairs: `[rows, hidden_size]` → `[pools, hidden_size]`.
    pub(super) fn pool(&self, rows: &Tensor) -> Result<Tensor> {
        let sum = rows.f_index_select(0, &self.first)? + rows.f_index_select(0, &self.second)?;
        Ok(sum * 0.5)
    }

    /// Adds to each token what the last pooled token that it sees has: `[tokens, hidden_size]`.
    pub(super) fn add_to(&self, hidden_states: &Tensor, of_pools: &Tensor) -> Result<Tensor> {
        // Not `index_add`, which keeps what it adds.
        let none = of_pools.f_new_zeros([1, of_pools.size()[1]], (of_pools.kind(), of_pools.device()))?;
        Ok(hidden_states + Tensor::f_cat(&[of_pools, &none], 0)?.f_index_select(0, &self.last)?)
    }

    /// A causal grouped convolution over pooled tokens: y_j = Σᵢ W[.., k − 1 − i] · x of the token i places before j.
    ///
    /// One node of the graph that keeps `pooled` and the weight, not the k shifted copies of `pooled`.
    ///
    /// # Shapes
    /// `pooled: [pools, hidden_size]`, `weight: [width, hidden_size / groups, kernel_size]` in the same kind; returns
    /// `[pools, width]`.
    pub(super) fn convolve(&self, pooled: &Tensor, weight: &Tensor, groups: i64) -> Result<Tensor> {
        let (width, kernel_size) = (weight.size()[0], weight.size()[2]);
        let (x, w) = (pooled.detach(), weight.detach());
        let (num_pools, hidden_size) = x.size2()?;
        let taps: Vec<Tensor> = self.taps.iter().map(Tensor::shallow_clone).collect();
        // [groups, width / groups, hidden_size / groups]
        let matrix = move |w: &Tensor, i: usize| -> std::result::Result<Tensor, TchError> {
            let one = w.f_select(2, kernel_size - 1 - i as i64)?;
            one.f_reshape([groups, width / groups, hidden_size / groups])
        };
        // [pools, n] → [groups, pools, n / groups]
        let by_group = move |t: &Tensor| -> std::result::Result<Tensor, TchError> {
            let size = t.size();
            t.f_view([size[0], groups, size[1] / groups])?.f_transpose(0, 1)
        };
        let with_none = move |x: &Tensor| -> std::result::Result<Tensor, TchError> {
            Tensor::f_cat(&[x, &x.f_new_zeros([1, hidden_size], (x.kind(), x.device()))?], 0)
        };
        let output = no_grad(|| -> Result<Tensor> {
            let rows = with_none(&x)?;
            let mut sum = Tensor::f_zeros([groups, num_pools, width / groups], (x.kind(), x.device()))?;
            for (i, tap) in taps.iter().enumerate() {
                let shifted = by_group(&rows.f_index_select(0, tap)?)?;
                sum = sum.f_baddbmm_(&shifted, &matrix(&w, i)?.f_transpose(1, 2)?)?;
            }
            Ok(sum.f_transpose(0, 1)?.f_reshape([num_pools, width])?)
        })?;
        let (needs_x, needs_w) = (pooled.requires_grad(), weight.requires_grad());
        attach_backward("causal_grouped_convolution", &[pooled, weight], &[&output], move |grads| {
            let Some(grad) = grads.into_iter().next().flatten() else { return Ok(vec![None, None]) };
            let grad = by_group(&grad.to_kind(x.kind()).contiguous())?; // [groups, pools, width / groups]
            let rows = with_none(&x)?;
            let mut grad_x = rows.f_zeros_like()?;
            let mut of_taps = Vec::new();
            for (i, tap) in taps.iter().enumerate() {
                if needs_x {
                    let back = grad.f_bmm(&matrix(&w, i)?)?.f_transpose(0, 1)?.f_reshape([num_pools, hidden_size])?;
                    grad_x = grad_x.f_index_add_(0, tap, &back)?;
                }
                if needs_w {
                    let shifted = by_group(&rows.f_index_select(0, tap)?)?;
                    of_taps.push(grad.f_transpose(1, 2)?.f_bmm(&shifted)?); // [groups, width / groups, hidden / groups]
                }
            }
            of_taps.reverse();
            let grad_w = match needs_w {
                true => Some(Tensor::f_stack(&of_taps, 3)?.f_view([width, hidden_size / groups, kernel_size])?),
                false => None,
            };
            Ok(vec![needs_x.then(|| grad_x.narrow(0, 0, num_pools)), grad_w])
        })?;
        Ok(output)
    }
}

/// Weight standardisation (Qiao et al. 2019, <https://arxiv.org/abs/1903.10520>): each output channel's weights with a mean
/// of zero and a variance of one.
pub(super) fn standardized(weight: &Tensor) -> Result<Tensor> {
    let flat = weight.f_flatten(1, -1)?; // [outputs, inputs of each]
    // A layer norm of the weights, which keeps the weights themselves and two numbers a row.
    let standardized = flat.f_layer_norm([flat.size()[1]], None::<Tensor>, None::<Tensor>, 1e-5, false)?;
    Ok(standardized.f_view_as(weight)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::init::uniform;
    use pt_tensor::Kind;

    fn random(name: &str, size: &[i64]) -> Tensor {
        let values = uniform(7, name, size.iter().product::<i64>() as usize, 1.0);
        Tensor::from_slice(&values).view(size).to_kind(Kind::Double)
    }

    /// A prompt of three tokens (rows 0..3) with completions of two (3, 4) and one (5), and a sequence of two (6, 7).
    fn order() -> TokenOrder {
        let previous = [None, Some(0), Some(1), Some(2), Some(3), Some(2), None, Some(6)];
        TokenOrder { previous: previous.into(), positions: vec![0, 1, 2, 3, 4, 3, 0, 1], own: None }
    }

    fn ids(tensor: &Tensor) -> Vec<i64> {
        Vec::try_from(tensor).unwrap()
    }

    #[test]
    fn pairs_follow_the_sequences_across_a_shared_prompts_end() {
        let pools = Pools::new(&order(), 2, Device::Cpu);
        assert_eq!((ids(&pools.first), ids(&pools.second)), (vec![0, 2, 2, 6], vec![1, 3, 5, 7]));
        assert_eq!(ids(&pools.taps[0]), [0, 1, 2, 3]);
        assert_eq!(ids(&pools.taps[1]), [4, 0, 0, 4]); // 4: none
        assert_eq!(ids(&pools.last), [4, 0, 0, 1, 1, 2, 4, 3]);
    }

    #[test]
    fn one_sequence_is_convolved_as_libtorch_does_and_its_gradients_agree() {
        let positions: Vec<i64> = (0..12).collect();
        let previous = (0..12usize).map(|row| row.checked_sub(1)).collect();
        let pools = Pools::new(&TokenOrder { previous, positions, own: None }, 3, Device::Cpu);
        let leaf = |name: &str, size: &[i64]| random(name, size).set_requires_grad(true);
        let (x, w) = (leaf("x", &[6, 8]), leaf("w", &[4, 4, 3]));
        let upstream = random("g", &[6, 4]);
        let run = |y: Tensor| {
            (&y * &upstream).sum(None).backward();
            let mut out = vec![y.detach()];
            for t in [&x, &w] {
                out.push(t.grad().copy());
                let _ = t.grad().zero_();
            }
            out
        };
        let ours = run(pools.convolve(&x, &w, 2).unwrap());
        let padded = x.tr().unsqueeze(0).constant_pad_nd([2, 0]); // [1, 8, 2 + 6]
        let theirs = run(padded.conv1d(&w, None::<Tensor>, [1], [0], [1], 2).squeeze_dim(0).tr());
        for (a, b) in ours.iter().zip(&theirs) {
            assert!(a.size() == b.size() && (a - b).abs().max().double_value(&[]) < 1e-12, "{a:?} {b:?}");
        }
    }

    #[test]
    fn standardized_weights_have_no_mean_and_unit_variance() {
        let weight = (random("w", &[3, 4, 5]) * 7.0 + 2.0).to_kind(Kind::Float);
        let standardized = standardized(&weight).unwrap().flatten(1, -1);
        let mean = standardized.mean_dim([1i64].as_slice(), false, Kind::Float).abs().max().double_value(&[]);
        let squares = standardized.square().mean_dim([1i64].as_slice(), false, Kind::Float);
        assert!(mean < 1e-6 && (squares - 1.0).abs().max().double_value(&[]) < 1e-4);
    }
}
