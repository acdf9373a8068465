//! NF4 weights and 1-bit deltas on the CPU, with hand-written SIMD and without libtorch.

#![cfg_attr(not(feature = "std"), no_std)]

extern crate alloc;

mod block4;
mod codebook;
pub mod delta;
pub mod dense;
mod dynamic8;
mod element;
mod error;
mod exec;
#[cfg(any(feature = "safetensors", feature = "gguf", feature = "ndarray"))]
pub mod formats;
mod isa;
mod product;
#[doc(hidden)]
pub mod roof;
mod simd;

pub use block4::{
    Absmax, AbsmaxBuf, Block4, Block4Ref, BlockSize, NestedAbsmax, NestedAbsmaxBuf, STREAM_BYTES, Stores, packed_len,
    quantize_into,
};
pub use codebook::Codebook;
pub use dynamic8::DynamicMap;
pub use element::{Bf16, Element, ElementKind, F16};
pub use error::QuantError;
#[cfg(feature = "rayon")]
pub use exec::Rayon;
pub use exec::{Exec, Inline, Pool};
pub use isa::Isa;
pub use product::{Arithmetic, Block4Matrix, ProductOptions, ScaleFormat};
