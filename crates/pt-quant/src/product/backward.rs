//! dX = dY · W.

use alloc::string::ToString;

use super::flat::Flat;
use super::forward::{Arithmetic, ProductOptions, Store};
use super::matrix::{Block4Matrix, Storage, Tiled};
use super::{SlotScratch, as_bf16_bits, as_f32, grown_aligned, worth_sharing};
use crate::dense::{Output, Workspace, grown};
use crate::error::check_len;
use crate::simd::product::{self, BackwardFew, FewRows, GROUP, Rows, TILE_ROWS};
use crate::{Bf16, Element, Exec, Inline, QuantError};

/// Rows of the weight in a panel: 16 KiB of f32.
const PANEL_ROWS: usize = 64;

/// Rows of the gradient whose sums are kept at once: 32 KiB a group.
const GRADIENT_ROWS: usize = 128;

/// Up to how many rows of the gradient codes are looked up where they are multiplied, where there is a kernel for it.
const FEW_ROWS: usize = 16;

/// Rows of the weight that such a kernel takes at once: their tables and gradients stay in the L1 cache.
const FEW_PANEL_ROWS: usize = 256;

/// Groups of columns in a task at most: 512 bytes of each tile lie in one piece.
const MAX_GROUPS: usize = 4;

impl Block4Matrix {
    /// `dx = dy · W`: the gradient of [`forward`](Self::forward) to its input.
    ///
    /// # Shapes
    /// - `dy`: `[rows, out_features]`, `dx`: `[rows, in_features]`, row-major; f32, bf16 or f16, as in [`forward`](Self::forward).
    ///
    /// The weights are decoded a panel of 64 by 64 at a time, or for up to 16 rows looked up where they are multiplied. No thread needs more than
    /// 192 KiB of scratch, next to a copy of `dy` where its format or order must change. The result depends on the instruction set, but not on the
    /// threads. The bounds are those of [`Arithmetic`], with `out_features` for K.
    ///
    /// # Errors
    /// [`QuantError::Length`] when a buffer has another length, [`QuantError::Value`] for [`Arithmetic::Int8`] and for a bias: neither has a
    /// backward product.
    pub fn backward<Y: Element, X: Element>(
        &self,
        dy: &[Y],
        dx: &mut [X],
        rows: usize,
        options: &ProductOptions<'_>,
        workspace: &mut Workspace,
        exec: &Exec<'_>,
    ) -> Result<(), QuantError> {
        let area = |a: usize, b: usize| a.checked_mul(b).ok_or(QuantError::Overflow { what: "rows" });
        check_len("dy", dy.len(), area(rows, self.out_features())?)?;
        check_len("dx", dx.len(), area(rows, self.in_features())?)?;
        let refused = |what, found: &str, expected| Err(QuantError::Value { what, found: found.to_string(), expected });
        if options.arithmetic == Arithmetic::Int8 {
            return refused("arithmetic", "Int8", "F32 or Bf16");
        }
        if options.bias.is_some() {
            return refused("bias", "given", "none");
        }
        let exec = &worth_sharing(exec, rows, self.out_features(), self.in_features());
        workspace.reserve_slots(exec);
        let kernels = product::kernels(exec.isa());
        let (num_rows, columns) = (self.out_features(), self.in_features());
        let round = options.arithmetic == Arithmetic::Bf16;
        if let (Storage::Tiled(tiled), Some(few), 1..=FEW_ROWS) = (self.storage(), kernels.backward_few, rows) {
            self.backward_few((tiled, few), dy, dx, rows, options, workspace, exec);
            return Ok(());
        }
        let Workspace { product, slots, .. } = workspace;
        // Pairs of rows have no partner for the last of an odd number.
        let pairs = kernels.backward_bf16.filter(|_| round && num_rows.is_multiple_of(2) && self.is_tiled());
        let (dy_f32, dy_bf16): (&[f32], &[u16]) = match pairs {
            Some(_) => (&[], as_bf16_bits(dy, &mut product.x_bf16)),
            None => (as_f32(dy, &mut product.x_f32, round), &[]),
        };
        let groups = columns.div_ceil(GROUP);
        let groups_per_task = (groups / (3 * exec.num_threads())).clamp(1, MAX_GROUPS);
        exec.for_each_columns((dx, columns), groups_per_task * GROUP, slots, |first, mut block, slot| {
            let SlotScratch { scales, columns: sums, panel_f32, panel_pairs, .. } = &mut slot.product;
            let num_groups = block.len().div_ceil(GROUP);
            for start in (0..rows).step_by(GRADIENT_ROWS) {
                let taken = GRADIENT_ROWS.min(rows - start);
                let sums = grown_aligned(sums, num_groups * taken * GROUP);
                sums.fill(0.0);
                let sums = sums.as_chunks_mut::<GROUP>().0;
                for panel_start in (0..num_rows).step_by(PANEL_ROWS) {
                    let panel_rows = panel_start..num_rows.min(panel_start + PANEL_ROWS);
                    let at = start * num_rows + panel_start..(start + taken - 1) * num_rows + panel_rows.end;
                    for (group, sums) in sums.chunks_exact_mut(taken).enumerate() {
                        let index = first / GROUP + group;
                        if let (Storage::Tiled(tiled), Some(backward)) = (self.storage(), pairs) {
                            let tiles = tiled.tiles(panel_rows.clone(), index..index + 1, scales);
                            let panel = grown_aligned(panel_pairs, 2 * tiles.num_tiles() * GROUP);
                            let panel = panel.as_chunks_mut::<GROUP>().0;
                            (kernels.panel_row_pairs)(&tiles, &self.table(true), panel);
                            let dy = Rows { data: &dy_bf16[at.clone()], rows: taken, stride: num_rows };
                            backward(&panel[..panel_rows.len() / 2], &dy, sums);
                            continue;
                        }
                        let panel = match self.storage() {
                            Storage::Tiled(tiled) => {
                                let tiles = tiled.tiles(panel_rows.clone(), index..index + 1, scales);
                                let panel = grown_aligned(panel_f32, 4 * tiles.num_tiles() * GROUP);
                                (kernels.panel_f32)(&tiles, &self.table(round), panel);
                                panel.as_chunks_mut::<GROUP>().0
                            }
                            Storage::Flat(block4) => {
                                let panel = grown_aligned(panel_f32, panel_rows.len() * GROUP);
                                let panel = panel.as_chunks_mut::<GROUP>().0;
                                let len = GROUP.min(columns - index * GROUP);
                                let exec = exec.with_pool(&Inline);
                                let flat = Flat { weights: block4.as_ref(), depth: columns, is_bf16: round, exec };
                                for (row, out) in panel_rows.clone().zip(panel.iter_mut()) {
                                    flat.decode(row * columns + index * GROUP, &mut out[..len]);
                                    if round {
                                        out[..len].iter_mut().for_each(|w| *w = Bf16::from_f32(*w).to_f32());
                                    }
                                    out[len..].fill(0.0);
                                }
                                panel
                            }
                        };
                        let dy = Rows { data: &dy_f32[at.clone()], rows: taken, stride: num_rows };
                        (kernels.backward_f32)(&panel[..panel_rows.len()], &dy, sums);
                    }
                }
                for m in 0..taken {
                    let sums = sums[m..].iter().step_by(taken).flatten();
                    let dx = block.row(start + m).iter_mut().zip(sums);
                    match options.output {
                        Output::Replace => dx.for_each(|(dx, sum)| *dx = X::from_f32(*sum)),
                        Output::Add => dx.for_each(|(dx, sum)| *dx = X::from_f32(dx.to_f32() + sum)),
                    }
                }
            }
        });
        Ok(())
    }
    /// Few rows: each code is looked up where it is multiplied.
    #[allow(clippy::too_many_arguments)]
    fn backward_few<Y: Element, X: Element>(
        &self,
        (tiled, few): (&Tiled, &BackwardFew),
        dy: &[Y],
        dx: &mut [X],
        rows: usize,
        options: &ProductOptions<'_>,
        workspace: &mut Workspace,
        exec: &Exec<'_>,
    ) {
        let round = options.arithmetic == Arithmetic::Bf16;
        let (num_rows, columns) = (self.out_features(), self.in_features());
        // Blocks of rows, as many as need be, of about the same size.
        let block_rows = rows.div_ceil(rows.div_ceil(few.max_rows));
        let padded = num_rows.next_multiple_of(TILE_ROWS);
        let Workspace { product, slots, .. } = workspace;
        let bf16 = few.bf16.filter(|_| round);
        let (dy_f32, dy_bf16): (&[f32], &[u32]) = match bf16 {
            Some(_) => {
                let number = |m: usize, n: usize| u32::from(Bf16::from_f32(dy[m * num_rows + n].to_f32()).0);
                let second = |m: usize, n: usize| if n < num_rows { number(m, n) } else { 0 };
                let pair = |m: usize, n: usize| number(m, 2 * n) | second(m, 2 * n + 1) << 16;
                let packed = grown(&mut product.few_bf16, rows * padded / 2);
                interleave((rows, num_rows.div_ceil(2), padded / 2), block_rows, pair, packed);
                (&[], packed)
            }
            None => {
                let number = |m: usize, n: usize| {
                    let number = dy[m * num_rows + n].to_f32();
                    if round { Bf16::from_f32(number).to_f32() } else { number }
                };
                let packed = grown(&mut product.few_f32, rows * padded);
                interleave((rows, num_rows, padded), block_rows, number, packed);
                (packed, &[])
            }
        };
        let store = Store { bias: None, output: options.output };
        let groups_per_task = (columns / GROUP / (3 * exec.num_threads())).clamp(1, MAX_GROUPS);
        exec.for_each_columns((dx, columns), groups_per_task * GROUP, slots, |first, mut block, slot| {
            let SlotScratch { scales, columns: sums, tables, .. } = &mut slot.product;
            let num_groups = block.len() / GROUP;
            let tables = grown_aligned(tables, 16 * FEW_PANEL_ROWS).as_chunks_mut::<16>().0;
            for start in (0..rows).step_by(block_rows) {
                let taken = block_rows.min(rows - start);
                let sums = grown_aligned(sums, num_groups * taken * GROUP);
                sums.fill(0.0);
                let sums = sums.as_chunks_mut::<GROUP>().0;
                for panel_start in (0..padded).step_by(FEW_PANEL_ROWS) {
                    let panel_end = padded.min(panel_start + FEW_PANEL_ROWS);
                    let at = start * padded + panel_start * taken..start * padded + panel_end * taken;
                    for (group, sums) in sums.chunks_exact_mut(taken).enumerate() {
                        let group = first / GROUP + group;
                        let tiles = tiled.tiles(panel_start..panel_end, group..group + 1, scales);
                        let rows = FewRows { sums, tables };
                        match bf16 {
                            Some(bf16) => bf16(&tiles, &self.table(true), &dy_bf16[at.start / 2..at.end / 2], rows),
                            None => (few.f32)(&tiles, &self.table(round), &dy_f32[at.clone()], rows),
                        }
                    }
                }
                (few.natural)(sums);
                for m in 0..taken {
                    let groups = block.row(start + m).chunks_exact_mut(GROUP).zip(sums[m..].iter().step_by(taken));
                    groups.for_each(|(dx, sums)| store.part(0, dx, sums));
                }
            }
        });
    }
}

/// `[rows, columns]` in blocks of rows, `[columns, rows of the block]` each, with zeros up to `padded` columns.
fn interleave<T: Copy + Default>(
    (rows, columns, padded): (usize, usize, usize),
    block_rows: usize,
    at: impl Fn(usize, usize) -> T,
    out: &mut [T],
) {
    for (block, out) in out.chunks_mut(block_rows * padded).enumerate() {
        let first = block * block_rows;
        let taken = block_rows.min(rows - first);
        // In pieces of 16, so that a cache line is used up while it is near.
        for piece in (0..columns).step_by(16) {
            for m in 0..taken {
                for n in piece..columns.min(piece + 16) {
                    out[n * taken + m] = at(first + m, n);
                }
            }
        }
        out[columns * taken..].fill(T::default());
    }
}
