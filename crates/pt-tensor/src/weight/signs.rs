//! 1-bit deltas whose scales are a tensor that can be trained.

use std::cell::RefCell;
use std::rc::Rc;

use pt_quant::Bf16;
use pt_quant::delta::{
    self, BitDelta, BitDeltaRef, BitMatrix, DeltaArithmetic, DeltaMatrix, DeltaOptions, DeltaScale, DeltaScaleBuf,
    SCALE_GROUP, ScaleAxis,
};
use pt_quant::dense::Output;
use tch::{Device, Kind, Tensor, no_grad};

use crate::autograd::attach_backward;
use crate::pool::{exec, with_delta_workspace};
use crate::slices::{NewTensor, bf16s, f32s};
use crate::{Result, TensorError};

/// The 1-bit delta between two dense weights `[out_features, in_features]`: the signs of `fine_tuned − base` and the mean of its magnitudes
/// (BitDelta, Liu et al. 2024, <https://arxiv.org/abs/2402.10193>).
///
/// # Errors
/// [`TensorError::Shape`] unless both are matrices of one shape, [`TensorError::Quant`] when a difference is not finite.
pub fn fit_delta(base: &Tensor, fine_tuned: &Tensor, axis: ScaleAxis) -> Result<BitDelta> {
    if base.dim() != 2 || base.size() != fine_tuned.size() {
        return Err(TensorError::shape("fine_tuned", fine_tuned, format!("{:?} as the base, two axes", base.size())));
    }
    let (out_features, in_features) = base.size2()?;
    let (rows, columns) = (out_features as usize, in_features as usize);
    let [base, fine_tuned] = [base, fine_tuned].map(|tensor| tensor.detach().to_device(Device::Cpu).contiguous());
    if base.kind() == Kind::BFloat16 && fine_tuned.kind() == Kind::BFloat16 {
        return Ok(BitDelta::fit::<Bf16>(bf16s(&base), bf16s(&fine_tuned), rows, columns, axis, &exec())?);
    }
    let [base, fine_tuned] = [base, fine_tuned].map(|tensor| tensor.to_kind(Kind::Float));
    Ok(BitDelta::fit::<f32>(f32s(&base), f32s(&fine_tuned), rows, columns, axis, &exec())?)
}

/// `delta_scale · signs`, `[out_features, in_features]`: a sign of one bit for each weight, and scales in an f32 tensor that may be a
/// trained leaf.
///
/// On the CPU products are table lookups of `pt-quant`, forward, backward and for the gradient of the scales; on other devices the signs are
/// expanded by libtorch's operations for each product. Clones share signs and scales.
#[derive(Debug)]
pub struct ScaledSigns {
    store: Rc<Store>,
    /// f32, of [`scale_size`](Self::scale_size).
    scale: Tensor,
    axis: ScaleAxis,
    size: (i64, i64),
}

impl Clone for ScaledSigns {
    fn clone(&self) -> Self {
        let Self { store, scale, axis, size } = self;
        Self { store: store.clone(), scale: scale.shallow_clone(), axis: *axis, size: *size }
    }
}

#[derive(Debug)]
enum Store {
    Cpu(RefCell<Lookup>),
    Device(Expanded),
}

/// Signs in the order that the kernels read, with the scales they had at some version of their tensor.
#[derive(Debug)]
struct Lookup {
    matrix: DeltaMatrix,
    version: i64,
}

impl ScaledSigns {
    /// Takes a delta to a device.
    ///
    /// # Errors
    /// [`TensorError::Torch`] when there is no memory for it.
    pub fn new(delta: BitDeltaRef<'_>, device: Device) -> Result<Self> {
        let axis = delta.scale().axis();
        let size = (delta.signs().out_features() as i64, delta.signs().in_features() as i64);
        let scale = Tensor::f_from_slice(delta.scale().values())?.f_view(Self::scale_size(axis, size).as_slice())?;
        let scale = scale.f_to_device(device)?;
        let store = match device {
            Device::Cpu => {
                let matrix = DeltaMatrix::new(delta, &exec())?;
                Store::Cpu(RefCell::new(Lookup { matrix, version: scale.f_internal_version()? }))
            }
            device => Store::Device(Expanded::new(delta, device)?),
        };
        Ok(Self { store: Rc::new(store), scale, axis, size })
    }

    /// From the signs as [`signs`](Self::signs) gives them, and their scales.
    ///
    /// # Errors
    /// [`TensorError::Shape`] and [`TensorError::Argument`] when shapes or kinds are not those of a delta of `size` with scales of `axis`;
    /// [`TensorError::Quant`] when bits beyond the end of a row are set.
    pub fn from_tensors(signs: &Tensor, scale: &Tensor, size: (i64, i64), axis: ScaleAxis) -> Result<Self> {
        check("signs", signs, &Self::signs_size(size), Kind::Uint8)?;
        check("scale", scale, &Self::scale_size(axis, size), Kind::Float)?;
        let (rows, columns) = (size.0 as usize, size.1 as usize);
        let bytes = Vec::<u8>::try_from(&signs.to_device(Device::Cpu).contiguous().f_view([-1])?)?;
        // Rows of whole words, the lowest byte first.
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
        let words = bytes.chunks(columns.div_ceil(8).max(1)).flat_map(|row| row.chunks(8).map(word)).collect();
        let delta = BitDelta::new(BitMatrix::new(words, rows, columns)?, buffer(axis, scale)?)?;
        Self::new(delta.as_ref(), scale.device())
    }

    /// From BitDelta's own packing: `mask`, `[in_features / 32, out_features]` i32, bit j of word `[k, n]` the sign of weight
    /// `[n, 32·k + j]`; one scale for the matrix.
    ///
    /// # Errors
    /// [`TensorError::Shape`] and [`TensorError::Argument`] for tensors of other axes or kinds.
    pub fn from_bitdelta(mask: &Tensor, coeff: &Tensor) -> Result<Self> {
        let size = match mask.size()[..] {
            [words, out_features] => (out_features, 32 * words),
            _ => return Err(TensorError::shape("mask", mask, "[in_features / 32, out_features]")),
        };
        check("mask", mask, &mask.size(), Kind::Int)?;
        if coeff.numel() != 1 {
            return Err(TensorError::shape("coeff", coeff, "one number"));
        }
        let words = Vec::<i32>::try_from(&mask.to_device(Device::Cpu).contiguous().f_view([-1])?)?;
        let signs = BitMatrix::from_bitdelta(&words, size.0 as usize, size.1 as usize, &exec())?;
        let delta = BitDelta::new(signs, DeltaScaleBuf::Matrix(coeff.double_value(&[]) as f32))?;
        Self::new(delta.as_ref(), mask.device())
    }

    /// The shape of scales: `[1]`, `[out_features, 1]` or `[out_features, ceil(in_features / 128)]`.
    pub fn scale_size(axis: ScaleAxis, (out_features, in_features): (i64, i64)) -> Vec<i64> {
        match axis {
            ScaleAxis::Matrix => vec![1],
            ScaleAxis::Row => vec![out_features, 1],
            ScaleAxis::Group128 => vec![out_features, (in_features as u64).div_ceil(SCALE_GROUP as u64) as i64],
        }
    }

    /// The shape of packed signs: `[out_features, ceil(in_features / 8)]`.
    pub fn signs_size((out_features, in_features): (i64, i64)) -> Vec<i64> {
        vec![out_features, (in_features as u64).div_ceil(8) as i64]
    }

    /// The scales: the tensor itself, so that it can be made a leaf and trained in place.
    pub fn scale(&self) -> &Tensor {
        &self.scale
    }

    /// What weights share a scale.
    pub fn axis(&self) -> ScaleAxis {
        self.axis
    }

    /// `(out_features, in_features)`.
    pub fn size(&self) -> (i64, i64) {
        self.size
    }

    /// The packed signs, u8 on the CPU: weight `[n, k]` is bit `k % 8` of byte `[n, k / 8]`, set for +1, the lowest bit first.
    ///
    /// # Errors
    /// [`TensorError::Torch`] when there is no memory for them.
    pub fn signs(&self) -> Result<Tensor> {
        let (delta, size) = (self.delta()?, Self::signs_size(self.size));
        let signs = delta.signs();
        let rows = (0..signs.out_features()).flat_map(|row| {
            signs.row(row).iter().flat_map(|word| word.to_le_bytes()).take(size[1] as usize).collect::<Vec<u8>>()
        });
        Ok(Tensor::f_from_slice(&rows.collect::<Vec<u8>>())?.f_view(size.as_slice())?)
    }

    /// The signs in BitDelta's own packing: see [`from_bitdelta`](Self::from_bitdelta).
    ///
    /// # Errors
    /// [`TensorError::Quant`] when `in_features` is no multiple of 32.
    pub fn bitdelta_mask(&self) -> Result<Tensor> {
        let (delta, (out_features, in_features)) = (self.delta()?, self.size);
        let mut mask = vec![0i32; (in_features / 32 * out_features) as usize];
        delta.signs().to_bitdelta(&mut mask, &exec())?;
        Ok(Tensor::f_from_slice(&mask)?.f_view([in_features / 32, out_features])?)
    }

    /// The delta as `pt-quant` stores it.
    ///
    /// # Errors
    /// [`TensorError::Torch`].
    pub fn delta(&self) -> Result<BitDelta> {
        match self.store.as_ref() {
            Store::Cpu(lookup) => {
                let mut lookup = lookup.borrow_mut();
                lookup.follow(&self.scale, self.axis)?;
                Ok(lookup.matrix.to_delta())
            }
            Store::Device(expanded) => {
                Ok(BitDelta::new(expanded.to_bits(self.size)?, buffer(self.axis, &self.scale)?)?)
            }
        }
    }

    /// The same on another device, with scales of its own; a clone where it is there already.
    ///
    /// # Errors
    /// [`TensorError::Torch`] when there is no memory for it.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        if self.scale.device() == device { Ok(self.clone()) } else { Self::new(self.delta()?.as_ref(), device) }
    }

    /// A copy with signs and scales of its own, as the scales are now; a clone would go on sharing them.
    ///
    /// # Errors
    /// [`TensorError::Torch`] when there is no memory for it.
    pub fn copy(&self) -> Result<Self> {
        Self::new(self.delta()?.as_ref(), self.scale.device())
    }

    /// `delta_scale · signs` as a dense tensor, f32, without a graph.
    ///
    /// # Errors
    /// [`TensorError::Torch`] when there is no memory for it.
    pub fn dense(&self) -> Result<Tensor> {
        no_grad(|| match self.store.as_ref() {
            Store::Cpu(_) => Expanded::new(self.delta()?.as_ref(), Device::Cpu)?.dense(&self.scale, self.size),
            Store::Device(expanded) => expanded.dense(&self.scale, self.size),
        })
    }

    /// `y + hidden_states · (delta_scale · signs)ᵀ`, with gradients to `y`, `hidden_states` and the scales.
    ///
    /// The scales must stay as they are until the backward pass is done.
    ///
    /// # Shapes
    /// - `hidden_states`: `[.., in_features]`, `y`: `[.., out_features]`, of one kind; sums are f32, rounded to that kind once.
    ///
    /// # Errors
    /// [`TensorError::Shape`].
    pub fn add_to(&self, y: &Tensor, hidden_states: &Tensor) -> Result<Tensor> {
        let (x, scale) = (hidden_states.detach(), self.scale.detach());
        let (axis, size) = (self.axis, self.size);
        let output = no_grad(|| self.store.forward(&scale, axis, size, &x, Some(&y.detach())))?;
        let (needs_x, needs_scale) = (hidden_states.requires_grad(), self.scale.requires_grad());
        let (store, version) = (self.store.clone(), scale.f_internal_version()?);
        // Kept for the gradient of the scales only; its siblings share it.
        let x = needs_scale.then_some(x);
        attach_backward("scaled_signs", &[y, hidden_states, &self.scale], &[&output], move |grads| {
            let Some(grad) = grads.into_iter().next().flatten() else { return Ok(vec![None, None, None]) };
            if scale.f_internal_version()? != version {
                return Err(TensorError::argument("delta_scale", "changed since the forward pass", "as it was"));
            }
            let grad_x = if needs_x { Some(store.backward(&scale, axis, size, &grad)?) } else { None };
            let grad_scale = match &x {
                Some(x) => Some(store.scale_gradient(&scale, axis, size, x, &grad)?),
                None => None,
            };
            Ok(vec![Some(grad), grad_x, grad_scale])
        })?;
        Ok(output)
    }

    /// `grad · delta_scale · signs`, without a graph: the gradient to the input.
    pub(super) fn project_backward(&self, grad: &Tensor) -> Result<Tensor> {
        self.store.backward(&self.scale.detach(), self.axis, self.size, grad)
    }
}

/// Adds to each row of `y` the product of that row of `hidden_states` with a delta of its own: `y[m] + hidden_states[m] · deltas[tenants[m]]ᵀ`;
/// a row without one stays as it is. The product of the base that all share stands in `y` already.
///
/// Where no graph is recorded, on the CPU, it is one pass over the rows ([`pt_quant::delta::add_tenants`]); else each delta takes its rows in
/// turn, with gradients as [`ScaledSigns::add_to`] has them.
///
/// # Shapes
/// - `hidden_states`: `[rows, in_features]`, `y`: `[rows, out_features]`; `tenants` has an index of `deltas`, or none, for each row.
///
/// # Errors
/// [`TensorError::Shape`] when shapes do not fit, [`TensorError::Argument`] for a tenant without a delta.
pub fn add_deltas(
    deltas: &[&ScaledSigns],
    tenants: &[Option<usize>],
    y: &Tensor,
    hidden_states: &Tensor,
) -> Result<Tensor> {
    if hidden_states.dim() != 2 || hidden_states.size()[0] != tenants.len() as i64 {
        return Err(TensorError::shape("hidden_states", hidden_states, format!("[{}, in_features]", tenants.len())));
    }
    if let Some(tenant) = tenants.iter().flatten().find(|tenant| **tenant >= deltas.len()) {
        return Err(TensorError::argument("tenants", tenant, &format!("under {}, the number of deltas", deltas.len())));
    }
    let is_recorded = [y, hidden_states].into_iter().chain(deltas.iter().map(|delta| &delta.scale));
    let is_recorded = is_grad_enabled() && is_recorded.into_iter().any(Tensor::requires_grad);
    let on_cpu: Vec<(&RefCell<Lookup>, &ScaledSigns)> = deltas
        .iter()
        .filter_map(|&delta| match delta.store.as_ref() {
            Store::Cpu(lookup) => Some((lookup, delta)),
            Store::Device(_) => None,
        })
        .collect();
    // All are brought up to date before one is read: a delta may be there twice, or beside a clone that shares its store.
    for (lookup, delta) in &on_cpu {
        lookup.borrow_mut().follow(&delta.scale.detach(), delta.axis)?;
    }
    let lookups: Vec<_> = on_cpu.iter().map(|(lookup, _)| lookup.borrow()).collect();
    if !is_recorded && lookups.len() == deltas.len() {
        let matrices: Vec<&DeltaMatrix> = lookups.iter().map(|lookup| &lookup.matrix).collect();
        return no_grad(|| add_tenants(&matrices, tenants, y, hidden_states));
    }
    drop(lookups);
    let mut output = y.shallow_clone();
    for (index, delta) in deltas.iter().enumerate() {
        let rows = tenants.iter().enumerate().filter(|(_, tenant)| **tenant == Some(index)).map(|(row, _)| row as i64);
        let rows = Tensor::f_from_slice(&rows.collect::<Vec<i64>>())?.f_to_device(y.device())?;
        if rows.numel() > 0 {
            let part = delta.add_to(&y.f_index_select(0, &rows)?, &hidden_states.f_index_select(0, &rows)?)?;
            output = output.f_index_copy(0, &rows, &part)?;
        }
    }
    Ok(output)
}

fn add_tenants(
    deltas: &[&DeltaMatrix],
    tenants: &[Option<usize>],
    y: &Tensor,
    hidden_states: &Tensor,
) -> Result<Tensor> {
    let kind = kernel_kind(hidden_states.kind());
    let x = hidden_states.detach().to_kind(kind).contiguous();
    let mut output = NewTensor::empty(&y.size(), kind);
    output.copy_from(&y.detach())?;
    let arithmetic = DeltaArithmetic::F32;
    with_delta_workspace(|workspace| match kind {
        Kind::BFloat16 => {
            delta::add_tenants(deltas, tenants, bf16s(&x), output.bf16s_mut(), arithmetic, workspace, &exec())
        }
        _ => delta::add_tenants(deltas, tenants, f32s(&x), output.f32s_mut(), arithmetic, workspace, &exec()),
    })?;
    Ok(output.into_tensor().to_kind(y.kind()))
}

/// Whether operations are being recorded.
fn is_grad_enabled() -> bool {
    Tensor::zeros([1], (Kind::Float, Device::Cpu)).set_requires_grad(true).neg().requires_grad()
}

fn check(what: &str, tensor: &Tensor, size: &[i64], kind: Kind) -> Result<()> {
    if tensor.kind() != kind {
        return Err(TensorError::argument(what, format!("{:?}", tensor.kind()), &format!("{kind:?}")));
    }
    if tensor.size() != size {
        return Err(TensorError::shape(what, tensor, format!("{size:?}")));
    }
    Ok(())
}

/// Scales out of their tensor.
fn buffer(axis: ScaleAxis, scale: &Tensor) -> Result<DeltaScaleBuf> {
    let values = Vec::<f32>::try_from(&scale.detach().to_device(Device::Cpu).contiguous().f_view([-1])?)?;
    Ok(match axis {
        ScaleAxis::Matrix => DeltaScaleBuf::Matrix(values.first().copied().unwrap_or(0.0)),
        ScaleAxis::Row => DeltaScaleBuf::Row(values),
        ScaleAxis::Group128 => DeltaScaleBuf::Group128(values),
    })
}

impl Lookup {
    /// Takes over the scales, where they were written to since the last time.
    fn follow(&mut self, scale: &Tensor, axis: ScaleAxis) -> Result<()> {
        let version = scale.f_internal_version()?;
        if version != self.version {
            self.matrix.set_scale(match &buffer(axis, scale)? {
                DeltaScaleBuf::Matrix(value) => DeltaScale::Matrix(*value),
                DeltaScaleBuf::Row(values) => DeltaScale::Row(values),
                DeltaScaleBuf::Group128(values) => DeltaScale::Group128(values),
            })?;
            self.version = version;
        }
        Ok(())
    }
}

impl Store {
    /// The product, added to `y` where there is one.
    fn forward(
        &self,
        scale: &Tensor,
        axis: ScaleAxis,
        size: (i64, i64),
        x: &Tensor,
        y: Option<&Tensor>,
    ) -> Result<Tensor> {
        match self {
            Self::Cpu(lookup) => {
                let mut lookup = lookup.borrow_mut();
                lookup.follow(scale, axis)?;
                multiply(&lookup.matrix, x, Product::Forward, y)
            }
            Self::Device(expanded) => {
                let product = x.f_matmul(&expanded.dense(scale, size)?.to_kind(x.kind()).tr())?;
                Ok(if let Some(y) = y { product.f_add(y)? } else { product })
            }
        }
    }

    fn backward(&self, scale: &Tensor, axis: ScaleAxis, size: (i64, i64), grad: &Tensor) -> Result<Tensor> {
        no_grad(|| match self {
            Self::Cpu(lookup) => {
                let mut lookup = lookup.borrow_mut();
                lookup.follow(scale, axis)?;
                multiply(&lookup.matrix, &grad.detach(), Product::Backward, None)
            }
            Self::Device(expanded) => Ok(grad.detach().f_matmul(&expanded.dense(scale, size)?.to_kind(grad.kind()))?),
        })
    }

    /// `<grad, signs · x>`, in the shape of the scales.
    fn scale_gradient(
        &self,
        scale: &Tensor,
        axis: ScaleAxis,
        size: (i64, i64),
        x: &Tensor,
        grad: &Tensor,
    ) -> Result<Tensor> {
        no_grad(|| match self {
            Self::Cpu(lookup) => scale_gradient(&lookup.borrow().matrix, x, grad, &scale.size()),
            Self::Device(expanded) => {
                let flat = |t: &Tensor, width| t.detach().to_kind(Kind::Float).f_reshape([-1, width]);
                let whole = flat(grad, size.0)?.f_t_copy()?.f_matmul(&flat(x, size.1)?)? * expanded.signs(size.1)?;
                Ok(match axis {
                    ScaleAxis::Matrix => whole.f_sum(Kind::Float)?.f_view([1])?,
                    ScaleAxis::Row => whole.f_sum_dim_intlist([1i64].as_slice(), true, Kind::Float)?,
                    ScaleAxis::Group128 => {
                        let padding = scale.size()[1] * SCALE_GROUP as i64 - size.1;
                        let groups = whole.f_constant_pad_nd([0, padding])?.f_view([size.0, -1, SCALE_GROUP as i64])?;
                        groups.f_sum_dim_intlist([-1i64].as_slice(), false, Kind::Float)?
                    }
                })
            }
        })
    }
}

#[derive(Clone, Copy)]
enum Product {
    Forward,
    Backward,
}

/// The kind that the kernels take: bf16 as it is, others by way of f32.
fn kernel_kind(kind: Kind) -> Kind {
    if kind == Kind::BFloat16 { Kind::BFloat16 } else { Kind::Float }
}

/// `[.., n]` times the delta, added to `y` where there is one, in the kind of x; computed in f32.
fn multiply(matrix: &DeltaMatrix, x: &Tensor, product: Product, y: Option<&Tensor>) -> Result<Tensor> {
    let (depth, width) = match product {
        Product::Forward => (matrix.in_features(), matrix.out_features()),
        Product::Backward => (matrix.out_features(), matrix.in_features()),
    };
    let kind = kernel_kind(x.kind());
    let input = x.to_kind(kind).contiguous();
    let mut size = input.size();
    if size.last() != Some(&(depth as i64)) {
        return Err(TensorError::shape("hidden_states", x, format!("[.., {depth}]")));
    }
    *size.last_mut().unwrap_or(&mut 0) = width as i64;
    let rows = input.numel().checked_div(depth).unwrap_or(0);
    let mut out = NewTensor::empty(&size, kind);
    let mut output = Output::Replace;
    if let Some(y) = y {
        if y.size() != size {
            return Err(TensorError::shape("y", y, format!("{size:?}")));
        }
        out.copy_from(y)?;
        output = Output::Add;
    }
    let options = DeltaOptions { arithmetic: DeltaArithmetic::F32, output };
    with_delta_workspace(|workspace| match (kind, product) {
        (Kind::BFloat16, Product::Forward) => {
            matrix.forward(bf16s(&input), out.bf16s_mut(), rows, options, workspace, &exec())
        }
        (Kind::BFloat16, Product::Backward) => {
            matrix.backward(bf16s(&input), out.bf16s_mut(), rows, options, workspace, &exec())
        }
        (_, Product::Forward) => matrix.forward(f32s(&input), out.f32s_mut(), rows, options, workspace, &exec()),
        (_, Product::Backward) => matrix.backward(f32s(&input), out.f32s_mut(), rows, options, workspace, &exec()),
    })?;
    Ok(out.into_tensor().to_kind(x.kind()))
}

/// `<grad, signs · x>` over the weights that share a scale, f32.
fn scale_gradient(matrix: &DeltaMatrix, x: &Tensor, grad: &Tensor, size: &[i64]) -> Result<Tensor> {
    let kind = kernel_kind(x.kind());
    let [x, grad] = [x, grad].map(|tensor| tensor.detach().to_kind(kind).contiguous());
    let rows = x.numel().checked_div(matrix.in_features()).unwrap_or(0);
    let mut gradient = NewTensor::empty(size, Kind::Float);
    let (out, arithmetic) = (gradient.f32s_mut(), DeltaArithmetic::F32);
    with_delta_workspace(|workspace| match kind {
        Kind::BFloat16 => matrix.scale_gradient(bf16s(&x), bf16s(&grad), out, rows, arithmetic, workspace, &exec()),
        _ => matrix.scale_gradient(f32s(&x), f32s(&grad), out, rows, arithmetic, workspace, &exec()),
    })?;
    Ok(gradient.into_tensor())
}

/// Signs on a device that has no kernels of ours.
#[derive(Debug)]
struct Expanded {
    /// `[out_features, ceil(in_features / 64) · 8]`, u8, the first weight in the lowest bit.
    bits: Tensor,
}

impl Expanded {
    fn new(delta: BitDeltaRef<'_>, device: Device) -> Result<Self> {
        let signs = delta.signs();
        let bytes: Vec<u8> = signs.words().iter().flat_map(|word| word.to_le_bytes()).collect();
        let size = [signs.out_features() as i64, 8 * signs.words_per_row() as i64];
        Ok(Self { bits: Tensor::f_from_slice(&bytes)?.f_view(size)?.f_to_device(device)? })
    }

    fn to_bits(&self, (out_features, in_features): (i64, i64)) -> Result<BitMatrix> {
        let bytes = Vec::<u8>::try_from(&self.bits.to_device(Device::Cpu).f_view([-1])?)?;
        let words = bytes.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
        Ok(BitMatrix::new(words, out_features as usize, in_features as usize)?)
    }

    /// ±1 in f32.
    fn signs(&self, columns: i64) -> Result<Tensor> {
        let places = Tensor::f_from_slice(&[1u8, 2, 4, 8, 16, 32, 64, 128])?.f_to_device(self.bits.device())?;
        let is_set = self.bits.f_unsqueeze(-1)?.f_bitwise_and_tensor(&places)?.f_ne(0)?; // [rows, bytes, 8]
        let rows = self.bits.size()[0];
        Ok(is_set.f_view([rows, -1])?.f_narrow(1, 0, columns)?.f_to_kind(Kind::Float)? * 2.0 - 1.0)
    }

    /// `delta_scale · signs`, f32.
    fn dense(&self, scale: &Tensor, (_, columns): (i64, i64)) -> Result<Tensor> {
        let scale = scale.detach();
        let scale = match scale.size()[..] {
            [_, groups] if groups > 1 => {
                scale.f_repeat_interleave_self_int(SCALE_GROUP as i64, 1, None)?.f_narrow(1, 0, columns)?
            }
            _ => scale,
        };
        Ok(self.signs(columns)? * scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(size: &[i64]) -> Tensor {
        Tensor::randn(size, (Kind::Float, Device::Cpu))
    }

    fn distance(a: &Tensor, b: &Tensor) -> f64 {
        let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
        ((a - &b).abs().max() / b.abs().max()).double_value(&[])
    }

    const AXES: [ScaleAxis; 3] = [ScaleAxis::Matrix, ScaleAxis::Row, ScaleAxis::Group128];

    fn fitted(axis: ScaleAxis) -> ScaledSigns {
        let base = draw(&[70, 200]);
        let delta = fit_delta(&base, &(&base + 0.1 * draw(&[70, 200])), axis).unwrap();
        ScaledSigns::new(delta.as_ref(), Device::Cpu).unwrap()
    }

    /// The same by libtorch's operations, with scales of its own.
    fn expanded(signs: &ScaledSigns) -> ScaledSigns {
        let store = Store::Device(Expanded::new(signs.delta().unwrap().as_ref(), Device::Cpu).unwrap());
        ScaledSigns { store: Rc::new(store), scale: signs.scale.detach().copy(), axis: signs.axis, size: signs.size }
    }

    #[test]
    fn values_and_gradients_of_input_and_scales_are_those_of_the_dense_product() {
        let _lock = crate::random::test_lock();
        for (kind, tolerance) in [(Kind::Float, 3e-6), (Kind::BFloat16, 2e-2), (Kind::Half, 3e-3)] {
            for axis in AXES {
                let signs = fitted(axis);
                for signs in [expanded(&signs), signs] {
                    let _ = signs.scale.set_requires_grad(true);
                    // A step of training writes in place, and products have to see it.
                    let _ = no_grad(|| signs.scale.shallow_clone().g_mul_(&(1.0 + 0.1 * draw(&signs.scale.size()))));
                    let plus = signs.dense().unwrap() / expanded(&signs).dense().unwrap().abs();
                    let x = draw(&[2, 3, 200]).to_kind(kind).set_requires_grad(true);
                    let y = draw(&[2, 3, 70]).to_kind(kind).set_requires_grad(true);
                    // Leaning towards the product, so that the gradient of one scale for all is no sum that cancels out:
                    // its error is in proportion to its terms, and is held against the sum.
                    let product = x.detach().to_kind(Kind::Float).linear(&plus, None::<Tensor>);
                    let upstream = (draw(&[2, 3, 70]) + product * 0.1).to_kind(kind);
                    let wide = |t: &Tensor| t.detach().to_kind(Kind::Double).set_requires_grad(true);
                    let (x64, y64, scale64) = (wide(&x), wide(&y), wide(&signs.scale));
                    let spread = match axis {
                        ScaleAxis::Group128 => scale64.repeat_interleave_self_int(128, 1, None).narrow(1, 0, 200),
                        _ => scale64.shallow_clone(),
                    };
                    let want = &y64 + x64.linear(&(plus.to_kind(Kind::Double) * spread), None::<Tensor>);
                    let found = signs.add_to(&y, &x).unwrap();
                    assert!(distance(&found, &want) < tolerance, "{kind:?} {axis:?} {}", distance(&found, &want));
                    crate::autograd::backward(&[found], &[upstream.shallow_clone()]).unwrap();
                    crate::autograd::backward(&[want], &[upstream.to_kind(Kind::Double)]).unwrap();
                    for (what, found, want) in [("x", &x, &x64), ("y", &y, &y64), ("scale", &signs.scale, &scale64)] {
                        let off = distance(&found.grad(), &want.grad());
                        assert!(off < tolerance, "{kind:?} {axis:?} gradient of {what}: {off}");
                    }
                }
            }
        }
    }

    #[test]
    fn packings_give_the_same_delta_back() {
        let _lock = crate::random::test_lock();
        for axis in AXES {
            let signs = fitted(axis);
            let back = ScaledSigns::from_tensors(&signs.signs().unwrap(), &signs.scale, signs.size, axis).unwrap();
            assert_eq!(back.delta().unwrap(), signs.delta().unwrap());
            assert_eq!(expanded(&signs).delta().unwrap(), signs.delta().unwrap());
            assert!(signs.bitdelta_mask().is_err(), "200 is no multiple of 32");
        }
        let base = draw(&[5, 96]);
        let delta = fit_delta(&base, &draw(&[5, 96]), ScaleAxis::Matrix).unwrap();
        let signs = ScaledSigns::new(delta.as_ref(), Device::Cpu).unwrap();
        let mask = signs.bitdelta_mask().unwrap();
        assert_eq!(mask.size(), [3, 5]);
        assert_eq!(ScaledSigns::from_bitdelta(&mask, &signs.scale).unwrap().delta().unwrap(), delta);
    }

    #[test]
    fn rows_of_several_deltas_get_what_each_gives_alone() {
        let _lock = crate::random::test_lock();
        let deltas = AXES.map(fitted);
        let tenants = [Some(2), None, Some(0), Some(2), Some(1)];
        let (x, y) = (draw(&[5, 200]), draw(&[5, 70]));
        let alone: Vec<Tensor> = tenants
            .iter()
            .enumerate()
            .map(|(row, tenant)| {
                let row = |t: &Tensor| t.narrow(0, row as i64, 1);
                tenant.map_or(row(&y), |tenant| deltas[tenant].add_to(&row(&y), &row(&x)).unwrap())
            })
            .collect();
        let alone = Tensor::cat(&alone, 0);
        let refs: Vec<&ScaledSigns> = deltas.iter().collect();
        assert!(add_deltas(&refs, &tenants, &y, &x).unwrap().equal(&alone));
        // With a graph, by turns.
        let leaf = x.copy().set_requires_grad(true);
        let recorded = add_deltas(&refs, &tenants, &y, &leaf).unwrap();
        assert!(recorded.equal(&alone));
        recorded.sum(Kind::Float).backward();
        let dense = deltas[2].dense().unwrap().sum_dim_intlist([0i64].as_slice(), false, Kind::Float);
        assert!(distance(&leaf.grad().get(0), &dense) < 1e-5);
        assert!(add_deltas(&refs[..2], &tenants, &y, &x).unwrap_err().to_string().contains("under 2"));
    }

    #[test]
    fn a_delta_may_stand_twice_and_beside_its_clone() {
        let _lock = crate::random::test_lock();
        let signs = fitted(ScaleAxis::Row);
        let clone = signs.clone();
        let (x, y) = (draw(&[3, 200]), draw(&[3, 70]));
        let together = add_deltas(&[&signs, &clone, &signs], &[Some(0), Some(1), Some(2)], &y, &x).unwrap();
        assert!(distance(&together, &signs.add_to(&y, &x).unwrap()) < 1e-6);
    }

    #[test]
    fn a_copy_has_scales_of_its_own_and_a_clone_has_not() {
        let _lock = crate::random::test_lock();
        let signs = fitted(ScaleAxis::Matrix);
        let (clone, copy, before) = (signs.clone(), signs.copy().unwrap(), signs.dense().unwrap());
        let _ = no_grad(|| signs.scale.shallow_clone().g_mul_scalar_(2.0));
        assert_eq!(clone.dense().unwrap(), &before * 2.0);
        assert_eq!(copy.dense().unwrap(), before);
        let (x, y) = (draw(&[2, 200]), Tensor::zeros([2, 70], (Kind::Float, Device::Cpu)));
        assert!(distance(&copy.add_to(&y, &x).unwrap(), &x.linear(&before, None::<Tensor>)) < 1e-5);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let _lock = crate::random::test_lock();
        let (small, large) = (draw(&[4, 8]), draw(&[4, 9]));
        assert!(matches!(fit_delta(&small, &large, ScaleAxis::Row), Err(TensorError::Shape { .. })));
        let infinite = Tensor::full([4, 8], f64::INFINITY, (Kind::Float, Device::Cpu));
        assert!(matches!(fit_delta(&small, &infinite, ScaleAxis::Matrix), Err(TensorError::Quant(_))));
        let signs = fitted(ScaleAxis::Row);
        assert!(signs.add_to(&draw(&[2, 70]), &draw(&[2, 199])).is_err());
        assert!(signs.add_to(&draw(&[3, 70]), &draw(&[2, 200])).is_err());
        let packed = signs.signs().unwrap();
        let load = |packed: &Tensor, axis| ScaledSigns::from_tensors(packed, &signs.scale, signs.size, axis);
        assert!(load(&packed, ScaleAxis::Matrix).is_err(), "scales of another axis");
        assert!(load(&packed.to_kind(Kind::Int), ScaleAxis::Row).is_err(), "signs of another kind");
        // What the forward pass has seen must be there in the backward pass.
        let _ = signs.scale.set_requires_grad(true);
        let y = signs.add_to(&draw(&[2, 70]), &draw(&[2, 200])).unwrap();
        let _ = no_grad(|| signs.scale.shallow_clone().g_mul_scalar_(2.0));
        let error = crate::autograd::backward(&[y.shallow_clone()], &[y.ones_like()]).unwrap_err();
        assert!(error.to_string().contains("changed since the forward pass"), "{error}");
    }
}
