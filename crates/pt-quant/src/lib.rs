//! NF4 weights and 1-bit deltas on the CPU, with hand-written SIMD: quantize, dequantize, multiply. Without libtorch, BLAS or C.
//!
//! What is quantized here has the bits of bitsandbytes 0.50; what it saved is read as it lies in the file. Every instruction set gives
//! the same codes and the same dequantized bits; products state their error.
//!
//! ```
//! use pt_quant::dense::Workspace;
//! use pt_quant::{Block4, Block4Matrix, BlockSize, Codebook, Exec, ProductOptions, ScaleFormat};
//!
//! let exec = Exec::new(); // the best instruction set, on rayon's threads
//! let weights = Block4::quantize(&[1.0f32, -0.5, 0.25, 0.0], BlockSize::B64, Codebook::nf4(), &exec)?;
//! let matrix = Block4Matrix::from_block4(weights.as_ref(), 2, 2, ScaleFormat::F32, &exec)?; // [[1, -0.5], [0.25, 0]]
//! let mut y = [0.0f32; 2];
//! matrix.forward(&[2.0f32, 1.0], &mut y, 1, &ProductOptions::default(), &mut Workspace::new(), &exec)?;
//! // -0.5 and 0.25 have become -0.5251 and 0.2461, the nearest of the 16 values.
//! assert_eq!(y, [2.0 - 0.525_073_05, 2.0 * 0.246_112_3]);
//! # Ok::<(), pt_quant::QuantError>(())
//! ```
//!
//! Save a matrix so that transformers and bitsandbytes load it (feature `safetensors`; `examples/quantize_file.rs` does a whole file):
//!
//! ```
//! # #[cfg(feature = "safetensors")] {
//! use pt_quant::formats::bitsandbytes::{SourceDtype, read, tensors};
//! use pt_quant::{Block4, BlockSize, Codebook, Exec};
//!
//! let exec = Exec::new();
//! let weights = Block4::quantize(&[0.5f32; 256], BlockSize::B64, Codebook::nf4(), &exec)?.double_quantize(&exec)?;
//! let saved = tensors("up_proj.weight", &weights.as_ref(), &[4, 64], SourceDtype::BFloat16)?;
//! let bytes = safetensors::serialize(saved, None).expect("names and sizes fit together");
//! let file = safetensors::SafeTensors::deserialize(&bytes).expect("what was just written");
//! assert_eq!(read(&file, "up_proj.weight")?.weights, weights.as_ref());
//! # }
//! # Ok::<(), pt_quant::QuantError>(())
//! ```
//!
//! Compress a fine-tune to one bit a weight and multiply with it:
//!
//! ```
//! use pt_quant::Exec;
//! use pt_quant::delta::{BitDelta, DeltaMatrix, DeltaOptions, DeltaWorkspace, ScaleAxis};
//!
//! let exec = Exec::new();
//! let (base, fine_tuned) = ([1.0f32, 2.0, 3.0, 4.0], [1.5f32, 1.5, 3.5, 3.5]); // [2, 2]
//! let delta = BitDelta::fit(&base, &fine_tuned, 2, 2, ScaleAxis::Matrix, &exec)?; // 0.5 · [[1, -1], [1, -1]]
//! let matrix = DeltaMatrix::new(delta.as_ref(), &exec)?;
//! let mut y = [0.0f32; 2];
//! matrix.forward(&[3.0f32, 1.0], &mut y, 1, DeltaOptions::default(), &mut DeltaWorkspace::new(), &exec)?;
//! assert_eq!(y, [1.0, 1.0]);
//! # Ok::<(), pt_quant::QuantError>(())
//! ```
//!
//! | module | holds |
//! | --- | --- |
//! | `block4` ([`Block4`], [`Block4Ref`], [`Absmax`]) | 4-bit tensors in bitsandbytes' byte order: quantize, dequantize, double quantization |
//! | `codebook` ([`Codebook`]) | NF4, FP4, IQ4_NL, MXFP4 or any 16 values |
//! | `dynamic8` ([`DynamicMap`]) | the 8-bit dynamic map, for scales and optimizer states |
//! | `product` ([`Block4Matrix`]) | products with 4-bit matrices, forward and backward, in f32, bf16 and W4A8 |
//! | [`dense`] | products of dense f32 and bf16 matrices |
//! | [`delta`] | 1-bit deltas: fit, multiply, many tenants over one base, merge, BitDelta's and GGUF's layouts |
//! | [`formats`] | bitsandbytes' tensors in safetensors files, GGUF blocks, ndarray |
//! | `exec`, `isa` ([`Exec`], [`Pool`], [`Isa`]) | instruction sets and threads: how to pin one, how to bring a pool of your own |
//! | `simd` | kernels by instruction set; all unsafe code but the hand-out of slices to threads |
//!
//! | feature | brings | costs |
//! | --- | --- | --- |
//! | `std` (default) | detection of the processor, `PT_QUANT_ISA` | the standard library |
//! | `rayon` (default) | rayon's threads for [`Exec::new`] | rayon |
//! | `half`, `ndarray` | their types as elements and matrices | those crates |
//! | `safetensors` | `formats::bitsandbytes` | safetensors, serde_json |
//! | `gguf` | `formats::gguf` | nothing |

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
