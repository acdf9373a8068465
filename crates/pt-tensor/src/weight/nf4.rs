//! Weights held in 4 bits.

use std::rc::Rc;

use pt_quant::dense::Output;
use pt_quant::formats::bitsandbytes::{self, QuantState, SourceDtype};
use pt_quant::{
    Absmax, AbsmaxBuf, Arithmetic, Block4, Block4Matrix, Block4Ref, BlockSize, Codebook, ProductOptions, ScaleFormat,
};
use tch::{Device, Kind, Tensor, no_grad};

use super::Weight;
use crate::autograd::attach_backward;
use crate::io::SafetensorsReader;
use crate::pool::{exec, with_workspace};
use crate::slices::{NewTensor, bf16s, f32s, u8s};
use crate::{Result, TensorError};

/// How a weight is quantized. The defaults are QLoRA's, blocks of 64 and double quantization, and what `--weights nf4` means in every command: an
/// adapter answers over the very weights that it was trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nf4Options {
    /// Weights that share a scale: a power of two from 32 to 4096.
    pub block_size: usize,
    /// Quantize the scales too, to 8 bits in blocks of 256: 4.127 instead of 4.5 bits a weight, in files and in memory on the CPU.
    pub double_quant: bool,
}

impl Default for Nf4Options {
    fn default() -> Self {
        Self { block_size: 64, double_quant: true }
    }
}

/// In which numbers a 4-bit weight is multiplied on the CPU when no gradient is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Nf4Arithmetic {
    /// As if the weight were dequantized to the kind it computes in.
    #[default]
    Exact,
    /// Activations in 8 bits with a scale for each 64 (W4A8): faster, with a relative error of some 0.6 % an output, which is more than the
    /// rounding that [`Weight`]'s laws allow. For answering; a backward pass is exact, and so not the gradient of this.
    Int8,
}

/// A linear weight in NF4 (Dettmers et al. 2023, <https://arxiv.org/abs/2305.14314>): 4-bit codes and one scale a block, the values
/// of bitsandbytes bit for bit. LoRA over it is QLoRA. (FP4 checkpoints of bitsandbytes are held the same way.)
///
/// Products on the CPU, forward and backward, decode as they multiply: a dense copy never exists. On other devices the weight is
/// dequantized by libtorch's operations for each product.
#[derive(Debug)]
pub struct Nf4Weight {
    store: Store,
    size: (i64, i64),
    kind: Kind,
    arithmetic: Nf4Arithmetic,
}

#[derive(Debug)]
enum Store {
    Cpu(Rc<Block4Matrix>),
    Tensors(Tensors),
}

impl Nf4Weight {
    /// Quantizes a dense weight `[out_features, in_features]`, which stays as it is; computes in its kind, on its device.
    ///
    /// # Errors
    /// [`TensorError::Shape`] unless it has two axes, [`TensorError::Quant`] for a block size that there is not.
    pub fn quantize(weight: &Tensor, options: Nf4Options) -> Result<Self> {
        Self::quantize_as(weight, options, weight.kind(), weight.device())
    }

    /// As [`quantize`](Self::quantize), to compute in another kind or on another device. A weight that comes as it is stored gets the same
    /// codes and scales whatever it computes in; one that was cast to a narrower kind before would not.
    ///
    /// # Errors
    /// As there.
    pub fn quantize_as(weight: &Tensor, options: Nf4Options, kind: Kind, device: Device) -> Result<Self> {
        let block4 = quantize(weight, options)?;
        Self::new(block4.as_ref(), weight.size2()?, kind, device)
    }

    /// Holds a 4-bit tensor of `size` = (out_features, in_features) that computes in `kind` on `device`.
    ///
    /// # Errors
    /// [`TensorError::Argument`] when the tensor has another number of weights.
    pub fn new(weights: Block4Ref<'_>, size: (i64, i64), kind: Kind, device: Device) -> Result<Self> {
        if size.0 < 0 || size.1 < 0 || size.0.checked_mul(size.1) != i64::try_from(weights.len()).ok() {
            let expected = format!("{} x {} of them", size.0, size.1);
            return Err(TensorError::Argument { what: "weights".into(), found: weights.len().to_string(), expected });
        }
        let store = match device {
            Device::Cpu => {
                let (rows, columns) = (size.0 as usize, size.1 as usize);
                Store::Cpu(Rc::new(Block4Matrix::from_block4(weights, rows, columns, ScaleFormat::AsStored, &exec())?))
            }
            device => Store::Tensors(Tensors::new(weights, size, device)?),
        };
        Ok(Self { store, size, kind, arithmetic: Nf4Arithmetic::Exact })
    }

    /// With other arithmetic where no gradient is wanted: for a model that answers, not for one under training.
    #[must_use]
    pub fn with_arithmetic(self, arithmetic: Nf4Arithmetic) -> Self {
        Self { arithmetic, ..self }
    }

    /// A 4-bit tensor of a checkpoint in bitsandbytes' layout, `None` when `name` is not one. Computes in `kind` on `device`.
    ///
    /// # Errors
    /// [`TensorError::Format`] when its parts do not fit together, [`TensorError::Shape`] unless it has two axes.
    pub fn read(reader: &SafetensorsReader, name: &str, kind: Kind, device: Device) -> Result<Option<Self>> {
        let Some(loaded) = reader.block4(name)? else { return Ok(None) };
        let [out_features, in_features] = loaded.state.shape[..] else {
            let found = loaded.state.shape.iter().map(|&n| n as i64).collect();
            let expected = "[out_features, in_features]".into();
            return Err(TensorError::Shape { what: format!("`{name}`"), found, expected });
        };
        Self::new(loaded.weights.as_ref(), (out_features as i64, in_features as i64), kind, device).map(Some)
    }

    /// Bytes that a 4-bit tensor of a checkpoint will take on the CPU: codes and scales as the file has them.
    pub fn num_bytes_of(state: &QuantState) -> usize {
        let len: usize = state.shape.iter().product();
        let num_scales = state.block_size.num_blocks(len);
        let scales =
            state.nested.map_or(4 * num_scales, |nested| num_scales + 4 * nested.block_size.num_blocks(num_scales));
        len.div_ceil(2) + scales
    }

    /// How it was quantized: with these, its weights as [`dense`](Weight::dense) has them could be quantized again.
    pub fn options(&self) -> Nf4Options {
        match &self.store {
            Store::Cpu(matrix) => {
                Nf4Options { block_size: matrix.block_size().get(), double_quant: matrix.has_nested_scales() }
            }
            Store::Tensors(tensors) => {
                Nf4Options { block_size: tensors.block_size as usize, double_quant: tensors.double_quant }
            }
        }
    }

    /// The tensors that bitsandbytes saves for the weight, called `name` there: as [`nf4_tensors`] gives them, of the very codes and scales that
    /// it computes with (scales in f32 where it holds them so).
    ///
    /// # Errors
    /// [`TensorError::Quant`] for a codebook that bitsandbytes does not have.
    pub fn tensors(&self, name: &str) -> Result<Vec<(String, Tensor)>> {
        let block4 = match &self.store {
            Store::Cpu(matrix) => matrix.to_block4(&exec()),
            Store::Tensors(tensors) => tensors.to_block4()?,
        };
        saved_tensors(name, &block4, &[self.size.0, self.size.1], self.kind)
    }
}

/// The tensors that bitsandbytes saves for a dense weight called `name`, quantized to compute in `kind`: codes, scales, tables and a
/// description. Written with [`save_sharded`](crate::io::save_sharded), transformers loads them, and so does [`Nf4Weight::read`].
///
/// # Errors
/// As [`Nf4Weight::quantize`].
pub fn nf4_tensors(name: &str, weight: &Tensor, options: Nf4Options, kind: Kind) -> Result<Vec<(String, Tensor)>> {
    saved_tensors(name, &quantize(weight, options)?, &weight.size(), kind)
}

fn saved_tensors(name: &str, block4: &Block4, size: &[i64], kind: Kind) -> Result<Vec<(String, Tensor)>> {
    let shape: Vec<usize> = size.iter().map(|&n| n as usize).collect();
    let dtype = match kind {
        Kind::BFloat16 => SourceDtype::BFloat16,
        Kind::Half => SourceDtype::Float16,
        _ => SourceDtype::Float32,
    };
    let parts = bitsandbytes::tensors(name, &block4.as_ref(), &shape, dtype)?;
    parts.into_iter().map(|(name, part)| Ok((name, crate::io::tensor_of(&part)?))).collect()
}

/// Quantizes a dense weight of any device, in f32, bf16 or f16.
fn quantize(weight: &Tensor, options: Nf4Options) -> Result<Block4> {
    if weight.dim() != 2 {
        return Err(TensorError::shape("weight", weight, "[out_features, in_features]"));
    }
    let block_size = BlockSize::new(options.block_size)?;
    let weight = weight.detach().to_device(Device::Cpu).contiguous();
    let block4 = match weight.kind() {
        Kind::BFloat16 => Block4::quantize(bf16s(&weight), block_size, Codebook::nf4(), &exec())?,
        // f16 widens exactly, and quantizing converts to f32 first.
        _ => Block4::quantize(f32s(&weight.to_kind(Kind::Float)), block_size, Codebook::nf4(), &exec())?,
    };
    Ok(if options.double_quant { block4.double_quantize(&exec())? } else { block4 })
}

impl Weight for Nf4Weight {
    fn size(&self) -> (i64, i64) {
        self.size
    }

    fn dense(&self) -> Result<Tensor> {
        let matrix = match &self.store {
            Store::Cpu(matrix) => matrix,
            Store::Tensors(tensors) => return tensors.dense(self.kind),
        };
        let block4 = matrix.to_block4(&exec());
        let mut dense = NewTensor::empty(&[self.size.0, self.size.1], stored_kind(self.kind));
        match stored_kind(self.kind) {
            Kind::BFloat16 => block4.as_ref().dequantize_into(dense.bf16s_mut(), &exec())?,
            _ => block4.as_ref().dequantize_into(dense.f32s_mut(), &exec())?,
        }
        Ok(dense.into_tensor().to_kind(self.kind))
    }

    fn project(&self, hidden_states: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        if hidden_states.size().last() != Some(&self.size.1) {
            return Err(TensorError::shape("hidden_states", hidden_states, format!("[.., {}]", self.size.1)));
        }
        match &self.store {
            Store::Cpu(matrix) => self.project_on_cpu(matrix, hidden_states, bias),
            Store::Tensors(tensors) => tensors.project(hidden_states, bias),
        }
    }

    fn project_backward(&self, grad: &Tensor) -> Result<Tensor> {
        if grad.size().last() != Some(&self.size.0) {
            return Err(TensorError::shape("grad", grad, format!("[.., {}]", self.size.0)));
        }
        match &self.store {
            Store::Cpu(matrix) => backward(matrix, grad, self.size.1),
            Store::Tensors(tensors) => no_grad(|| Ok(grad.detach().f_matmul(&tensors.dense(grad.kind())?)?)),
        }
    }

    /// Codes and scales.
    fn num_bytes(&self) -> usize {
        match &self.store {
            Store::Cpu(matrix) => matrix.num_bytes(),
            Store::Tensors(tensors) => tensors.packed.numel() + 4 * tensors.absmax.numel(),
        }
    }

    fn device(&self) -> Device {
        match &self.store {
            Store::Cpu(_) => Device::Cpu,
            Store::Tensors(tensors) => tensors.packed.device(),
        }
    }

    fn kind(&self) -> Kind {
        self.kind
    }

    fn as_nf4(&self) -> Option<&Nf4Weight> {
        Some(self)
    }
}

/// The kind that kernels compute in for tensors of `kind`: there are none for f16 and f64.
fn stored_kind(kind: Kind) -> Kind {
    if kind == Kind::BFloat16 { Kind::BFloat16 } else { Kind::Float }
}

/// Which product of a matrix.
#[derive(Clone, Copy)]
enum Product {
    Forward,
    Backward,
}

/// `x: [.., n]` times the matrix, in the kind of x, which is f32 or bf16; `width` numbers a row come out.
fn multiply(
    matrix: &Block4Matrix,
    x: &Tensor,
    width: i64,
    product: Product,
    arithmetic: Arithmetic,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let x = x.contiguous();
    let mut size = x.size();
    let depth = std::mem::replace(size.last_mut().unwrap_or(&mut 0), width);
    let rows = x.numel().checked_div(depth as usize).unwrap_or(0);
    let mut y = NewTensor::empty(&size, x.kind());
    let bias = bias.map(|bias| bias.to_kind(Kind::Float).contiguous());
    let options = ProductOptions { arithmetic, bias: bias.as_ref().map(f32s), output: Output::Replace };
    with_workspace(|workspace| match (x.kind(), product) {
        (Kind::BFloat16, Product::Forward) => {
            matrix.forward(bf16s(&x), y.bf16s_mut(), rows, &options, workspace, &exec())
        }
        (Kind::BFloat16, Product::Backward) => {
            matrix.backward(bf16s(&x), y.bf16s_mut(), rows, &options, workspace, &exec())
        }
        (_, Product::Forward) => matrix.forward(f32s(&x), y.f32s_mut(), rows, &options, workspace, &exec()),
        (_, Product::Backward) => matrix.backward(f32s(&x), y.f32s_mut(), rows, &options, workspace, &exec()),
    })?;
    Ok(y.into_tensor())
}

/// The arithmetic that is exact for a kind.
fn exact(kind: Kind) -> Arithmetic {
    if kind == Kind::BFloat16 { Arithmetic::Bf16 } else { Arithmetic::F32 }
}

fn backward(matrix: &Block4Matrix, grad: &Tensor, in_features: i64) -> Result<Tensor> {
    let kind = stored_kind(grad.kind());
    let dx =
        no_grad(|| multiply(matrix, &grad.detach().to_kind(kind), in_features, Product::Backward, exact(kind), None))?;
    Ok(dx.to_kind(grad.kind()))
}

impl Nf4Weight {
    fn project_on_cpu(&self, matrix: &Rc<Block4Matrix>, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let kind = stored_kind(x.kind());
        let arithmetic = match self.arithmetic {
            Nf4Arithmetic::Int8 if !x.requires_grad() => Arithmetic::Int8,
            _ => exact(kind),
        };
        // A bias that trains needs a graph of its own.
        let (fused, added) = match bias {
            Some(bias) if bias.requires_grad() => (None, Some(bias)),
            bias => (bias, None),
        };
        let (out_features, in_features) = self.size;
        let y = no_grad(|| {
            let x = x.detach().to_kind(kind);
            multiply(matrix, &x, out_features, Product::Forward, arithmetic, fused)
        })?;
        let y = y.to_kind(x.kind());
        let matrix = matrix.clone();
        attach_backward("nf4_linear", &[x], &[&y], move |grads| {
            let Some(grad) = grads.into_iter().next().flatten() else { return Ok(vec![None]) };
            Ok(vec![Some(backward(&matrix, &grad, in_features)?)])
        })?;
        Ok(match added {
            Some(bias) => y + bias,
            None => y,
        })
    }
}

/// The parts on a device that has no kernels of ours: a kernel of one's own would take these three.
#[derive(Debug)]
struct Tensors {
    /// `[ceil(out_features · in_features / 2)]`, u8, the first weight in the high half.
    packed: Tensor,
    /// `[num_blocks]`, f32.
    absmax: Tensor,
    /// `[16]`, f32.
    codebook: Tensor,
    block_size: i64,
    /// Whether the scales came in 8 bits.
    double_quant: bool,
    size: (i64, i64),
}

impl Tensors {
    fn new(weights: Block4Ref<'_>, size: (i64, i64), device: Device) -> Result<Self> {
        let mut absmax = vec![0.0; weights.absmax().len()];
        weights.absmax().decode_into(0, &mut absmax, &exec())?;
        Ok(Self {
            packed: Tensor::f_from_slice(weights.packed())?.f_to_device(device)?,
            absmax: Tensor::f_from_slice(&absmax)?.f_to_device(device)?,
            codebook: Tensor::f_from_slice(weights.codebook().values())?.f_to_device(device)?,
            block_size: weights.block_size().get() as i64,
            double_quant: matches!(weights.absmax(), Absmax::Nested(_)),
            size,
        })
    }

    fn to_block4(&self) -> Result<Block4> {
        let [packed, absmax, codebook] =
            [&self.packed, &self.absmax, &self.codebook].map(|tensor| tensor.to_device(Device::Cpu).contiguous());
        let values = <[f32; 16]>::try_from(f32s(&codebook)).unwrap_or_default();
        let (len, block_size) = ((self.size.0 * self.size.1) as usize, BlockSize::new(self.block_size as usize)?);
        let absmax = AbsmaxBuf::F32(f32s(&absmax).to_vec());
        Ok(Block4::new(u8s(&packed).to_vec(), absmax, len, block_size, Codebook::new(values)?)?)
    }

    fn dense(&self, kind: Kind) -> Result<Tensor> {
        let len = self.size.0 * self.size.1;
        let codes =
            Tensor::f_stack(&[self.packed.f_bitwise_right_shift_tensor_scalar(4)?, self.packed.f_bitwise_and(15)?], 1)?;
        let values = self.codebook.f_index_select(0, &codes.f_view([-1])?.f_to_kind(Kind::Int64)?)?; // [2 · bytes]
        // The last block may be short: scales are repeated for whole blocks and cut.
        let scales = self.absmax.f_repeat_interleave_self_int(self.block_size, 0, None)?;
        let dense = values.f_narrow(0, 0, len)?.f_mul(&scales.f_narrow(0, 0, len)?)?;
        Ok(dense.f_to_kind(kind)?.f_view([self.size.0, self.size.1])?)
    }

    fn project(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let kind = x.kind();
        // libtorch would keep the dense weight for the backward pass: there it is dequantized again.
        let y = no_grad(|| -> Result<Tensor> {
            let bias = bias.filter(|bias| !bias.requires_grad()).map(|bias| bias.to_kind(kind));
            Ok(x.detach().f_linear(&self.dense(kind)?, bias.as_ref())?)
        })?;
        let parts = Self {
            packed: self.packed.shallow_clone(),
            absmax: self.absmax.shallow_clone(),
            codebook: self.codebook.shallow_clone(),
            ..*self
        };
        attach_backward("nf4_linear", &[x], &[&y], move |grads| {
            let Some(grad) = grads.into_iter().next().flatten() else { return Ok(vec![None]) };
            Ok(vec![Some(grad.f_matmul(&parts.dense(kind)?)?)])
        })?;
        Ok(match bias.filter(|bias| bias.requires_grad()) {
            Some(bias) => y + bias,
            None => y,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(size: &[i64], kind: Kind) -> Tensor {
        Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind)
    }

    /// The largest difference, relative to the largest number.
    fn distance(a: &Tensor, b: &Tensor) -> f64 {
        let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
        ((a - &b).abs().max() / b.abs().max()).double_value(&[])
    }

    #[test]
    fn it_projects_forward_and_backward_as_its_dense_weight() {
        let _lock = crate::random::test_lock();
        for (kind, tolerance) in [(Kind::Float, 2e-6), (Kind::BFloat16, 1e-2), (Kind::Half, 2e-3)] {
            for (out_features, in_features) in [(192, 576), (7, 96), (64, 64)] {
                let weight =
                    Nf4Weight::quantize(&draw(&[out_features, in_features], kind), Nf4Options::default()).unwrap();
                assert_eq!((weight.size(), weight.kind()), ((out_features, in_features), kind));
                let dense = weight.dense().unwrap();
                for rows in [1, 3, 40] {
                    let x = draw(&[2, rows, in_features], kind).set_requires_grad(true);
                    let bias = draw(&[out_features], kind).set_requires_grad(rows == 3);
                    let y = weight.project(&x, Some(&bias)).unwrap();
                    assert_eq!((y.size(), y.kind()), (vec![2, rows, out_features], kind));
                    let x64 = x.detach().to_kind(Kind::Double).set_requires_grad(true);
                    let want = x64.linear(&dense.to_kind(Kind::Double), Some(&bias.to_kind(Kind::Double)));
                    assert!(distance(&y, &want) < tolerance, "{kind:?} {rows}: {}", distance(&y, &want));
                    let grad = draw(&[2, rows, out_features], kind);
                    crate::autograd::backward(&[y], &[grad.shallow_clone()]).unwrap();
                    crate::autograd::backward(&[want], &[grad.to_kind(Kind::Double)]).unwrap();
                    assert!(distance(&x.grad(), &x64.grad()) < tolerance, "{kind:?} backward");
                    assert_eq!(bias.grad().defined(), rows == 3);
                }
            }
        }
    }

    #[test]
    fn libtorch_operations_give_the_same_weights_bit_for_bit() {
        let _lock = crate::random::test_lock();
        for (out_features, in_features) in [(192, 576), (7, 96), (3, 5)] {
            let block4 = quantize(&draw(&[out_features, in_features], Kind::Float), Nf4Options::default()).unwrap();
            let size = (out_features, in_features);
            for kind in [Kind::Float, Kind::BFloat16] {
                let ours = Nf4Weight::new(block4.as_ref(), size, kind, Device::Cpu).unwrap();
                let parts = Tensors::new(block4.as_ref(), size, Device::Cpu).unwrap();
                let theirs = Nf4Weight { store: Store::Tensors(parts), size, kind, arithmetic: Nf4Arithmetic::Exact };
                assert_eq!(ours.dense().unwrap(), theirs.dense().unwrap());
                let x = draw(&[2, in_features], kind);
                let grads = [&ours, &theirs].map(|weight| {
                    let x = x.copy().set_requires_grad(true);
                    let y = weight.project(&x, None).unwrap();
                    crate::autograd::backward(&[y.shallow_clone()], &[y.ones_like()]).unwrap();
                    (y.detach(), x.grad())
                });
                assert!(distance(&grads[0].0, &grads[1].0) < 1e-2 && distance(&grads[0].1, &grads[1].1) < 1e-2);
            }
        }
    }

    #[test]
    fn a_quantized_weight_is_saved_and_read_back_from_several_shards() {
        let _lock = crate::random::test_lock();
        let folder = tempfile::tempdir().unwrap();
        for (kind, double_quant) in [(Kind::Float, false), (Kind::BFloat16, true), (Kind::Half, true)] {
            let dense = draw(&[48, 80], kind);
            let options = Nf4Options { double_quant, ..Nf4Options::default() };
            let mut tensors = nf4_tensors("a.weight", &dense, options, kind).unwrap();
            tensors.push(("b".into(), draw(&[3], kind)));
            crate::io::save_sharded(folder.path(), &tensors, 600).unwrap();
            let reader = SafetensorsReader::open(folder.path()).unwrap();
            let read = Nf4Weight::read(&reader, "a.weight", kind, Device::Cpu).unwrap().unwrap();
            let want = Nf4Weight::quantize(&dense, options).unwrap();
            assert_eq!((read.size(), read.dense().unwrap()), ((48, 80), want.dense().unwrap()));
            assert_eq!((read.options(), want.options()), (options, options));
            // What is loaded is saved again as it was, scales in 8 bits too.
            let again = read.tensors("a.weight").unwrap();
            assert!(again.iter().zip(&tensors).all(|(again, first)| again == first));
            assert!(Nf4Weight::read(&reader, "b", kind, Device::Cpu).unwrap().is_none());
        }
    }

    #[test]
    fn int8_is_close_and_only_without_gradients() {
        let _lock = crate::random::test_lock();
        let dense = draw(&[64, 576], Kind::Float);
        let exact = Nf4Weight::quantize(&dense, Nf4Options::default()).unwrap();
        let int8 = Nf4Weight::quantize(&dense, Nf4Options::default()).unwrap().with_arithmetic(Nf4Arithmetic::Int8);
        let x = draw(&[2, 576], Kind::Float);
        let (want, got) = (exact.project(&x, None).unwrap(), int8.project(&x, None).unwrap());
        let error = distance(&got, &want);
        assert!(error > 0.0 && error < 2e-2, "{error}");
        let x = x.set_requires_grad(true);
        assert_eq!(int8.project(&x, None).unwrap().detach(), want);
    }

    #[test]
    fn it_takes_an_eighth_of_the_memory_of_f32() {
        let num_bytes = |double_quant| {
            let options = Nf4Options { double_quant, ..Nf4Options::default() };
            Nf4Weight::quantize(&draw(&[576, 576], Kind::Float), options).unwrap().num_bytes() as f64
        };
        assert_eq!(num_bytes(false), 0.5625 * 576.0 * 576.0);
        assert!(num_bytes(true) < 0.516 * 576.0 * 576.0, "{}", num_bytes(true));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let flat = Tensor::zeros([6], (Kind::Float, Device::Cpu));
        assert!(matches!(Nf4Weight::quantize(&flat, Nf4Options::default()), Err(TensorError::Shape { .. })));
        let square = Tensor::zeros([4, 4], (Kind::Float, Device::Cpu));
        let odd = Nf4Options { block_size: 48, double_quant: false };
        assert!(matches!(Nf4Weight::quantize(&square, odd), Err(TensorError::Quant(_))));
        let weight = Nf4Weight::quantize(&square, Nf4Options::default()).unwrap();
        assert!(matches!(weight.project(&flat, None), Err(TensorError::Shape { .. })));
    }
}
