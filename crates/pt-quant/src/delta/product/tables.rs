//! Tables of activations, and the kernels that read them.

use alloc::vec::Vec;
use core::ops::Range;

use super::DeltaArithmetic;
use crate::Exec;
use crate::dense::grown;
use crate::simd::delta::lookup::{GROUP, Integers, Kernels, LINE, Out, Rows, Sums, Tiles};

/// Memory that tables may take, so that they stay in the L2 cache: more rows than that holds go one part after the other.
const MAX_BYTES: usize = 768 << 10;

/// Where tables and what they are made of lie.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    x: Vec<f32>,
    f32: Vec<f32>,
    bytes: Vec<u8>,
    units: Vec<f32>,
}

/// Tables of some rows of activations.
pub(super) enum TableRows<'a> {
    F32 { data: &'a [f32], stride: usize },
    Integers { kind: Integers, data: &'a [u8], stride: usize, units: &'a [f32], units_stride: usize },
}

/// Rows of activations whose tables are made together: a multiple of what kernels take at once.
pub(super) fn rows_at_once(kernels: &Kernels, arithmetic: DeltaArithmetic, num_lines: usize) -> usize {
    let line_bytes = match arithmetic.integers() {
        None => kernels.f32_len * size_of::<f32>(),
        Some(kind) => kind.line_bytes(),
    };
    let rows = MAX_BYTES / (line_bytes * num_lines).max(1);
    (rows / 4 * 4).clamp(4, 128)
}

impl Buffers {
    /// Makes the tables of `rows` rows of `num_lines` lines; `fill(row, x)` gives the activations, all of `x`, which may hold anything before.
    pub(super) fn build(
        &mut self,
        kernels: &Kernels,
        arithmetic: DeltaArithmetic,
        (rows, num_lines): (usize, usize),
        fill: impl Fn(usize, &mut [f32]) + Sync,
        exec: &Exec<'_>,
    ) -> TableRows<'_> {
        let depth = num_lines * LINE;
        let x = grown(&mut self.x, rows * depth);
        if depth > 0 {
            exec.for_each_chunk(x, depth, fill);
        }
        let x = &*x;
        match arithmetic.integers() {
            None => {
                let stride = num_lines * kernels.f32_len;
                let data = grown(&mut self.f32, rows * stride);
                exec.for_each_chunk(data, stride, |row, tables| {
                    (kernels.build_f32)(&x[row * depth..][..depth], tables);
                });
                TableRows::F32 { data, stride }
            }
            Some(kind) => {
                let (stride, units_stride) = (num_lines * kind.line_bytes(), num_lines.div_ceil(GROUP));
                let data = grown(&mut self.bytes, rows * stride);
                let units = grown(&mut self.units, rows * units_stride);
                exec.for_each_chunk_pair((data, stride), (units, units_stride), |row, tables, units| {
                    (kernels.build_integers)(kind, &x[row * depth..][..depth], tables, units);
                });
                TableRows::Integers { kind, data, stride, units, units_stride }
            }
        }
    }
}

impl TableRows<'_> {
    /// Adds the product of some lines of some tiles with some rows: `sums[tile, row]`. The lines start with a group; `scales` are those of all groups of the
    /// tiles, or none.
    pub(super) fn multiply(
        &self,
        kernels: &Kernels,
        tiles: &Tiles<'_>,
        lines: Range<usize>,
        scales: &Rows<'_, Sums>,
        rows: Range<usize>,
        sums: &mut [Sums],
    ) {
        let groups = lines.start / GROUP..lines.end.div_ceil(GROUP);
        let tiles_of = |lines: Range<usize>| Tiles { lines: &tiles.lines[lines.start..], len: lines.len(), ..*tiles };
        let scales_of = |group: usize| match scales.data {
            [] => *scales,
            data => Rows { data: &data[group..], stride: scales.stride },
        };
        let mut out = Out { sums, stride: rows.len(), rows: rows.len() };
        match *self {
            Self::F32 { data, stride } => {
                let mut part = |lines: Range<usize>, scales| {
                    let data = &data[rows.start * stride + lines.start * kernels.f32_len..];
                    (kernels.forward_f32)(&tiles_of(lines), &Rows { data, stride }, &scales, &mut out);
                };
                if scales.data.is_empty() {
                    part(lines, *scales);
                } else {
                    for group in groups {
                        part(group * GROUP..lines.end.min((group + 1) * GROUP), scales_of(group));
                    }
                }
            }
            Self::Integers { kind, data, stride, units, units_stride } => {
                let forward = if kind == Integers::One { kernels.forward_one } else { kernels.forward_two };
                let tables = Rows { data: &data[rows.start * stride + lines.start * kind.line_bytes()..], stride };
                let units = Rows { data: &units[rows.start * units_stride + groups.start..], stride: units_stride };
                forward(&tiles_of(lines), &tables, &units, &scales_of(groups.start), &mut out);
            }
        }
    }
}
