//! Products with 4-bit matrices in tiles, by instruction set.
//!
//! # The layout
//! A tile is 4 rows of the matrix; it is cut into groups of 64 columns ([`Group`]), 128 bytes in one piece. Byte `k` of half `h` of a group holds
//! column `k` of rows `2h` (low half of the byte) and `2h + 1` (high half). So one stream is read for 4 rows, a vector of activations serves all 4,
//! and each vector of codes lies in one block of each row, for which the 16 products code · absmax are made once and looked up.

mod scalar;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

use core::ops::Range;

use crate::Isa;

/// Rows of a tile.
pub(crate) const TILE_ROWS: usize = 4;

/// Columns of a group.
pub(crate) const GROUP: usize = 64;

/// The codes of 4 rows and 64 columns, aligned to a cache line.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct Group(pub(crate) [[u8; GROUP]; 2]);

const _: () = assert!(size_of::<Group>() == 128 && align_of::<Group>() == 64);

impl Group {
    pub(crate) const ZERO: Self = Self([[0; GROUP]; 2]);
}

/// Some tiles of a matrix, and some of their groups.
#[derive(Clone, Copy)]
pub(crate) struct Tiles<'a> {
    /// `[num_tiles, groups_per_row]`
    pub(crate) codes: &'a [Group],
    /// `[num_tiles, groups_per_row]`: the scales of the 4 rows.
    pub(crate) scales: &'a [[f32; TILE_ROWS]],
    pub(crate) groups_per_row: usize,
    /// The groups that are worked on.
    pub(crate) groups: Range2,
}

/// A range that can be copied.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Range2 {
    pub(crate) start: usize,
    pub(crate) len: usize,
}

impl From<Range<usize>> for Range2 {
    fn from(range: Range<usize>) -> Self {
        Self { start: range.start, len: range.len() }
    }
}

impl Tiles<'_> {
    pub(crate) fn num_tiles(&self) -> usize {
        self.codes.len().checked_div(self.groups_per_row).unwrap_or(0)
    }

    /// Panics unless codes and scales are there for all tiles and groups.
    fn check(&self) {
        assert_eq!(self.codes.len(), self.num_tiles() * self.groups_per_row, "whole tiles");
        assert_eq!(self.codes.len(), self.scales.len(), "four scales for each group");
        assert!(self.groups.start + self.groups.len <= self.groups_per_row, "the groups lie within the row");
    }
}

/// What codes stand for: `values[code] · absmax`, rounded to bf16 where asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Table {
    pub(crate) values: [f32; 16],
    pub(crate) round: bool,
}

/// Activations: `rows` rows, `stride` apart, each with the columns of the groups that are worked on.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, T> {
    pub(crate) data: &'a [T],
    pub(crate) rows: usize,
    pub(crate) stride: usize,
}

impl<T> Rows<'_, T> {
    /// Panics unless every row has `columns` elements.
    fn check(&self, columns: usize) {
        assert!(columns <= self.stride || self.rows <= 1, "rows do not overlap");
        if self.rows > 0 {
            assert!((self.rows - 1) * self.stride + columns <= self.data.len(), "every row is whole");
        }
    }
}

/// The integers that stand for a codebook's values: value `i` is about `(codes[i] - 128) / scale`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Int8Table {
    /// 1 to 255: unsigned, as the dot-product instructions of x86 want one operand.
    pub(crate) codes: [u8; 16],
    /// 1 / scale.
    pub(crate) inverse_scale: f32,
}

/// 64 activations as integers, and what sums of products with [`Int8Table::codes`] start from.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Int8Group {
    /// -127 to 127.
    pub(crate) codes: [i8; GROUP],
    /// -128 times the sum of codes `4i .. 4i + 4`.
    pub(crate) start: [i32; 16],
}

impl Int8Group {
    pub(crate) const ZERO: Self = Self { codes: [0; GROUP], start: [0; 16] };
}

/// Activations in 8 bits, each group with its scale: those of the groups that are worked on.
#[derive(Clone, Copy)]
pub(crate) struct Int8Rows<'a> {
    pub(crate) groups: &'a [Int8Group],
    pub(crate) scales: &'a [f32],
    pub(crate) rows: usize,
    /// Groups from one row to the next.
    pub(crate) stride: usize,
}

/// A product's outputs: for each tile and each row of activations the 4 rows of the tile, `[num_tiles, rows]`.
pub(crate) type Sums = [[f32; TILE_ROWS]];

/// A product of up to `max_rows` rows of activations with all tiles. It adds to `acc`, `[num_tiles, rows, 4, lanes]`, or, when the groups begin with the
/// first, replaces what is there; lanes are summed last. So a row can be worked through in pieces, without a trace in the result.
pub(crate) type Forward<T> = fn(&Tiles<'_>, &Table, &Rows<'_, T>, acc: &mut [f32]);

/// As [`Forward`] with integers; the last argument is scratch of `rows · groups.len`.
pub(crate) type ForwardInt8 = fn(&Tiles<'_>, &Int8Table, &Int8Rows<'_>, acc: &mut [f32], scratch: &mut Sums);

/// `sums[m] += Σ_n dy[m, n] · panel[n]` for a panel of some rows and one group of the matrix.
pub(crate) type Backward<W, T> = fn(panel: &[[W; GROUP]], dy: &Rows<'_, T>, sums: &mut [[f32; GROUP]]);

/// What a gradient of few rows writes: one group of columns.
// Only x86-64 has kernels that read it.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(crate) struct FewRows<'a> {
    /// `[rows, 64]` in an order of its own; added to.
    pub(crate) sums: &'a mut [[f32; GROUP]],
    /// Scratch: one for each row of W.
    pub(crate) tables: &'a mut [[u32; 16]],
}

/// `sums[m] += Σ_n dy[m, n] · W[n, ..]` for the rows of some tiles and one group, with `dy: [n, rows]`; codes are looked up where they are multiplied.
pub(crate) type BackwardFewFn<T> = fn(&Tiles<'_>, &Table, dy: &[T], FewRows<'_>);

/// The gradient of few rows.
pub(crate) struct BackwardFew {
    /// Rows that one call takes at most.
    pub(crate) max_rows: usize,
    pub(crate) f32: BackwardFewFn<f32>,
    /// `dy` holds the bf16 numbers of two neighbouring rows n in an element, the first in the low half. Without it, `f32` with `Table::round` does.
    pub(crate) bf16: Option<BackwardFewFn<u32>>,
    /// Puts sums that are complete in the order of the columns.
    pub(crate) natural: fn(&mut [[f32; GROUP]]),
}

/// Puts activations in the order that a product wants, within each group.
pub(crate) type Order<T> = fn(&[T], &mut [T]);

pub(crate) struct Kernels {
    /// Rows of activations that one call takes at most.
    pub(crate) max_rows: usize,
    /// From how many rows on decoding a panel and multiplying that is faster, in f32 and bf16.
    pub(crate) panel_rows: [usize; 2],
    /// Lanes of an accumulator.
    pub(crate) lanes: usize,
    pub(crate) forward_f32: Forward<f32>,
    /// The order that it wants its activations in, if not the natural one.
    pub(crate) order_f32: Option<Order<f32>>,
    /// Without it, `forward_f32` with `Table::round` does.
    pub(crate) forward_bf16: Option<Forward<u16>>,
    pub(crate) order_bf16: Option<Order<u16>>,
    pub(crate) forward_int8: ForwardInt8,
    /// The sums over lanes.
    pub(crate) reduce: fn(acc: &[f32], sums: &mut Sums),
    /// 64 activations to integers; the result is their scale.
    pub(crate) quantize: fn(&[f32; GROUP], &mut Int8Group) -> f32,
    /// The weights of the tiles, `[num_tiles · 4, groups.len · 64]`.
    pub(crate) panel_f32: fn(&Tiles<'_>, &Table, &mut [f32]),
    /// The weights as bf16, two in an element, the first in the low half: `[num_tiles · 4, groups.len · 32]`.
    pub(crate) panel_bf16: fn(&Tiles<'_>, &Table, &mut [u32]),
    /// The weights of one group as bf16, the numbers of two neighbouring rows in an element, the first in the low half: `[num_tiles · 2, 64]`.
    pub(crate) panel_row_pairs: fn(&Tiles<'_>, &Table, &mut [[u32; GROUP]]),
    pub(crate) backward_f32: Backward<f32, f32>,
    /// As `backward_f32`, with a panel of row pairs; without it, `backward_f32` does.
    pub(crate) backward_bf16: Option<Backward<u32, u16>>,
    /// Where it is faster than a panel.
    pub(crate) backward_few: Option<&'static BackwardFew>,
    /// Four rows of bitsandbytes' bytes to the groups of a tile.
    pub(crate) tile_rows: fn(&[&[u8]; TILE_ROWS], &mut [Group]),
    /// The inverse of `tile_rows`.
    pub(crate) untile_rows: fn(&[Group], &mut [&mut [u8]; TILE_ROWS]),
}

pub(crate) fn kernels(isa: Isa) -> &'static Kernels {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => &avx2::KERNELS,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => &avx512::KERNELS,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 => &avx512::KERNELS_BF16,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => &neon::KERNELS,
        #[cfg(target_arch = "aarch64")]
        Isa::NeonDot => &neon::KERNELS_DOT,
        _ => &scalar::KERNELS,
    }
}

/// Panics unless all that a forward product reads and writes is there: the kernels' pointers rely on it.
fn check_forward<T>(tiles: &Tiles<'_>, x: &Rows<'_, T>, acc: &[f32], max_rows: usize, lanes: usize) {
    tiles.check();
    assert!(tiles.groups.len > 0, "there is something to multiply");
    x.check(tiles.groups.len * GROUP);
    assert!(x.rows <= max_rows, "at most {max_rows} rows");
    assert_eq!(acc.len(), tiles.num_tiles() * x.rows * TILE_ROWS * lanes, "an accumulator for each tile and row");
}

/// As [`check_forward`].
fn check_int8(tiles: &Tiles<'_>, x: &Int8Rows<'_>, acc: &[f32], scratch: &Sums, max_rows: usize, lanes: usize) {
    tiles.check();
    assert!(x.rows <= max_rows, "at most {max_rows} rows");
    if x.rows > 0 {
        assert!((x.rows - 1) * x.stride + tiles.groups.len <= x.groups.len(), "every row is whole");
    }
    assert_eq!(x.scales.len(), x.groups.len(), "a scale for each group");
    assert_eq!(scratch.len(), x.rows * tiles.groups.len, "scratch for the scales of a tile");
    assert_eq!(acc.len(), tiles.num_tiles() * x.rows * TILE_ROWS * lanes, "an accumulator for each tile and row");
}

/// Panics unless a panel of `elements` elements a group and row fits.
fn check_panel(tiles: &Tiles<'_>, elements: usize, len: usize) {
    tiles.check();
    assert_eq!(len, tiles.num_tiles() * TILE_ROWS * tiles.groups.len * elements, "the panel has room for its tiles");
}

/// Panics unless a backward product's operands fit: `num_rows` rows of the matrix in the panel.
fn check_backward<T>(num_rows: usize, dy: &Rows<'_, T>, sums: usize) {
    dy.check(num_rows);
    assert_eq!(dy.rows, sums, "sums for every row of the gradient");
}

/// Panics unless the operands of a gradient of few rows fit: `dy_rows` elements of each of its rows a tile.
#[cfg(target_arch = "x86_64")]
fn check_backward_few(tiles: &Tiles<'_>, dy: usize, dy_rows: usize, rows: &FewRows<'_>, max_rows: usize) {
    tiles.check();
    assert!(tiles.groups.len == 1 && tiles.num_tiles() > 0, "one group at a time");
    assert!((1..=max_rows).contains(&rows.sums.len()), "between 1 and {max_rows} rows");
    assert_eq!(dy, tiles.num_tiles() * dy_rows * rows.sums.len(), "the gradient has its numbers for every tile");
    assert!(rows.tables.len() >= tiles.num_tiles() * TILE_ROWS, "a table for each row");
}

/// Panics unless each row has 32 bytes for each group.
fn check_rows<'a>(rows: impl Iterator<Item = &'a [u8]>, groups: usize) {
    rows.for_each(|row| assert_eq!(row.len(), groups * GROUP / 2, "a row has its groups"));
}
