//! dx = dy · delta_scale · signs, and the gradient of the scales.

use super::tables::rows_at_once;
use super::{DeltaOptions, DeltaWorkspace, Slot, filled, forward, multiply, task_len};
use crate::delta::matrix::TiledScale;
use crate::delta::{DeltaArithmetic, DeltaMatrix, ScaleAxis};
use crate::error::check_len;
use crate::simd::delta::lookup::{self, GROUP, LINE, Line, Rows, TILE, Tiles, output_at};
use crate::{Element, Exec, Inline, QuantError};

impl DeltaMatrix {
    /// `dx = dy · delta_scale · signs`, or `dx += ..` with [`Output::Add`](crate::dense::Output::Add): the gradient of [`forward`](Self::forward)
    /// to its input.
    ///
    /// # Shapes
    /// - `dy`: `[rows, out_features]`, `dx`: `[rows, in_features]`, row-major; f32, bf16 or f16.
    ///
    /// The signs of 64 inputs are transposed at a time; no transpose of the whole matrix is made. The bounds of
    /// [`DeltaArithmetic`] hold with `dy`, times its scales, in the place of `x`; a group is 128 outputs.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn backward<Y: Element, X: Element>(
        &self,
        dy: &[Y],
        dx: &mut [X],
        rows: usize,
        options: DeltaOptions,
        workspace: &mut DeltaWorkspace,
        exec: &Exec<'_>,
    ) -> Result<(), QuantError> {
        let area = |columns: usize| rows.checked_mul(columns).ok_or(QuantError::Overflow { what: "rows" });
        let (in_features, out_features) = (self.in_features(), self.out_features());
        check_len("dy", dy.len(), area(out_features)?)?;
        check_len("dx", dx.len(), area(in_features)?)?;
        workspace.reserve_slots(exec);
        let kernels = lookup::kernels(exec.isa());
        let num_lines = 8 * self.num_tiles();
        let chunk = rows_at_once(kernels, options.arithmetic, num_lines);
        let DeltaWorkspace { shared, slots, .. } = workspace;
        for start in (0..rows).step_by(chunk) {
            let count = chunk.min(rows - start);
            // Outputs in the order of the transposed lines' bits, times their scales for a group of inputs.
            let fill = |group: usize, row: usize, numbers: &mut [f32]| {
                let dy = &dy[(start + row) * out_features..][..out_features];
                for (tile, numbers) in numbers.chunks_exact_mut(TILE).enumerate() {
                    let scales = match self.scale() {
                        TiledScale::Matrix(_) => None,
                        TiledScale::Row(scales) => Some(&scales[tile]),
                        TiledScale::Group128(scales) => {
                            Some(&scales[tile * self.lines_per_tile().div_ceil(GROUP) + group])
                        }
                    };
                    for (position, number) in numbers.iter_mut().enumerate() {
                        let output = output_at(position);
                        let value = dy.get(tile * TILE + output).map_or(0.0, |value| value.to_f32());
                        *number = scales.map_or(value, |scales| value * scales[output]);
                    }
                }
            };
            let is_shared = self.scale_axis() != ScaleAxis::Group128;
            let tables = is_shared.then(|| {
                shared.build(
                    kernels,
                    options.arithmetic,
                    (count, num_lines),
                    |row, numbers| fill(0, row, numbers),
                    exec,
                )
            });
            let scale = match self.scale() {
                TiledScale::Matrix(scale) => *scale,
                TiledScale::Row(_) | TiledScale::Group128(_) => 1.0,
            };
            // Two tiles of inputs have the scales of one group.
            let block = GROUP * LINE;
            exec.for_each_columns((&mut *dx, in_features), block, slots, |first, mut block, slot| {
                let Slot { sums, lines, own } = slot;
                let num_tiles = block.len().div_ceil(TILE);
                let lines = filled(lines, num_tiles * num_lines, Line([0; TILE]));
                for (index, lines) in lines.chunks_exact_mut(num_lines.max(1)).enumerate() {
                    self.transposed_tile(first / TILE + index, lines, kernels);
                }
                let own_tables;
                let tables = if let Some(tables) = &tables {
                    tables
                } else {
                    let fill = |row: usize, numbers: &mut [f32]| fill(first / (GROUP * LINE), row, numbers);
                    own_tables =
                        own.build(kernels, options.arithmetic, (count, num_lines), fill, &exec.with_pool(&Inline));
                    &own_tables
                };
                let sums = filled(sums, num_tiles * count, [0.0; TILE]);
                let tiles = Tiles { lines, stride: num_lines, count: num_tiles, len: num_lines };
                multiply(kernels, &tiles, 0..num_lines, &Rows { data: &[], stride: 0 }, (tables, 0..count), sums);
                for (index, sums) in sums.chunks_exact(count).enumerate() {
                    for (row, sums) in sums.iter().enumerate() {
                        let dx = block.row(start + row);
                        let len = TILE.min(dx.len() - index * TILE);
                        let dx = &mut dx[index * TILE..][..len];
                        forward::store(dx, options.output, sums.iter().map(|sum| sum * scale));
                    }
                }
            });
        }
        Ok(())
    }

    /// The gradient of the scales: `<dy, signs · x>`, over all of the matrix, over each row, or over each group of 128 inputs of a row, as the scales of this
    /// matrix are; the scales' values do not matter.
    ///
    /// # Shapes
    /// - `x`: `[rows, in_features]`, `dy`: `[rows, out_features]`, row-major; f32, bf16 or f16.
    /// - `gradient`: one number for each scale, in the order of [`DeltaScale`](super::super::DeltaScale); replaced.
    ///
    /// `signs · x` is computed as `arithmetic` tells, the products with `dy` are added up in f64, always in the same order.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    #[allow(clippy::too_many_arguments)]
    pub fn scale_gradient<X: Element, Y: Element>(
        &self,
        x: &[X],
        dy: &[Y],
        gradient: &mut [f32],
        rows: usize,
        arithmetic: DeltaArithmetic,
        workspace: &mut DeltaWorkspace,
        exec: &Exec<'_>,
    ) -> Result<(), QuantError> {
        let area = |columns: usize| rows.checked_mul(columns).ok_or(QuantError::Overflow { what: "rows" });
        let (in_features, out_features) = (self.in_features(), self.out_features());
        check_len("x", x.len(), area(in_features)?)?;
        check_len("dy", dy.len(), area(out_features)?)?;
        let axis = self.scale_axis();
        check_len("gradient", gradient.len(), axis.num_scales(out_features, in_features)?)?;
        workspace.reserve_slots(exec);
        let kernels = lookup::kernels(exec.isa());
        let num_lines = self.lines_per_tile();
        let DeltaWorkspace { shared, slots, gradient: sums_of_rows, .. } = workspace;
        // Scales of a row: with one for the matrix, the rows are added up afterwards.
        let (per_row, part) = match axis {
            ScaleAxis::Group128 => (num_lines.div_ceil(GROUP), GROUP),
            ScaleAxis::Matrix | ScaleAxis::Row => (1, num_lines.max(1)),
        };
        let totals = filled(sums_of_rows, out_features * per_row, 0.0);
        let chunk = rows_at_once(kernels, arithmetic, num_lines);
        for start in (0..rows).step_by(chunk) {
            let count = chunk.min(rows - start);
            let fill = |row: usize, numbers: &mut [f32]| {
                forward::copy(&x[(start + row) * in_features..][..in_features], numbers);
            };
            let tables = shared.build(kernels, arithmetic, (count, num_lines), fill, exec);
            let block = task_len(out_features, exec) * per_row;
            exec.for_each_columns((&mut *totals, out_features * per_row), block, slots, |first, mut block, slot| {
                let (first, totals) = (first / per_row, block.row(0));
                let num_tiles = (totals.len() / per_row).div_ceil(TILE);
                let tiles = self.tiles(first / TILE, num_tiles);
                for (group, start_line) in (0..num_lines).step_by(part).enumerate() {
                    let sums = filled(&mut slot.sums, num_tiles * count, [0.0; TILE]);
                    let lines = start_line..num_lines.min(start_line + part);
                    multiply(kernels, &tiles, lines, &Rows { data: &[], stride: 0 }, (&tables, 0..count), sums);
                    for (tile, sums) in sums.chunks_exact(count).enumerate() {
                        for (row, sums) in sums.iter().enumerate() {
                            let dy = &dy[(start + row) * out_features..][first + tile * TILE..out_features];
                            let totals = totals[tile * TILE * per_row..].iter_mut().skip(group).step_by(per_row);
                            for ((total, sum), dy) in totals.zip(sums).zip(dy) {
                                *total += f64::from(*sum) * f64::from(dy.to_f32());
                            }
                        }
                    }
                }
            });
        }
        match axis {
            ScaleAxis::Matrix => gradient[0] = totals.iter().sum::<f64>() as f32,
            ScaleAxis::Row | ScaleAxis::Group128 => {
                gradient.iter_mut().zip(totals).for_each(|(gradient, total)| *gradient = *total as f32);
            }
        }
        Ok(())
    }
}
