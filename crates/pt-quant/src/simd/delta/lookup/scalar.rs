//! What the products mean, in plain Rust. The tables of integers, and the products with them, have the same bits on all instruction sets; products with f32
//! tables differ in the order of their sums.

use super::{
    GROUP, Integers, Kernels, LINE, Line, Out, Rows, Sums, TILE, Tiles, check_build_integers, check_forward,
    check_integers, position, steps_of,
};

const F32_LEN: usize = 32;

pub(super) static KERNELS: Kernels = Kernels {
    f32_len: F32_LEN,
    build_f32,
    forward_f32,
    build_integers,
    forward_one: forward_integers::<1>,
    forward_two: forward_integers::<2>,
    transpose,
};

/// All 16 sums of 4 numbers: bit `i` of the index tells whether number `i` is added or taken off.
pub(super) fn sums(x: &[f32]) -> [f32; 16] {
    core::array::from_fn(|index| {
        let signed = |at: usize| if index >> at & 1 == 1 { x[at] } else { -x[at] };
        (signed(0) + signed(1)) + (signed(2) + signed(3))
    })
}

fn build_f32(x: &[f32], tables: &mut [f32]) {
    for (x, table) in x.chunks_exact(4).zip(tables.chunks_exact_mut(16)) {
        table.copy_from_slice(&sums(x));
    }
}

fn forward_f32(tiles: &Tiles<'_>, tables: &Rows<'_, f32>, scales: &Rows<'_, Sums>, out: &mut Out<'_>) {
    check_forward(tiles, tables, F32_LEN, scales, out);
    for tile in 0..tiles.count {
        let scale = scales.data.get(tile * scales.stride);
        for row in 0..out.rows {
            let mut acc = [0.0; TILE];
            let tables = tables.data[row * tables.stride..].chunks_exact(F32_LEN);
            for (line, table) in tiles.tile(tile).iter().zip(tables) {
                for (output, acc) in acc.iter_mut().enumerate() {
                    let byte = usize::from(line.0[position(output)]);
                    *acc += table[byte & 15] + table[16 + (byte >> 4)];
                }
            }
            let sums = &mut out.sums[tile * out.stride + row];
            for (output, (sum, acc)) in sums.iter_mut().zip(acc).enumerate() {
                *sum += scale.map_or(1.0, |scale| scale[output]) * acc;
            }
        }
    }
}

/// The nearest integer, ties to even, of a number below 2^22.
pub(super) fn round(value: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 · 2^23: the sum has no bits for a fraction
    (value + SHIFT) - SHIFT
}

/// The largest of numbers that are not negative; no number if any is none.
fn largest(values: impl Iterator<Item = f32>) -> f32 {
    // They order as their bits do, what is no number above infinity.
    f32::from_bits(values.map(f32::to_bits).max().unwrap_or(0))
}

pub(super) fn build_integers(kind: Integers, x: &[f32], tables: &mut [u8], units: &mut [f32]) {
    check_build_integers(kind, x, tables, units);
    let groups = x.chunks(GROUP * LINE).zip(tables.chunks_mut(GROUP * kind.line_bytes()));
    for ((x, tables), unit) in groups.zip(units) {
        let largest = match kind {
            Integers::Int8 => largest(x.iter().map(|x| x.abs())),
            Integers::One | Integers::Two => {
                largest(x.chunks_exact(4).map(|x| (x[0].abs() + x[1].abs()) + (x[2].abs() + x[3].abs())))
            }
        };
        let steps;
        (steps, *unit) = steps_of(kind, largest);
        for (x, table) in x.chunks_exact(LINE).zip(tables.chunks_exact_mut(kind.line_bytes())) {
            for (nibble, x) in x.chunks_exact(4).enumerate() {
                let entries = match (steps == 0.0, kind) {
                    (true, _) => [0.0; 16],
                    (_, Integers::Int8) => sums(&[0, 1, 2, 3].map(|at| round(x[at] * steps))),
                    (_, Integers::One | Integers::Two) => sums(x).map(|sum| round(sum * steps)),
                };
                for (index, entry) in entries.into_iter().enumerate() {
                    let entry = entry as i32 + kind.bias();
                    if kind == Integers::One {
                        table[16 * nibble + index] = entry as u8;
                    } else {
                        table[16 * nibble + index] = (entry & 127) as u8;
                        table[32 + 16 * nibble + index] = (entry >> 7) as u8;
                    }
                }
            }
        }
    }
}

fn forward_integers<const PLANES: usize>(
    tiles: &Tiles<'_>,
    tables: &Rows<'_, u8>,
    units: &Rows<'_, f32>,
    scales: &Rows<'_, Sums>,
    out: &mut Out<'_>,
) {
    let kind = if PLANES == 1 { Integers::One } else { Integers::Two };
    check_integers(kind, tiles, tables, units, scales, out);
    let line_bytes = kind.line_bytes();
    for (tile, row) in (0..tiles.count).flat_map(|tile| (0..out.rows).map(move |row| (tile, row))) {
        let sums = &mut out.sums[tile * out.stride + row];
        for (group, lines) in tiles.tile(tile).chunks(GROUP).enumerate() {
            let tables = &tables.data[row * tables.stride + group * GROUP * line_bytes..];
            let unit = units.data[row * units.stride + group];
            let scale = scales.data.get(tile * scales.stride + group);
            for (output, sum) in sums.iter_mut().enumerate() {
                let mut total = -(2 * lines.len() as i32) * kind.bias();
                for (line, table) in lines.iter().zip(tables.chunks_exact(line_bytes)) {
                    let byte = usize::from(line.0[position(output)]);
                    for (plane, table) in table.chunks_exact(32).enumerate() {
                        let entries = i32::from(table[byte & 15]) + i32::from(table[16 + (byte >> 4)]);
                        total += entries << (7 * plane);
                    }
                }
                let value = total as f32 * unit;
                *sum += scale.map_or(value, |scale| value * scale[output]);
            }
        }
    }
}

/// The transpose of a matrix of 8 × 8 bits, byte `i` being row `i`.
fn transpose_bits(mut bits: u64) -> u64 {
    // Halves, quarters and single bits change places across the diagonal.
    for (shift, mask) in [(7, 0x00aa_00aa_00aa_00aa), (14, 0x0000_cccc_0000_cccc), (28, 0x0000_0000_f0f0_f0f0)] {
        let swap = (bits ^ (bits >> shift)) & mask;
        bits ^= swap ^ (swap << shift);
    }
    bits
}

pub(super) fn transpose(from: &[Line; 8], to: &mut [Line; 8]) {
    for (octet, to) in to.iter_mut().enumerate() {
        for (line, from) in from.iter().enumerate() {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&from.0[8 * octet..8 * octet + 8]);
            for (input, byte) in transpose_bits(u64::from_le_bytes(bytes)).to_le_bytes().into_iter().enumerate() {
                to.0[position(8 * line + input)] = byte;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::output_at;
    use super::*;

    #[test]
    fn transposing_swaps_rows_and_columns() {
        let bits = 0x8040_2010_0804_0301u64;
        let bit = |bits: u64, row: u32, column: u32| bits >> (8 * row + column) & 1;
        for row in 0..8 {
            for column in 0..8 {
                assert_eq!(bit(transpose_bits(bits), row, column), bit(bits, column, row));
            }
        }
    }

    #[test]
    fn positions_and_outputs_are_inverse() {
        assert!((0..TILE).all(|output| output_at(position(output)) == output));
        assert_eq!([position(0), position(1), position(16), position(63)], [0, 4, 1, 63]);
    }

    #[test]
    fn rounding_is_to_even() {
        assert_eq!([0.5, 1.5, -2.5, 8190.4, -8190.6].map(round), [0.0, 2.0, -2.0, 8190.0, -8191.0]);
    }
}
