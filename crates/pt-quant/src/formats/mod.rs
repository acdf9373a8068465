//! 4-bit tensors as files and other crates have them.

#[cfg(feature = "safetensors")]
pub mod bitsandbytes;
#[cfg(feature = "gguf")]
pub mod gguf;
#[cfg(feature = "ndarray")]
mod ndarray;
