//! y = x · Wᵀ.

use alloc::vec::Vec;
use core::ops::Range;

use super::flat::Flat;
use super::matrix::{Block4Matrix, Storage, Tiled};
use super::{Scratch, SlotScratch, as_bf16_bits, as_f32, grown_aligned, grown_with, worth_sharing};
use crate::dense::{BLOCK_DEPTH, BLOCK_ROWS, GemmShape, Output, Slot, Workspace, grown, pack};
use crate::error::check_len;
use crate::exec::Columns;
use crate::simd::dense::{self, Panel};
use crate::simd::product::{self, Forward, GROUP, Int8Group, Int8Rows, Kernels, Order, Rows, TILE_ROWS};
use crate::{Element, Exec, Inline, QuantError};

/// In which numbers a product is computed. Sums are in f32 in all of them.
///
/// The bounds are those of an output y against the exact sum over its row, with u = 2^-24, K the length of the row and w = code · absmax in f32, as
/// dequantizing gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Arithmetic {
    /// Activations and weights in f32: |y - Σ w·x| ≤ 2(K + 2)·u·Σ|w·x|.
    #[default]
    F32,
    /// Activations and weights rounded to bf16, as if dequantized to it: with those, |y - Σ w·x| ≤ 2(K + 2)·u·Σ|w·x|. With
    /// [`Isa::Avx512Bf16`](crate::Isa::Avx512Bf16) numbers under 2^-126 count as zero.
    Bf16,
    /// Activations as integers from -127 to 127 with a scale for each 64 of them, codes as integers of the same range: W4A8. Besides the bound of
    /// [`F32`](Self::F32), each group of 64 adds at most absmax·(e·Σ|x| + 64·(c + e)·s/2) to the error, with s = max|x| / 127 of the group, c the largest
    /// magnitude of the codebook and e the largest error of its integers (NF4: under 0.0045). Sums are exact within a group. A group of
    /// activations that are not all finite gives NaN. A matrix that is not [tiled](Block4Matrix::is_tiled) is computed in f32.
    Int8,
}

/// How a product is computed, and what becomes of its result.
#[derive(Debug, Clone, Copy, Default)]
pub struct ProductOptions<'a> {
    /// In which numbers.
    pub arithmetic: Arithmetic,
    /// Added to every row of the result: `[out_features]`. The backward product has none.
    pub bias: Option<&'a [f32]>,
    /// Replaces what is in the output, or adds to it.
    pub output: Output,
}

/// Activations as the kernels of one arithmetic want them: `[rows, in_features]`.
#[derive(Clone, Copy)]
enum Activations<'a> {
    /// And whether the weights are rounded to bf16.
    F32(&'a [f32], bool),
    Bf16(&'a [u16], Forward<u16>),
    Int8(&'a [Int8Group], &'a [f32]),
}

impl Activations<'_> {
    /// How many groups of 64 fit in half an L1 cache of 32 KiB.
    fn l1_groups(&self) -> usize {
        match self {
            Self::F32(..) => 64,
            Self::Bf16(..) | Self::Int8(..) => 128,
        }
    }
}

/// Writes sums to outputs: adds the bias, rounds to the output's format.
pub(super) struct Store<'a> {
    pub(super) bias: Option<&'a [f32]>,
    pub(super) output: Output,
}

impl Store<'_> {
    /// Some columns of a row, from column `first` on.
    #[inline]
    pub(super) fn part<Y: Element>(&self, first: usize, y: &mut [Y], sums: &[f32]) {
        let pairs = y.iter_mut().zip(sums);
        match (self.output, self.bias.map(|bias| &bias[first..])) {
            (Output::Replace, None) => pairs.for_each(|(y, sum)| *y = Y::from_f32(*sum)),
            (Output::Replace, Some(bias)) => pairs.zip(bias).for_each(|((y, sum), bias)| *y = Y::from_f32(sum + bias)),
            (Output::Add, None) => pairs.for_each(|(y, sum)| *y = Y::from_f32(y.to_f32() + sum)),
            (Output::Add, Some(bias)) => {
                pairs.zip(bias).for_each(|((y, sum), bias)| *y = Y::from_f32(y.to_f32() + (sum + bias)));
            }
        }
    }
}

impl Block4Matrix {
    /// `y = x · Wᵀ + bias`: the linear layer.
    ///
    /// # Shapes
    /// - `x`: `[rows, in_features]`, `y`: `[rows, out_features]`, row-major; f32, bf16 or f16. What [`Arithmetic`] asks for is made of `x` on the way, and
    ///   `y` is the f32 sum rounded to its format.
    ///
    /// The result depends on the instruction set, but not on the threads. Scratch comes from `workspace` and is kept there; it is a copy of `x`
    /// where its format must change, and under 1 MiB a thread for up to 4096 rows.
    ///
    /// # Errors
    /// [`QuantError::Length`] when a buffer has another length, [`QuantError::Overflow`] for a shape that no memory holds.
    pub fn forward<X: Element, Y: Element>(
        &self,
        x: &[X],
        y: &mut [Y],
        rows: usize,
        options: &ProductOptions<'_>,
        workspace: &mut Workspace,
        exec: &Exec<'_>,
    ) -> Result<(), QuantError> {
        let area = |a: usize, b: usize| a.checked_mul(b).ok_or(QuantError::Overflow { what: "rows" });
        check_len("x", x.len(), area(rows, self.in_features())?)?;
        check_len("y", y.len(), area(rows, self.out_features())?)?;
        if let Some(bias) = options.bias {
            check_len("bias", bias.len(), self.out_features())?;
        }
        let exec = &worth_sharing(exec, rows, self.out_features(), self.in_features());
        workspace.reserve_slots(exec);
        let kernels = product::kernels(exec.isa());
        let store = Store { bias: options.bias, output: options.output };
        let shape = GemmShape { rows, columns: self.out_features(), depth: self.in_features() };
        let [panel_rows_f32, panel_rows_bf16] = kernels.panel_rows;
        let is_bf16 = options.arithmetic == Arithmetic::Bf16;
        match self.storage() {
            Storage::Flat(block4) => {
                let flat =
                    Flat { weights: block4.as_ref(), depth: shape.depth, is_bf16, exec: exec.with_pool(&Inline) };
                if (1..=dense::MAX_DOTS).contains(&rows) && shape.depth > 0 {
                    flat.few_rows(x, (y, shape, store), workspace, exec);
                } else {
                    panels(&flat, x, (y, shape, store), workspace, exec);
                }
            }
            Storage::Tiled(tiled)
                if options.arithmetic != Arithmetic::Int8
                    && rows >= if is_bf16 { panel_rows_bf16 } else { panel_rows_f32 } =>
            {
                let panel = TiledPanel { matrix: self, tiled, kernels, is_bf16 };
                panels(&panel, x, (y, shape, store), workspace, exec);
            }
            Storage::Tiled(tiled) => {
                let Workspace { product, slots, .. } = workspace;
                let x = activations(x, options.arithmetic, kernels, product, exec);
                self.lookup(tiled, x, (y, shape, store), slots, exec);
            }
        }
        Ok(())
    }

    /// Few rows: each code is looked up where it is multiplied.
    fn lookup<Y: Element>(
        &self,
        tiled: &Tiled,
        x: Activations<'_>,
        (y, shape, store): (&mut [Y], GemmShape, Store<'_>),
        slots: &mut [Slot],
        exec: &Exec<'_>,
    ) {
        let kernels = product::kernels(exec.isa());
        let GemmShape { rows, columns, depth } = shape;
        let groups = tiled.groups_per_row();
        // Large enough that handing out a block costs little, small enough that threads end together and that the codes stay in the L2 cache.
        let block_len = (columns / (6 * exec.num_threads())).clamp(16, 64).next_multiple_of(TILE_ROWS);
        exec.for_each_columns((y, columns), block_len, slots, |first, mut block, slot| {
            let SlotScratch { acc, sums, scales, scaled, .. } = &mut slot.product;
            let rows_of_tiles = first..first + block.len();
            let num_tiles = block.len().div_ceil(TILE_ROWS);
            // Blocks of rows, as many as need be, of about the same size.
            let block_rows = rows.div_ceil(rows.div_ceil(kernels.max_rows).max(1)).max(1);
            for start in (0..rows).step_by(block_rows) {
                let taken = block_rows.min(rows - start);
                let acc = grown_aligned(acc, num_tiles * taken * TILE_ROWS * kernels.lanes);
                // The activations of a piece stay in the L1 cache while all tiles go by.
                let pieces = groups.div_ceil((x.l1_groups() / taken).max(1));
                let piece = groups.div_ceil(pieces);
                for group in (0..groups).step_by(piece) {
                    let range = group..groups.min(group + piece);
                    let tiles = tiled.tiles(rows_of_tiles.clone(), range.clone(), scales);
                    let at = start * depth + group * GROUP..(start + taken) * depth;
                    match x {
                        Activations::F32(x, round) => {
                            let x = Rows { data: &x[at], rows: taken, stride: depth };
                            (kernels.forward_f32)(&tiles, &self.table(round), &x, acc);
                        }
                        Activations::Bf16(x, forward_bf16) => {
                            let x = Rows { data: &x[at], rows: taken, stride: depth };
                            forward_bf16(&tiles, &self.table(true), &x, acc);
                        }
                        Activations::Int8(x, x_scales) => {
                            let at = start * groups + group..(start + taken) * groups;
                            let (x, scales) = (&x[at.clone()], &x_scales[at]);
                            let x = Int8Rows { groups: x, scales, rows: taken, stride: groups };
                            let scaled = grown(scaled, taken * range.len());
                            (kernels.forward_int8)(&tiles, self.int8(), &x, acc, scaled);
                        }
                    }
                }
                let sums = grown(sums, num_tiles * taken);
                (kernels.reduce)(acc, sums);
                if let Activations::Int8(..) = x {
                    sums.as_flattened_mut().iter_mut().for_each(|sum| *sum *= self.int8().inverse_scale);
                }
                for m in 0..taken {
                    let parts = block.row(start + m).chunks_mut(TILE_ROWS).zip(sums[m..].iter().step_by(taken));
                    parts.enumerate().for_each(|(tile, (y, sums))| store.part(first + tile * TILE_ROWS, y, sums));
                }
            }
        });
    }
}

fn activations<'a, X: Element>(
    x: &'a [X],
    arithmetic: Arithmetic,
    kernels: &Kernels,
    scratch: &'a mut Scratch,
    exec: &Exec<'_>,
) -> Activations<'a> {
    match (arithmetic, kernels.forward_bf16) {
        (Arithmetic::Bf16, Some(forward_bf16)) => {
            let bits = as_bf16_bits(x, &mut scratch.x_bf16);
            Activations::Bf16(ordered(bits, kernels.order_bf16, &mut scratch.x_bf16_ordered), forward_bf16)
        }
        (Arithmetic::F32 | Arithmetic::Bf16, _) => {
            let round = arithmetic == Arithmetic::Bf16;
            let numbers = as_f32(x, &mut scratch.x_f32, round);
            Activations::F32(ordered(numbers, kernels.order_f32, &mut scratch.x_f32_ordered), round)
        }
        (Arithmetic::Int8, _) => {
            let groups = x.len() / GROUP;
            let codes = grown_with(&mut scratch.x_int8, groups, Int8Group::ZERO);
            let scales = grown(&mut scratch.x_scales, groups);
            exec.for_each_chunk_pair((codes, GROUP), (scales, GROUP), |index, codes, scales| {
                let x = x[index * GROUP * GROUP..].chunks_exact(GROUP);
                for ((x, codes), scale) in x.zip(codes).zip(scales) {
                    let mut numbers = [0f32; GROUP];
                    numbers.iter_mut().zip(x).for_each(|(number, x)| *number = x.to_f32());
                    *scale = (kernels.quantize)(&numbers, codes);
                }
            });
            Activations::Int8(&scratch.x_int8[..groups], &scratch.x_scales[..groups])
        }
    }
}

/// In the order of a kernel.
fn ordered<'a, T: Copy + Default>(x: &'a [T], order: Option<Order<T>>, buffer: &'a mut Vec<T>) -> &'a [T] {
    let Some(order) = order else { return x };
    let buffer = grown_aligned(buffer, x.len());
    order(x, buffer);
    buffer
}

/// Where the weights of many rows' products come from, a panel at a time.
pub(super) trait PanelSource: Sync {
    fn is_bf16(&self) -> bool;

    /// The weights of some rows and columns, `[rows (rounded up to whole tiles), columns]`, in f32.
    fn decode_f32(&self, rows: Range<usize>, columns: Range<usize>, slot: &mut SlotScratch, out: &mut Vec<f32>);

    /// As `decode_f32` in bf16, two weights of a row in an element, the last alone with zero if their number is odd.
    fn decode_bf16(&self, rows: Range<usize>, columns: Range<usize>, slot: &mut SlotScratch, out: &mut Vec<u32>);
}

struct TiledPanel<'a> {
    matrix: &'a Block4Matrix,
    tiled: &'a Tiled,
    kernels: &'static Kernels,
    is_bf16: bool,
}

impl PanelSource for TiledPanel<'_> {
    fn is_bf16(&self) -> bool {
        self.is_bf16
    }

    fn decode_f32(&self, rows: Range<usize>, columns: Range<usize>, slot: &mut SlotScratch, out: &mut Vec<f32>) {
        let tiles = self.tiled.tiles(rows, columns.start / GROUP..columns.end / GROUP, &mut slot.scales);
        let out = grown(out, tiles.num_tiles() * TILE_ROWS * columns.len());
        (self.kernels.panel_f32)(&tiles, &self.matrix.table(false), out);
    }

    fn decode_bf16(&self, rows: Range<usize>, columns: Range<usize>, slot: &mut SlotScratch, out: &mut Vec<u32>) {
        let tiles = self.tiled.tiles(rows, columns.start / GROUP..columns.end / GROUP, &mut slot.scales);
        let out = grown(out, tiles.num_tiles() * TILE_ROWS * columns.len() / 2);
        (self.kernels.panel_bf16)(&tiles, &self.matrix.table(true), out);
    }
}

/// Adds what some rows and columns of the weight give to the sums of a block.
type AddPanel<'a> = &'a (dyn Fn(Range<usize>, Range<usize>, &mut Slot, &mut [f32]) + Sync);

/// Many rows: panels of weights are decoded to the L1 cache and multiplied by the dense kernels.
fn panels<X: Element, Y: Element>(
    source: &impl PanelSource,
    x: &[X],
    (y, shape, store): (&mut [Y], GemmShape, Store<'_>),
    workspace: &mut Workspace,
    exec: &Exec<'_>,
) {
    let kernels = dense::kernels(exec.isa());
    let padded_rows = shape.rows.next_multiple_of(kernels.lanes);
    let Workspace { tiles_f32, tiles_bf16, slots, .. } = workspace;
    // Small products are cut finer, so that every thread gets a part; a multiple of the rows of a tile.
    let block_rows = BLOCK_ROWS.min(shape.columns.div_ceil(exec.num_threads()).next_multiple_of(12));
    let each = |slots: &mut [Slot], y: &mut [Y], add: AddPanel<'_>| {
        exec.for_each_columns((y, shape.columns), block_rows, slots, |first, mut block: Columns<'_, Y>, slot| {
            let rows = first..first + block.len();
            let mut yt = core::mem::take(&mut slot.yt);
            let sums = grown(&mut yt, rows.len() * padded_rows);
            sums.fill(0.0);
            for start in (0..shape.depth).step_by(BLOCK_DEPTH) {
                add(rows.clone(), start..shape.depth.min(start + BLOCK_DEPTH), slot, sums);
            }
            for m in 0..block.num_rows() {
                let y = block.row(m).iter_mut().zip(sums[m..].iter().step_by(padded_rows));
                y.enumerate().for_each(|(n, (y, sum))| store.part(first + n, core::slice::from_mut(y), &[*sum]));
            }
            slot.yt = yt;
        });
    };
    if source.is_bf16() {
        let tiles = pack::tiles_bf16(x, shape, kernels.lanes, tiles_bf16, exec);
        each(slots, y, &|rows, depths, slot, yt| {
            let (len, first) = (depths.len().div_ceil(2), depths.start / 2);
            source.decode_bf16(rows.clone(), depths, &mut slot.product, &mut slot.panel_bf16);
            let data = &slot.panel_bf16;
            let panel = Panel { data, rows: rows.len(), row_stride: len, depth_stride: 1, first, depth: len };
            (kernels.block_bf16)(&tiles, &panel, yt);
        });
    } else {
        let tiles = pack::tiles_f32(x, shape, kernels.lanes, tiles_f32, exec);
        each(slots, y, &|rows, depths, slot, yt| {
            let (len, first) = (depths.len(), depths.start);
            source.decode_f32(rows.clone(), depths, &mut slot.product, &mut slot.panel_f32);
            let data = &slot.panel_f32;
            let panel = Panel { data, rows: rows.len(), row_stride: len, depth_stride: 1, first, depth: len };
            (kernels.block_f32)(&tiles, &panel, yt);
        });
    }
}
