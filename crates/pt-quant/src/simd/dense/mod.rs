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

/// Dot products of each row of `w` (`[n, depth]`) with each row of `x` (`[m, depth]`, `m` at most [`MAX_DOTS`]), into `out: [n, m]`.
pub(crate) type DotsFn<T> = fn(x: &[T], w: &[T], depth: usize, out: &mut [f32]);

/// Rows of X that [`DotsFn`] takes: as many as have accumulators for one pass over a weight row.
pub(crate) const MAX_DOTS: usize = 4;

/// As [`DotsFn`] of more rows of X, up to [`MAX_FEW`], packed for it: `[depth in pieces of a cache line, rows, a line's numbers]`, zero beyond the depth.
/// The arguments are those rows, their number, `w`, `depth` and `out: [n, rows]`.
pub(crate) type FewFn<T> = fn(x: &[T], rows: usize, w: &[T], depth: usize, out: &mut [f32]);

/// Rows of X that [`FewFn`] takes.
pub(crate) const MAX_FEW: usize = 8;

/// Rows of W for which [`FewFn`] reads X once.
pub(crate) const FEW_BLOCK: usize = 24;

pub(crate) struct Kernels {
    pub(crate) dots_f32: DotsFn<f32>,
    /// Elements are the bits of bf16 numbers.
    pub(crate) dots_bf16: DotsFn<u16>,
    /// Where it is faster than tiles, in f32 and bf16.
    pub(crate) few: Option<(FewFn<f32>, FewFn<u16>)>,
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

/// The number of rows of `x`. Panics unless every element that [`DotsFn`] reads or writes is there.
fn check_dots<T>(x: &[T], w: &[T], depth: usize, out: &[f32]) -> usize {
    let num_x = x.len().checked_div(depth).unwrap_or(0);
    assert!((1..=MAX_DOTS).contains(&num_x) && x.len() == num_x * depth, "x has between 1 and {MAX_DOTS} rows");
    assert_eq!(out.len() % num_x, 0, "one output for each pair of rows");
    assert_eq!(w.len(), out.len() / num_x * depth, "w has a row for each row of outputs");
    num_x
}

/// Panics unless every element that [`FewFn`] reads or writes is there.
#[cfg(target_arch = "x86_64")]
fn check_few<T>(x: &[T], rows: usize, w: &[T], depth: usize, out: &[f32]) {
    assert!((1..=MAX_FEW).contains(&rows), "x has between 1 and {MAX_FEW} rows");
    assert_eq!(x.len(), depth.div_ceil(64 / size_of::<T>()) * rows * (64 / size_of::<T>()), "x is packed");
    assert_eq!(out.len() % rows, 0, "one output for each pair of rows");
    assert_eq!(w.len(), out.len() / rows * depth, "w has a row for each row of outputs");
}

/// Makes a [`DotsFn`] from `$row::<M>(x, w, depth) -> [f32; M]`, the dot products of one weight row.
macro_rules! dots_function {
    ($name:ident, $inner:ident, $features:literal, $type:ty, $row:ident) => {
        fn $name(x: &[$type], w: &[$type], depth: usize, out: &mut [f32]) {
            let num_x = check_dots(x, w, depth, out);
            // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked; `check_dots` has seen to the lengths.
            unsafe {
                match num_x {
                    1 => $inner::<1>(x, w, depth, out),
                    2 => $inner::<2>(x, w, depth, out),
                    3 => $inner::<3>(x, w, depth, out),
                    _ => $inner::<4>(x, w, depth, out),
                }
            }
        }

        /// # Safety
        /// `x` holds `M` rows of `depth`, `w` a row of `depth` for each `M` of `out`.
        #[target_feature(enable = $features)]
        unsafe fn $inner<const M: usize>(x: &[$type], w: &[$type], depth: usize, out: &mut [f32]) {
            for (row, out) in out.chunks_exact_mut(M).enumerate() {
                // SAFETY: the caller's promise: row `row` of `w` is there, and `M` rows of `x`.
                let sums = unsafe { $row::<M>(x.as_ptr(), w.as_ptr().add(row * depth), depth) };
                out.copy_from_slice(&sums);
            }
        }
    };
}
use dots_function;

/// The number whose bf16 bits these are.
fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// bf16 numbers as pairs, where they are aligned so that no pair is cut.
pub(crate) fn as_pairs(bits: &[u16]) -> Option<&[u32]> {
    if cfg!(target_endian = "big") {
        return None;
    }
    // SAFETY: any two `u16` side by side make a `u32`.
    match unsafe { bits.align_to::<u32>() } {
        ([], pairs, []) => Some(pairs),
        _ => None,
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
    fn every_dot_product_agrees_with_f64() {
        for isa in Isa::available() {
            let kernels = kernels(isa);
            for num_x in 1..=MAX_DOTS {
                for depth in (1..140).chain([576, 1023, 1536]) {
                    let rows = 3;
                    let (x, w) = (numbers(num_x * depth, 1), numbers(rows * depth, 2));
                    let mut y = vec![f32::NAN; rows * num_x];
                    (kernels.dots_f32)(&x, &w, depth, &mut y);
                    let half = |values: &[f32]| values.iter().map(|v| Bf16::from_f32(*v).0).collect::<Vec<u16>>();
                    let (xh, wh) = (half(&x), half(&w));
                    let mut yh = vec![f32::NAN; rows * num_x];
                    (kernels.dots_bf16)(&xh, &wh, depth, &mut yh);
                    for row in 0..rows {
                        for m in 0..num_x {
                            let sum = |at: &dyn Fn(usize) -> (f32, f32)| -> f64 {
                                (0..depth).map(at).map(|(a, b)| f64::from(a) * f64::from(b)).sum()
                            };
                            let exact = sum(&|d| (x[m * depth + d], w[row * depth + d]));
                            let got = f64::from(y[row * num_x + m]);
                            assert!((got - exact).abs() < 3e-5, "{isa} depth {depth}: {got} is not {exact}");
                            let exact = sum(&|d| (widen(xh[m * depth + d]), widen(wh[row * depth + d])));
                            let got = f64::from(yh[row * num_x + m]);
                            assert!((got - exact).abs() < 3e-5, "{isa} bf16 depth {depth}: {got} is not {exact}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn every_product_of_few_rows_agrees_with_f64() {
        for isa in Isa::available() {
            let Some((few_f32, few_bf16)) = kernels(isa).few else { continue };
            let pack = |x: &[f32], rows: usize, depth: usize, line: usize| {
                let mut packed = vec![0.0; depth.div_ceil(line) * rows * line];
                for (index, number) in x.iter().enumerate() {
                    let (m, d) = (index / depth, index % depth);
                    packed[(d / line * rows + m) * line + d % line] = *number;
                }
                packed
            };
            for rows in 1..=MAX_FEW {
                for depth in (1..70).chain([127, 576, 1023, 2100]) {
                    for columns in [1, 2, 3, 5, FEW_BLOCK + 1] {
                        let (x, w) = (numbers(rows * depth, 1), numbers(columns * depth, 2));
                        let half = |values: &[f32]| values.iter().map(|v| Bf16::from_f32(*v).0).collect::<Vec<u16>>();
                        let (mut y, mut yh) = (vec![f32::NAN; columns * rows], vec![f32::NAN; columns * rows]);
                        few_f32(&pack(&x, rows, depth, 16), rows, &w, depth, &mut y);
                        few_bf16(&half(&pack(&x, rows, depth, 32)), rows, &half(&w), depth, &mut yh);
                        let (xh, wh) = (half(&x), half(&w));
                        for (index, (got, got_half)) in y.iter().zip(&yh).enumerate() {
                            let at = |d: usize| (index % rows * depth + d, index / rows * depth + d);
                            let sum = |of: &dyn Fn((usize, usize)) -> f64| (0..depth).map(at).map(of).sum::<f64>();
                            let exact = sum(&|(a, b)| f64::from(x[a]) * f64::from(w[b]));
                            assert!(
                                (f64::from(*got) - exact).abs() < 5e-5,
                                "{isa} depth {depth}: {got} is not {exact}"
                            );
                            let exact = sum(&|(a, b)| f64::from(widen(xh[a])) * f64::from(widen(wh[b])));
                            let error = (f64::from(*got_half) - exact).abs();
                            assert!(error < 5e-5, "{isa} bf16 depth {depth}: {got_half} is not {exact}");
                        }
                    }
                }
            }
        }
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
