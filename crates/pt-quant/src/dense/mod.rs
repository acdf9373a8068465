//! Products of dense matrices, f32 and bf16, with sums in f32.
//!
//! The 4-bit products stand on the same block kernels. They are public because a plain, libtorch-free product is of use by itself.

pub(crate) mod pack;

use alloc::string::ToString;
use alloc::vec::Vec;
use core::ops::Range;

use crate::element::ElementKind;
use crate::error::check_len;
use crate::exec::Columns;
use crate::simd::dense::{self, DotsFn, FewFn, Kernels, Panel};
use crate::{Element, Exec, QuantError};

/// Rows of the weight that are worked on at once: a multiple of every kernel's rows, so few that their outputs stay in the L2 cache.
pub(crate) const BLOCK_ROWS: usize = 48;

/// Depth of a panel: what a kernel reads again and again stays in the L1 cache.
pub(crate) const BLOCK_DEPTH: usize = 256;

/// Up to how many rows a product reads each weight once or twice, where there is a kernel for it.
const FEW_ROWS: usize = 16;

/// Weights in the smallest block of a product of few rows: below it, handing out a block costs more than the block.
const MIN_DOTS_WORK: usize = 32 * 1024;

/// The size of a product `Y[rows, columns] = X[rows, depth] · W`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GemmShape {
    /// M: rows of X and Y (tokens).
    pub rows: usize,
    /// N: columns of Y.
    pub columns: usize,
    /// K: what is summed over.
    pub depth: usize,
}

/// Whether a product replaces its output or adds to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Output {
    /// `y = …`
    #[default]
    Replace,
    /// `y += …`
    Add,
}

/// Scratch memory of products. Keep one and pass it to every call: it grows to what the largest call needs and is not allocated again.
#[derive(Debug, Default)]
pub struct Workspace {
    pub(crate) tiles_f32: Vec<f32>,
    pub(crate) tiles_bf16: Vec<u32>,
    lines_f32: Vec<f32>,
    lines_bf16: Vec<u16>,
    pub(crate) slots: Vec<Slot>,
    pub(crate) product: crate::product::Scratch,
}

/// What one thread needs.
#[derive(Debug, Default)]
pub(crate) struct Slot {
    /// Outputs of a block of weight rows, `[block_rows, padded_rows]`.
    pub(crate) yt: Vec<f32>,
    pub(crate) panel_f32: Vec<f32>,
    pub(crate) panel_bf16: Vec<u32>,
    pub(crate) product: crate::product::SlotScratch,
}

impl Workspace {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// At least one slot a thread.
    pub(crate) fn reserve_slots(&mut self, exec: &Exec<'_>) {
        if self.slots.len() < exec.num_slots() {
            self.slots.resize_with(exec.num_slots(), Slot::default);
        }
    }
}

/// The first `len` elements of a buffer that only ever grows; what they hold is left over from earlier use.
pub(crate) fn grown<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
    &mut buffer[..len]
}

/// As [`grown`], at the start of a cache line: a vector that lies across two costs twice.
pub(crate) fn grown_aligned<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    const LINE: usize = 64;
    grown(buffer, len + LINE);
    let skipped = buffer.as_ptr().align_offset(LINE).min(LINE);
    &mut buffer[skipped..][..len]
}

/// `y = x · wᵀ`: a linear layer without bias, `w` as a checkpoint stores it.
///
/// # Shapes
/// - `x`: `[rows, depth]`, `w`: `[columns, depth]`, `y`: `[rows, columns]`, row-major; `T` is `f32` or [`Bf16`](crate::Bf16), `O` any
///   format, to which the sums are rounded.
///
/// Sums are in f32, in an order that depends on the instruction set but not on the threads; bf16 operands are used as they are.
///
/// # Errors
/// [`QuantError::Length`] when a buffer does not fit the shape, [`QuantError::Value`] for half-precision elements, which have no kernel.
///
/// # Example
/// ```
/// use pt_quant::dense::{GemmShape, Output, Workspace, gemm_nt};
/// use pt_quant::Exec;
///
/// let (x, w) = ([1.0f32, 2.0, 3.0, 4.0], [1.0f32, 0.0, 1.0, 1.0, 0.0, 1.0]); // [2, 2], [3, 2]
/// let mut y = [0f32; 6];
/// let shape = GemmShape { rows: 2, columns: 3, depth: 2 };
/// gemm_nt(&x, &w, &mut y, shape, Output::Replace, &mut Workspace::new(), &Exec::new())?;
/// assert_eq!(y, [1.0, 3.0, 2.0, 3.0, 7.0, 4.0]);
/// # Ok::<(), pt_quant::QuantError>(())
/// ```
pub fn gemm_nt<T: Element, O: Element>(
    x: &[T],
    w: &[T],
    y: &mut [O],
    shape: GemmShape,
    output: Output,
    workspace: &mut Workspace,
    exec: &Exec<'_>,
) -> Result<(), QuantError> {
    gemm(x, w, y, (shape, output), workspace, exec, Layout::RowsAreColumns)
}

/// `y = x · w`: the gradient of [`gemm_nt`] to its input, with `x` the gradient of its output.
///
/// # Shapes
/// - `x`: `[rows, depth]`, `w`: `[depth, columns]`, `y`: `[rows, columns]`, row-major; otherwise as [`gemm_nt`].
///
/// # Errors
/// As [`gemm_nt`].
pub fn gemm_nn<T: Element, O: Element>(
    x: &[T],
    w: &[T],
    y: &mut [O],
    shape: GemmShape,
    output: Output,
    workspace: &mut Workspace,
    exec: &Exec<'_>,
) -> Result<(), QuantError> {
    gemm(x, w, y, (shape, output), workspace, exec, Layout::RowsAreDepth)
}

/// How `w` lies in memory.
#[derive(Clone, Copy)]
enum Layout {
    /// `[columns, depth]`
    RowsAreColumns,
    /// `[depth, columns]`
    RowsAreDepth,
}

fn gemm<T: Element, O: Element>(
    x: &[T],
    w: &[T],
    y: &mut [O],
    (shape, output): (GemmShape, Output),
    workspace: &mut Workspace,
    exec: &Exec<'_>,
    layout: Layout,
) -> Result<(), QuantError> {
    let area = |a: usize, b: usize| a.checked_mul(b).ok_or(QuantError::Overflow { what: "shape" });
    check_len("x", x.len(), area(shape.rows, shape.depth)?)?;
    check_len("w", w.len(), area(shape.columns, shape.depth)?)?;
    check_len("y", y.len(), area(shape.rows, shape.columns)?)?;
    if T::KIND == ElementKind::F16 {
        return Err(QuantError::Value { what: "x", found: "f16".to_string(), expected: "f32 or bf16 elements" });
    }
    workspace.reserve_slots(exec);
    let kernels = dense::kernels(exec.isa());
    let Workspace { tiles_f32, tiles_bf16, lines_f32, lines_bf16, slots, .. } = workspace;
    let are_rows_few = (1..=dense::MAX_DOTS).contains(&shape.rows) && shape.depth > 0;
    if are_rows_few && matches!(layout, Layout::RowsAreColumns) {
        if let (Some(x), Some(w)) = (T::as_f32(x), T::as_f32(w)) {
            run_dots(kernels.dots_f32, x, w, (y, shape, output), slots, exec);
        } else if let (Some(x), Some(w)) = (T::as_bf16_bits(x), T::as_bf16_bits(w)) {
            run_dots(kernels.dots_bf16, x, w, (y, shape, output), slots, exec);
        }
    } else if let (Some((few_f32, few_bf16)), Layout::RowsAreColumns, 1..=FEW_ROWS, 1..) =
        (kernels.few, layout, shape.rows, shape.depth)
    {
        if let (Some(x), Some(w)) = (T::as_f32(x), T::as_f32(w)) {
            run_few(few_f32, x, w, (y, shape, output), lines_f32, slots, exec);
        } else if let (Some(x), Some(w)) = (T::as_bf16_bits(x), T::as_bf16_bits(w)) {
            run_few(few_bf16, x, w, (y, shape, output), lines_bf16, slots, exec);
        }
    } else if let Some(w) = T::as_f32(w) {
        let tiles = pack::tiles_f32(x, shape, kernels.lanes, tiles_f32, exec);
        let (row_stride, depth_stride) = match layout {
            Layout::RowsAreColumns => (shape.depth, 1),
            Layout::RowsAreDepth => (1, shape.columns),
        };
        run_blocks(kernels, (y, shape, output), slots, exec, |rows, depths, yt, _, _| {
            let data = &w[rows.start * row_stride + depths.start * depth_stride..];
            let panel =
                Panel { data, rows: rows.len(), row_stride, depth_stride, first: depths.start, depth: depths.len() };
            (kernels.block_f32)(&tiles, &panel, yt);
        });
    } else if let Some(w) = T::as_bf16_bits(w) {
        let tiles = pack::tiles_bf16(x, shape, kernels.lanes, tiles_bf16, exec);
        let pairs = dense::as_pairs(w).filter(|_| shape.depth % 2 == 0);
        run_blocks(kernels, (y, shape, output), slots, exec, |rows, depths, yt, _, panel| {
            let panel = match (layout, pairs) {
                (Layout::RowsAreColumns, Some(pairs)) => {
                    let (row_stride, first, depth) = (shape.depth / 2, depths.start / 2, depths.len() / 2);
                    let data = &pairs[rows.start * row_stride + first..];
                    Panel { data, rows: rows.len(), row_stride, depth_stride: 1, first, depth }
                }
                (Layout::RowsAreColumns, None) => pack::panel_of_rows(w, shape.depth, rows, depths, panel),
                (Layout::RowsAreDepth, _) => pack::panel_of_columns(w, shape.columns, rows, depths, panel),
            };
            (kernels.block_bf16)(&tiles, &panel, yt);
        });
    }
    Ok(())
}

/// The product of a few rows, which reads each weight once.
fn run_dots<T: Sync, O: Element>(
    dots: DotsFn<T>,
    x: &[T],
    w: &[T],
    (y, shape, output): (&mut [O], GemmShape, Output),
    slots: &mut [Slot],
    exec: &Exec<'_>,
) {
    let GemmShape { rows, columns, depth } = shape;
    // Large enough that handing out a block costs little, small enough that threads end together.
    let block_len = (MIN_DOTS_WORK / depth).max(columns.div_ceil(8 * exec.num_threads())).max(1);
    exec.for_each_columns((y, columns), block_len, slots, |first, mut block, slot| {
        let sums = grown(&mut slot.yt, block.len() * rows);
        dots(x, &w[first * depth..][..block.len() * depth], depth, sums);
        store(sums, (0, rows, rows), &mut block, output);
    });
}

/// The product of some more rows, in blocks between which the weights stay in the L2 cache.
fn run_few<T: Copy + Default + Sync, O: Element>(
    few: FewFn<T>,
    x: &[T],
    w: &[T],
    (y, shape, output): (&mut [O], GemmShape, Output),
    lines: &mut Vec<T>,
    slots: &mut [Slot],
    exec: &Exec<'_>,
) {
    let GemmShape { rows, columns, depth } = shape;
    // Blocks of rows, as many as need be, of about the same size.
    let block_rows = rows.div_ceil(rows.div_ceil(dense::MAX_FEW));
    let lines = &*pack::lines(x, depth, block_rows, lines);
    let padded = lines.len() / rows;
    let block_len = (MIN_DOTS_WORK / depth).min(columns.div_ceil(exec.num_threads())).max(1);
    let block_len = block_len.next_multiple_of(dense::FEW_BLOCK);
    exec.for_each_columns((y, columns), block_len, slots, |first, mut block, slot| {
        let w = &w[first * depth..][..block.len() * depth];
        for start in (0..rows).step_by(block_rows) {
            let taken = block_rows.min(rows - start);
            let sums = grown(&mut slot.yt, block.len() * taken);
            few(&lines[start * padded..][..taken * padded], taken, w, depth, sums);
            store(sums, (start, taken, taken), &mut block, output);
        }
    });
}

/// Goes over the columns of `y` in blocks and over the depth in panels: `add_panel(columns, depths, yt, panel_f32, panel_bf16)` adds to `yt`
/// (`[columns, padded rows]`) what the panel gives; the panels are scratch for it. `depths.start` is even.
pub(crate) fn run_blocks<O: Element>(
    kernels: &Kernels,
    (y, shape, output): (&mut [O], GemmShape, Output),
    slots: &mut [Slot],
    exec: &Exec<'_>,
    add_panel: impl Fn(Range<usize>, Range<usize>, &mut [f32], &mut Vec<f32>, &mut Vec<u32>) + Sync,
) {
    let padded_rows = shape.rows.next_multiple_of(kernels.lanes);
    // Small products are cut finer, so that every thread gets a part.
    let block_rows = BLOCK_ROWS.min(shape.columns.div_ceil(exec.num_threads()).next_multiple_of(12));
    exec.for_each_columns((y, shape.columns), block_rows, slots, |first, mut block, slot| {
        let rows = first..first + block.len();
        let Slot { yt, panel_f32, panel_bf16, .. } = slot;
        let yt = grown(yt, rows.len() * padded_rows);
        yt.fill(0.0);
        let mut start = 0;
        while start < shape.depth {
            let depths = start..shape.depth.min(start + BLOCK_DEPTH);
            start = depths.end;
            add_panel(rows.clone(), depths, yt, panel_f32, panel_bf16);
        }
        store(yt, (0, shape.rows, padded_rows), &mut block, output);
    });
}

/// Writes the transpose of `yt`, `[columns, stride]`, to `rows` rows of a block of columns, from row `first` on.
fn store<O: Element>(
    yt: &[f32],
    (first, rows, stride): (usize, usize, usize),
    block: &mut Columns<'_, O>,
    output: Output,
) {
    for row in 0..rows {
        let sums = yt[row..].iter().step_by(stride);
        let y = block.row(first + row).iter_mut().zip(sums);
        match output {
            Output::Replace => y.for_each(|(y, sum)| *y = O::from_f32(*sum)),
            Output::Add => y.for_each(|(y, sum)| *y = O::from_f32(y.to_f32() + sum)),
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use proptest::prelude::*;

    use super::*;
    use crate::{Bf16, F16, Isa};

    fn oracle(x: &[f32], w: impl Fn(usize, usize) -> f32, shape: GemmShape) -> Vec<(f64, f64)> {
        let GemmShape { rows, columns, depth } = shape;
        let sum = |row: usize, column: usize| {
            (0..depth).fold((0.0, 0.0), |(sum, size), d| {
                let product = f64::from(x[row * depth + d]) * f64::from(w(column, d));
                (sum + product, size + product.abs())
            })
        };
        (0..rows * columns).map(|index| sum(index / columns, index % columns)).collect()
    }

    fn check<T: Element>(x: &[f32], w: &[f32], shape: GemmShape) {
        let rounded = |values: &[f32]| values.iter().map(|value| T::from_f32(*value)).collect::<Vec<T>>();
        let widened = |values: &[T]| values.iter().map(|value| value.to_f32()).collect::<Vec<f32>>();
        let (x, w) = (rounded(x), rounded(w));
        let (x32, w32) = (widened(&x), widened(&w));
        // K products, and 2 more roundings: of the first sum, and of adding to y. Intermediate sums are no larger than Σ|x||w|.
        let bound = |size: f64| (shape.depth as f64 + 2.0) * f64::from(f32::EPSILON) * (size + 1.0);
        let start = 0.5f32;
        for isa in Isa::available() {
            let exec = Exec::new().with_isa(isa).unwrap();
            for transposed in [false, true] {
                let exact = oracle(
                    &x32,
                    |column, d| {
                        if transposed { w32[d * shape.columns + column] } else { w32[column * shape.depth + d] }
                    },
                    shape,
                );
                let mut alone = vec![start; shape.rows * shape.columns];
                let mut y = alone.clone();
                let run = if transposed { gemm_nn::<T, f32> } else { gemm_nt::<T, f32> };
                run(&x, &w, &mut y, shape, Output::Add, &mut Workspace::new(), &exec).unwrap();
                for (got, (exact, size)) in y.iter().zip(&exact) {
                    let error = (f64::from(*got) - f64::from(start) - exact).abs();
                    assert!(error <= bound(*size), "{isa} {shape:?}: {got} is not {start} + {exact}");
                }
                run(&x, &w, &mut alone, shape, Output::Add, &mut Workspace::new(), &exec.with_pool(&crate::Inline))
                    .unwrap();
                assert_eq!(y, alone, "{isa}: threads change nothing");
                let mut short = vec![Bf16::from_f32(start); shape.rows * shape.columns];
                let run = if transposed { gemm_nn::<T, Bf16> } else { gemm_nt::<T, Bf16> };
                run(&x, &w, &mut short, shape, Output::Add, &mut Workspace::new(), &exec).unwrap();
                assert!(short.iter().zip(&y).all(|(short, y)| *short == Bf16::from_f32(*y)), "{isa}: rounded once");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn products_are_within_the_bound_of_f64(
            rows in 0usize..70,
            columns in 0usize..130,
            depth in prop_oneof![0usize..40, 250usize..520],
            seed in any::<u32>(),
        ) {
            let mut state = seed | 1;
            let mut number = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            };
            let x: Vec<f32> = (0..rows * depth).map(|_| number()).collect();
            let w: Vec<f32> = (0..columns * depth).map(|_| number()).collect();
            let shape = GemmShape { rows, columns, depth };
            check::<f32>(&x, &w, shape);
            check::<Bf16>(&x, &w, shape);
        }
    }

    #[test]
    fn replacing_forgets_what_was_there_and_a_workspace_serves_many_calls() {
        let mut workspace = Workspace::new();
        let shape = GemmShape { rows: 1, columns: 2, depth: 3 };
        for _ in 0..2 {
            let mut y = [f32::NAN; 2];
            let (x, w) = ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 0.0, 0.0, -1.0]);
            gemm_nt(&x, &w, &mut y, shape, Output::Replace, &mut workspace, &Exec::new()).unwrap();
            assert_eq!(y, [6.0, -3.0]);
        }
    }

    #[test]
    fn buffers_that_do_not_fit_are_refused() {
        let shape = GemmShape { rows: 1, columns: 2, depth: 3 };
        let run = |x: usize, w: usize, y: usize, shape: GemmShape| {
            let (x, w) = (vec![0f32; x], vec![0f32; w]);
            gemm_nt(&x, &w, &mut vec![0f32; y], shape, Output::Replace, &mut Workspace::new(), &Exec::new())
        };
        assert_eq!(run(3, 6, 2, shape), Ok(()));
        assert!(matches!(run(2, 6, 2, shape), Err(QuantError::Length { what: "x", found: 2, expected: 3 })));
        assert!(matches!(run(3, 7, 2, shape), Err(QuantError::Length { what: "w", .. })));
        assert!(matches!(run(3, 6, 0, shape), Err(QuantError::Length { what: "y", .. })));
        let huge = GemmShape { rows: usize::MAX, columns: 2, depth: 3 };
        assert!(matches!(run(0, 0, 0, huge), Err(QuantError::Overflow { .. })));
        let half = [F16(0); 3];
        let outcome =
            gemm_nt(&half, &[F16(0); 6], &mut [0.0; 2], shape, Output::Replace, &mut Workspace::new(), &Exec::new());
        assert!(matches!(outcome, Err(QuantError::Value { .. })));
    }
}
