//! The products as plain Rust, to be read; the other instruction sets are tested against it.

use super::{
    GROUP, Group, Int8Group, Int8Rows, Int8Table, Kernels, Rows, Sums, TILE_ROWS, Table, Tiles, check_backward,
    check_forward, check_int8, check_panel, check_rows,
};
use crate::Bf16;

pub(super) static KERNELS: Kernels = Kernels {
    max_rows: 8,
    lanes: 1,
    panel_rows: [usize::MAX; 2],
    forward_f32,
    order_f32: None,
    forward_bf16: None,
    order_bf16: None,
    forward_int8,
    reduce,
    quantize,
    panel_f32,
    panel_bf16,
    panel_row_pairs,
    backward_f32,
    backward_bf16: None,
    backward_few: None,
    tile_rows,
    untile_rows,
};

impl Table {
    /// What code `code` stands for in a block of scale `absmax`.
    fn weight(&self, code: u8, absmax: f32) -> f32 {
        let weight = self.values[usize::from(code)] * absmax;
        if self.round { Bf16::from_f32(weight).to_f32() } else { weight }
    }
}

impl Group {
    /// The code of one weight.
    fn code(&self, row: usize, column: usize) -> u8 {
        self.0[row / 2][column] >> (4 * (row % 2)) & 15
    }
}

impl Tiles<'_> {
    /// The codes and scales of the groups of one tile that are worked on.
    fn groups_of(&self, tile: usize) -> impl Iterator<Item = (&Group, &[f32; TILE_ROWS])> {
        let start = tile * self.groups_per_row + self.groups.start;
        let range = start..start + self.groups.len;
        self.codes[range.clone()].iter().zip(&self.scales[range])
    }
}

fn forward_f32(tiles: &Tiles<'_>, table: &Table, x: &Rows<'_, f32>, acc: &mut [f32]) {
    check_forward(tiles, x, acc, 8, 1);
    for (index, sums) in acc.chunks_exact_mut(TILE_ROWS).enumerate() {
        let (tile, m) = (index / x.rows, index % x.rows);
        let x = &x.data[m * x.stride..];
        if tiles.groups.start == 0 {
            sums.fill(0.0);
        }
        for ((codes, scales), x) in tiles.groups_of(tile).zip(x.chunks_exact(GROUP)) {
            for (row, sum) in sums.iter_mut().enumerate() {
                for (column, x) in x.iter().enumerate() {
                    *sum += table.weight(codes.code(row, column), scales[row]) * x;
                }
            }
        }
    }
}

fn forward_int8(tiles: &Tiles<'_>, table: &Int8Table, x: &Int8Rows<'_>, acc: &mut [f32], scratch: &mut Sums) {
    check_int8(tiles, x, acc, scratch, 8, 1);
    for (index, sums) in acc.chunks_exact_mut(TILE_ROWS).enumerate() {
        let (tile, m) = (index / x.rows, index % x.rows);
        let x = x.groups[m * x.stride..].iter().zip(&x.scales[m * x.stride..]);
        if tiles.groups.start == 0 {
            sums.fill(0.0);
        }
        for ((codes, scales), (x, x_scale)) in tiles.groups_of(tile).zip(x) {
            for (row, sum) in sums.iter_mut().enumerate() {
                let weight = |column| i32::from(table.codes[usize::from(codes.code(row, column))]) - 128;
                let dot: i32 = (0..GROUP).map(|column| weight(column) * i32::from(x.codes[column])).sum();
                *sum += dot as f32 * (scales[row] * x_scale);
            }
        }
    }
}

fn reduce(acc: &[f32], sums: &mut Sums) {
    sums.as_flattened_mut().copy_from_slice(acc);
}

/// The largest magnitude becomes 127; ties round to even. A group with a number that is not finite has the scale NaN.
#[inline(always)]
pub(super) fn quantize(x: &[f32; GROUP], out: &mut Int8Group) -> f32 {
    let mut largest = [0f32; 16];
    let mut poison = [0f32; 16];
    for x in x.chunks_exact(16) {
        for lane in 0..16 {
            let magnitude = x[lane].abs();
            largest[lane] = if magnitude > largest[lane] { magnitude } else { largest[lane] };
            poison[lane] += x[lane] * 0.0;
        }
    }
    let largest = largest.into_iter().fold(0f32, |a, b| if a > b { a } else { b });
    let poison: f32 = poison.into_iter().sum();
    // The inverse of a subnormal number may be infinite.
    let inverse = if largest >= f32::MIN_POSITIVE * 128.0 { 127.0 / largest } else { 0.0 };
    // Adding 1.5 · 2^23 leaves the nearest integer in the low bits of the sum.
    const SHIFT: f32 = 12_582_912.0;
    for (code, x) in out.codes.iter_mut().zip(x) {
        *code = (x * inverse + SHIFT).to_bits().wrapping_sub(SHIFT.to_bits()) as i8;
    }
    for (start, codes) in out.start.iter_mut().zip(out.codes.chunks_exact(4)) {
        *start = -128 * codes.iter().map(|code| i32::from(*code)).sum::<i32>();
    }
    if inverse == 0.0 { poison } else { largest / 127.0 + poison }
}

fn panel_f32(tiles: &Tiles<'_>, table: &Table, out: &mut [f32]) {
    check_panel(tiles, GROUP, out.len());
    let columns = tiles.groups.len * GROUP;
    for (index, out) in out.iter_mut().enumerate() {
        let (row, column) = (index / columns, index % columns);
        *out = weight_at(tiles, table, row, column);
    }
}

/// One weight of the groups that are worked on.
fn weight_at(tiles: &Tiles<'_>, table: &Table, row: usize, column: usize) -> f32 {
    let group = row / TILE_ROWS * tiles.groups_per_row + tiles.groups.start + column / GROUP;
    let row = row % TILE_ROWS;
    table.weight(tiles.codes[group].code(row, column % GROUP), tiles.scales[group][row])
}

/// Two numbers as bf16, the first in the low half.
fn pair(low: f32, high: f32) -> u32 {
    u32::from(Bf16::from_f32(low).0) | u32::from(Bf16::from_f32(high).0) << 16
}

fn panel_bf16(tiles: &Tiles<'_>, table: &Table, out: &mut [u32]) {
    check_panel(tiles, GROUP / 2, out.len());
    let columns = tiles.groups.len * GROUP / 2;
    for (index, out) in out.iter_mut().enumerate() {
        let (row, column) = (index / columns, 2 * (index % columns));
        *out = pair(weight_at(tiles, table, row, column), weight_at(tiles, table, row, column + 1));
    }
}

pub(super) fn panel_row_pairs(tiles: &Tiles<'_>, table: &Table, out: &mut [[u32; GROUP]]) {
    check_panel(tiles, GROUP, 2 * out.as_flattened().len());
    for (index, out) in out.iter_mut().enumerate() {
        for (column, out) in out.iter_mut().enumerate() {
            *out = pair(weight_at(tiles, table, 2 * index, column), weight_at(tiles, table, 2 * index + 1, column));
        }
    }
}

fn backward_f32(panel: &[[f32; GROUP]], dy: &Rows<'_, f32>, sums: &mut [[f32; GROUP]]) {
    check_backward(panel.len(), dy, sums.len());
    for (m, sums) in sums.iter_mut().enumerate() {
        for (weights, dy) in panel.iter().zip(&dy.data[m * dy.stride..]) {
            for (sum, weight) in sums.iter_mut().zip(weights) {
                *sum += dy * weight;
            }
        }
    }
}

/// 32 bytes of each of two rows, `2j` high and `2j + 1` low, become 64 bytes with a column each.
#[inline(always)]
pub(super) fn tile_half(first: &[u8; 32], second: &[u8; 32], out: &mut [u8; GROUP]) {
    for ((out, first), second) in out.chunks_exact_mut(2).zip(first).zip(second) {
        out[0] = first >> 4 | second & 0xf0;
        out[1] = first & 0x0f | second << 4;
    }
}

/// The inverse of [`tile_half`].
#[inline(always)]
pub(super) fn untile_half(half: &[u8; GROUP], first: &mut [u8; 32], second: &mut [u8; 32]) {
    for ((half, first), second) in half.chunks_exact(2).zip(first).zip(second) {
        *first = half[0] << 4 | half[1] & 0x0f;
        *second = half[0] & 0xf0 | half[1] >> 4;
    }
}

#[inline(always)]
pub(super) fn tile_rows(rows: &[&[u8]; TILE_ROWS], out: &mut [Group]) {
    check_rows(rows.iter().copied(), out.len());
    let [a, b, c, d] = rows.map(|row| row.as_chunks::<32>().0);
    for ((((out, a), b), c), d) in out.iter_mut().zip(a).zip(b).zip(c).zip(d) {
        tile_half(a, b, &mut out.0[0]);
        tile_half(c, d, &mut out.0[1]);
    }
}

#[inline(always)]
pub(super) fn untile_rows(groups: &[Group], rows: &mut [&mut [u8]; TILE_ROWS]) {
    check_rows(rows.iter().map(|row| &**row), groups.len());
    let [a, b, c, d] = rows;
    let (a, b) = (a.as_chunks_mut::<32>().0, b.as_chunks_mut::<32>().0);
    let (c, d) = (c.as_chunks_mut::<32>().0, d.as_chunks_mut::<32>().0);
    for ((((group, a), b), c), d) in groups.iter().zip(a).zip(b).zip(c).zip(d) {
        untile_half(&group.0[0], a, b);
        untile_half(&group.0[1], c, d);
    }
}
