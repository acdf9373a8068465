//! DoRA (Liu et al. 2024, <https://arxiv.org/abs/2402.09353>): y = m ⊙ x·(W + s·B·A)ᵀ / ‖W + s·B·A‖, where m and the norm
//! have a value for each row of the weight.

use crate::Result;
use pt_tensor::{Kind, Tensor, Weight, no_grad};
use std::cell::RefCell;
use std::rc::{Rc, Weak};

/// Rows of a weight that are widened to f32 at a time.
const TILE_ROWS: i64 = 256;

/// The trained length of each row, and the norms that it stands in for.
#[derive(Debug)]
pub(super) struct Magnitude {
    /// m, `[out_features]`, f32.
    pub(super) vector: Tensor,
    norms: RefCell<Option<Norms>>,
}

/// What is known of the norms, and of which weight, A and B.
#[derive(Debug)]
struct Norms {
    weight: Weak<dyn Weight>,
    /// The version of a dense weight: merging writes into an embedding in place.
    weight_version: i64,
    /// ‖w‖² of each row, `[out_features]`, f32: it stays when A and B move.
    squares: Tensor,
    versions: (i64, i64),
    norm: Tensor,
}

impl Magnitude {
    /// Zeros; [`start`](Self::start) or a file sets them.
    pub(super) fn zeros(weight: &Rc<dyn Weight>) -> Result<Self> {
        let vector = Tensor::f_zeros([weight.size().0], (Kind::Float, weight.device()))?.set_requires_grad(true);
        Ok(Self { vector, norms: RefCell::new(None) })
    }

    /// Sets m to the norms, so that the layer is what it would be without it.
    pub(super) fn start(&self, weight: &Rc<dyn Weight>, a: &Tensor, b: &Tensor, scaling: f64) -> Result<()> {
        let norm = self.norm(weight, a, b, scaling)?;
        no_grad(|| self.vector.shallow_clone().f_copy_(&norm))?;
        Ok(())
    }

    /// m / ‖W + s·B·A‖, `[out_features]`, f32. As in the paper (section 4.3) and in PEFT the norm follows A and B but has
    /// no gradient.
    pub(super) fn scale(&self, weight: &Rc<dyn Weight>, a: &Tensor, b: &Tensor, scaling: f64) -> Result<Tensor> {
        Ok(self.vector.f_div(&self.norm(weight, a, b, scaling)?)?)
    }

    /// ‖W + s·B·A‖ of each row, computed again when one of the three has changed.
    ///
    /// As ‖w‖² + 2s·b·(w·Aᵀ) + s²·b·(A·Aᵀ)·bᵀ, so that no matrix of the weight's size is made, and a weight in 4 bits
    /// is multiplied as it is.
    fn norm(&self, weight: &Rc<dyn Weight>, a: &Tensor, b: &Tensor, scaling: f64) -> Result<Tensor> {
        let versions = (a.f_internal_version()?, b.f_internal_version()?);
        let weight_version = weight.parameter().map_or(Ok(0), Tensor::f_internal_version)?;
        let weak = Rc::downgrade(weight);
        let mut known = self.norms.borrow_mut();
        let same = known.take().filter(|k| k.weight.ptr_eq(&weak) && k.weight_version == weight_version);
        if let Some(norms) = same.as_ref().filter(|norms| norms.versions == versions) {
            let norm = norms.norm.shallow_clone();
            *known = same;
            return Ok(norm);
        }
        let norms = no_grad(|| -> Result<Norms> {
            let squares = match same {
                Some(norms) => norms.squares,
                None => squares(weight.as_ref())?,
            };
            let (a, b) = (a.detach(), b.detach());
            let sum = |t: Tensor| t.f_sum_dim_intlist([-1i64].as_slice(), false, Kind::Float);
            let cross = sum(&b * projected(weight.as_ref(), &a)?)?;
            let own = sum(b.f_mm(&a.f_mm(&a.tr())?)? * &b)?;
            let norm = (&squares + cross * (2.0 * scaling) + own * (scaling * scaling)).clamp_min(0.0).sqrt();
            // A row of zeros has length 0, and 0 / 0 would be no number.
            let norm = norm.clamp_min(f64::from(f32::MIN_POSITIVE));
            Ok(Norms { weight: weak, weight_version, squares, versions, norm })
        })?;
        let norm = norms.norm.shallow_clone();
        *known = Some(norms);
        Ok(norm)
    }
}

/// A function of a dense weight's rows in f32, tile by tile, put together again.
fn by_rows(dense: &Tensor, of: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let rows = dense.size()[0];
    let tile = |start: i64| of(&dense.narrow(0, start, TILE_ROWS.min(rows - start)).to_kind(Kind::Float));
    let tiles = (0..rows).step_by(TILE_ROWS as usize).map(tile).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::f_cat(&tiles, 0)?)
}

/// ‖w‖² of each row.
fn squares(weight: &dyn Weight) -> Result<Tensor> {
    by_rows(&weight.dense()?.detach(), |rows| {
        Ok(rows.square().f_sum_dim_intlist([-1i64].as_slice(), false, Kind::Float)?)
    })
}

/// W·Aᵀ in f32, `[out_features, rank]`.
fn projected(weight: &dyn Weight, a: &Tensor) -> Result<Tensor> {
    match weight.parameter() {
        Some(dense) => by_rows(&dense.detach(), |rows| Ok(rows.f_mm(&a.tr())?)),
        None => Ok(weight.project(&a.to_kind(weight.kind()), None)?.tr().to_kind(Kind::Float)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pt_tensor::{DenseWeight, Device, Nf4Options, Nf4Weight};

    fn wave(size: [i64; 2], pace: f64) -> Tensor {
        (Tensor::arange(size[0] * size[1], (Kind::Float, Device::Cpu)) * pace).sin().view(size)
    }

    #[test]
    fn norms_are_those_of_the_sum_and_follow_what_changes() {
        let dense = wave([300, 64], 0.7);
        let (a, mut b) = (wave([4, 64], 1.3), wave([300, 4], 0.9));
        let weights: [Rc<dyn Weight>; 3] = [
            Rc::new(DenseWeight::new(dense.copy()).unwrap()),
            Rc::new(DenseWeight::new(dense.to_kind(Kind::BFloat16)).unwrap()),
            Rc::new(Nf4Weight::quantize(&dense, Nf4Options::default()).unwrap()),
        ];
        let magnitude = Magnitude::zeros(&weights[0]).unwrap();
        for _ in 0..2 {
            for weight in &weights {
                let sum = weight.dense().unwrap().to_kind(Kind::Float) + b.mm(&a) * 1.5;
                let want = sum.square().sum_dim_intlist([1i64].as_slice(), false, Kind::Float).sqrt();
                magnitude.start(weight, &a, &b, 1.5).unwrap();
                let off = ((&magnitude.vector.detach() - &want) / &want).abs().max().double_value(&[]);
                assert!(off < 1e-6, "{weight:?} is off by {off:e}");
                let scale = magnitude.scale(weight, &a, &b, 1.5).unwrap();
                assert!(scale.requires_grad() && scale.eq(1.0).all().int64_value(&[]) == 1);
            }
            let _ = b.g_mul_scalar_(0.5);
        }
    }
}
