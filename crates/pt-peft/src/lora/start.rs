//! Where A and B start.

use super::options::{LoraInit, Start};
use crate::init::{normal, uniform};
use crate::{PeftError, Result};
use pt_tensor::{Device, Kind, Tensor, Weight, no_grad};

/// Whose start it is.
pub(super) struct Place<'a> {
    pub(super) path: &'a str,
    pub(super) weight: &'a dyn Weight,
    pub(super) rank: i64,
    pub(super) scaling: f64,
    pub(super) seed: u64,
}

/// The starting A `[rank, in_features]` and B `[out_features, rank]`, f32.
#[derive(Debug)]
pub(super) struct Factored {
    pub(super) a: Tensor,
    pub(super) b: Tensor,
}

impl Place<'_> {
    /// A and B for a start; each tensor has its own random stream from the seed and its name.
    pub(super) fn start(&self, start: Start, init: &LoraInit) -> Result<Factored> {
        let (out_features, in_features) = self.weight.size();
        let rank = self.rank;
        if start.is_from_weight() && rank > out_features.min(in_features) {
            return Err(PeftError::Config {
                faults: vec![format!(
                    "`rank` is {rank}, expected at most {} at `{}` for `init_lora_weights` = {init}",
                    out_features.min(in_features),
                    self.path
                )],
            });
        }
        let (a_size, b_size) = ([rank, in_features], [out_features, rank]);
        let zeros = |size: [i64; 2]| Tensor::zeros(size, (Kind::Float, self.weight.device()));
        no_grad(|| {
            Ok(match start {
                Start::Uniform => Factored { a: self.uniform("lora_A.weight", a_size, in_features), b: zeros(b_size) },
                Start::Random => Factored {
                    a: self.uniform("lora_A.weight", a_size, in_features),
                    b: self.uniform("lora_B.weight", b_size, rank),
                },
                Start::Gaussian => {
                    Factored { a: self.normal("lora_A.weight", a_size, 1.0 / rank as f32), b: zeros(b_size) }
                }
                Start::Orthogonal => self.orthogonal()?,
                Start::Pissa { num_iterations } => self.pissa(num_iterations)?,
                Start::Olora => self.olora()?,
            })
        })
    }

    /// Uniform in ±1/√fan_in: PyTorch's for a linear layer, Kaiming with a = √5.
    pub(super) fn uniform(&self, part: &str, size: [i64; 2], fan_in: i64) -> Tensor {
        let bound = 1.0 / (fan_in as f32).sqrt();
        self.tensor(&uniform(self.seed, &format!("{}.{part}", self.path), (size[0] * size[1]) as usize, bound), size)
    }

    pub(super) fn normal(&self, part: &str, size: [i64; 2], std: f32) -> Tensor {
        self.tensor(&normal(self.seed, &format!("{}.{part}", self.path), (size[0] * size[1]) as usize, std, None), size)
    }

    fn tensor(&self, values: &[f32], size: [i64; 2]) -> Tensor {
        Tensor::from_slice(values).view(size).to_device(self.weight.device())
    }

    /// The weight in f32; one in 4 bits as it is dequantized.
    fn dense(&self) -> Result<Tensor> {
        Ok(self.weight.dense()?.detach().to_kind(Kind::Float))
    }

    /// A and B in spaces that stand at right angles, so that B·A is zero while neither is: random combinations of the
    /// odd and of the even rows of an orthogonal matrix.
    fn orthogonal(&self) -> Result<Factored> {
        let (out_features, in_features) = self.weight.size();
        let (rank, half) = (self.rank, self.rank / 2);
        let square = self.normal("orthogonal", [rank, rank], 1.0);
        let rows = Tensor::f_linalg_qr(&square, "reduced")?.0.f_view([half, 2, rank])?;
        let [odd, even] = [0, 1].map(|part| rows.select(1, part)); // [rank / 2, rank]
        let a = odd.tr().f_mm(&self.normal("lora_A.weight", [half, in_features], 0.1))?;
        let b = self.normal("lora_B.weight", [out_features, half], 0.1).f_mm(&even)?;
        Ok(Factored { a, b })
    }

    /// PiSSA (Meng et al. 2024): the part of W with the largest singular values, W ≈ U·S·Vᵀ, as B = U·√(S/s) and
    /// A = √(S/s)·Vᵀ.
    fn pissa(&self, num_iterations: Option<u32>) -> Result<Factored> {
        let weight = self.dense()?;
        let (u, s, vh) = match num_iterations {
            None => svd(&weight)?,
            Some(number) => self.approximate_svd(&weight, number)?,
        };
        let root = (s.f_narrow(0, 0, self.rank)? / self.scaling).sqrt();
        let a = vh.f_narrow(0, 0, self.rank)? * root.unsqueeze(1);
        let b = u.f_narrow(1, 0, self.rank)? * root;
        Ok(Factored { a, b })
    }

    /// The first singular values of a matrix by random subspace iteration (Halko et al. 2011, algorithms 4.4 and 5.1).
    fn approximate_svd(&self, weight: &Tensor, num_iterations: u32) -> Result<(Tensor, Tensor, Tensor)> {
        let is_wide = weight.size()[0] < weight.size()[1];
        let matrix = if is_wide { weight.tr() } else { weight.shallow_clone() };
        let basis = |x: Tensor| -> Result<Tensor> { Ok(Tensor::f_linalg_qr(&x, "reduced")?.0) };
        let directions = self.normal("pissa", [matrix.size()[1], self.rank], 1.0);
        let mut q = basis(matrix.f_mm(&directions)?)?;
        for _ in 0..num_iterations {
            q = basis(matrix.tr().f_mm(&q)?)?;
            q = basis(matrix.f_mm(&q)?)?;
        }
        let (u, s, vh) = svd(&q.tr().f_mm(&matrix)?)?;
        let u = q.f_mm(&u)?;
        Ok(if is_wide { (vh.tr(), s, u.tr()) } else { (u, s, vh) })
    }

    /// OLoRA (Büyükakyüz 2024): the first columns and rows of W = Q·R.
    fn olora(&self) -> Result<Factored> {
        let (q, r) = Tensor::f_linalg_qr(&self.dense()?, "reduced")?;
        Ok(Factored { a: r.f_narrow(0, 0, self.rank)?.contiguous(), b: q.f_narrow(1, 0, self.rank)?.contiguous() })
    }
}

/// U, S and Vᵀ of a matrix, as many as its shorter side.
pub(super) fn svd(matrix: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
    let (u, s, v) = matrix.f_svd(true, true)?;
    Ok((u, s, v.tr()))
}

/// A part s·B·A that is taken out of a weight: what PiSSA and OLoRA train starts as this part and takes its place.
///
/// PEFT overwrites the weight with the rest, W − s·B·A. Here the two thin products are subtracted, so that the weight
/// stays what it is (also in 4 bits, also while the adapter is switched off), and nothing of the rest is rounded.
#[derive(Debug)]
pub(super) struct WithoutPart {
    pub(super) weight: std::rc::Rc<dyn Weight>,
    /// In the kind that the weight computes in.
    pub(super) a: Tensor,
    pub(super) b: Tensor,
    pub(super) scaling: f64,
}

impl Weight for WithoutPart {
    fn size(&self) -> (i64, i64) {
        self.weight.size()
    }

    fn dense(&self) -> pt_tensor::Result<Tensor> {
        let kind = self.weight.kind();
        let part = self.b.to_kind(Kind::Float).f_mm(&self.a.to_kind(Kind::Float))? * self.scaling;
        Ok((self.weight.dense()?.to_kind(Kind::Float) - part).to_kind(kind))
    }

    fn project(&self, hidden_states: &Tensor, bias: Option<&Tensor>) -> pt_tensor::Result<Tensor> {
        let low = hidden_states.f_linear(&self.a, None::<Tensor>)? * self.scaling;
        Ok(self.weight.project(hidden_states, bias)? - low.f_linear(&self.b, None::<Tensor>)?)
    }

    fn project_backward(&self, grad: &Tensor) -> pt_tensor::Result<Tensor> {
        no_grad(|| {
            let low = grad.detach().f_matmul(&self.b)? * self.scaling;
            Ok(self.weight.project_backward(grad)? - low.f_matmul(&self.a)?)
        })
    }

    fn device(&self) -> Device {
        self.weight.device()
    }

    fn kind(&self) -> Kind {
        self.weight.kind()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pt_tensor::DenseWeight;
    use std::rc::Rc;

    fn wave(size: [i64; 2]) -> Tensor {
        (Tensor::arange(size[0] * size[1], (Kind::Float, Device::Cpu)) * 0.7).sin().view(size)
    }

    fn largest(t: &Tensor) -> f64 {
        t.abs().max().double_value(&[])
    }

    fn start(weight: &DenseWeight, start: Start) -> Factored {
        let place = Place { path: "p", weight, rank: 4, scaling: 2.0, seed: 1 };
        place.start(start, &LoraInit::default()).unwrap()
    }

    #[test]
    fn orthogonal_factors_cancel() {
        let weight = DenseWeight::new(wave([6, 8])).unwrap();
        let Factored { a, b } = start(&weight, Start::Orthogonal);
        assert!(largest(&a) > 0.01 && largest(&b) > 0.01 && largest(&b.mm(&a)) < 1e-6);
    }

    #[test]
    fn pissa_takes_the_best_part_out_and_iterations_come_near_it() {
        // Random rows: a wave would have two singular values.
        for size in [[12, 9], [9, 12]] {
            let place =
                Place { path: "w", weight: &DenseWeight::new(wave(size)).unwrap(), rank: 4, scaling: 2.0, seed: 1 };
            let weight = DenseWeight::new(place.normal("w", size, 1.0)).unwrap();
            let rest =
                |Factored { a, b }: Factored| (weight.dense().unwrap() - b.mm(&a) * 2.0).norm().double_value(&[]);
            let s = svd(&weight.dense().unwrap()).unwrap().1;
            let best = s.narrow(0, 4, 5).norm().double_value(&[]);
            assert!((rest(start(&weight, Start::Pissa { num_iterations: None })) - best).abs() < 1e-4);
            let near = rest(start(&weight, Start::Pissa { num_iterations: Some(16) }));
            assert!((near - best).abs() < 1e-2 * best, "{near} {best}");
            let olora = start(&weight, Start::Olora);
            let eye = Tensor::eye(4, (Kind::Float, Device::Cpu));
            assert!(largest(&(olora.b.tr().mm(&olora.b) - eye)) < 1e-5);
        }
    }

    #[test]
    fn a_weight_without_a_part_keeps_the_laws_of_weights() {
        let dense = wave([6, 8]);
        let (a, b) = (wave([2, 8]), wave([6, 2]));
        let weight = WithoutPart {
            weight: Rc::new(DenseWeight::new(dense.copy()).unwrap()),
            a: a.copy(),
            b: b.copy(),
            scaling: 1.5,
        };
        let want = dense - b.mm(&a) * 1.5;
        assert!(largest(&(weight.dense().unwrap() - &want)) < 1e-6);
        let x = wave([3, 8]).set_requires_grad(true);
        let y = weight.project(&x, None).unwrap();
        assert!(largest(&(y.detach() - x.detach().mm(&want.tr()))) < 1e-5);
        let grad = wave([3, 6]);
        (y * &grad).sum(None).backward();
        let backward = weight.project_backward(&grad).unwrap();
        assert!(largest(&(x.grad() - &backward)) < 1e-5 && largest(&(backward - grad.mm(&want))) < 1e-5);
    }
}
