//! y = x · (delta_scale · signs)ᵀ.

use alloc::string::ToString;

use super::tables::{TableRows, rows_at_once};
use super::{DeltaOptions, DeltaWorkspace, Slot, filled, multiply, task_len};
use crate::delta::DeltaMatrix;
use crate::delta::matrix::TiledScale;
use crate::dense::Output;
use crate::error::check_len;
use crate::exec::Columns;
use crate::simd::delta::lookup::{self, Kernels, Rows, Sums, TILE};
use crate::{Element, Exec, QuantError};

impl DeltaMatrix {
    /// `y = x · (delta_scale · signs)ᵀ`, or `y += ..` with [`Output::Add`]: the delta's part of a linear layer.
    ///
    /// # Shapes
    /// - `x`: `[rows, in_features]`, `y`: `[rows, out_features]`, row-major; f32, bf16 or f16. Sums are f32, rounded to the format of `y`.
    ///
    /// The result does not depend on the threads, nor on what other rows there are; on the instruction set as [`DeltaArithmetic`](super::DeltaArithmetic) tells.
    /// Infinite activations give what f32 arithmetic gives with `F32`, and NaN in all outputs of their row with the others.
    ///
    /// # Errors
    /// [`QuantError::Length`] when a buffer has another length, [`QuantError::Overflow`] for a shape that no memory holds.
    ///
    /// # Example
    /// ```
    /// use pt_quant::delta::{BitDelta, DeltaMatrix, DeltaOptions, DeltaWorkspace, ScaleAxis};
    /// use pt_quant::Exec;
    ///
    /// let exec = Exec::new();
    /// let (base, fine_tuned) = ([0.0f32; 4], [0.5f32, -0.5, 0.5, 0.5]); // [2, 2]
    /// let delta = BitDelta::fit(&base, &fine_tuned, 2, 2, ScaleAxis::Matrix, &exec)?;
    /// let matrix = DeltaMatrix::new(delta.as_ref(), &exec)?;
    /// let mut y = [0.0f32; 2];
    /// matrix.forward(&[3.0f32, 1.0], &mut y, 1, DeltaOptions::default(), &mut DeltaWorkspace::new(), &exec)?;
    /// assert_eq!(y, [1.0, 2.0]);
    /// # Ok::<(), pt_quant::QuantError>(())
    /// ```
    pub fn forward<X: Element, Y: Element>(
        &self,
        x: &[X],
        y: &mut [Y],
        rows: usize,
        options: DeltaOptions,
        workspace: &mut DeltaWorkspace,
        exec: &Exec<'_>,
    ) -> Result<(), QuantError> {
        let area = |columns: usize| rows.checked_mul(columns).ok_or(QuantError::Overflow { what: "rows" });
        check_len("x", x.len(), area(self.in_features())?)?;
        check_len("y", y.len(), area(self.out_features())?)?;
        workspace.order.clear();
        workspace.order.extend((0..rows).map(|row| (0, row)));
        run(&[self], x, y, options, workspace, exec);
        Ok(())
    }
}

/// Adds the deltas of many tenants to the product of the base they share: `y[m] += x[m] · (delta of tenants[m])ᵀ`. The base's product stands in `y`
/// already, however it was computed. Rows of one tenant are multiplied together, so the signs of each are read once.
///
/// # Shapes
/// - `x`: `[rows, in_features]`, `y`: `[rows, out_features]`, row-major; f32, bf16 or f16; `rows` is the length of `tenants`.
/// - `tenants`: for each row the index of its delta in `deltas`, or none for the base alone, whose row is left as it is.
///
/// A row gets the same bits whatever other rows and tenants there are.
///
/// # Errors
/// [`QuantError::Length`] when a buffer has another length; [`QuantError::Value`] when deltas differ in shape or a tenant has none.
///
/// # Example
/// ```
/// use pt_quant::delta::{BitDelta, BitMatrix, DeltaArithmetic, DeltaMatrix, DeltaScaleBuf, DeltaWorkspace, add_tenants};
/// use pt_quant::Exec;
///
/// let exec = Exec::new();
/// let delta = |bits, scale| {
///     let delta = BitDelta::new(BitMatrix::new(vec![bits], 1, 2)?, DeltaScaleBuf::Matrix(scale))?;
///     DeltaMatrix::new(delta.as_ref(), &exec)
/// };
/// let (plus, mixed) = (delta(0b11, 0.5)?, delta(0b01, 2.0)?);
/// let (x, mut y) = ([1.0f32, 2.0].repeat(3), [10.0f32; 3]);
/// let tenants = [Some(1), None, Some(0)];
/// add_tenants(&[&plus, &mixed], &tenants, &x, &mut y, DeltaArithmetic::F32, &mut DeltaWorkspace::new(), &exec)?;
/// assert_eq!(y, [8.0, 10.0, 11.5]);
/// # Ok::<(), pt_quant::QuantError>(())
/// ```
pub fn add_tenants<X: Element, Y: Element>(
    deltas: &[&DeltaMatrix],
    tenants: &[Option<usize>],
    x: &[X],
    y: &mut [Y],
    arithmetic: super::DeltaArithmetic,
    workspace: &mut DeltaWorkspace,
    exec: &Exec<'_>,
) -> Result<(), QuantError> {
    let wrong = |what, found: usize, expected| Err(QuantError::Value { what, found: found.to_string(), expected });
    if let Some(tenant) = tenants.iter().flatten().find(|tenant| **tenant >= deltas.len()) {
        return wrong("tenants", *tenant, "an index of `deltas`");
    }
    let Some(first) = deltas.first() else {
        return Ok(());
    };
    if let Some(other) = deltas.iter().find(|other| other.in_features() != first.in_features()) {
        return wrong("deltas", other.in_features(), "as many inputs as the first has");
    }
    if let Some(other) = deltas.iter().find(|other| other.out_features() != first.out_features()) {
        return wrong("deltas", other.out_features(), "as many outputs as the first has");
    }
    let area = |columns: usize| tenants.len().checked_mul(columns).ok_or(QuantError::Overflow { what: "tenants" });
    check_len("x", x.len(), area(first.in_features())?)?;
    check_len("y", y.len(), area(first.out_features())?)?;
    workspace.order.clear();
    let with_delta = tenants.iter().enumerate().filter_map(|(row, tenant)| Some(((*tenant)?, row)));
    workspace.order.extend(with_delta);
    workspace.order.sort_unstable();
    run(deltas, x, y, DeltaOptions { arithmetic, output: Output::Add }, workspace, exec);
    Ok(())
}

/// The rows of `workspace.order`, which are sorted by their delta.
fn run<X: Element, Y: Element>(
    deltas: &[&DeltaMatrix],
    x: &[X],
    y: &mut [Y],
    options: DeltaOptions,
    workspace: &mut DeltaWorkspace,
    exec: &Exec<'_>,
) {
    workspace.reserve_slots(exec);
    let kernels = lookup::kernels(exec.isa());
    let (in_features, out_features) = (deltas[0].in_features(), deltas[0].out_features());
    let num_lines = deltas[0].lines_per_tile();
    let DeltaWorkspace { shared, slots, order, .. } = workspace;
    for order in order.chunks(rows_at_once(kernels, options.arithmetic, num_lines)) {
        let fill = |index: usize, numbers: &mut [f32]| {
            copy(&x[order[index].1 * in_features..][..in_features], numbers);
        };
        let tables = shared.build(kernels, options.arithmetic, (order.len(), num_lines), fill, exec);
        let block = task_len(out_features, exec);
        exec.for_each_columns((&mut *y, out_features), block, slots, |first, mut block, slot| {
            let mut start = 0;
            for rows in order.chunk_by(|a, b| a.0 == b.0) {
                let part = (start..start + rows.len(), rows);
                start += rows.len();
                forward_block(kernels, deltas[rows[0].0], &tables, part, first, &mut block, options.output, slot);
            }
        });
    }
}

/// The numbers as f32, and zeros beyond them.
pub(super) fn copy<X: Element>(from: &[X], to: &mut [f32]) {
    let (numbers, padding) = to.split_at_mut(from.len());
    match X::as_f32(from) {
        Some(from) => numbers.copy_from_slice(from),
        None => numbers.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_f32()),
    }
    padding.fill(0.0);
}

#[allow(clippy::too_many_arguments)]
fn forward_block<Y: Element>(
    kernels: &Kernels,
    delta: &DeltaMatrix,
    tables: &TableRows<'_>,
    (range, rows): (core::ops::Range<usize>, &[(usize, usize)]),
    first: usize,
    block: &mut Columns<'_, Y>,
    output: Output,
    slot: &mut Slot,
) {
    let (first_tile, num_tiles) = (first / TILE, block.len().div_ceil(TILE));
    let sums = filled(&mut slot.sums, num_tiles * rows.len(), [0.0; TILE]);
    let groups = delta.lines_per_tile().div_ceil(lookup::GROUP);
    let scales: &[Sums] = match delta.scale() {
        TiledScale::Group128(scales) => &scales[first_tile * groups..],
        TiledScale::Matrix(_) | TiledScale::Row(_) => &[],
    };
    let scales = Rows { data: scales, stride: groups };
    let tiles = delta.tiles(first_tile, num_tiles);
    multiply(kernels, &tiles, 0..tiles.len, &scales, (tables, range), sums);
    for (index, sums) in sums.chunks_exact(rows.len()).enumerate() {
        for ((_, row), sums) in rows.iter().zip(sums) {
            let y = block.row(*row);
            let len = TILE.min(y.len() - index * TILE);
            let y = &mut y[index * TILE..][..len];
            match delta.scale() {
                TiledScale::Matrix(scale) => store(y, output, sums.iter().map(|sum| sum * scale)),
                TiledScale::Row(scales) => {
                    store(y, output, sums.iter().zip(&scales[first_tile + index]).map(|(sum, scale)| sum * scale));
                }
                TiledScale::Group128(_) => store(y, output, sums.iter().copied()),
            }
        }
    }
}

/// Writes or adds sums, rounded to the output's format.
pub(super) fn store<Y: Element>(y: &mut [Y], output: Output, sums: impl Iterator<Item = f32>) {
    let y = y.iter_mut().zip(sums);
    match output {
        Output::Replace => y.for_each(|(y, sum)| *y = Y::from_f32(sum)),
        Output::Add => y.for_each(|(y, sum)| *y = Y::from_f32(y.to_f32() + sum)),
    }
}
