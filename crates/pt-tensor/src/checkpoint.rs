//! Activation checkpointing: keep the inputs of a block, compute its inside again in the backward pass.

use crate::autograd::{attach_backward, backward};
use crate::{Result, random};
use tch::{Tensor, no_grad};

/// Runs `block` without keeping its activations and runs it again when gradients are asked for.
///
/// Gradients of parameters used inside `block` accumulate into them as usual; gradients of `inputs` flow on. The
/// state of the CPU random generator is restored for the second run, so dropout draws the same mask.
/// Chen et al. 2016, <https://arxiv.org/abs/1604.06174>.
///
/// At least one input must require a gradient for anything to flow back, as in every reentrant form.
///
/// # Errors
/// Those of `block`.
pub fn checkpoint(inputs: &[&Tensor], block: impl Fn(&[Tensor]) -> Result<Tensor> + 'static) -> Result<Tensor> {
    let saved: Vec<Tensor> = inputs.iter().map(|t| t.detach()).collect();
    let generator = random::state()?;
    let output = no_grad(|| block(&saved))?;
    let needs_grad: Vec<bool> = inputs.iter().map(|t| t.requires_grad()).collect();
    attach_backward("checkpoint", inputs, &[&output], move |grads| {
        let Some(grad) = grads.into_iter().next().flatten() else {
            return Ok(needs_grad.iter().map(|_| None).collect());
        };
        let leaves: Vec<Tensor> =
            saved.iter().zip(&needs_grad).map(|(t, &needs)| t.detach().set_requires_grad(needs)).collect();
        let now = random::state()?;
        random::set_state(&generator)?;
        let output = tch::with_grad(|| block(&leaves));
        random::set_state(&now)?;
        tch::with_grad(|| backward(&[output?], &[grad]))?;
        Ok(leaves
            .iter()
            .zip(&needs_grad)
            .map(|(leaf, &needs)| needs.then(|| leaf.grad()).filter(Tensor::defined))
            .collect())
    })?;
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn values_and_gradients_equal_those_without_checkpointing() {
        let _lock = random::test_lock();
        let weight = Tensor::randn([3, 3], (Kind::Double, Device::Cpu)).set_requires_grad(true);
        let x = Tensor::randn([4, 3], (Kind::Double, Device::Cpu)).set_requires_grad(true);
        let inner = weight.shallow_clone();
        let block = move |inputs: &[Tensor]| Ok(inputs[0].matmul(&inner).dropout(0.5, true));
        let output = checkpoint(&[&x], block).unwrap();
        // Draw in between: the second run must still see the mask of the first.
        let _ = Tensor::rand([7], (Kind::Double, Device::Cpu));
        let mask = output.ne(0.0).to_kind(Kind::Double) * 2.0;
        output.sum(Kind::Double).backward();
        let expected_dw = x.detach().tr().matmul(&mask);
        assert!((weight.grad() - expected_dw).abs().max().double_value(&[]) < 1e-12);
        let expected_dx = mask.matmul(&weight.detach().tr());
        assert!((x.grad() - expected_dx).abs().max().double_value(&[]) < 1e-12);
    }
}
