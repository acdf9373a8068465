//! Attention over packed prompt groups: no padding, and a shared prompt's keys stand once.

use crate::Result;
use crate::batch::{AttentionPlan, Segment};
use pt_tensor::autograd::attach_backward;
use pt_tensor::{Device, Kind, Tensor, TensorError, no_grad};
use std::sync::Arc;

/// Softmax attention of packed tokens.
///
/// # Shapes
/// `query: [total_tokens, num_heads, head_dim]`, `key`, `value`: `[total_tokens, num_kv_heads, head_dim]`; returns
/// query's shape. `num_kv_heads` divides `num_heads`; each key head serves a run of query heads. A token sees
/// at most the last `window` tokens where a window is given (Mistral).
///
/// # Errors
/// When the shapes do not fit.
pub fn packed_attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    plan: &Arc<AttentionPlan>,
    scale: f64,
    window: Option<i64>,
) -> Result<Tensor> {
    if query.device() == Device::Cpu {
        Ok(cpu_attention(query, key, value, plan, scale, window)?)
    } else {
        let parts = plan
            .segments
            .iter()
            .map(|segment| {
                let view = View::new(segment, query, key, value, window);
                Ok(Tensor::f_scaled_dot_product_attention(
                    &view.query,
                    &view.key,
                    &view.value,
                    view.mask.as_ref(),
                    0.0,
                    view.mask.is_none(),
                    scale,
                    false,
                )?
                .squeeze_dim(0)
                .transpose(0, 1))
            })
            .collect::<std::result::Result<Vec<_>, TensorError>>()?;
        Ok(Tensor::cat(&parts, 0))
    }
}

/// One segment as libtorch's attention wants it: `[1, num_heads, length, head_dim]`, key heads repeated.
struct View {
    query: Tensor,
    key: Tensor,
    value: Tensor,
    /// `[queries, keys]`, 0 or −inf; none where plain causality says it all.
    mask: Option<Tensor>,
}

impl View {
    fn new(segment: &Segment, query: &Tensor, key: &Tensor, value: &Tensor, window: Option<i64>) -> Self {
        let own = |t: &Tensor| t.narrow(0, segment.tokens.start, segment.tokens.end - segment.tokens.start);
        let repeats = query.size()[1] / key.size()[1];
        let keys = |t: &Tensor| {
            let mut rows = own(t);
            if !segment.prefix.is_empty() {
                let prefix = t.narrow(0, segment.prefix.start, segment.prefix.end - segment.prefix.start);
                rows = Tensor::cat(&[prefix, rows], 0);
            }
            repeat_heads(&rows, repeats).transpose(0, 1).unsqueeze(0)
        };
        let query_view = own(query).transpose(0, 1).unsqueeze(0);
        let mask = mask(segment, window, query);
        Self { query: query_view, key: keys(key), value: keys(value), mask }
    }
}

/// `[length, kv_heads, head_dim]` → `[length, kv_heads · repeats, head_dim]`.
fn repeat_heads(rows: &Tensor, repeats: i64) -> Tensor {
    if repeats == 1 {
        return rows.shallow_clone();
    }
    let size = rows.size();
    rows.unsqueeze(2).expand([size[0], size[1], repeats, size[2]], false).reshape([size[0], size[1] * repeats, size[2]])
}

/// The mask of a segment, or none where it is plainly causal.
fn mask(segment: &Segment, window: Option<i64>, like: &Tensor) -> Option<Tensor> {
    let own = segment.tokens.end - segment.tokens.start;
    let prefix = segment.prefix.end - segment.prefix.start;
    let window = window.filter(|&window| prefix + own > window);
    if prefix == 0 && window.is_none() {
        return None;
    }
    let options = (Kind::Int64, like.device());
    // Row i stands at position prefix + i.
    let rows = (Tensor::arange(own, options) + prefix).unsqueeze(1);
    let columns = Tensor::arange(prefix + own, options).unsqueeze(0);
    let mut is_hidden = columns.gt_tensor(&rows);
    if let Some(window) = window {
        is_hidden = is_hidden.logical_or(&columns.le_tensor(&(rows - window)));
    }
    let mask = Tensor::zeros([own, prefix + own], (like.kind(), like.device()));
    Some(mask.masked_fill(&is_hidden, f64::NEG_INFINITY))
}

/// libtorch's tiled CPU attention, segment by segment, as one node of the graph: it keeps query, key, value, the
/// output and one number per row, and a prompt's gradients gather from all completions that saw it.
fn cpu_attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    plan: &Arc<AttentionPlan>,
    scale: f64,
    window: Option<i64>,
) -> std::result::Result<Tensor, TensorError> {
    let saved = [query.detach(), key.detach(), value.detach()];
    let [q, k, v] = &saved;
    let output = no_grad(|| Tensor::empty_like(q));
    let mut row_sums = Vec::with_capacity(plan.segments.len());
    no_grad(|| {
        for segment in &plan.segments {
            let view = View::new(segment, q, k, v, window);
            let (out, row_sum) = Tensor::f_internal_scaled_dot_product_flash_attention_for_cpu(
                &view.query,
                &view.key,
                &view.value,
                0.0,
                view.mask.is_none(),
                view.mask.as_ref(),
                scale,
            )?;
            rows(&output, segment).copy_(&out.squeeze_dim(0).transpose(0, 1));
            row_sums.push(row_sum);
        }
        Ok::<(), TensorError>(())
    })?;
    // The output is needed again, but the node must not hold the tensor that holds the node.
    let saved_output = output.detach();
    let plan = plan.clone();
    attach_backward("packed_attention", &[query, key, value], &[&output], move |grads| {
        let Some(grad) = grads.into_iter().next().flatten() else { return Ok(vec![None, None, None]) };
        let [q, k, v] = &saved;
        let grad_q = q.empty_like();
        let (grad_k, grad_v) = (k.zeros_like(), v.zeros_like());
        let kv_heads = k.size()[1];
        for (segment, row_sum) in plan.segments.iter().zip(&row_sums) {
            let view = View::new(segment, q, k, v, window);
            let as_heads = |t: &Tensor| rows(t, segment).transpose(0, 1).unsqueeze(0);
            let (dq, dk, dv) = Tensor::f_internal_scaled_dot_product_flash_attention_for_cpu_backward(
                &as_heads(&grad),
                &view.query,
                &view.key,
                &view.value,
                &as_heads(&saved_output),
                row_sum,
                0.0,
                view.mask.is_none(),
                view.mask.as_ref(),
                scale,
            )?;
            rows(&grad_q, segment).copy_(&dq.squeeze_dim(0).transpose(0, 1));
            for (total, part) in [(&grad_k, dk), (&grad_v, dv)] {
                let part = part.squeeze_dim(0).transpose(0, 1); // [keys, num_heads, head_dim]
                let size = part.size();
                let part = part.reshape([size[0], kv_heads, size[1] / kv_heads, size[2]]).sum_dim_intlist(
                    2,
                    false,
                    part.kind(),
                );
                let prefix = segment.prefix.end - segment.prefix.start;
                if prefix > 0 {
                    let _ = total.narrow(0, segment.prefix.start, prefix).g_add_(&part.narrow(0, 0, prefix));
                }
                let _ = rows(total, segment).g_add_(&part.narrow(0, prefix, size[0] - prefix));
            }
        }
        Ok(vec![Some(grad_q), Some(grad_k), Some(grad_v)])
    })?;
    Ok(output)
}

fn rows(tensor: &Tensor, segment: &Segment) -> Tensor {
    tensor.narrow(0, segment.tokens.start, segment.tokens.end - segment.tokens.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Arc<AttentionPlan> {
        Arc::new(AttentionPlan {
            segments: vec![
                Segment { prefix: 0..0, tokens: 0..4 },
                Segment { prefix: 0..4, tokens: 4..7 },
                Segment { prefix: 0..4, tokens: 7..9 },
                Segment { prefix: 9..9, tokens: 9..14 },
            ],
        })
    }

    /// The definition: one dense mask over all pairs of tokens, in f64.
    fn dense(q: &Tensor, k: &Tensor, v: &Tensor, window: Option<i64>) -> Tensor {
        let total = q.size()[0];
        let mask = Tensor::full([total, total], f64::NEG_INFINITY, (Kind::Double, Device::Cpu));
        for segment in &plan().segments {
            let keys: Vec<i64> = segment.prefix.clone().chain(segment.tokens.clone()).collect();
            for row in segment.tokens.clone() {
                let at = keys.iter().position(|&key| key == row).unwrap() as i64;
                for (position, &key) in keys.iter().enumerate() {
                    let position = position as i64;
                    if position <= at && window.is_none_or(|window| position > at - window) {
                        let _ = mask.get(row).get(key).fill_(0.0);
                    }
                }
            }
        }
        let repeats = q.size()[1] / k.size()[1];
        let (k, v) = (k.repeat_interleave_self_int(repeats, 1, None), v.repeat_interleave_self_int(repeats, 1, None));
        let scores = Tensor::einsum("qhd,khd->hqk", &[q, &k], None::<i64>) * 0.5 + mask;
        Tensor::einsum("hqk,khd->qhd", &[scores.softmax(-1, Kind::Double), v], None::<i64>)
    }

    #[test]
    fn values_and_gradients_equal_a_dense_mask() {
        for window in [None, Some(3)] {
            let leaf = |heads| Tensor::randn([14, heads, 4], (Kind::Double, Device::Cpu)).set_requires_grad(true);
            let (mut q, mut k, mut v) = (leaf(4), leaf(2), leaf(2));
            let upstream = Tensor::randn([14, 4, 4], (Kind::Double, Device::Cpu));
            let out = packed_attention(&q, &k, &v, &plan(), 0.5, window).unwrap();
            (&out * &upstream).sum(Kind::Double).backward();
            let grads: Vec<Tensor> = [&q, &k, &v].iter().map(|t| t.grad().copy()).collect();
            [&mut q, &mut k, &mut v].into_iter().for_each(Tensor::zero_grad);
            let want = dense(&q, &k, &v, window);
            (&want * &upstream).sum(Kind::Double).backward();
            let error = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
            assert!(error(&out, &want) < 1e-12);
            for (own, leaf) in grads.iter().zip([&q, &k, &v]) {
                assert!(error(own, &leaf.grad()) < 1e-12);
            }
        }
    }
}
