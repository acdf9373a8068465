//! Weights held as a base that others share and a 1-bit delta of their own.

use std::rc::Rc;

use pt_quant::Bf16;
use pt_quant::delta::{BitDelta, BitDeltaRef, DeltaArithmetic, DeltaMatrix, DeltaOptions, DeltaScale, ScaleAxis};
use pt_quant::dense::Output;
use tch::{Device, Kind, Tensor, no_grad};

use super::Weight;
use crate::autograd::attach_backward;
use crate::pool::{exec, with_delta_workspace};
use crate::slices::{NewTensor, bf16s, f32s};
use crate::{Result, TensorError};

/// The 1-bit delta between two dense weights `[out_features, in_features]`: the signs of `fine_tuned − base` and the mean of its magnitudes
/// (BitDelta, Liu et al. 2024, <https://arxiv.org/abs/2402.10193>).
///
/// # Errors
/// [`TensorError::Shape`] unless both are matrices of one shape, [`TensorError::Quant`] when a difference is not finite.
pub fn fit_delta(base: &Tensor, fine_tuned: &Tensor, axis: ScaleAxis) -> Result<BitDelta> {
    if base.dim() != 2 || base.size() != fine_tuned.size() {
        return Err(TensorError::shape("fine_tuned", fine_tuned, format!("{:?} as the base, two axes", base.size())));
    }
    let (out_features, in_features) = base.size2()?;
    let (rows, columns) = (out_features as usize, in_features as usize);
    let [base, fine_tuned] = [base, fine_tuned].map(|tensor| tensor.detach().to_device(Device::Cpu).contiguous());
    if base.kind() == Kind::BFloat16 && fine_tuned.kind() == Kind::BFloat16 {
        return Ok(BitDelta::fit::<Bf16>(bf16s(&base), bf16s(&fine_tuned), rows, columns, axis, &exec())?);
    }
    let [base, fine_tuned] = [base, fine_tuned].map(|tensor| tensor.to_kind(Kind::Float));
    Ok(BitDelta::fit::<f32>(f32s(&base), f32s(&fine_tuned), rows, columns, axis, &exec())?)
}

/// `base + delta_scale · signs`: many fine-tunes over one base, each an eighth of a byte a weight.
///
/// The base may be any [`Weight`]. On the CPU the delta is added to the base's product by table lookups, forward and backward; on other
/// devices the signs are expanded by libtorch's operations for each product.
#[derive(Debug)]
pub struct DeltaWeight {
    base: Rc<dyn Weight>,
    store: Store,
}

#[derive(Debug)]
enum Store {
    Cpu(Rc<DeltaMatrix>),
    Tensors(Tensors),
}

impl DeltaWeight {
    /// Puts a delta on a base.
    ///
    /// # Errors
    /// [`TensorError::Argument`] when the two differ in shape.
    pub fn new(base: Rc<dyn Weight>, delta: BitDeltaRef<'_>) -> Result<Self> {
        let size = (delta.signs().out_features() as i64, delta.signs().in_features() as i64);
        if size != base.size() {
            let expected = format!("{:?}, the base's shape", base.size());
            return Err(TensorError::Argument { what: "delta".into(), found: format!("{size:?}"), expected });
        }
        let store = match base.device() {
            Device::Cpu => Store::Cpu(Rc::new(DeltaMatrix::new(delta, &exec())?)),
            device => Store::Tensors(Tensors::new(delta, device)?),
        };
        Ok(Self { base, store })
    }

    /// The weight that the delta is on.
    pub fn base(&self) -> &Rc<dyn Weight> {
        &self.base
    }
}

impl Weight for DeltaWeight {
    fn size(&self) -> (i64, i64) {
        self.base.size()
    }

    fn dense(&self) -> Result<Tensor> {
        let base = self.base.dense()?;
        let delta = match &self.store {
            Store::Cpu(matrix) => Tensors::new(matrix.to_delta().as_ref(), Device::Cpu)?.dense()?,
            Store::Tensors(tensors) => tensors.dense()?,
        };
        Ok((base.to_kind(Kind::Float) + delta).to_kind(base.kind()))
    }

    fn project(&self, hidden_states: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let y = self.base.project(hidden_states, bias)?;
        Ok(y + self.store.project(hidden_states)?)
    }

    fn project_backward(&self, grad: &Tensor) -> Result<Tensor> {
        Ok(self.base.project_backward(grad)? + self.store.project_backward(grad)?)
    }

    fn device(&self) -> Device {
        self.base.device()
    }

    fn kind(&self) -> Kind {
        self.base.kind()
    }
}

impl Store {
    fn shallow_clone(&self) -> Self {
        match self {
            Self::Cpu(matrix) => Self::Cpu(matrix.clone()),
            Self::Tensors(tensors) => Self::Tensors(tensors.shallow_clone()),
        }
    }

    /// The delta's part of the output, with a graph to the input.
    fn project(&self, x: &Tensor) -> Result<Tensor> {
        let y = no_grad(|| match self {
            Self::Cpu(matrix) => multiply(matrix, &x.detach(), Product::Forward),
            Self::Tensors(tensors) => Ok(x.detach().f_matmul(&tensors.dense()?.to_kind(x.kind()).tr())?),
        })?;
        let store = self.shallow_clone();
        attach_backward("delta_linear", &[x], &[&y], move |grads| {
            let Some(grad) = grads.into_iter().next().flatten() else { return Ok(vec![None]) };
            Ok(vec![Some(store.project_backward(&grad)?)])
        })?;
        Ok(y)
    }

    fn project_backward(&self, grad: &Tensor) -> Result<Tensor> {
        no_grad(|| match self {
            Self::Cpu(matrix) => multiply(matrix, &grad.detach(), Product::Backward),
            Self::Tensors(tensors) => Ok(grad.detach().f_matmul(&tensors.dense()?.to_kind(grad.kind()))?),
        })
    }
}

#[derive(Clone, Copy)]
enum Product {
    Forward,
    Backward,
}

/// `[.., n]` times the delta, in the kind of x; computed in f32, from bf16 as it is and from other kinds by way of f32.
fn multiply(matrix: &DeltaMatrix, x: &Tensor, product: Product) -> Result<Tensor> {
    let (depth, width) = match product {
        Product::Forward => (matrix.in_features(), matrix.out_features()),
        Product::Backward => (matrix.out_features(), matrix.in_features()),
    };
    let kind = if x.kind() == Kind::BFloat16 { Kind::BFloat16 } else { Kind::Float };
    let input = x.to_kind(kind).contiguous();
    let mut size = input.size();
    if size.last() != Some(&(depth as i64)) {
        return Err(TensorError::shape("hidden_states", x, format!("[.., {depth}]")));
    }
    *size.last_mut().unwrap_or(&mut 0) = width as i64;
    let rows = input.numel().checked_div(depth).unwrap_or(0);
    let mut y = NewTensor::empty(&size, kind);
    let options = DeltaOptions { arithmetic: DeltaArithmetic::F32, output: Output::Replace };
    with_delta_workspace(|workspace| match (kind, product) {
        (Kind::BFloat16, Product::Forward) => {
            matrix.forward(bf16s(&input), y.bf16s_mut(), rows, options, workspace, &exec())
        }
        (Kind::BFloat16, Product::Backward) => {
            matrix.backward(bf16s(&input), y.bf16s_mut(), rows, options, workspace, &exec())
        }
        (_, Product::Forward) => matrix.forward(f32s(&input), y.f32s_mut(), rows, options, workspace, &exec()),
        (_, Product::Backward) => matrix.backward(f32s(&input), y.f32s_mut(), rows, options, workspace, &exec()),
    })?;
    Ok(y.into_tensor().to_kind(x.kind()))
}

/// The parts on a device that has no kernels of ours.
#[derive(Debug)]
struct Tensors {
    /// `[out_features, ceil(in_features / 64) · 8]`, u8, the first weight in the lowest bit.
    bits: Tensor,
    /// f32, broadcast against `[out_features, num_groups]`: a group of 128 inputs, or all of them.
    scale: Tensor,
    size: (i64, i64),
}

impl Tensors {
    fn new(delta: BitDeltaRef<'_>, device: Device) -> Result<Self> {
        let signs = delta.signs();
        let (rows, columns) = (signs.out_features() as i64, signs.in_features() as i64);
        let bytes: Vec<u8> = signs.words().iter().flat_map(|word| word.to_le_bytes()).collect();
        let bits = Tensor::f_from_slice(&bytes)?.f_view([rows, 8 * signs.words_per_row() as i64])?;
        let scale = match delta.scale() {
            DeltaScale::Matrix(scale) => Tensor::f_from_slice(&[scale])?.f_view([1, 1])?,
            DeltaScale::Row(scales) => Tensor::f_from_slice(scales)?.f_view([rows, 1])?,
            DeltaScale::Group128(scales) => Tensor::f_from_slice(scales)?.f_view([rows, -1])?,
        };
        Ok(Self { bits: bits.f_to_device(device)?, scale: scale.f_to_device(device)?, size: (rows, columns) })
    }

    fn shallow_clone(&self) -> Self {
        Self { bits: self.bits.shallow_clone(), scale: self.scale.shallow_clone(), size: self.size }
    }

    /// `delta_scale · signs`, f32.
    fn dense(&self) -> Result<Tensor> {
        let (rows, columns) = self.size;
        let places = Tensor::f_from_slice(&[1u8, 2, 4, 8, 16, 32, 64, 128])?.f_to_device(self.bits.device())?;
        let is_set = self.bits.f_unsqueeze(-1)?.f_bitwise_and_tensor(&places)?.f_ne(0)?; // [rows, bytes, 8]
        let signs = is_set.f_view([rows, -1])?.f_narrow(1, 0, columns)?.f_to_kind(Kind::Float)? * 2.0 - 1.0;
        let scale = match self.scale.size()[1] {
            1 => self.scale.shallow_clone(),
            _ => {
                let group = pt_quant::delta::SCALE_GROUP as i64;
                self.scale.f_repeat_interleave_self_int(group, 1, None)?.f_narrow(1, 0, columns)?
            }
        };
        Ok(signs * scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DenseWeight, Nf4Options, Nf4Weight};

    fn draw(size: &[i64], kind: Kind) -> Tensor {
        Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind)
    }

    fn distance(a: &Tensor, b: &Tensor) -> f64 {
        let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
        ((a - &b).abs().max() / b.abs().max()).double_value(&[])
    }

    #[test]
    fn it_projects_forward_and_backward_as_its_dense_weight_over_any_base() {
        let _lock = crate::random::test_lock();
        for (kind, tolerance) in [(Kind::Float, 3e-6), (Kind::BFloat16, 2e-2), (Kind::Half, 3e-3)] {
            for axis in [ScaleAxis::Matrix, ScaleAxis::Row, ScaleAxis::Group128] {
                let dense = draw(&[96, 200], kind);
                let delta = fit_delta(&dense, &(&dense + 0.1 * draw(&[96, 200], kind)), axis).unwrap();
                let bases: [Rc<dyn Weight>; 2] = [
                    Rc::new(Nf4Weight::quantize(&dense, Nf4Options::default()).unwrap()),
                    Rc::new(DenseWeight::new(dense).unwrap()),
                ];
                for base in bases {
                    let weight = DeltaWeight::new(base, delta.as_ref()).unwrap();
                    let parts = Store::Tensors(Tensors::new(delta.as_ref(), Device::Cpu).unwrap());
                    let expanded = DeltaWeight { base: weight.base().clone(), store: parts };
                    assert_eq!(weight.dense().unwrap(), expanded.dense().unwrap());
                    let wide = weight.base().dense().unwrap().to_kind(Kind::Double)
                        + Tensors::new(delta.as_ref(), Device::Cpu).unwrap().dense().unwrap().to_kind(Kind::Double);
                    for weight in [&weight, &expanded] {
                        let x = draw(&[2, 3, 200], kind).set_requires_grad(true);
                        let x64 = x.detach().to_kind(Kind::Double).set_requires_grad(true);
                        let bias = draw(&[96], kind);
                        let y = weight.project(&x, Some(&bias)).unwrap();
                        let want = x64.linear(&wide, Some(&bias.to_kind(Kind::Double)));
                        assert!(distance(&y, &want) < tolerance, "{kind:?} {axis:?} {}", distance(&y, &want));
                        crate::autograd::backward(&[y.shallow_clone()], &[y.ones_like()]).unwrap();
                        crate::autograd::backward(&[want.shallow_clone()], &[want.ones_like()]).unwrap();
                        assert!(distance(&x.grad(), &x64.grad()) < tolerance, "{kind:?} {axis:?} backward");
                    }
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (small, large) = (draw(&[4, 8], Kind::Float), draw(&[4, 9], Kind::Float));
        assert!(matches!(fit_delta(&small, &large, ScaleAxis::Row), Err(TensorError::Shape { .. })));
        let delta = fit_delta(&small, &small, ScaleAxis::Row).unwrap();
        let base: Rc<dyn Weight> = Rc::new(DenseWeight::new(large).unwrap());
        assert!(matches!(DeltaWeight::new(base, delta.as_ref()), Err(TensorError::Argument { .. })));
        let infinite = Tensor::full([4, 8], f64::INFINITY, (Kind::Float, Device::Cpu));
        assert!(matches!(fit_delta(&small, &infinite, ScaleAxis::Matrix), Err(TensorError::Quant(_))));
    }
}
