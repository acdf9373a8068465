//! dX = dY · W.

use alloc::string::ToString;

use super::flat::Flat;
use super::forward::{Arithmetic, ProductOptions};
use super::matrix::{Block4Matrix, Storage};
use super::{SlotScratch, as_bf16_bits, as_f32, grown_aligned, worth_sharing};
use crate::dense::{Output, Workspace};
use crate::error::check_len;
use crate::simd::product::{self, GROUP, Rows};
use crate::{Bf16, Element, Exec, Inline, QuantError};

/// Rows of the weight in a panel: 16 KiB of f32.
const PANEL_ROWS: usize = 64;

/// Rows of the gradient whose sums are kept at once: 32 KiB a group.
const GRADIENT_ROWS: usize = 128;

/// Groups of columns in a task at most: 512 bytes of each tile lie in one piece.
const MAX_GROUPS: usize = 4;

impl Block4Matrix {
    /// `dx = dy · W`: the gradient of [`forward`](Self::forward) to its input.
    ///
    /// # Shapes
    /// - `dy`: `[rows, out_features]`, `dx`: `[rows, in_features]`, row-major; f32, bf16 or f16, as in [`forward`](Self::forward).
    ///
    /// The weights are decoded a panel of 64 by 64 at a time; no thread needs more than 192 KiB of scratch, next to a copy of `dy` where its format
    /// must change. The result depends on the instruction set, but not on the threads. The bounds are those of [`Arithmetic`], with
    /// `out_features` for K.
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
}
