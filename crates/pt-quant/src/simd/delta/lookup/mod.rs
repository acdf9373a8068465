//! Products of signs with activations by table lookup, by instruction set.
//!
//! Eight signs are a byte, and a nibble of it picks one of the 16 sums `±x₀ ±x₁ ±x₂ ±x₃`, all of which stand in a table (T-MAC, Wei et al. 2024,
//! <https://arxiv.org/abs/2407.00088>). A tile is 64 outputs; a [`Line`] holds a byte of each.

mod scalar;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

use crate::Isa;

/// Outputs of a tile.
pub(crate) const TILE: usize = 64;

/// Inputs of a line.
pub(crate) const LINE: usize = 8;

/// Lines that share a scale of the weights, and a unit of the tables of integers: 128 inputs.
pub(crate) const GROUP: usize = 16;

/// Signs of 64 outputs for 8 inputs: byte [`position`] `(o)` holds those of output `o`, the first input in the lowest bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u8; TILE]);

/// Where an output's byte stands. Byte `r` of the double words holds outputs `16r ..`, so that a lookup for each byte of a double word gives 16 outputs
/// in order.
pub(crate) const fn position(output: usize) -> usize {
    4 * (output % 16) + output / 16
}

/// Sums of a tile, in order.
pub(crate) type Sums = [f32; TILE];

/// Some lines of some tiles: those of tile `t` are the `len` from `t · stride` on.
#[derive(Clone, Copy)]
pub(crate) struct Tiles<'a> {
    pub(crate) lines: &'a [Line],
    pub(crate) stride: usize,
    pub(crate) count: usize,
    pub(crate) len: usize,
}

impl<'a> Tiles<'a> {
    /// The lines of a tile.
    fn tile(&self, tile: usize) -> &'a [Line] {
        &self.lines[tile * self.stride..][..self.len]
    }
}

/// Tables, units or scales: row `m`, or tile `t`, starts at `m · stride`.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, T> {
    pub(crate) data: &'a [T],
    pub(crate) stride: usize,
}

impl<T> Rows<'_, T> {
    /// Panics unless each of `rows` rows has `len` elements: the kernels' pointers rely on it.
    fn check(&self, rows: usize, len: usize) {
        assert!(rows == 0 || self.data.len() >= (rows - 1) * self.stride + len, "elements for all rows");
    }
}

/// Sums of `rows` rows of activations for each tile: `[tiles, stride]`, the first `rows` of each.
pub(crate) struct Out<'a> {
    pub(crate) sums: &'a mut [Sums],
    pub(crate) stride: usize,
    pub(crate) rows: usize,
}

/// How tables of integers are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Integers {
    /// Sums rounded to 63 steps each way: one byte an entry.
    One,
    /// Sums rounded to 8190 steps each way: two planes of 7 bits.
    Two,
    /// Exact sums of activations that are rounded to 127 steps each way: two planes of 7 bits.
    Int8,
}

impl Integers {
    /// Bytes of the tables of a line: 2 nibbles of 16 entries, by plane.
    pub(crate) const fn line_bytes(self) -> usize {
        match self {
            Self::One => 32,
            Self::Two | Self::Int8 => 64,
        }
    }

    /// Steps from 0 to the largest number of a group.
    const fn steps(self) -> f32 {
        match self {
            Self::One => 63.0,
            Self::Two => 8190.0,
            Self::Int8 => 127.0,
        }
    }

    /// What is added to an entry, so that no byte is negative.
    const fn bias(self) -> i32 {
        match self {
            Self::One => ONE_BIAS,
            Self::Two | Self::Int8 => TWO_BIAS,
        }
    }
}

const ONE_BIAS: i32 = 64;
const TWO_BIAS: i32 = 8192;

/// Groups whose largest number is below it count as zero: the reciprocal must stay finite.
const MIN_LARGEST: f32 = f32::from_bits(0x0c80_0000); // 2^-102

/// Steps a unit for a group whose largest magnitude is given, and the unit. The largest may be no number.
fn steps_of(kind: Integers, largest: f32) -> (f32, f32) {
    if largest < MIN_LARGEST {
        (0.0, 0.0)
    } else if largest.is_finite() {
        (kind.steps() / largest, largest / kind.steps())
    } else {
        (0.0, f32::NAN)
    }
}

/// `(x, tables)`: tables of `x`, of whole lines; [`Kernels::f32_len`] numbers a line.
pub(crate) type BuildF32 = fn(&[f32], &mut [f32]);

/// `(tiles, tables, scales, out)`: adds to the sums of each tile and row their product, times the scale of each output if there are scales; then the lines are
/// of one group, and there is one element of scales a tile.
pub(crate) type ForwardF32 = fn(&Tiles<'_>, &Rows<'_, f32>, &Rows<'_, Sums>, &mut Out<'_>);

/// `(kind, x, tables, units)`: tables of `x`, of whole lines, and a unit for each group.
pub(crate) type BuildIntegers = fn(Integers, &[f32], &mut [u8], &mut [f32]);

/// `(tiles, tables, units, scales, out)`: as [`ForwardF32`], where the lines start with a group; units are for each group of a row, and scales, if any, for each
/// group of a tile.
pub(crate) type ForwardIntegers = fn(&Tiles<'_>, &Rows<'_, u8>, &Rows<'_, f32>, &Rows<'_, Sums>, &mut Out<'_>);

/// Eight lines of inputs `8g ..` to eight lines of the transposed tile: outputs become inputs. Line `q` of the result holds, in the order of its bits, the
/// outputs at positions `8q ..`, see [`output_at`].
pub(crate) type Transpose = fn(&[Line; 8], &mut [Line; 8]);

/// The output whose byte stands at a position.
pub(crate) const fn output_at(position: usize) -> usize {
    16 * (position % 4) + position / 4
}

pub(crate) struct Kernels {
    /// Numbers of f32 tables a line.
    pub(crate) f32_len: usize,
    pub(crate) build_f32: BuildF32,
    pub(crate) forward_f32: ForwardF32,
    pub(crate) build_integers: BuildIntegers,
    pub(crate) forward_one: ForwardIntegers,
    pub(crate) forward_two: ForwardIntegers,
    pub(crate) transpose: Transpose,
}

pub(crate) fn kernels(isa: Isa) -> &'static Kernels {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => &avx2::KERNELS,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => &avx512::KERNELS,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon | Isa::NeonDot => &neon::KERNELS,
        _ => &scalar::KERNELS,
    }
}

/// Panics unless tables, scales and sums are there for all tiles and rows: the kernels' pointers rely on it.
fn check_forward<T>(tiles: &Tiles<'_>, tables: &Rows<'_, T>, line_len: usize, scales: &Rows<'_, Sums>, out: &Out<'_>) {
    let Tiles { lines, stride, count, len } = *tiles;
    assert!(count == 0 || lines.len() >= (count - 1) * stride + len, "lines for all tiles");
    tables.check(out.rows, len * line_len);
    if !scales.data.is_empty() {
        scales.check(count, len.div_ceil(GROUP));
    }
    assert!(out.rows <= out.stride && out.sums.len() >= count * out.stride, "sums for all tiles and rows");
}

/// Panics as [`check_forward`] does, and unless there are units for all groups and rows.
fn check_integers(
    kind: Integers,
    tiles: &Tiles<'_>,
    tables: &Rows<'_, u8>,
    units: &Rows<'_, f32>,
    scales: &Rows<'_, Sums>,
    out: &Out<'_>,
) {
    check_forward(tiles, tables, kind.line_bytes(), scales, out);
    units.check(out.rows, tiles.len.div_ceil(GROUP));
}

/// Panics unless `x` and the tables are those of whole lines.
fn check_build_integers(kind: Integers, x: &[f32], tables: &[u8], units: &[f32]) {
    assert!(x.len().is_multiple_of(LINE), "whole lines");
    assert_eq!(tables.len(), x.len() / LINE * kind.line_bytes(), "tables for all lines");
    assert_eq!(units.len(), (x.len() / LINE).div_ceil(GROUP), "a unit for each group");
}
