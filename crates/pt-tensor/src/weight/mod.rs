//! Linear weights, however they are stored.

mod delta;
mod dense;
mod nf4;
mod signs;

pub use delta::DeltaWeight;
pub use dense::DenseWeight;
pub use nf4::{Nf4Arithmetic, Nf4Options, Nf4Weight, nf4_tensors};
pub use signs::{ScaledSigns, add_deltas, fit_delta};

use crate::Result;
use tch::{Device, Kind, Tensor};

/// A linear weight `[out_features, in_features]`, however it is stored.
///
/// Laws: `project(x)` equals `x · dense()ᵀ` and `project_backward(g)` equals `g · dense()` within the rounding of the compute kind, and
/// gradients flow through `project` to its input.
pub trait Weight: std::fmt::Debug {
    /// `(out_features, in_features)`.
    fn size(&self) -> (i64, i64);

    /// The weight as a dense tensor `[out_features, in_features]`.
    ///
    /// # Errors
    /// When the store cannot be decoded.
    fn dense(&self) -> Result<Tensor>;

    /// `hidden_states · Wᵀ (+ bias)`: `[.., in_features]` → `[.., out_features]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    fn project(&self, hidden_states: &Tensor, bias: Option<&Tensor>) -> Result<Tensor>;

    /// `grad · W`: the gradient of [`project`](Self::project) to its input, `[.., out_features]` → `[.., in_features]`, as a new tensor without
    /// a graph.
    ///
    /// # Errors
    /// When the shapes do not fit.
    fn project_backward(&self, grad: &Tensor) -> Result<Tensor> {
        tch::no_grad(|| Ok(grad.detach().f_matmul(&self.dense()?.detach())?))
    }

    /// Bytes that it takes in memory: those of a dense tensor, unless its store takes others.
    fn num_bytes(&self) -> usize {
        let (out_features, in_features) = self.size();
        (out_features * in_features) as usize * self.kind().elt_size_in_bytes()
    }

    /// Device the weight lives on.
    fn device(&self) -> Device;

    /// Kind it computes in.
    fn kind(&self) -> Kind;

    /// The dense parameter itself, where there is one that can be trained in full.
    fn parameter(&self) -> Option<&Tensor> {
        None
    }

    /// The 4-bit store, where the weight is one.
    fn as_nf4(&self) -> Option<&Nf4Weight> {
        None
    }
}
