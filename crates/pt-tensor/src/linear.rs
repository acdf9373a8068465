//! Products with dense weights: the kernels of `pt-quant` where they are faster, libtorch's otherwise.

use pt_quant::dense::{GemmShape, Output, gemm_nt};
use tch::{Kind, Tensor};

use crate::Result;
use crate::fused::is_fusable;
use crate::pool::{exec, with_workspace};
use crate::slices::{NewTensor, bf16s, f32s};

/// The most rows that [`linear`] takes to the kernels of `pt-quant`; libtorch's products are as fast from about there.
const FEW_ROWS: i64 = 32;

/// x · Wᵀ + b: `x: [.., in]`, `weight: [out, in]`, `bias: [out]`; returns `[.., out]`.
///
/// Where no gradient is wanted and x has few rows, as in decoding, the CPU reads the weight once at the memory's
/// speed; otherwise this is libtorch's `linear`.
///
/// # Errors
/// When the shapes do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let size = weight.size();
    let fits = size.len() == 2 && x.size().last() == size.last() && bias.is_none_or(|b| b.size() == size[..1]);
    let operands: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    if !fits
        || size[1] == 0
        || x.numel() as i64 > FEW_ROWS * size[1]
        || !is_fusable(&operands)
        || operands.iter().any(|t| t.requires_grad())
        || !weight.is_contiguous()
    {
        return Ok(x.f_linear(weight, bias)?);
    }
    let x = x.contiguous();
    let mut out = x.size();
    *out.last_mut().unwrap_or(&mut 0) = size[0];
    let mut y = NewTensor::empty(&out, x.kind());
    let output = match bias {
        Some(bias) => {
            y.copy_from(bias)?; // broadcast to every row
            Output::Add
        }
        None => Output::Replace,
    };
    let shape = GemmShape { rows: x.numel() / size[1] as usize, columns: size[0] as usize, depth: size[1] as usize };
    with_workspace(|workspace| match x.kind() {
        Kind::Float => gemm_nt(f32s(&x), f32s(weight), y.f32s_mut(), shape, output, workspace, &exec()),
        _ => gemm_nt(bf16s(&x), bf16s(weight), y.bf16s_mut(), shape, output, workspace, &exec()),
    })?;
    Ok(y.into_tensor())
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn linear_equals_libtorch_for_few_rows_and_many() {
        let _lock = crate::random::test_lock();
        for (kind, tolerance) in [(Kind::Float, 5e-6), (Kind::BFloat16, 8e-3)] {
            let draw = |size: &[i64]| Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind);
            for (input, output) in [(64, 6), (577, 193), (16, 1000), (7, 25)] {
                let (weight, bias) = (draw(&[output, input]), draw(&[output]));
                for rows in [0, 1, 2, 3, 4, 5, 16, 17, 32, 33] {
                    let x = draw(&[rows, input]);
                    for bias in [None, Some(&bias)] {
                        let y = linear(&x, &weight, bias).unwrap();
                        let wide = |t: &Tensor| t.to_kind(Kind::Double);
                        let want = wide(&x).linear(&wide(&weight), bias.map(wide).as_ref());
                        assert_eq!((y.size(), y.kind()), (want.size(), kind));
                        if rows > 0 {
                            let error = (wide(&y) - &want).abs().max() / want.abs().max();
                            assert!(error.double_value(&[]) < tolerance, "{kind:?} {rows} x {input} x {output}");
                        }
                    }
                }
            }
        }
        let x = Tensor::ones([1, 3], (Kind::Float, Device::Cpu));
        assert!(linear(&x, &Tensor::ones([12, 4], (Kind::Float, Device::Cpu)), None).is_err());
    }
}
