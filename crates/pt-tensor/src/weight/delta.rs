//! Weights held as a base that others share and a 1-bit delta of their own.

use std::rc::Rc;

use pt_quant::delta::BitDeltaRef;
use tch::{Device, Kind, Tensor};

use super::{ScaledSigns, Weight};
use crate::{Result, TensorError};

/// `base + delta_scale · signs`: many fine-tunes over one base, each an eighth of a byte a weight.
///
/// The base may be any [`Weight`]; the delta's product is [`ScaledSigns::add_to`].
#[derive(Debug)]
pub struct DeltaWeight {
    base: Rc<dyn Weight>,
    signs: ScaledSigns,
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
        Ok(Self { signs: ScaledSigns::new(delta, base.device())?, base })
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

    /// The base, which others may share, and a bit a weight.
    fn num_bytes(&self) -> usize {
        let (out_features, in_features) = self.base.size();
        self.base.num_bytes() + out_features as usize * (in_features as usize).div_ceil(8)
    }

    fn dense(&self) -> Result<Tensor> {
        let base = self.base.dense()?;
        Ok((base.to_kind(Kind::Float) + self.signs.dense()?).to_kind(base.kind()))
    }

    fn project(&self, hidden_states: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        self.signs.add_to(&self.base.project(hidden_states, bias)?, hidden_states)
    }

    fn project_backward(&self, grad: &Tensor) -> Result<Tensor> {
        Ok(self.base.project_backward(grad)? + self.signs.project_backward(grad)?)
    }

    fn device(&self) -> Device {
        self.base.device()
    }

    fn kind(&self) -> Kind {
        self.base.kind()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DenseWeight, Nf4Options, Nf4Weight, ScaleAxis, fit_delta};

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
                    let wide = weight.base().dense().unwrap().to_kind(Kind::Double)
                        + weight.signs.dense().unwrap().to_kind(Kind::Double);
                    assert!(distance(&weight.dense().unwrap(), &wide) < tolerance);
                    let x = draw(&[2, 3, 200], kind).set_requires_grad(true);
                    let x64 = x.detach().to_kind(Kind::Double).set_requires_grad(true);
                    let bias = draw(&[96], kind);
                    let y = weight.project(&x, Some(&bias)).unwrap();
                    let want = x64.linear(&wide, Some(&bias.to_kind(Kind::Double)));
                    assert!(distance(&y, &want) < tolerance, "{kind:?} {axis:?} {}", distance(&y, &want));
                    crate::autograd::backward(&[y.shallow_clone()], &[y.ones_like()]).unwrap();
                    crate::autograd::backward(&[want.shallow_clone()], &[want.ones_like()]).unwrap();
                    assert!(distance(&x.grad(), &x64.grad()) < tolerance, "{kind:?} {axis:?} backward");
                    let back = weight.project_backward(&y.ones_like()).unwrap();
                    assert!(distance(&back, &x64.grad()) < tolerance, "{kind:?} {axis:?} project_backward");
                }
            }
        }
    }

    #[test]
    fn a_delta_of_another_shape_is_refused() {
        let _lock = crate::random::test_lock();
        let (small, large) = (draw(&[4, 8], Kind::Float), draw(&[4, 9], Kind::Float));
        let delta = fit_delta(&small, &small, ScaleAxis::Row).unwrap();
        let base: Rc<dyn Weight> = Rc::new(DenseWeight::new(large).unwrap());
        assert!(matches!(DeltaWeight::new(base, delta.as_ref()), Err(TensorError::Argument { .. })));
    }
}
