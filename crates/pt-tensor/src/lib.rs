//! Tensors for post-training: a thin layer over [tch] (libtorch).
//!
//! The parts that every method shares live here: log-probs at label positions without a logits tensor
//! ([`label_logprobs`]), backward passes written in Rust ([`autograd`]), activation [`checkpoint`]ing, weights
//! behind a trait ([`Weight`]), safetensors in and out ([`io`]), [`AdamW`] with gradient clipping, and random
//! generators whose state can be saved ([`random`]).
//!
//! ```
//! use pt_tensor::{Kind, LabelLogprobs, Tensor, label_logprobs};
//! // Two tokens, hidden size 2, vocabulary of 3; a zero hidden state makes every token equally likely.
//! let hidden_states = Tensor::zeros([2, 2], (Kind::Float, pt_tensor::Device::Cpu));
//! let weight = Tensor::from_slice(&[1f32, 0., 0., 1., 1., 1.]).view([3, 2]);
//! let label_ids = Tensor::from_slice(&[0i64, 2]);
//! let out = label_logprobs(&hidden_states, &weight, &label_ids, &LabelLogprobs::default())?;
//! assert!((out.logprobs.double_value(&[0]) + 3f64.ln()).abs() < 1e-6);
//! # Ok::<(), pt_tensor::TensorError>(())
//! ```

mod attention;
pub mod autograd;
mod checkpoint;
mod decode_attention;
mod device;
mod error;
mod fused;
pub mod io;
mod label_logprobs;
mod linear;
mod memory;
mod optim;
mod pool;
pub mod random;
mod slices;
mod weight;

pub use attention::{AttentionPlan, Segment, packed_attention};
pub use checkpoint::checkpoint;
pub use decode_attention::{CacheSlot, decode_attention};
pub use device::{ComputeKind, exit_now, parse_device, parse_kind, peak_memory_bytes};
pub use error::{Result, TensorError};
pub use fused::{apply_rotary, rms_norm, swiglu};
pub use label_logprobs::{LabelLogprobs, LabelOutput, label_logprobs};
pub use linear::linear;
pub use memory::peak_tensor_bytes;
pub use optim::{AdamW, AdamWConfig, AdamWVariant, clip_grad_norm_, global_grad_norm};
pub use pool::TorchPool;
pub use pt_quant::delta::{BitDelta, BitDeltaRef, ScaleAxis};
pub use tch::{Device, IndexOp, Kind, TchError, Tensor, no_grad, set_num_threads};
pub use weight::{
    DeltaWeight, DenseWeight, Nf4Arithmetic, Nf4Options, Nf4Weight, ScaledSigns, Weight, add_deltas, fit_delta,
    nf4_tensors,
};
