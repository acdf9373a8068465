//! Operands in the order that the block kernels read them.

use alloc::vec::Vec;
use core::ops::Range;

use super::{GemmShape, grown, grown_aligned};
use crate::simd::dense::{Panel, Tiles};
use crate::{Bf16, Element, Exec};

/// X, `[rows, depth]`, in tiles of `lanes` rows.
pub(crate) fn tiles_f32<'a, T: Element>(
    x: &[T],
    shape: GemmShape,
    lanes: usize,
    buffer: &'a mut Vec<f32>,
    exec: &Exec<'_>,
) -> Tiles<'a, f32> {
    let depth = shape.depth;
    tiles(shape.rows, depth, lanes, buffer, exec, |row, d| x[row * depth + d].to_f32())
}

/// X in tiles of pairs, rounded to bf16 if it is not of that format.
pub(crate) fn tiles_bf16<'a, T: Element>(
    x: &[T],
    shape: GemmShape,
    lanes: usize,
    buffer: &'a mut Vec<u32>,
    exec: &Exec<'_>,
) -> Tiles<'a, u32> {
    let depth = shape.depth;
    tiles(shape.rows, depth.div_ceil(2), lanes, buffer, exec, |row, d| {
        let row = &x[row * depth..][..depth];
        pair(row[2 * d], row.get(2 * d + 1).copied())
    })
}

/// X in blocks of up to `block_rows` rows, each `[depth in pieces of a cache line, rows of the block, a line's numbers]`, zero beyond the depth.
pub(crate) fn lines<'a, T: Copy + Default>(
    x: &[T],
    depth: usize,
    block_rows: usize,
    buffer: &'a mut Vec<T>,
) -> &'a mut [T] {
    let (line, rows) = (64 / size_of::<T>(), x.len().checked_div(depth).unwrap_or(0));
    let padded = depth.next_multiple_of(line);
    let packed = grown_aligned(buffer, rows * padded);
    for (x, packed) in x.chunks(block_rows * depth).zip(packed.chunks_mut(block_rows * padded)) {
        let rows = x.len() / depth;
        for (m, x) in x.chunks_exact(depth).enumerate() {
            for (x, packed) in x.chunks(line).zip(packed.chunks_exact_mut(line).skip(m).step_by(rows)) {
                packed[..x.len()].copy_from_slice(x);
                packed[x.len()..].fill(T::default());
            }
        }
    }
    packed
}

fn tiles<'a, T: Copy + Default + Send>(
    rows: usize,
    depth: usize,
    lanes: usize,
    buffer: &'a mut Vec<T>,
    exec: &Exec<'_>,
    at: impl Fn(usize, usize) -> T + Sync,
) -> Tiles<'a, T> {
    let num_tiles = rows.div_ceil(lanes);
    let data = grown(buffer, num_tiles * depth * lanes);
    exec.for_each_chunk(data, depth * lanes, |tile, data| {
        let rows = tile * lanes..rows.min((tile + 1) * lanes);
        // In pieces of 16 along the depth, so that a cache line of X is used up while it is near.
        for first in (0..depth).step_by(16) {
            let last = depth.min(first + 16);
            for (lane, row) in rows.clone().enumerate() {
                for d in first..last {
                    data[d * lanes + lane] = at(row, d);
                }
            }
            for lane in rows.len()..lanes {
                for d in first..last {
                    data[d * lanes + lane] = T::default();
                }
            }
        }
    });
    Tiles { data, num_tiles, depth }
}

/// The bits of two numbers, the second of which may be missing.
fn pair<T: Element>(low: T, high: Option<T>) -> u32 {
    let bits = |value: T| Bf16::from_f32(value.to_f32()).0;
    pair_of_bits(bits(low), high.map_or(0, bits))
}

/// A panel of W, `[columns, depth]`, of rows whose pairs do not lie ready.
pub(crate) fn panel_of_rows<'a>(
    w: &[u16],
    depth: usize,
    rows: Range<usize>,
    depths: Range<usize>,
    buffer: &'a mut Vec<u32>,
) -> Panel<'a, u32> {
    let (num_rows, len) = (rows.len(), depths.len().div_ceil(2));
    let data = grown(buffer, num_rows * len);
    for (row, out) in rows.zip(data.chunks_exact_mut(len)) {
        for (out, two) in out.iter_mut().zip(w[row * depth..][depths.clone()].chunks(2)) {
            *out = pair_of_bits(two[0], two.get(1).copied().unwrap_or(0));
        }
    }
    Panel { data, rows: num_rows, row_stride: len, depth_stride: 1, first: depths.start / 2, depth: len }
}

/// A panel of W, `[depth, columns]`: a pair takes one number from each of two rows.
pub(crate) fn panel_of_columns<'a>(
    w: &[u16],
    columns: usize,
    rows: Range<usize>,
    depths: Range<usize>,
    buffer: &'a mut Vec<u32>,
) -> Panel<'a, u32> {
    let (num_rows, len) = (rows.len(), depths.len().div_ceil(2));
    let data = grown(buffer, num_rows * len);
    for (index, out) in data.chunks_exact_mut(num_rows).enumerate() {
        let at = depths.start + 2 * index;
        let low = &w[at * columns..][rows.clone()];
        if at + 1 < depths.end {
            let high = &w[(at + 1) * columns..][rows.clone()];
            for (out, (low, high)) in out.iter_mut().zip(low.iter().zip(high)) {
                *out = pair_of_bits(*low, *high);
            }
        } else {
            for (out, low) in out.iter_mut().zip(low) {
                *out = pair_of_bits(*low, 0);
            }
        }
    }
    Panel { data, rows: num_rows, row_stride: 1, depth_stride: num_rows, first: depths.start / 2, depth: len }
}

fn pair_of_bits(low: u16, high: u16) -> u32 {
    u32::from(low) | u32::from(high) << 16
}
