//! Products of a block of weight rows with packed activations, by instruction set.

mod scalar;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

use crate::Isa;

/// Activations in tiles: `[num_tiles, depth, lanes]`, tile `t` holding rows `t · lanes ..` of X, zero beyond its last row.
///
/// For f32 an element is a number and `depth` is K. For bf16 an element holds two, k = 2d in the low half and 2d + 1 in the high one,
/// and `depth` is K / 2, rounded up, with zero for the number that is missing.
#[derive(Clone, Copy)]
pub(crate) struct Tiles<'a, T> {
    pub(crate) data: &'a [T],
    pub(crate) num_tiles: usize,
    pub(crate) depth: usize,
}

/// Weights where they lie: element `(row, d)` is at `row · row_stride + d · depth_stride`. The strides serve both products:
/// X·Wᵀ reads W along its rows, dY·W down its columns.
#[derive(Clone, Copy)]
pub(crate) struct Panel<'a, T> {
    pub(crate) data: &'a [T],
    pub(crate) rows: usize,
    pub(crate) row_stride: usize,
    pub(crate) depth_stride: usize,
    /// The part of the depth of [`Tiles`] that this panel holds.
    pub(crate) first: usize,
    pub(crate) depth: usize,
}

/// `yt[row, m] += Σ_d panel(row, d) · tiles(m, first + d)` with `yt: [rows, num_tiles · lanes]`; sums in f32.
pub(crate) type BlockFn<T> = fn(&Tiles<'_, T>, &Panel<'_, T>, &mut [f32]);

pub(crate) struct Kernels {
    /// Rows of X in a tile.
    pub(crate) lanes: usize,
    pub(crate) block_f32: BlockFn<f32>,
    /// Elements are pairs of bf16 numbers.
    pub(crate) block_bf16: BlockFn<u32>,
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
        Isa::Neon | Isa::NeonDot => &neon::KERNELS,
        _ => &scalar::KERNELS,
    }
}

/// Panics unless every element that a block function reads or writes is there: the kernels' pointers rely on it.
fn check_block<T>(lanes: usize, tiles: &Tiles<'_, T>, panel: &Panel<'_, T>, yt: &[f32]) {
    assert_eq!(tiles.data.len(), tiles.num_tiles * tiles.depth * lanes, "tiles hold all rows");
    assert!(panel.first + panel.depth <= tiles.depth, "the panel lies within the depth");
    assert_eq!(yt.len(), panel.rows * tiles.num_tiles * lanes, "one output for each weight row and activation row");
    if panel.rows > 0 && panel.depth > 0 {
        let last = (panel.rows - 1) * panel.row_stride + (panel.depth - 1) * panel.depth_stride;
        assert!(last < panel.data.len(), "the panel holds its last element");
    }
}

/// The two numbers of a pair, as f32: low half first.
fn pair(bits: u32) -> (f32, f32) {
    (f32::from_bits(bits << 16), f32::from_bits(bits & 0xffff_0000))
}

/// Makes the block function of an instruction set from its register tile: row blocks of `$rows` with two vectors of X at once, then what is left.
/// `$tile::<ROWS, VECTORS>(x, x_stride, depth, w, row_stride, depth_stride, y, y_stride)` works on pointers.
macro_rules! block_function {
    ($name:ident, $inner:ident, $features:literal, $type:ty, $lanes:expr, $rows:literal, $tile:ident, [$($rest:literal),*]) => {
        fn $name(tiles: &Tiles<'_, $type>, panel: &Panel<'_, $type>, yt: &mut [f32]) {
            check_block($lanes, tiles, panel, yt);
            // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked; `check_block` has seen to the bounds.
            unsafe { $inner(tiles, panel, yt) }
        }

        #[target_feature(enable = $features)]
        unsafe fn $inner(tiles: &Tiles<'_, $type>, panel: &Panel<'_, $type>, yt: &mut [f32]) {
            let x_stride = tiles.depth * $lanes;
            let y_stride = tiles.num_tiles * $lanes;
            let mut row = 0;
            while row < panel.rows {
                let rows = (panel.rows - row).min($rows);
                let mut tile = 0;
                while tile < tiles.num_tiles {
                    let vectors = (tiles.num_tiles - tile).min(2);
                    // SAFETY: `check_block`: the tiles from `tile` on hold `first + depth` vectors each, the panel's rows from `row` on hold
                    // `depth` elements each, and `yt` has `rows` rows of `num_tiles` vectors; offsets stay inside, at most at the end.
                    unsafe {
                        let x = tiles.data.as_ptr().add(tile * x_stride + panel.first * $lanes);
                        let w = panel.data.as_ptr().wrapping_add(row * panel.row_stride);
                        let y = yt.as_mut_ptr().add(row * y_stride + tile * $lanes);
                        let (depth, ws, ds) = (panel.depth, panel.row_stride, panel.depth_stride);
                        match (rows, vectors) {
                            ($rows, 2) => $tile::<$rows, 2>(x, x_stride, depth, w, ws, ds, y, y_stride),
                            ($rows, _) => $tile::<$rows, 1>(x, x_stride, depth, w, ws, ds, y, y_stride),
                            $(
                                ($rest, 2) => $tile::<$rest, 2>(x, x_stride, depth, w, ws, ds, y, y_stride),
                                ($rest, _) => $tile::<$rest, 1>(x, x_stride, depth, w, ws, ds, y, y_stride),
                            )*
                            _ => unreachable!("between 1 and {} rows are left", $rows),
                        }
                    }
                    tile += vectors;
                }
                row += rows;
            }
        }
    };
}
use block_function;

#[cfg(test)]
mod tests {
    use alloc::vec;
    use alloc::vec::Vec;

    use super::*;
    use crate::Bf16;

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as f32 / u32::MAX as f32 - 0.5
        };
        (0..count).map(|_| next()).collect()
    }

    fn pairs(numbers: &[f32]) -> Vec<u32> {
        let half = |value: f32| u32::from(Bf16::from_f32(value).0);
        numbers.chunks(2).map(|two| half(two[0]) | half(two[1]) << 16).collect()
    }

    #[test]
    fn every_instruction_set_agrees_with_f64() {
        for isa in Isa::available() {
            let kernels = kernels(isa);
            for rows in 1..=26 {
                for (num_tiles, depth, first, len) in [(1, 5, 0, 5), (2, 9, 3, 6), (3, 33, 1, 30), (5, 7, 7, 0)] {
                    let lanes = kernels.lanes;
                    let x = numbers(num_tiles * depth * lanes * 2, 1);
                    let w = numbers(rows * len * 2 + 6, 2);
                    // Rows one after the other, and rows interleaved.
                    for (row_stride, depth_stride) in [(len, 1), (1, rows)] {
                        let y0 = numbers(rows * num_tiles * lanes, 3);
                        let element = |row: usize, d: usize| row * row_stride + d * depth_stride;
                        let (x32, w32) = (&x[..num_tiles * depth * lanes], &w);
                        let mut y = y0.clone();
                        let tiles = Tiles { data: x32, num_tiles, depth };
                        let panel = Panel { data: w32.as_slice(), rows, row_stride, depth_stride, first, depth: len };
                        (kernels.block_f32)(&tiles, &panel, &mut y);
                        let (xp, wp) = (pairs(&x), pairs(&w));
                        let mut yp = y0.clone();
                        let tiles = Tiles { data: xp.as_slice(), num_tiles, depth };
                        let panel = Panel { data: wp.as_slice(), rows, row_stride, depth_stride, first, depth: len };
                        (kernels.block_bf16)(&tiles, &panel, &mut yp);
                        for row in 0..rows {
                            for m in 0..num_tiles * lanes {
                                let at = |d: usize| (m / lanes * depth + first + d) * lanes + m % lanes;
                                let start = f64::from(y0[row * num_tiles * lanes + m]);
                                let exact: f64 =
                                    (0..len).map(|d| f64::from(x32[at(d)]) * f64::from(w32[element(row, d)])).sum();
                                let got = f64::from(y[row * num_tiles * lanes + m]);
                                assert!((got - start - exact).abs() < 4e-6, "{isa} {rows} rows: {got} {start} {exact}");
                                let product = |d: usize| {
                                    let ((a, b), (c, e)) = (pair(xp[at(d)]), pair(wp[element(row, d)]));
                                    f64::from(a) * f64::from(c) + f64::from(b) * f64::from(e)
                                };
                                let exact: f64 = (0..len).map(product).sum();
                                let got = f64::from(yp[row * num_tiles * lanes + m]);
                                assert!(
                                    (got - start - exact).abs() < 8e-6,
                                    "{isa} bf16 {rows} rows: {got} {start} {exact}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}
