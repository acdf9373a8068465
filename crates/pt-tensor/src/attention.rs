//! Attention over packed prompt groups: no padding, and a shared prompt's keys stand once.

use crate::autograd::attach_backward;
use crate::fused::{is_bf16, is_fusable, ptr};
use crate::{Result, TensorError};
use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::sync::Arc;
use tch::{Kind, Tensor, no_grad};

/// A run of tokens whose queries attend to `prefix` wholly and to themselves causally.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Keys before the segment that all its queries see; empty where there are none.
    pub prefix: Range<i64>,
    /// The segment's own tokens.
    pub tokens: Range<i64>,
}

/// Who attends to whom in a packed batch.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AttentionPlan {
    /// So many tokens at the front stand before every segment but their own: virtual tokens of a prompt or a prefix. A
    /// segment's positions count them, then its prefix, then its own tokens.
    pub common: i64,
    /// The segments, in token order; together they cover every token once, and a prefix lies before its segment. The
    /// common tokens are the first segment, or they are in none and have keys and values only.
    pub segments: Vec<Segment>,
}

impl AttentionPlan {
    /// A plan without tokens that all segments see.
    pub fn new(segments: Vec<Segment>) -> Self {
        Self { common: 0, segments }
    }

    /// The plan with `common` more tokens at its front, which all of its segments see; `are_queried` says whether they
    /// have queries of their own.
    pub fn behind(&self, common: i64, are_queried: bool) -> Self {
        let later = |range: &Range<i64>| range.start + common..range.end + common;
        let first = are_queried.then_some(Segment { prefix: 0..0, tokens: 0..common });
        let others = self.segments.iter().map(|s| Segment { prefix: later(&s.prefix), tokens: later(&s.tokens) });
        Self { common: self.common + common, segments: first.into_iter().chain(others).collect() }
    }

    /// Tokens at the front that have no query.
    pub fn ahead(&self) -> i64 {
        self.segments.first().map_or(0, |first| first.tokens.start)
    }

    /// The common tokens that a segment sees before its prefix.
    fn common_of(&self, segment: &Segment) -> i64 {
        if segment.tokens.start < self.common { 0 } else { self.common }
    }
}

/// Softmax attention of packed tokens.
///
/// # Shapes
/// `query: [total_tokens, num_heads, head_dim]`, `key`, `value`: `[total_tokens, num_kv_heads, head_dim]`; returns
/// query's shape. `num_kv_heads` divides `num_heads`; each key head serves a run of query heads. A token sees
/// at most the last `window` tokens where a window is given (Mistral). Common tokens in no segment have no row in
/// `query`.
///
/// On the CPU in f32 and bf16 this is one node of the graph that keeps its inputs, its output and one number per
/// query; elsewhere libtorch's attention runs segment by segment.
///
/// # Errors
/// [`TensorError::Shape`] and [`TensorError::Argument`] when shapes, plan or window do not fit.
pub fn packed_attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    plan: &Arc<AttentionPlan>,
    scale: f64,
    window: Option<i64>,
) -> Result<Tensor> {
    let shape = Shape::of(query, key, value, plan, scale, window)?;
    if is_fusable(&[query, key, value]) {
        return cpu_attention(query, key, value, plan, shape);
    }
    let parts = plan
        .segments
        .iter()
        .map(|segment| {
            let view = View::new(plan, segment, query, key, value, window);
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
        .collect::<Result<Vec<_>>>()?;
    Ok(if parts.is_empty() { query.shallow_clone() } else { Tensor::cat(&parts, 0) })
}

/// What the kernel is told besides pointers and spans.
#[derive(Clone, Copy)]
struct Shape {
    tokens: i64,
    heads: i64,
    kv_heads: i64,
    dim: i64,
    common: i64,
    ahead: i64,
    /// 0 where there is none.
    window: i64,
    scale: f32,
}

impl Shape {
    fn of(
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        plan: &AttentionPlan,
        scale: f64,
        window: Option<i64>,
    ) -> Result<Self> {
        let layout = "[total_tokens, num_heads, head_dim]";
        let (queries, heads, dim) = query.size3().map_err(|_| TensorError::shape("query", query, layout))?;
        let (common, ahead) = (plan.common, plan.ahead());
        if ahead != 0 && ahead != common {
            let found = format!("segments from token {ahead} on after {common} common tokens");
            return Err(TensorError::argument(
                "plan",
                found,
                "segments from token 0 on, or from the first that is not common",
            ));
        }
        let tokens = queries + ahead;
        let kv_heads = key.size().get(1).copied().unwrap_or(0);
        if kv_heads == 0 || heads % kv_heads != 0 || key.size() != [tokens, kv_heads, dim] {
            return Err(TensorError::shape("key", key, format!("[{tokens}, a divisor of {heads}, {dim}]")));
        }
        if value.size() != key.size() {
            return Err(TensorError::shape("value", value, format!("{:?} as key", key.size())));
        }
        if window.is_some_and(|window| window < 1) {
            return Err(TensorError::argument("window", window.unwrap_or(0), "at least 1 token"));
        }
        let mut covered = ahead;
        for Segment { prefix, tokens } in &plan.segments {
            let prefix_fits = prefix.is_empty() || (prefix.start >= common && prefix.end <= tokens.start);
            let common_fits = tokens.start >= common || tokens.end == common && tokens.start == 0;
            if tokens.start != covered || tokens.end < tokens.start || !prefix_fits || !common_fits {
                let found = format!("a segment of tokens {tokens:?} after prefix {prefix:?}");
                return Err(TensorError::argument("plan", found, &format!("one that starts at token {covered}")));
            }
            covered = tokens.end;
        }
        if covered != tokens {
            return Err(TensorError::argument("plan", format!("{covered} tokens"), &format!("{tokens} tokens")));
        }
        let (window, scale) = (window.unwrap_or(0), scale as f32);
        Ok(Self { tokens, heads, kv_heads, dim, common, ahead, window, scale })
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
    fn new(
        plan: &AttentionPlan,
        segment: &Segment,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        window: Option<i64>,
    ) -> Self {
        let rows = |t: &Tensor, range: &Range<i64>| t.narrow(0, range.start, range.end - range.start);
        let common = plan.common_of(segment);
        let repeats = query.size()[1] / key.size()[1];
        let keys = |t: &Tensor| {
            let own = rows(t, &segment.tokens);
            let before = [0..common, segment.prefix.clone()].into_iter().filter(|run| !run.is_empty());
            let mut seen: Vec<Tensor> = before.map(|run| rows(t, &run)).collect();
            let seen = if seen.is_empty() {
                own
            } else {
                seen.push(own);
                Tensor::cat(&seen, 0)
            };
            repeat_heads(&seen, repeats).transpose(0, 1).unsqueeze(0)
        };
        let ahead = plan.ahead();
        let own = rows(query, &(segment.tokens.start - ahead..segment.tokens.end - ahead));
        let before = common + segment.prefix.end - segment.prefix.start;
        let mask = mask(before, segment.tokens.end - segment.tokens.start, window, query);
        Self { query: own.transpose(0, 1).unsqueeze(0), key: keys(key), value: keys(value), mask }
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

/// The mask of `own` queries that `before` keys stand before, or none where it is plainly causal.
fn mask(before: i64, own: i64, window: Option<i64>, like: &Tensor) -> Option<Tensor> {
    let window = window.filter(|&window| before + own > window);
    if before == 0 && window.is_none() {
        return None;
    }
    let options = (Kind::Int64, like.device());
    // Row i stands at position before + i.
    let rows = (Tensor::arange(own, options) + before).unsqueeze(1);
    let columns = Tensor::arange(before + own, options).unsqueeze(0);
    let mut is_hidden = columns.gt_tensor(&rows);
    if let Some(window) = window {
        is_hidden = is_hidden.logical_or(&columns.le_tensor(&(rows - window)));
    }
    let mask = Tensor::zeros([own, before + own], (like.kind(), like.device()));
    Some(mask.masked_fill(&is_hidden, f64::NEG_INFINITY))
}

/// A [`Segment`] as the kernel reads it.
#[repr(C)]
struct Span {
    prefix_start: i64,
    prefix_end: i64,
    start: i64,
    end: i64,
}

unsafe extern "C" {
    fn pt_attention(
        is_bf16: c_int,
        query: *const c_void,
        key: *const c_void,
        value: *const c_void,
        out: *mut c_void,
        row_lse: *mut f32,
        spans: *const Span,
        num_spans: i64,
        tokens: i64,
        heads: i64,
        kv_heads: i64,
        dim: i64,
        common: i64,
        ahead: i64,
        window: i64,
        scale: f32,
    );
    fn pt_attention_backward(
        is_bf16: c_int,
        query: *const c_void,
        key: *const c_void,
        value: *const c_void,
        out: *const c_void,
        grad_out: *const c_void,
        row_lse: *const f32,
        grad_query: *mut c_void,
        grad_key: *mut c_void,
        grad_value: *mut c_void,
        spans: *const Span,
        families: *const i64,
        num_families: i64,
        tokens: i64,
        heads: i64,
        kv_heads: i64,
        dim: i64,
        common: i64,
        ahead: i64,
        window: i64,
        scale: f32,
    );
}

fn spans(plan: &AttentionPlan) -> Vec<Span> {
    let span = |Segment { prefix, tokens }: &Segment| {
        // An empty prefix may stand anywhere: the kernel only asks that it be empty.
        let prefix = if prefix.is_empty() { 0..0 } else { prefix.clone() };
        Span { prefix_start: prefix.start, prefix_end: prefix.end, start: tokens.start, end: tokens.end }
    };
    plan.segments.iter().map(span).collect()
}

/// Cuts the segments where no later one reads an earlier one's tokens: indices of each family's first segment, and
/// the number of segments at the end. The families' gradients are independent of one another.
fn families(spans: &[Span]) -> Vec<i64> {
    let mut starts: Vec<usize> = Vec::new();
    for (index, span) in spans.iter().enumerate() {
        starts.push(index);
        if span.prefix_start < span.prefix_end {
            // Merged with every family that ends after the prefix begins.
            while starts.len() > 1 && spans[starts[starts.len() - 1]].start > span.prefix_start {
                starts.pop();
            }
        }
    }
    starts.push(spans.len());
    starts.into_iter().map(|index| index as i64).collect()
}

/// The kernel of csrc/attention.cpp as one node of the graph.
fn cpu_attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    plan: &Arc<AttentionPlan>,
    shape: Shape,
) -> Result<Tensor> {
    let saved = [query, key, value].map(|t| t.detach().contiguous());
    let Shape { tokens, heads, kv_heads, dim, common, ahead, window, scale } = shape;
    let [q, k, v] = &saved;
    let output = no_grad(|| q.empty_like());
    let row_lse = Tensor::empty([tokens - ahead, heads], (Kind::Float, q.device()));
    let spans = spans(plan);
    // SAFETY: contiguous CPU tensors of one kind and the sizes given, `Shape::of` checked that the spans lie within
    // them; all outlive the call, which keeps no pointer.
    unsafe {
        pt_attention(
            is_bf16(q),
            ptr(q),
            ptr(k),
            ptr(v),
            ptr(&output),
            ptr(&row_lse).cast(),
            spans.as_ptr(),
            spans.len() as i64,
            tokens,
            heads,
            kv_heads,
            dim,
            common,
            ahead,
            window,
            scale,
        );
    }
    // The output is needed again, but the node must not hold the tensor that holds the node.
    let saved_output = output.detach();
    attach_backward("packed_attention", &[query, key, value], &[&output], move |grads| {
        let Some(grad) = grads.into_iter().next().flatten() else { return Ok(vec![None, None, None]) };
        let [q, k, v] = &saved;
        let grad = grad.to_kind(q.kind()).contiguous();
        let [grad_q, grad_k, grad_v] = [q, k, v].map(Tensor::empty_like);
        let families = families(&spans);
        // SAFETY: as above, for three more tensors of the sizes of query, key and value; `families` rises from 0 to
        // the number of spans, and no span's prefix begins before its family.
        unsafe {
            pt_attention_backward(
                is_bf16(q),
                ptr(q),
                ptr(k),
                ptr(v),
                ptr(&saved_output),
                ptr(&grad),
                ptr(&row_lse).cast(),
                ptr(&grad_q),
                ptr(&grad_k),
                ptr(&grad_v),
                spans.as_ptr(),
                families.as_ptr(),
                families.len() as i64 - 1,
                tokens,
                heads,
                kv_heads,
                dim,
                common,
                ahead,
                window,
                scale,
            );
        }
        Ok(vec![Some(grad_q), Some(grad_k), Some(grad_v)])
    })?;
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::*;

    use tch::Device;

    fn plan() -> Arc<AttentionPlan> {
        Arc::new(AttentionPlan::new(vec![
            Segment { prefix: 0..0, tokens: 0..4 },
            Segment { prefix: 0..4, tokens: 4..7 },
            Segment { prefix: 0..4, tokens: 7..9 },
            Segment { prefix: 9..9, tokens: 9..14 },
        ]))
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
        let _lock = crate::random::test_lock();
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

    fn segments(parts: &[(Range<i64>, Range<i64>)]) -> Arc<AttentionPlan> {
        let segment =
            |(prefix, tokens): &(Range<i64>, Range<i64>)| Segment { prefix: prefix.clone(), tokens: tokens.clone() };
        Arc::new(AttentionPlan::new(parts.iter().map(segment).collect()))
    }

    /// The kernel in f32 and bf16 against libtorch's attention in f64, over tiles of every kind: longer and shorter
    /// than one, ragged at both ends, a width that fills no vector.
    #[test]
    fn the_kernel_equals_libtorch_in_f64() {
        let _lock = crate::random::test_lock();
        let plan = segments(&[
            (0..0, 0..150),
            (0..150, 150..200),
            (0..150, 200..331),
            (0..0, 331..332),
            (331..332, 332..340),
            (0..0, 340..507),
            (0..0, 507..507),
        ]);
        for (dim, heads, kv_heads, window) in
            [(64, 6, 2, None), (8, 2, 2, None), (20, 3, 1, Some(40)), (64, 2, 1, Some(1)), (128, 2, 2, Some(200))]
        {
            for (kind, tolerance) in [(Kind::Float, 2e-6), (Kind::BFloat16, 2e-2)] {
                let draw = |heads: i64| Tensor::randn([507, heads, dim], (Kind::Float, Device::Cpu)).to_kind(kind);
                let own = [draw(heads), draw(kv_heads), draw(kv_heads)].map(|t| t.set_requires_grad(true));
                let wide = own.each_ref().map(|t| t.detach().to_kind(Kind::Double).set_requires_grad(true));
                let scale = 1.0 / (dim as f64).sqrt();
                let grad = draw(heads);
                let run = |[q, k, v]: &[Tensor; 3]| packed_attention(q, k, v, &plan, scale, window).unwrap();
                let (out, want) = (run(&own), run(&wide));
                crate::autograd::backward(&[out.shallow_clone()], &[grad.shallow_clone()]).unwrap();
                crate::autograd::backward(&[want.shallow_clone()], &[grad.to_kind(Kind::Double)]).unwrap();
                let close = |name: &str, a: &Tensor, b: &Tensor| {
                    let size = b.abs().max().double_value(&[]).max(1.0);
                    let error = (a.to_kind(Kind::Double) - b).abs().max().double_value(&[]) / size;
                    assert!(error < tolerance, "{name}, dim {dim}, window {window:?}, {kind:?}: {error}");
                };
                close("out", &out, &want);
                for (name, (a, b)) in ["query", "key", "value"].iter().zip(own.iter().zip(&wide)) {
                    close(name, &a.grad(), &b.grad());
                }
            }
        }
    }

    /// Tokens that all segments see, with queries and without, against copies of them before each sequence.
    #[test]
    fn common_tokens_stand_before_every_sequence() {
        let _lock = crate::random::test_lock();
        let n = 21;
        // A prompt with two completions, and a sequence: as one batch, and as three sequences.
        let plan = segments(&[(0..0, 0..30), (0..30, 30..83), (0..30, 83..90), (0..0, 90..150), (0..0, 150..150)]);
        let sequences: [Vec<i64>; 3] = [(0..83).collect(), (0..30).chain(83..90).collect(), (90..150).collect()];
        for (are_queried, window, dim, kind, tolerance) in [
            (true, None, 8, Kind::Float, 2e-6),
            (false, None, 64, Kind::Float, 2e-6),
            (true, Some(25), 20, Kind::Float, 2e-6),
            (false, Some(40), 16, Kind::Float, 2e-6),
            (true, None, 16, Kind::BFloat16, 2e-2),
            (false, Some(25), 16, Kind::Double, 1e-12),
        ] {
            let draw = |heads: i64| {
                Tensor::randn([n + 150, heads, dim], (Kind::Float, Device::Cpu)).to_kind(kind).set_requires_grad(true)
            };
            let own = [draw(4), draw(2), draw(2)];
            let wide = own.each_ref().map(|t| t.detach().to_kind(Kind::Double).set_requires_grad(true));
            let grad = Tensor::randn([n + 150, 4, dim], (Kind::Float, Device::Cpu)).to_kind(kind);
            let from = if are_queried { 0 } else { n };
            let queried = |t: &Tensor| t.narrow(0, from, n + 150 - from);
            let scale = 1.0 / (dim as f64).sqrt();
            let common = Arc::new(plan.behind(n, are_queried));
            let out = packed_attention(&queried(&own[0]), &own[1], &own[2], &common, scale, window).unwrap();
            crate::autograd::backward(&[out.shallow_clone()], &[queried(&grad)]).unwrap();
            // What each sequence sees, as one causal run; gradients only of what is asked once.
            let close = |name: &str, a: &Tensor, b: &Tensor| {
                let size = b.abs().max().double_value(&[]).max(1.0);
                let error = (a.to_kind(Kind::Double) - b).abs().max().double_value(&[]) / size;
                assert!(error < tolerance, "{name}, {are_queried}, window {window:?}, dim {dim}, {kind:?}: {error}");
            };
            let mut done: Vec<i64> = if are_queried { vec![] } else { (0..n).collect() };
            for ids in &sequences {
                let rows: Vec<i64> = (0..n).chain(ids.iter().map(|id| id + n)).collect();
                let index = Tensor::from_slice(&rows);
                let [q, k, v] = wide.each_ref().map(|t| t.index_select(0, &index));
                let causal = segments(&[(0..0, 0..rows.len() as i64)]);
                let want = packed_attention(&q, &k, &v, &causal, scale, window).unwrap();
                let fresh: Vec<i64> = (0..rows.len() as i64).filter(|&i| !done.contains(&rows[i as usize])).collect();
                let at: Vec<i64> = fresh.iter().map(|&i| rows[i as usize]).collect();
                let (fresh, at_all) = (Tensor::from_slice(&fresh), Tensor::from_slice(&at));
                close("out", &out.index_select(0, &(&at_all - from)), &want.index_select(0, &fresh));
                let upstream = grad.index_select(0, &at_all).to_kind(Kind::Double);
                crate::autograd::backward(&[want.index_select(0, &fresh)], &[upstream]).unwrap();
                done.extend(at);
            }
            for (name, (a, b)) in ["query", "key", "value"].iter().zip(own.iter().zip(&wide)) {
                close(name, &a.grad(), &b.grad());
            }
        }
    }

    #[test]
    fn what_a_segment_does_not_see_cannot_reach_it() {
        let _lock = crate::random::test_lock();
        let plan = segments(&[(0..0, 0..20), (0..0, 20..53)]);
        let draw = || Tensor::randn([53, 2, 16], (Kind::Float, Device::Cpu));
        let (q, k, v) = (draw(), draw(), draw());
        let run = || packed_attention(&q, &k, &v, &plan, 0.25, None).unwrap().narrow(0, 0, 20);
        let before = run();
        for t in [&k, &v] {
            let _ = t.narrow(0, 20, 33).fill_(f64::NAN);
        }
        assert!(run().equal(&before));
    }

    #[test]
    fn shapes_and_plans_that_do_not_fit_are_refused() {
        let zeros = |heads: i64| Tensor::zeros([8, heads, 4], (Kind::Float, Device::Cpu));
        let run = |q: &Tensor, k: &Tensor, plan: &Arc<AttentionPlan>, window| {
            packed_attention(q, k, k, plan, 1.0, window).map(drop).map_err(|e| e.to_string())
        };
        let whole = segments(&[(0..0, 0..8)]);
        assert!(run(&zeros(4), &zeros(2), &whole, None).is_ok());
        assert!(run(&zeros(4), &zeros(3), &whole, None).unwrap_err().contains("key"));
        assert!(run(&zeros(4), &zeros(2), &whole, Some(0)).unwrap_err().contains("window"));
        for parts in [vec![(0..0, 0..7)], vec![(0..0, 0..9)], vec![(0..0, 1..8)], vec![(0..0, 0..4), (2..6, 4..8)]] {
            assert!(run(&zeros(4), &zeros(2), &segments(&parts), None).unwrap_err().contains("plan"), "{parts:?}");
        }
        // Common tokens are a segment of their own, or in none.
        for parts in [vec![(0..0, 0..8)], vec![(0..0, 0..3), (1..3, 3..8)], vec![(0..0, 2..8)]] {
            let plan = Arc::new(AttentionPlan { common: 3, ..AttentionPlan::clone(&segments(&parts)) });
            assert!(run(&zeros(4), &zeros(2), &plan, None).unwrap_err().contains("plan"), "{parts:?}");
        }
    }
}
