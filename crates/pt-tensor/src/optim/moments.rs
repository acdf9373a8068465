//! The two moments of a parameter, in 32 or 8 bits, and one update by them.

use std::ffi::{c_char, c_void};

use pt_quant::{BlockSize, DynamicMap};
use tch::{Device, Kind, Tensor};

use super::place::Place;
use crate::autograd::{check, raw};
use crate::pool::exec;
use crate::slices::{NewTensor, f32s, u8s};
use crate::{Result, TensorError};

unsafe extern "C" {
    fn pt_adamw_8bit(
        parameter: *mut c_void,
        grad: *mut c_void,
        first: *mut c_void,
        second: *mut c_void,
        step: f64,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
    ) -> *mut c_char;
    fn pt_copy_async(target: *mut c_void, source: *mut c_void) -> *mut c_char;
}

/// The numbers of one update of one parameter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Update {
    /// Counted from 1.
    pub(super) step: i64,
    pub(super) lr: f64,
    pub(super) beta1: f64,
    pub(super) beta2: f64,
    pub(super) eps: f64,
    pub(super) weight_decay: f64,
}

/// Numbers that share a scale in 8-bit states.
const BLOCK: i64 = 256;

/// Tensors with fewer elements keep 32-bit states: bitsandbytes' `min_8bit_size`.
const MIN_8BIT_SIZE: usize = 4096;

/// Elements a thread that are decoded at a time; a number of blocks, and of vectors, so that no element is computed otherwise than in one piece.
const CHUNK: i64 = 1 << 16;

/// Both moments of a parameter.
#[derive(Debug)]
pub(super) enum Moments {
    /// In f32, of the parameter's shape.
    Full { first: Tensor, second: Tensor },
    /// In 8 bits (Dettmers et al. 2022, <https://arxiv.org/abs/2110.02861>): codes of the dynamic map and one scale a block of 256.
    EightBit { first: Blocks, second: Blocks },
}

/// A moment in 8 bits.
#[derive(Debug)]
pub(super) struct Blocks {
    /// u8, of the parameter's shape.
    codes: Tensor,
    /// f32, `[ceil(n / 256)]`.
    absmax: Tensor,
    map: &'static DynamicMap,
}

impl Moments {
    fn is_8bit(numel: usize, wants_8bit: bool) -> bool {
        wants_8bit && numel >= MIN_8BIT_SIZE
    }

    /// Bytes of the tensors for a parameter of `numel` elements, in the order in which [`new`](Self::new) makes them.
    pub(super) fn sizes(numel: usize, wants_8bit: bool) -> impl Iterator<Item = usize> {
        let of_one = match Self::is_8bit(numel, wants_8bit) {
            true => [numel, 4 * numel.div_ceil(BLOCK as usize)],
            false => [4 * numel, 0],
        };
        [of_one, of_one].into_iter().flatten()
    }

    /// Zeros for a parameter.
    pub(super) fn new(name: &str, parameter: &Tensor, wants_8bit: bool, place: &mut Place) -> Result<Self> {
        let (size, device) = (parameter.size(), parameter.device());
        if !Self::is_8bit(parameter.numel(), wants_8bit) {
            let mut zeros = || place.zeros(name, &size, Kind::Float, device);
            return Ok(Self::Full { first: zeros()?, second: zeros()? });
        }
        let num_blocks = (parameter.numel() as i64 + BLOCK - 1) / BLOCK;
        let mut blocks = |map| -> Result<Blocks> {
            let codes = place.zeros(name, &size, Kind::Uint8, device)?;
            Ok(Blocks { codes, absmax: place.zeros(name, &[num_blocks], Kind::Float, device)?, map })
        };
        Ok(Self::EightBit { first: blocks(DynamicMap::signed())?, second: blocks(DynamicMap::unsigned())? })
    }

    /// Its tensors by the ends of their names.
    pub(super) fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Self::Full { first, second } => vec![("exp_avg", first), ("exp_avg_sq", second)],
            Self::EightBit { first, second } => vec![
                ("exp_avg.codes", &first.codes),
                ("exp_avg.absmax", &first.absmax),
                ("exp_avg_sq.codes", &second.codes),
                ("exp_avg_sq.absmax", &second.absmax),
            ],
        }
    }

    /// A copy on a device, which may be still on its way.
    pub(super) fn fetch(&self, device: Device) -> Result<Self> {
        let fetch = |tensor: &Tensor| tensor.f_to_device_(device, tensor.kind(), true, true);
        let blocks = |blocks: &Blocks| -> Result<Blocks> {
            Ok(Blocks { codes: fetch(&blocks.codes)?, absmax: fetch(&blocks.absmax)?, map: blocks.map })
        };
        Ok(match self {
            Self::Full { first, second } => Self::Full { first: fetch(first)?, second: fetch(second)? },
            Self::EightBit { first, second } => Self::EightBit { first: blocks(first)?, second: blocks(second)? },
        })
    }

    /// Takes over the values of another copy of these moments; they have arrived once its device is done.
    pub(super) fn store(&self, other: &Self) -> Result<()> {
        self.tensors().into_iter().zip(other.tensors()).try_for_each(|((_, target), (_, source))| {
            // SAFETY: two live tensors of one kind and size, of which the first is written to.
            check(unsafe { pt_copy_async(raw(target), raw(source)) })
        })
    }

    /// Updates the moments by a gradient and the parameter by the moments, all on one device. Without a graph.
    pub(super) fn update(&mut self, parameter: &mut Tensor, grad: &Tensor, by: &Update) -> Result<()> {
        match self {
            Self::Full { first, second } => update_full(parameter, grad, first, second, by),
            Self::EightBit { first, second } => {
                if parameter.is_contiguous() {
                    return update_8bit(parameter, grad, first, second, by);
                }
                let mut contiguous = parameter.f_contiguous()?;
                update_8bit(&mut contiguous, grad, first, second, by)?;
                parameter.f_copy_(&contiguous)?;
                Ok(())
            }
        }
    }
}

/// In the arithmetic order of `torch.optim.AdamW`.
fn update_full(
    parameter: &mut Tensor,
    grad: &Tensor,
    first: &mut Tensor,
    second: &mut Tensor,
    by: &Update,
) -> Result<()> {
    let Update { step, lr, beta1, beta2, eps, weight_decay } = *by;
    let correction1 = 1.0 - beta1.powi(step as i32);
    let correction2 = 1.0 - beta2.powi(step as i32);
    let grad = grad.f_to_kind(Kind::Float)?;
    if weight_decay != 0.0 {
        let _ = parameter.f_mul_scalar_(1.0 - lr * weight_decay)?;
    }
    let _ = first.f_lerp_(&grad, 1.0 - beta1)?;
    let _ = second.f_mul_scalar_(beta2)?.f_addcmul_(&(&grad * (1.0 - beta2)), &grad)?;
    let denominator = second.f_sqrt()? / correction2.sqrt() + eps;
    let update = (&*first / denominator) * (-lr / correction1);
    let _ = parameter.f_add_(&update.to_kind(parameter.kind()))?;
    Ok(())
}

/// As bitsandbytes' AdamW8bit: decode, update in f32, encode anew; a chunk at a time, so that f32 moments never exist as a whole.
fn update_8bit(
    parameter: &mut Tensor,
    grad: &Tensor,
    first: &mut Blocks,
    second: &mut Blocks,
    by: &Update,
) -> Result<()> {
    let grad = grad.f_contiguous()?.f_view(-1)?;
    let flat = parameter.f_view(-1)?;
    let len = flat.numel() as i64;
    let chunk = match flat.device() {
        Device::Cpu => CHUNK * i64::from(tch::get_num_threads().max(1)),
        _ => len,
    };
    let mut start = 0;
    while start < len {
        let count = chunk.min(len - start);
        let (parameter, grad) = (flat.f_narrow(0, start, count)?, grad.f_narrow(0, start, count)?);
        let (first_moment, second_moment) = (first.decode(start, count)?, second.decode(start, count)?);
        // SAFETY: four live tensors of `count` elements, the moments in f32 and held by nobody else; the call keeps no pointer and catches what
        // libtorch throws.
        check(unsafe {
            pt_adamw_8bit(
                raw(&parameter),
                raw(&grad),
                raw(&first_moment),
                raw(&second_moment),
                by.step as f64,
                by.lr,
                by.beta1,
                by.beta2,
                by.weight_decay,
                by.eps,
            )
        })?;
        first.encode(start, &first_moment)?;
        second.encode(start, &second_moment)?;
        start += count;
    }
    Ok(())
}

impl Blocks {
    /// Codes and scales of the elements `start..start + count`, where `start` begins a block.
    fn part(&self, start: i64, count: i64) -> Result<(Tensor, Tensor)> {
        let codes = self.codes.f_view(-1)?.f_narrow(0, start, count)?;
        Ok((codes, self.absmax.f_narrow(0, start / BLOCK, (count + BLOCK - 1) / BLOCK)?))
    }

    /// `[count]`, f32.
    fn decode(&self, start: i64, count: i64) -> Result<Tensor> {
        let (codes, absmax) = self.part(start, count)?;
        if codes.device() != Device::Cpu {
            return decode_by_operations(&codes, &absmax, self.map);
        }
        let mut out = NewTensor::empty(&[count], Kind::Float);
        self.map.dequantize_into(u8s(&codes), f32s(&absmax), BlockSize::B256, out.f32s_mut(), &exec())?;
        Ok(out.into_tensor())
    }

    fn encode(&mut self, start: i64, values: &Tensor) -> Result<()> {
        let (mut codes, mut absmax) = self.part(start, values.numel() as i64)?;
        let (new_codes, new_absmax) = match values.device() {
            Device::Cpu => {
                let mut codes = NewTensor::empty(&codes.size(), Kind::Uint8);
                let mut absmax = NewTensor::empty(&absmax.size(), Kind::Float);
                self.map.quantize_into(f32s(values), BlockSize::B256, codes.u8s_mut(), absmax.f32s_mut(), &exec())?;
                (codes.into_tensor(), absmax.into_tensor())
            }
            _ => encode_by_operations(values, self.map)?,
        };
        codes.f_copy_(&new_codes)?;
        absmax.f_copy_(&new_absmax)?;
        Ok(())
    }
}

/// The kernels' values by libtorch's operations, for devices without kernels of ours.
fn decode_by_operations(codes: &Tensor, absmax: &Tensor, map: &DynamicMap) -> Result<Tensor> {
    let values = Tensor::f_from_slice(map.values())?.f_to_device(codes.device())?;
    let scales = absmax.f_repeat_interleave_self_int(BLOCK, 0, None)?.f_narrow(0, 0, codes.numel() as i64)?;
    Ok(values.f_index_select(0, &codes.f_to_kind(Kind::Int64)?)?.f_mul(&scales)?)
}

/// Codes and scales of `[n]` values by libtorch's operations; as on CUDA, a short last block is scaled as the others are.
fn encode_by_operations(values: &Tensor, map: &DynamicMap) -> Result<(Tensor, Tensor)> {
    let len = values.numel() as i64;
    let num_blocks = (len + BLOCK - 1) / BLOCK;
    let blocks = values.f_constant_pad_nd([0, num_blocks * BLOCK - len])?.f_view([num_blocks, BLOCK])?;
    let absmax = blocks.f_abs()?.f_amax([1], false)?; // [num_blocks]
    let scaled = blocks.f_mul(&absmax.f_clamp_min(1e-38)?.f_reciprocal()?.f_unsqueeze(1)?)?.f_clamp(-1.0, 1.0)?;
    let map = Tensor::f_from_slice(map.values())?.f_to_device(values.device())?;
    let thresholds = (map.f_narrow(0, 0, 255)? + map.f_narrow(0, 1, 255)?) / 2.0;
    let codes = scaled.f_view(-1)?.f_bucketize(&thresholds, true, false)?.f_narrow(0, 0, len)?;
    Ok((codes.f_to_kind(Kind::Uint8)?, absmax))
}

/// Refuses what is not of a state's size and kind.
pub(super) fn check_state(name: &str, found: &Tensor, expected: &Tensor) -> Result<()> {
    if found.size() != expected.size() {
        return Err(TensorError::shape(name, found, format!("{:?}", expected.size())));
    }
    if found.kind() != expected.kind() {
        let kind = format!("{:?}", expected.kind());
        return Err(TensorError::Argument { what: name.into(), found: format!("{:?}", found.kind()), expected: kind });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_of_libtorch_code_as_the_kernels_do() {
        let _lock = crate::random::test_lock();
        crate::random::seed(3);
        let spread = Tensor::linspace(-6.0, 0.0, 20 * BLOCK, (Kind::Float, Device::Cpu)) * std::f64::consts::LN_10;
        let values = Tensor::randn([20 * BLOCK], (Kind::Float, Device::Cpu)) * spread.exp();
        for (map, values) in [(DynamicMap::signed(), values.copy()), (DynamicMap::unsigned(), values.square())] {
            let zeros = |size: i64, kind| Tensor::zeros([size], (kind, Device::Cpu));
            let mut blocks = Blocks { codes: zeros(20 * BLOCK, Kind::Uint8), absmax: zeros(20, Kind::Float), map };
            blocks.encode(0, &values).unwrap();
            let (codes, absmax) = encode_by_operations(&values, map).unwrap();
            assert_eq!((&codes, &absmax), (&blocks.codes, &blocks.absmax));
            let decoded = decode_by_operations(&codes, &absmax, map).unwrap();
            assert_eq!(decoded, blocks.decode(0, 20 * BLOCK).unwrap());
            // A block in the middle, and a short one at the end.
            assert_eq!(blocks.decode(BLOCK, 300).unwrap(), decoded.narrow(0, BLOCK, 300));
        }
    }

    #[test]
    fn sizes_are_those_of_the_tensors() {
        for (numel, wants_8bit) in [(4095, true), (4096, true), (5000, true), (5000, false), (0, true)] {
            let parameter = Tensor::zeros([numel], (Kind::Float, Device::Cpu));
            let moments = Moments::new("p", &parameter, wants_8bit, &mut Place::Device).unwrap();
            let bytes: usize =
                moments.tensors().iter().map(|(_, tensor)| tensor.numel() * tensor.kind().elt_size_in_bytes()).sum();
            assert_eq!(Moments::sizes(numel as usize, wants_8bit).sum::<usize>(), bytes);
        }
    }
}
