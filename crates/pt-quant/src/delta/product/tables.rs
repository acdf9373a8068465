//! Tables of activations, and the kernels that read them.

use alloc::vec::Vec;
use core::ops::Range;

use super::DeltaArithmetic;
use crate::Exec;
use crate::dense::grown;
use crate::simd::delta::lookup::{GROUP, Integers, Kernels, LINE, Line, Rows, Sums};

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

/// Rows of activations whose tables are made together.
pub(super) fn rows_at_once(kernels: &Kernels, arithmetic: DeltaArithmetic, num_lines: usize) -> usize {
    let (line_bytes, max_rows) = match arithmetic.integers() {
        None => (kernels.f32_len * size_of::<f32>(), kernels.max_rows[0]),
        Some(kind) => (kind.line_bytes(), kernels.max_rows[planes(kind)]),
    };
    let rows = MAX_BYTES / (line_bytes * num_lines).max(1);
    (rows / max_rows * max_rows).clamp(max_rows, 128)
}

fn planes(kind: Integers) -> usize {
    match kind {
        Integers::One => 1,
        Integers::Two | Integers::Int8 => 2,
    }
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
    /// Rows that the kernel takes at once.
    pub(super) fn max_rows(&self, kernels: &Kernels) -> usize {
        match self {
            Self::F32 { .. } => kernels.max_rows[0],
            Self::Integers { kind, .. } => kernels.max_rows[planes(*kind)],
        }
    }

    /// Adds the product of some lines of a tile with the rows from `row` on, one for each of `sums`. The lines start with a group; `scales` are those of all
    /// groups of the tile, or none.
    pub(super) fn multiply(
        &self,
        kernels: &Kernels,
        lines: &[Line],
        range: Range<usize>,
        scales: &[Sums],
        row: usize,
        sums: &mut [Sums],
    ) {
        let groups = range.start / GROUP..range.end.div_ceil(GROUP);
        match *self {
            Self::F32 { data, stride } => {
                let mut part = |range: Range<usize>, scale| {
                    let data = &data[row * stride + range.start * kernels.f32_len..];
                    (kernels.forward_f32)(&lines[range], &Rows { data, stride }, scale, sums);
                };
                if scales.is_empty() {
                    part(range, None);
                } else {
                    for group in groups {
                        part(group * GROUP..range.end.min((group + 1) * GROUP), Some(&scales[group]));
                    }
                }
            }
            Self::Integers { kind, data, stride, units, units_stride } => {
                let forward = if kind == Integers::One { kernels.forward_one } else { kernels.forward_two };
                let data = &data[row * stride + range.start * kind.line_bytes()..];
                let units = &units[row * units_stride + groups.start..];
                let scales = if scales.is_empty() { scales } else { &scales[groups] };
                forward(&lines[range], &Rows { data, stride }, &Rows { data: units, stride: units_stride }, scales, sums);
            }
        }
    }
}
