//! Products with 1-bit deltas: forward, for many tenants at once, backward, and the gradient of the scales.

mod backward;
mod forward;
mod tables;

use alloc::vec::Vec;
use core::ops::Range;

pub use forward::add_tenants;

use crate::Exec;
use crate::dense::Output;
use crate::simd::delta::lookup::{Integers, Kernels, Line, Rows, Sums, TILE, Tiles};
use tables::TableRows;

/// In which numbers a product is computed.
///
/// All of them look up sums of 4 activations in tables. The bounds are for an output `y` of a row of K weights with one scale `s`, against the exact
/// `s · Σ ±x`; with scales for groups they hold with each group's own. u = 2^-24, and a group is 128 inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum DeltaArithmetic {
    /// In f32: `|error| ≤ (K + 12)·u·s·Σ|x|`. The order of the sums depends on the instruction set.
    #[default]
    F32,
    /// Tables of 14 bits: each group is divided into 8190 steps of the largest sum `a` of 4 neighbouring magnitudes, and every table entry is off by
    /// half a step at most: `|error| ≤ s·Σ_groups n·a/(2·8190)`, n being the group's tables (32, fewer at the end). In practice some 1e-4 of the product.
    /// The same bits on all instruction sets.
    Table14,
    /// Activations rounded to integers from -127 to 127, with a scale for each group; their sums are exact: `|error| ≤ s·Σ_groups 4n·max|x|/(2·127)`.
    /// What an integer dot product with int8 activations gives; the tables make it as fast as `Table14`, which is more accurate. The same bits on
    /// all instruction sets.
    Int8,
    /// Tables of 7 bits, as `Table14` with 63 steps: `|error| ≤ s·Σ_groups n·a/(2·63)`; some 1e-2 of the product. A delta is a few hundredths of the
    /// whole output, of which the error is then about a bf16 rounding. The same bits on all instruction sets.
    Table7,
}

impl DeltaArithmetic {
    fn integers(self) -> Option<Integers> {
        match self {
            Self::F32 => None,
            Self::Table14 => Some(Integers::Two),
            Self::Int8 => Some(Integers::Int8),
            Self::Table7 => Some(Integers::One),
        }
    }
}

/// How a product is computed, and what becomes of its result.
#[derive(Debug, Clone, Copy, Default)]
pub struct DeltaOptions {
    /// In which numbers.
    pub arithmetic: DeltaArithmetic,
    /// Replaces what is in the output, or adds to it, as a delta is added to the product of its base.
    pub output: Output,
}

/// Scratch memory of the products. Keep one and pass it to every call: it grows to what the largest call needs, about 1 MiB and what each thread needs
/// for some tiles, and is not allocated again.
#[derive(Debug, Default)]
pub struct DeltaWorkspace {
    shared: tables::Buffers,
    slots: Vec<Slot>,
    /// Rows of the batch by tenant: `(tenant, row)`.
    order: Vec<(usize, usize)>,
    gradient: Vec<f64>,
}

/// What one thread needs.
#[derive(Debug, Default)]
struct Slot {
    sums: Vec<Sums>,
    lines: Vec<Line>,
    /// Tables of the backward product with scales for groups, which are another for each group of inputs.
    own: tables::Buffers,
}

impl DeltaWorkspace {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn reserve_slots(&mut self, exec: &Exec<'_>) {
        if self.slots.len() < exec.num_slots() {
            self.slots.resize_with(exec.num_slots(), Slot::default);
        }
    }
}

/// Lines that are worked on for all rows and tiles before the next: lines and tables stay in the L1 cache meanwhile. Whole groups.
const BLOCK_LINES: usize = 32;

/// Tiles that a task takes at most: tables that are read once serve all of them.
const TASK_TILES: usize = 4;

/// The first `len` elements of a buffer that only ever grows, all of them the filler.
fn filled<T: Copy>(buffer: &mut Vec<T>, len: usize, filler: T) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, filler);
    }
    let buffer = &mut buffer[..len];
    buffer.fill(filler);
    buffer
}

/// Outputs that a task takes: whole tiles, fewer when every thread is to have a part.
fn task_len(outputs: usize, exec: &Exec<'_>) -> usize {
    let tiles = outputs.div_ceil(TILE);
    tiles.div_ceil(2 * exec.num_threads()).clamp(1, TASK_TILES) * TILE
}

/// `sums[tile, row] += Σ signs · x` for some lines of some tiles, with their scales by group or none, and rows of tables. The lines start with a group.
fn multiply(
    kernels: &Kernels,
    tiles: &Tiles<'_>,
    lines: Range<usize>,
    scales: &Rows<'_, Sums>,
    (tables, rows): (&TableRows<'_>, Range<usize>),
    sums: &mut [Sums],
) {
    // A single row reads lines once, so they come in the order in which they lie.
    let block_lines = if rows.len() == 1 { lines.len().max(1) } else { BLOCK_LINES };
    for start in lines.clone().step_by(block_lines) {
        let block = start..lines.end.min(start + block_lines);
        tables.multiply(kernels, tiles, block, scales, rows.clone(), sums);
    }
}
