//! Element-wise parts of a decoder layer: one pass over memory each on the CPU, plain libtorch elsewhere.
//!
//! Each has its own backward pass and keeps only what that needs. Arithmetic is in f32 with one rounding at the end.

use crate::autograd::{attach_backward, raw};
use crate::{Result, TensorError};
use std::ffi::{c_int, c_void};
use tch::{Device, Kind, Tensor, no_grad};

unsafe extern "C" {
    fn pt_rms_norm(
        is_bf16: c_int,
        x: *const c_void,
        w: *const c_void,
        y: *mut c_void,
        rstd: *mut f32,
        rows: i64,
        n: i64,
        eps: f32,
    );
    fn pt_rms_norm_backward(
        is_bf16: c_int,
        g: *const c_void,
        x: *const c_void,
        w: *const c_void,
        rstd: *const f32,
        dx: *mut c_void,
        rows: i64,
        n: i64,
    );
    fn pt_swiglu(is_bf16: c_int, gate: *const c_void, up: *const c_void, y: *mut c_void, count: i64);
    fn pt_swiglu_backward(
        is_bf16: c_int,
        dy: *const c_void,
        gate: *const c_void,
        up: *const c_void,
        dgate: *mut c_void,
        dup: *mut c_void,
        count: i64,
    );
    fn pt_softmax_tile(
        is_bf16: c_int,
        x: *mut c_void,
        rows: i64,
        n: i64,
        scale: f32,
        labels: *const i64,
        first: i64,
        max: *mut f32,
        others: *mut f32,
        squares: *mut f32,
        label_logits: *mut f32,
        rescale: *mut f32,
    );
    fn pt_rotary(
        is_bf16: c_int,
        x: *const c_void,
        cos: *const f32,
        sin: *const f32,
        y: *mut c_void,
        rows: i64,
        heads: i64,
        head_dim: i64,
        sign: f32,
    );
}

/// Whether the one-pass loops apply: CPU tensors of one kind, f32 or bf16.
pub(crate) fn is_fusable(tensors: &[&Tensor]) -> bool {
    let kind = tensors[0].kind();
    matches!(kind, Kind::Float | Kind::BFloat16)
        && tensors.iter().all(|t| t.kind() == kind && t.device() == Device::Cpu)
}

pub(crate) fn is_bf16(tensor: &Tensor) -> c_int {
    c_int::from(tensor.kind() == Kind::BFloat16)
}

pub(crate) fn ptr(tensor: &Tensor) -> *mut c_void {
    debug_assert!(!raw(tensor).is_null() && tensor.is_contiguous());
    tensor.data_ptr()
}

/// Root-mean-square norm over the last axis times `weight`: y = x / √(mean x² + eps) · w.
///
/// Zhang and Sennrich 2019, <https://arxiv.org/abs/1910.07467>. `x: [.., n]`, `weight: [n]`; returns `[.., n]`.
///
/// # Errors
/// [`TensorError::Shape`] when `weight` is not `[n]`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let n = *x.size().last().unwrap_or(&0);
    if weight.size() != [n] {
        return Err(TensorError::shape("rms_norm weight", weight, format!("[{n}]")));
    }
    if !is_fusable(&[x, weight]) {
        let wide = if x.kind() == Kind::Double { x.shallow_clone() } else { x.to_kind(Kind::Float) };
        let rstd = (wide.square().mean_dim(-1, true, wide.kind()) + eps).rsqrt();
        return Ok((wide * rstd * weight).to_kind(x.kind()));
    }
    let (x_saved, w_saved) = (x.detach().contiguous(), weight.detach().contiguous());
    let rows = x.numel() as i64 / n.max(1);
    let y = no_grad(|| x_saved.empty_like());
    let rstd = Tensor::empty([rows], (Kind::Float, Device::Cpu));
    // SAFETY: contiguous CPU tensors of one kind, checked above; x and y hold rows · n elements, w holds n, rstd
    // holds rows. They outlive the call, which keeps no pointer.
    unsafe { pt_rms_norm(is_bf16(x), ptr(&x_saved), ptr(&w_saved), ptr(&y), ptr(&rstd).cast(), rows, n, eps as f32) };
    let wants_weight = weight.requires_grad();
    attach_backward("rms_norm", &[x, weight], &[&y], move |grads| {
        let Some(grad) = grads.into_iter().next().flatten() else { return Ok(vec![None, None]) };
        let grad = grad.to_kind(x_saved.kind()).contiguous();
        let dx = x_saved.empty_like();
        // SAFETY: as above; grad and dx have x's kind, size and layout.
        unsafe {
            pt_rms_norm_backward(
                is_bf16(&grad),
                ptr(&grad),
                ptr(&x_saved),
                ptr(&w_saved),
                ptr(&rstd).cast(),
                ptr(&dx),
                rows,
                n,
            );
        }
        let dw = wants_weight.then(|| {
            let normed = x_saved.view([rows, n]).to_kind(Kind::Float) * rstd.unsqueeze(1);
            (normed * grad.view([rows, n]).to_kind(Kind::Float))
                .sum_dim_intlist(0, false, Kind::Float)
                .to_kind(w_saved.kind())
        });
        Ok(vec![Some(dx), dw])
    })?;
    Ok(y)
}

/// SwiGLU: silu(gate) · up, element by element. Shazeer 2020, <https://arxiv.org/abs/2002.05202>.
///
/// Keeps `gate` and `up` for the backward pass and nothing else.
///
/// # Errors
/// [`TensorError::Shape`] when the two differ in shape.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.size() != up.size() {
        return Err(TensorError::shape("up", up, format!("{:?} as gate", gate.size())));
    }
    if !is_fusable(&[gate, up]) {
        return Ok(gate.silu() * up);
    }
    let (gate_saved, up_saved) = (gate.detach().contiguous(), up.detach().contiguous());
    let count = gate.numel() as i64;
    let y = no_grad(|| gate_saved.empty_like());
    // SAFETY: three contiguous CPU tensors of one kind and `count` elements, alive during the call.
    unsafe { pt_swiglu(is_bf16(gate), ptr(&gate_saved), ptr(&up_saved), ptr(&y), count) };
    attach_backward("swiglu", &[gate, up], &[&y], move |grads| {
        let Some(grad) = grads.into_iter().next().flatten() else { return Ok(vec![None, None]) };
        let grad = grad.to_kind(gate_saved.kind()).contiguous();
        let (dgate, dup) = (gate_saved.empty_like(), up_saved.empty_like());
        // SAFETY: as above, for five tensors.
        unsafe {
            pt_swiglu_backward(
                is_bf16(&grad),
                ptr(&grad),
                ptr(&gate_saved),
                ptr(&up_saved),
                ptr(&dgate),
                ptr(&dup),
                count,
            );
        }
        Ok(vec![Some(dgate), Some(dup)])
    })?;
    Ok(y)
}

/// What a softmax over tiles of the vocabulary has gathered so far, each `[rows]` f32 (f64 for f64 input).
#[derive(Debug)]
pub(crate) struct SoftmaxState {
    /// The greatest logit.
    pub(crate) max: Tensor,
    /// Σ exp(logit − max) over all entries but the label.
    pub(crate) others: Tensor,
    /// Σ exp(logit − max)² over the same entries; off the one-pass loop only where it is asked for.
    pub(crate) squares: Tensor,
    /// The label's logit, once its tile has been seen.
    pub(crate) label_logits: Tensor,
}

impl SoftmaxState {
    pub(crate) fn new(rows: i64, kind: Kind, device: Device) -> Self {
        let column = |value: f64| Tensor::full([rows], value, (kind, device));
        Self { max: column(f64::NEG_INFINITY), others: column(0.0), squares: column(0.0), label_logits: column(0.0) }
    }

    /// Takes in a tile of CPU logits, f32 or bf16, of the ids `first..`: one pass that turns `logits: [rows, ids]` in
    /// place into exp(scale · logit − max), the label's entry into next to nothing. Returns what sums over earlier
    /// tiles are to be multiplied by, `[rows]`.
    pub(crate) fn take_in(&mut self, logits: &Tensor, scale: f64, labels: &Tensor, first: i64) -> Tensor {
        let (rows, ids) = (logits.size()[0], logits.size()[1]);
        let labels = labels.contiguous();
        let rescale = self.max.empty_like();
        debug_assert!(is_fusable(&[logits]) && self.max.kind() == Kind::Float && labels.size() == [rows]);
        // SAFETY: contiguous CPU tensors: logits holds rows · ids elements of its kind, labels rows of i64, the five
        // columns rows of f32 each, made by `new`; the label's entry is touched only where it lies within the tile.
        unsafe {
            pt_softmax_tile(
                is_bf16(logits),
                ptr(logits),
                rows,
                ids,
                scale as f32,
                ptr(&labels).cast(),
                first,
                ptr(&self.max).cast(),
                ptr(&self.others).cast(),
                ptr(&self.squares).cast(),
                ptr(&self.label_logits).cast(),
                ptr(&rescale).cast(),
            );
        }
        rescale
    }
}

/// Rotary position embedding, halves form: (a, b) → (a·cos − b·sin, b·cos + a·sin).
///
/// Su et al. 2021, <https://arxiv.org/abs/2104.09864>, in the layout of Hugging Face's Llama.
/// `x: [tokens, heads, head_dim]`, `cos`, `sin`: `[tokens, head_dim / 2]` f32; returns x's shape.
///
/// # Errors
/// [`TensorError::Shape`] when the shapes do not fit.
pub fn apply_rotary(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (tokens, heads, head_dim) = x.size3().map_err(|_| TensorError::shape("x", x, "[tokens, heads, head_dim]"))?;
    for (name, table) in [("cos", cos), ("sin", sin)] {
        if table.size() != [tokens, head_dim / 2] || head_dim % 2 != 0 {
            return Err(TensorError::shape(name, table, format!("[{tokens}, {head_dim} / 2]")));
        }
    }
    if !is_fusable(&[x]) || !is_fusable(&[cos, sin]) || cos.kind() != Kind::Float {
        let halves = x.chunk(2, -1);
        let (cos, sin) = (cos.unsqueeze(1), sin.unsqueeze(1));
        let rotated = [&halves[0] * &cos - &halves[1] * &sin, &halves[1] * &cos + &halves[0] * &sin];
        return Ok(Tensor::cat(&rotated, -1).to_kind(x.kind()));
    }
    let (cos, sin) = (cos.contiguous(), sin.contiguous());
    let rotate = move |x: &Tensor, sign: f32| {
        let x = x.contiguous();
        let y = x.empty_like();
        // SAFETY: x and y are contiguous CPU tensors of tokens · heads · head_dim elements, the tables hold
        // tokens · head_dim / 2 floats; all outlive the call.
        unsafe {
            pt_rotary(is_bf16(&x), ptr(&x), ptr(&cos).cast(), ptr(&sin).cast(), ptr(&y), tokens, heads, head_dim, sign);
        }
        y
    };
    let y = no_grad(|| rotate(&x.detach(), 1.0));
    attach_backward("apply_rotary", &[x], &[&y], move |grads| Ok(vec![grads[0].as_ref().map(|g| rotate(g, -1.0))]))?;
    Ok(y)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values and gradients of the one-pass loop in f32 and bf16 against libtorch's own autograd in f64.
    fn check(function: impl Fn(&[Tensor]) -> Tensor, shapes: &[&[i64]]) {
        let _lock = crate::random::test_lock();
        for (kind, tolerance) in [(Kind::Float, 2e-6), (Kind::BFloat16, 2e-2)] {
            let leaves: Vec<Tensor> = shapes
                .iter()
                .map(|s| Tensor::randn(*s, (Kind::Float, Device::Cpu)).to_kind(kind).set_requires_grad(true))
                .collect();
            let wide: Vec<Tensor> =
                leaves.iter().map(|t| t.detach().to_kind(Kind::Double).set_requires_grad(true)).collect();
            let (y, want) = (function(&leaves), function(&wide));
            let grad = Tensor::randn(want.size(), (Kind::Float, Device::Cpu)).to_kind(kind);
            crate::autograd::backward(&[y.shallow_clone()], &[grad.shallow_clone()]).unwrap();
            crate::autograd::backward(&[want.shallow_clone()], &[grad.to_kind(Kind::Double)]).unwrap();
            let close = |a: &Tensor, b: &Tensor| {
                let scale = b.abs().max().double_value(&[]).max(1.0);
                let error = (a.to_kind(Kind::Double) - b).abs().max().double_value(&[]) / scale;
                assert!(error < tolerance, "{kind:?}: {error}");
            };
            close(&y, &want);
            for (a, b) in leaves.iter().zip(&wide) {
                close(&a.grad(), &b.grad());
            }
        }
    }

    #[test]
    fn rms_norm_equals_its_definition() {
        check(|t| rms_norm(&t[0], &t[1], 1e-5).unwrap(), &[&[7, 48], &[48]]);
        check(|t| rms_norm(&t[0], &t[1], 1e-5).unwrap(), &[&[200, 577], &[577]]);
    }

    #[test]
    fn swiglu_equals_its_definition() {
        check(|t| swiglu(&t[0], &t[1]).unwrap(), &[&[65, 1023], &[65, 1023]]);
    }

    #[test]
    fn swiglu_of_large_values_saturates() {
        let gate = Tensor::from_slice(&[-200f32, -90., 90., 200., 0.]);
        let y = swiglu(&gate, &gate.ones_like()).unwrap();
        let y = Vec::<f32>::try_from(&y).unwrap();
        assert!(y[0].abs() < 1e-30 && y[1].abs() < 1e-30);
        assert_eq!(y[2..], [90., 200., 0.]);
    }

    #[test]
    fn rotary_equals_its_definition() {
        let angles = Tensor::arange(5 * 4, (Kind::Float, Device::Cpu)).view([5, 4]);
        check(
            |t| {
                let kind = if t[0].kind() == Kind::Double { Kind::Double } else { Kind::Float };
                apply_rotary(&t[0], &angles.cos().to_kind(kind), &angles.sin().to_kind(kind)).unwrap()
            },
            &[&[5, 3, 8]],
        );
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let x = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu));
        assert!(rms_norm(&x, &Tensor::zeros([2], (Kind::Float, Device::Cpu)), 1e-5).is_err());
        assert!(swiglu(&x, &x.tr()).is_err());
        assert!(apply_rotary(&x, &x, &x).is_err());
    }
}
