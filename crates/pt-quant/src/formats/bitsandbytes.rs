//! bitsandbytes' 4-bit tensors in safetensors files, as transformers saves and loads them.
//!
//! A layer's `weight` of shape `[out, in]` becomes several tensors: `weight` (the codes), `weight.absmax`, `weight.quant_map`,
//! `weight.nested_absmax` and `weight.nested_quant_map` if the scales are quantized too, and `weight.quant_state.bitsandbytes__nf4` (or
//! `__fp4`), whose bytes are JSON.

use alloc::borrow::Cow;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors, View};

mod state;

pub use state::{NestedState, QuantState, QuantType, SourceDtype};

use crate::simd::view::{bytes_of, f32s_in};
use crate::{Absmax, AbsmaxBuf, Block4, Block4Ref, NestedAbsmax, NestedAbsmaxBuf, QuantError, packed_len};

/// A 4-bit tensor that lies in a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored<'a> {
    /// The weights, where they are in the file.
    pub weights: Block4Ref<'a>,
    /// Shape, format before quantizing and the rest of what the JSON says.
    pub state: QuantState,
}

/// A 4-bit tensor copied out of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The weights.
    pub weights: Block4,
    /// Shape, format before quantizing and the rest of what the JSON says.
    pub state: QuantState,
}

/// Whether the file holds tensor `name` in bitsandbytes' 4 bits.
#[must_use]
pub fn is_quantized(tensors: &SafeTensors<'_>, name: &str) -> bool {
    QuantType::ALL.iter().any(|kind| tensors.tensor(&kind.state_key(name)).is_ok())
}

/// Tensor `name` (say `model.layers.0.mlp.up_proj.weight`), borrowed from the file without a copy.
///
/// # Errors
/// - [`QuantError::MissingTensor`], [`QuantError::Tensor`]: a tensor that belongs to it is missing, or has another format or size.
/// - [`QuantError::QuantState`]: the JSON is not right; the field is named.
/// - [`QuantError::Misaligned`]: its `f32` tensors do not lie at multiples of 4 bytes in memory (or the processor is big-endian);
///   [`read_owned`] copies instead.
///
/// # Example
/// ```
/// use pt_quant::formats::bitsandbytes::{SourceDtype, read, tensors};
/// use pt_quant::{Block4, BlockSize, Codebook, Exec};
///
/// let exec = Exec::new();
/// let weights = Block4::quantize(&[0.5f32; 128], BlockSize::B64, Codebook::nf4(), &exec)?;
/// let saved = tensors("up_proj.weight", &weights.as_ref(), &[2, 64], SourceDtype::BFloat16)?;
/// let bytes = safetensors::serialize(saved, None).expect("names and sizes fit together");
///
/// let file = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
/// let stored = read(&file, "up_proj.weight")?;
/// assert_eq!(stored.state.shape, [2, 64]);
/// assert_eq!(stored.weights, weights.as_ref());
/// # Ok::<(), pt_quant::QuantError>(())
/// ```
pub fn read<'a>(tensors: &SafeTensors<'a>, name: &str) -> Result<Stored<'a>, QuantError> {
    let parts = Parts::find(tensors, name)?;
    let floats = |suffix: &str, bytes: &'a [u8]| {
        f32s_in(bytes).ok_or_else(|| QuantError::Misaligned { name: format!("{name}.{suffix}") })
    };
    let absmax = match parts.nested {
        None => Absmax::F32(floats("absmax", parts.absmax)?),
        Some(nested) => {
            let map = floats("nested_quant_map", nested.map)?;
            let map: &[f32; 256] = map.try_into().map_err(|_| wrong_len(name, "nested_quant_map", map.len(), 256))?;
            let absmax = floats("nested_absmax", nested.absmax)?;
            Absmax::Nested(NestedAbsmax::new(parts.absmax, absmax, map, nested.offset, nested.block_size)?)
        }
    };
    let (len, block_size) = (parts.len, parts.state.block_size);
    let weights = Block4Ref::new(parts.packed, absmax, len, block_size, parts.state.quant_type.codebook())?;
    Ok(Stored { weights, state: parts.state })
}

/// As [`read`], copied, from wherever the file lies in memory.
///
/// # Errors
/// As [`read`], without [`QuantError::Misaligned`].
pub fn read_owned(tensors: &SafeTensors<'_>, name: &str) -> Result<Loaded, QuantError> {
    let parts = Parts::find(tensors, name)?;
    let floats = |bytes: &[u8]| -> Vec<f32> {
        bytes.chunks_exact(4).map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]])).collect()
    };
    let absmax = match parts.nested {
        None => AbsmaxBuf::F32(floats(parts.absmax)),
        Some(nested) => {
            let map = floats(nested.map).into_boxed_slice();
            let map = map.try_into().map_err(|_| wrong_len(name, "nested_quant_map", nested.map.len() / 4, 256))?;
            let codes = parts.absmax.to_vec();
            let absmax = floats(nested.absmax);
            AbsmaxBuf::Nested(NestedAbsmaxBuf::new(codes, absmax, map, nested.offset, nested.block_size)?)
        }
    };
    let (len, block_size) = (parts.len, parts.state.block_size);
    let weights = Block4::new(parts.packed.to_vec(), absmax, len, block_size, parts.state.quant_type.codebook())?;
    Ok(Loaded { weights, state: parts.state })
}

fn wrong_len(name: &str, suffix: &str, found: usize, expected: usize) -> QuantError {
    QuantError::Tensor {
        name: format!("{name}.{suffix}"),
        found: format!("{found} elements"),
        expected: format!("{expected} elements"),
    }
}

/// The tensors of a weight, with formats and sizes checked.
struct Parts<'a> {
    state: QuantState,
    len: usize,
    packed: &'a [u8],
    /// Numbers in `f32`, or codes if there is `nested`.
    absmax: &'a [u8],
    nested: Option<NestedParts<'a>>,
}

struct NestedParts<'a> {
    absmax: &'a [u8],
    map: &'a [u8],
    offset: f32,
    block_size: crate::BlockSize,
}

impl<'a> Parts<'a> {
    fn find(tensors: &SafeTensors<'a>, name: &str) -> Result<Self, QuantError> {
        let find = |key: String| tensors.tensor(&key).map_err(|_| QuantError::MissingTensor { name: key });
        let part = |suffix: &str, dtype: Dtype, len: usize| {
            let key = format!("{name}.{suffix}");
            let tensor = find(key.clone())?;
            let count: usize = tensor.shape().iter().product();
            if tensor.dtype() == dtype && count == len {
                return Ok(tensor.data());
            }
            Err(QuantError::Tensor {
                name: key,
                found: format!("{:?} {:?}", tensor.dtype(), tensor.shape()),
                expected: format!("{dtype:?} [{len}]"),
            })
        };
        // 1. The JSON.
        let mut found = QuantType::ALL.into_iter().filter_map(|kind| {
            let key = kind.state_key(name);
            tensors.tensor(&key).ok().map(|tensor| (kind, key, tensor))
        });
        let Some((kind, key, json)) = found.next() else {
            return Err(QuantError::MissingTensor { name: QuantType::Nf4.state_key(name) });
        };
        let json = u8_data(&key, &json)?;
        let state = QuantState::parse(&key, json)?;
        if state.quant_type != kind {
            return Err(QuantError::QuantState {
                name: key,
                field: "quant_type",
                found: state.quant_type.name().to_string(),
                expected: "the one that the tensor's name ends in",
            });
        }
        // 2. The codes: bytes, whatever format they are stored as.
        let len = state.len()?;
        let weight = find(name.to_string())?;
        if weight.data().len() != packed_len(len) {
            return Err(QuantError::Tensor {
                name: name.to_string(),
                found: format!("{} bytes", weight.data().len()),
                expected: format!("{} bytes for the shape {:?}", packed_len(len), state.shape),
            });
        }
        // 3. The table, which bitsandbytes writes but does not use.
        check_map(&format!("{name}.quant_map"), part("quant_map", Dtype::F32, 16)?, kind)?;
        // 4. The scales.
        let num_blocks = state.block_size.num_blocks(len);
        let nested = match state.nested {
            None => None,
            Some(nested) => Some(NestedParts {
                absmax: part("nested_absmax", Dtype::F32, nested.block_size.num_blocks(num_blocks))?,
                map: part("nested_quant_map", Dtype::F32, 256)?,
                offset: nested.offset,
                block_size: nested.block_size,
            }),
        };
        let dtype = if nested.is_some() { Dtype::U8 } else { Dtype::F32 };
        let absmax = part("absmax", dtype, num_blocks)?;
        Ok(Self { state, len, packed: weight.data(), absmax, nested })
    }
}

fn u8_data<'a>(key: &str, tensor: &TensorView<'a>) -> Result<&'a [u8], QuantError> {
    if tensor.dtype() == Dtype::U8 {
        return Ok(tensor.data());
    }
    Err(QuantError::Tensor {
        name: key.to_string(),
        found: format!("{:?} {:?}", tensor.dtype(), tensor.shape()),
        expected: "U8, the bytes of a JSON object".to_string(),
    })
}

/// Every version of bitsandbytes has the same values, but for rounding.
fn check_map(key: &str, bytes: &[u8], kind: QuantType) -> Result<(), QuantError> {
    let values = *kind.codebook().values();
    for (code, (four, value)) in bytes.chunks_exact(4).zip(values).enumerate() {
        let found = f32::from_le_bytes([four[0], four[1], four[2], four[3]]);
        let is_near = (found - value).abs() <= 1e-6;
        if !is_near {
            return Err(QuantError::Tensor {
                name: key.to_string(),
                found: format!("{found} for code {code}"),
                expected: format!("{value}, as in {}", kind.name()),
            });
        }
    }
    Ok(())
}

/// A tensor to be saved; [`safetensors::serialize`] takes pairs of a name and this.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Cow<'a, [u8]>,
}

impl View for Tensor<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}

/// The tensors that bitsandbytes saves for a weight called `name`, byte for byte: transformers and bitsandbytes load them.
///
/// `shape` is the weight's, `dtype` the format it had, in which bitsandbytes will give it back. Say
/// `"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4", ..}` in `config.json`.
///
/// # Errors
/// [`QuantError::Length`] when the shape has another number of elements than there are weights, [`QuantError::Overflow`] when it has too many
/// for any memory; [`QuantError::Value`] for a codebook other than NF4 and FP4, which bitsandbytes cannot read.
pub fn tensors<'a>(
    name: &str,
    weights: &Block4Ref<'a>,
    shape: &[usize],
    dtype: SourceDtype,
) -> Result<Vec<(String, Tensor<'a>)>, QuantError> {
    let quant_type = QuantType::of(weights.codebook()).ok_or_else(|| QuantError::Value {
        what: "weights.codebook",
        found: format!("{:?}", weights.codebook().values()),
        expected: "NF4 or FP4",
    })?;
    let nested = match weights.absmax() {
        Absmax::F32(_) => None,
        Absmax::Nested(nested) => Some(state::NestedState { block_size: nested.block_size(), offset: nested.offset() }),
    };
    let state = QuantState { quant_type, block_size: weights.block_size(), dtype, shape: shape.to_vec(), nested };
    crate::error::check_len("shape", state.len()?, weights.len())?;

    let bytes = |shape: Vec<usize>, data: Cow<'a, [u8]>| Tensor { dtype: Dtype::U8, shape, data };
    let floats =
        |numbers: &'a [f32]| Tensor { dtype: Dtype::F32, shape: [numbers.len()].into(), data: bytes_of(numbers) };
    let map: Vec<u8> = weights.codebook().values().iter().flat_map(|value| value.to_le_bytes()).collect();
    let json = state.to_json().into_bytes();
    let packed = weights.packed();
    let mut saved = Vec::with_capacity(6);
    saved.push((name.to_string(), bytes([packed.len(), 1].into(), packed.into())));
    match weights.absmax() {
        Absmax::F32(absmax) => saved.push((format!("{name}.absmax"), floats(absmax))),
        Absmax::Nested(nested) => {
            saved.push((format!("{name}.absmax"), bytes([nested.codes().len()].into(), nested.codes().into())));
            saved.push((format!("{name}.nested_absmax"), floats(nested.absmax())));
            saved.push((format!("{name}.nested_quant_map"), floats(nested.map())));
        }
    }
    saved.push((format!("{name}.quant_map"), Tensor { dtype: Dtype::F32, shape: [16].into(), data: map.into() }));
    saved.push((quant_type.state_key(name), bytes([json.len()].into(), json.into())));
    Ok(saved)
}
