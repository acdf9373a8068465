//! Products with NEON.
//!
//! ```text
//! for each group of 64 columns, for each of 4 rows: 16 products code · absmax, as 4 planes of 16 bytes
//!     for each 16 columns: look the codes up in each plane, zip the bytes to 4 vectors of 4 weights
//!         acc[row] += weight · x
//! ```
//! A table of 16 bytes is what one lookup takes. Tables rounded to bf16 need two planes only. Integers are signed here: the dot-product instruction
//! takes two signed operands, and without it products widen to 16 bits.

// Arrays of registers are read best by index, several at once.
#![allow(clippy::needless_range_loop)]

use core::arch::aarch64::*;

use super::{
    GROUP, Int8Rows, Int8Table, Kernels, Rows, Sums, TILE_ROWS, Table, Tiles, check_backward, check_forward,
    check_int8, check_panel, scalar,
};

const MAX_ROWS: usize = 4;

pub(super) static KERNELS: Kernels = Kernels {
    max_rows: MAX_ROWS,
    panel_rows: [12; 2],
    lanes: 4,
    forward_f32,
    order_f32: None,
    forward_bf16: None,
    order_bf16: None,
    forward_int8,
    reduce,
    quantize: scalar::quantize,
    panel_f32,
    panel_bf16,
    panel_row_pairs: scalar::panel_row_pairs,
    backward_f32,
    backward_bf16: None,
    backward_few: None,
    tile_rows: scalar::tile_rows,
    untile_rows: scalar::untile_rows,
};

pub(super) static KERNELS_DOT: Kernels = Kernels { forward_int8: forward_int8_dot, ..KERNELS };

/// Calls `$function::<M>` for the number of rows, which is 1 to 4.
macro_rules! by_rows {
    ($rows:expr, $function:ident; $arguments:tt) => {
        match $rows {
            0 => {}
            1 => $function::<1> $arguments,
            2 => $function::<2> $arguments,
            3 => $function::<3> $arguments,
            4 => $function::<4> $arguments,
            rows => unreachable!("{rows} rows"),
        }
    };
}

fn forward_f32(tiles: &Tiles<'_>, table: &Table, x: &Rows<'_, f32>, acc: &mut [f32]) {
    check_forward(tiles, x, acc, MAX_ROWS, 4);
    // SAFETY: NEON is part of aarch64; `check_forward` has seen to the bounds.
    unsafe { by_rows!(x.rows, forward_f32_of; (tiles, table, x, acc)) }
}

fn forward_int8(tiles: &Tiles<'_>, table: &Int8Table, x: &Int8Rows<'_>, acc: &mut [f32], scratch: &mut Sums) {
    check_int8(tiles, x, acc, scratch, MAX_ROWS, 4);
    // SAFETY: as in `forward_f32`, with `check_int8`.
    unsafe { by_rows!(x.rows, forward_int8_of; (tiles, table, x, acc, |sum, a, b| dot_widened(sum, a, b))) }
}

fn forward_int8_dot(tiles: &Tiles<'_>, table: &Int8Table, x: &Int8Rows<'_>, acc: &mut [f32], scratch: &mut Sums) {
    #[target_feature(enable = "neon,dotprod")]
    unsafe fn inner<const M: usize>(tiles: &Tiles<'_>, table: &Int8Table, x: &Int8Rows<'_>, acc: &mut [f32]) {
        // SAFETY: the caller's promise, which is that of `forward_int8_of`; this function has the instruction.
        unsafe { forward_int8_of::<M>(tiles, table, x, acc, |sum, a, b| dot(sum, a, b)) }
    }
    check_int8(tiles, x, acc, scratch, MAX_ROWS, 4);
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked; bounds as in `forward_int8`.
    unsafe { by_rows!(x.rows, inner; (tiles, table, x, acc)) }
}

fn reduce(acc: &[f32], sums: &mut Sums) {
    assert_eq!(acc.len(), sums.len() * TILE_ROWS * 4, "4 lanes for each sum");
    for (sum, lanes) in sums.as_flattened_mut().iter_mut().zip(acc.as_chunks::<4>().0) {
        *sum = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    }
}

/// The nearest bf16 numbers, ties to even; NaN stays NaN.
#[inline]
#[target_feature(enable = "neon")]
fn round_bf16(values: float32x4_t) -> float32x4_t {
    let bits = vreinterpretq_u32_f32(values);
    let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
    let bits = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    let rounded = vandq_u32(bits, vdupq_n_u32(0xffff_0000));
    let rounded = vbslq_u32(vceqq_f32(values, values), rounded, vdupq_n_u32(0x7fc0_0000));
    vreinterpretq_f32_u32(rounded)
}

/// Byte `i` of plane `p` is byte `p` of the number that code `i` stands for.
#[derive(Clone, Copy)]
struct Planes([uint8x16_t; 4]);

impl Planes {
    /// The table of a block.
    #[inline]
    #[target_feature(enable = "neon")]
    fn new(table: &Table, absmax: f32) -> Self {
        let products = [0, 4, 8, 12].map(|first| {
            // SAFETY: 4 of 16 values.
            let product = vmulq_n_f32(unsafe { vld1q_f32(table.values.as_ptr().add(first)) }, absmax);
            vreinterpretq_u16_f32(if table.round { round_bf16(product) } else { product })
        });
        let low = [vuzp1q_u16(products[0], products[1]), vuzp1q_u16(products[2], products[3])];
        let high = [vuzp2q_u16(products[0], products[1]), vuzp2q_u16(products[2], products[3])];
        let [low, high] = [low, high].map(|halves| halves.map(|half| vreinterpretq_u8_u16(half)));
        Self([
            vuzp1q_u8(low[0], low[1]),
            vuzp2q_u8(low[0], low[1]),
            vuzp1q_u8(high[0], high[1]),
            vuzp2q_u8(high[0], high[1]),
        ])
    }

    /// The upper halves of 16 weights.
    #[inline]
    #[target_feature(enable = "neon")]
    fn upper(&self, codes: uint8x16_t) -> [uint16x8_t; 2] {
        let (low, high) = (vqtbl1q_u8(self.0[2], codes), vqtbl1q_u8(self.0[3], codes));
        [vreinterpretq_u16_u8(vzip1q_u8(low, high)), vreinterpretq_u16_u8(vzip2q_u8(low, high))]
    }

    /// 16 weights.
    #[inline]
    #[target_feature(enable = "neon")]
    fn weights(&self, codes: uint8x16_t) -> [float32x4_t; 4] {
        let (low, high) = (vqtbl1q_u8(self.0[0], codes), vqtbl1q_u8(self.0[1], codes));
        let lower = [vreinterpretq_u16_u8(vzip1q_u8(low, high)), vreinterpretq_u16_u8(vzip2q_u8(low, high))];
        let upper = self.upper(codes);
        [
            vreinterpretq_f32_u16(vzip1q_u16(lower[0], upper[0])),
            vreinterpretq_f32_u16(vzip2q_u16(lower[0], upper[0])),
            vreinterpretq_f32_u16(vzip1q_u16(lower[1], upper[1])),
            vreinterpretq_f32_u16(vzip2q_u16(lower[1], upper[1])),
        ]
    }
}

/// 16 codes of a row of a tile.
///
/// # Safety
/// `half` must be valid for 16 bytes: half of the row's pair.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn codes_of(half: *const u8, row: usize) -> uint8x16_t {
    // SAFETY: the caller's promise.
    let codes = unsafe { vld1q_u8(half) };
    if row.is_multiple_of(2) { vandq_u8(codes, vdupq_n_u8(15)) } else { vshrq_n_u8::<4>(codes) }
}

/// # Safety
/// The operands as `check_forward` wants them, for `M` rows.
#[target_feature(enable = "neon")]
unsafe fn forward_f32_of<const M: usize>(tiles: &Tiles<'_>, table: &Table, x: &Rows<'_, f32>, acc: &mut [f32]) {
    // SAFETY: `check_forward`: a tile has the groups worked on and their scales; rows of as many groups of activations; 4 accumulators of 4 lanes for
    // each of M rows a tile.
    unsafe {
        for tile in 0..tiles.num_tiles() {
            let at = tile * tiles.groups_per_row + tiles.groups.start;
            let (codes, scales) = (tiles.codes.as_ptr().add(at), tiles.scales.as_ptr().add(at));
            let out = acc.as_mut_ptr().add(tile * M * TILE_ROWS * 4);
            let mut acc = load_acc::<M>(out, tiles.groups.start);
            for group in 0..tiles.groups.len {
                let (codes, scales) = (&(*codes.add(group)).0, &*scales.add(group));
                for row in 0..TILE_ROWS {
                    let planes = Planes::new(table, scales[row]);
                    for part in 0..GROUP / 16 {
                        let weights = planes.weights(codes_of(codes[row / 2].as_ptr().add(16 * part), row));
                        for m in 0..M {
                            let x = x.data.as_ptr().add(m * x.stride + group * GROUP + 16 * part);
                            for (index, weights) in weights.into_iter().enumerate() {
                                acc[m][row] = vfmaq_f32(acc[m][row], weights, vld1q_f32(x.add(4 * index)));
                            }
                        }
                    }
                }
            }
            store_acc(acc, out);
        }
    }
}

/// The accumulators of a tile: those at `out`, or zero when the groups begin with the first.
///
/// # Safety
/// `out` must be valid for `4 · M` vectors.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load_acc<const M: usize>(out: *const f32, first_group: usize) -> [[float32x4_t; TILE_ROWS]; M] {
    let mut acc = [[vdupq_n_f32(0.0); TILE_ROWS]; M];
    if first_group > 0 {
        for (index, acc) in acc.as_flattened_mut().iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *acc = unsafe { vld1q_f32(out.add(4 * index)) };
        }
    }
    acc
}

/// # Safety
/// As [`load_acc`].
#[inline]
#[target_feature(enable = "neon")]
unsafe fn store_acc<const M: usize>(acc: [[float32x4_t; TILE_ROWS]; M], out: *mut f32) {
    for (index, acc) in acc.as_flattened().iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { vst1q_f32(out.add(4 * index), *acc) };
    }
}

/// Adds the products of 16 pairs of integers, 4 to a lane.
///
/// # Safety
/// The processor must have the dot-product extension.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn dot(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction reads and writes the registers named; the intrinsic is not stable yet.
    unsafe {
        core::arch::asm!(
            "sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b",
            sum = inout(vreg) sum,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// As [`dot`], in other lanes.
#[inline]
#[target_feature(enable = "neon")]
fn dot_widened(sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // Two products of at most 127² each need 16 bits; their sum is taken in 32.
    let sum = vpadalq_s16(sum, vmull_s8(vget_low_s8(a), vget_low_s8(b)));
    vpadalq_s16(sum, vmull_high_s8(a, b))
}

/// # Safety
/// The operands as `check_int8` wants them, for `M` rows; `dot` adds the products of 16 integers to the lanes of a sum.
#[inline(always)]
unsafe fn forward_int8_of<const M: usize>(
    tiles: &Tiles<'_>,
    table: &Int8Table,
    x: &Int8Rows<'_>,
    acc: &mut [f32],
    dot: impl Fn(int32x4_t, int8x16_t, int8x16_t) -> int32x4_t,
) {
    // SAFETY: `check_int8`: 16 codes; a tile has the groups worked on and their scales, a row of activations as many; 4 accumulators of 4 lanes
    // for each of M rows a tile.
    unsafe {
        let values = vreinterpretq_s8_u8(vsubq_u8(vld1q_u8(table.codes.as_ptr()), vdupq_n_u8(128)));
        for tile in 0..tiles.num_tiles() {
            let at = tile * tiles.groups_per_row + tiles.groups.start;
            let (codes, scales) = (tiles.codes.as_ptr().add(at), tiles.scales.as_ptr().add(at));
            let out = acc.as_mut_ptr().add(tile * M * TILE_ROWS * 4);
            let mut acc = load_acc::<M>(out, tiles.groups.start);
            for group in 0..tiles.groups.len {
                let (codes, scales) = (&(*codes.add(group)).0, &*scales.add(group));
                for row in 0..TILE_ROWS {
                    let mut sums = [vdupq_n_s32(0); M];
                    for part in 0..GROUP / 16 {
                        let weights = vqtbl1q_s8(values, codes_of(codes[row / 2].as_ptr().add(16 * part), row));
                        for (m, sum) in sums.iter_mut().enumerate() {
                            let x = &*x.groups.as_ptr().add(m * x.stride + group);
                            *sum = dot(*sum, weights, vld1q_s8(x.codes.as_ptr().add(16 * part)));
                        }
                    }
                    for m in 0..M {
                        let scale = scales[row] * *x.scales.as_ptr().add(m * x.stride + group);
                        acc[m][row] = vfmaq_n_f32(acc[m][row], vcvtq_f32_s32(sums[m]), scale);
                    }
                }
            }
            store_acc(acc, out);
        }
    }
}

fn panel_f32(tiles: &Tiles<'_>, table: &Table, out: &mut [f32]) {
    check_panel(tiles, GROUP, out.len());
    // SAFETY: as in `forward_f32`, with `check_panel`.
    unsafe {
        panel_of(tiles, table, out, GROUP, |planes, codes, out| {
            for (index, weights) in planes.weights(codes).into_iter().enumerate() {
                vst1q_f32(out.add(4 * index), weights);
            }
        });
    }
}

fn panel_bf16(tiles: &Tiles<'_>, table: &Table, out: &mut [u32]) {
    check_panel(tiles, GROUP / 2, out.len());
    let table = Table { round: true, ..*table };
    // SAFETY: as in `panel_f32`; an element holds two weights.
    unsafe {
        panel_of(tiles, &table, out, GROUP / 2, |planes, codes, out| {
            for (index, weights) in planes.upper(codes).into_iter().enumerate() {
                vst1q_u16(out.cast::<u16>().add(8 * index), weights);
            }
        });
    }
}

/// Calls `store` for each 16 columns, with the table of their block and where their weights go.
///
/// # Safety
/// The operands as `check_panel` wants them, with `per_group` elements; `store` writes at most `per_group / 4` elements.
#[target_feature(enable = "neon")]
unsafe fn panel_of<T>(
    tiles: &Tiles<'_>,
    table: &Table,
    out: &mut [T],
    per_group: usize,
    store: impl Fn(&Planes, uint8x16_t, *mut T),
) {
    let columns = tiles.groups.len * per_group;
    // SAFETY: `check_panel`: the groups worked on lie in `codes` and `scales`, and 4 rows of `columns` elements a tile in `out`.
    unsafe {
        for tile in 0..tiles.num_tiles() {
            for group in 0..tiles.groups.len {
                let at = tile * tiles.groups_per_row + tiles.groups.start + group;
                let (codes, scales) = (&(*tiles.codes.as_ptr().add(at)).0, &*tiles.scales.as_ptr().add(at));
                for row in 0..TILE_ROWS {
                    let planes = Planes::new(table, scales[row]);
                    let out = out.as_mut_ptr().add((tile * TILE_ROWS + row) * columns + group * per_group);
                    for part in 0..GROUP / 16 {
                        let codes = codes_of(codes[row / 2].as_ptr().add(16 * part), row);
                        store(&planes, codes, out.add(per_group / 4 * part));
                    }
                }
            }
        }
    }
}

/// Rows of the gradient that are worked on at once: 4 rows of 4 accumulators, for a quarter of a group.
const BACKWARD_ROWS: usize = 4;

fn backward_f32(panel: &[[f32; GROUP]], dy: &Rows<'_, f32>, sums: &mut [[f32; GROUP]]) {
    check_backward(panel.len(), dy, sums.len());
    for (block, sums) in sums.chunks_mut(BACKWARD_ROWS).enumerate() {
        // SAFETY: as in `forward_f32`, with `check_backward`; each block has as many sums as rows.
        unsafe {
            let dy_rows = dy.data.as_ptr().wrapping_add(block * BACKWARD_ROWS * dy.stride);
            by_rows!(sums.len(), backward_f32_of; (panel, dy_rows, dy.stride, sums));
        }
    }
}

/// # Safety
/// `M` rows of `panel.len()` numbers at `dy`, `stride` apart; `M` sums.
#[target_feature(enable = "neon")]
unsafe fn backward_f32_of<const M: usize>(
    panel: &[[f32; GROUP]],
    dy: *const f32,
    stride: usize,
    sums: &mut [[f32; GROUP]],
) {
    // SAFETY: the caller's promise.
    unsafe {
        for quarter in 0..4 {
            let sum = |sums: *mut [f32; GROUP], m: usize, v: usize| sums.add(m).cast::<f32>().add(16 * quarter + 4 * v);
            let mut acc = [[vdupq_n_f32(0.0); 4]; M];
            for m in 0..M {
                for v in 0..4 {
                    acc[m][v] = vld1q_f32(sum(sums.as_mut_ptr(), m, v));
                }
            }
            for (n, weights) in panel.iter().enumerate() {
                let weights = [0, 4, 8, 12].map(|v| vld1q_f32(weights.as_ptr().add(16 * quarter + v)));
                for (m, acc) in acc.iter_mut().enumerate() {
                    let dy = *dy.add(m * stride + n);
                    for v in 0..4 {
                        acc[v] = vfmaq_n_f32(acc[v], weights[v], dy);
                    }
                }
            }
            for m in 0..M {
                for v in 0..4 {
                    vst1q_f32(sum(sums.as_mut_ptr(), m, v), acc[m][v]);
                }
            }
        }
    }
}
