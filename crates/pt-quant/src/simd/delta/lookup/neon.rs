//! Lookup products with NEON.
//!
//! ```text
//! f32, 16 bytes of a line:       for each nibble: look up the four bytes of the sums by `tbl`, interleave them to 16 sums by `zip`, acc += sums
//! integers, 16 bytes of a line:  entries = tbl(table[0], low nibbles) + tbl(table[1], high nibbles), for each plane; then as with AVX-512
//! ```
//! A table of 16 f32 sums stands as four tables of 16 bytes. The sums of f32 are in the order of the bytes, so they go to their outputs at the end.

use core::arch::aarch64::*;

use super::{
    GROUP, Integers, Kernels, ONE_BIAS, Out, Rows, Sums, TILE, TWO_BIAS, Tiles, check_forward, check_integers,
    output_at, scalar,
};

const F32_LEN: usize = 32;

pub(super) static KERNELS: Kernels = Kernels {
    f32_len: F32_LEN,
    build_f32,
    forward_f32,
    build_integers: scalar::build_integers,
    forward_one: forward_integers::<1>,
    forward_two: forward_integers::<2>,
    transpose: scalar::transpose,
};

fn build_f32(x: &[f32], tables: &mut [f32]) {
    for (x, table) in x.chunks_exact(4).zip(tables.chunks_exact_mut(16)) {
        let bytes = scalar::sums(x).map(f32::to_ne_bytes);
        for (index, number) in table.iter_mut().enumerate() {
            // Numbers 4b .. 4b + 3 hold byte b of all sums.
            *number = f32::from_ne_bytes(core::array::from_fn(|at| bytes[index % 4 * 4 + at][index / 4]));
        }
    }
}

fn forward_f32(tiles: &Tiles<'_>, tables: &Rows<'_, f32>, scales: &Rows<'_, Sums>, out: &mut Out<'_>) {
    check_forward(tiles, tables, F32_LEN, scales, out);
    for row in 0..out.rows {
        for tile in 0..tiles.count {
            // SAFETY: NEON is in every 64-bit Arm; `check_forward` has seen to the tables.
            let sums = unsafe { forward_f32_of(tiles, &tables.data[row * tables.stride..], tile) };
            let scale = scales.data.get(tile * scales.stride);
            let out = &mut out.sums[tile * out.stride + row];
            for (position, sum) in sums.into_iter().enumerate() {
                let output = output_at(position);
                out[output] += scale.map_or(1.0, |scale| scale[output]) * sum;
            }
        }
    }
}

/// The sums of a tile in the order of the bytes.
///
/// # Safety
/// Tables for all lines.
#[target_feature(enable = "neon")]
unsafe fn forward_f32_of(tiles: &Tiles<'_>, tables: &[f32], tile: usize) -> Sums {
    let mut sums = [0.0; TILE];
    for quarter in 0..4 {
        let mut acc = [vdupq_n_f32(0.0); 4];
        for (index, line) in tiles.tile(tile).iter().enumerate() {
            // SAFETY: a line has 64 bytes, its tables 128; the caller's promise.
            let (bytes, table) = unsafe {
                let table = tables.as_ptr().add(index * F32_LEN).cast::<u8>();
                let table: [uint8x16_t; 8] = core::array::from_fn(|at| vld1q_u8(table.add(16 * at)));
                (vld1q_u8(line.0.as_ptr().add(16 * quarter)), table)
            };
            let nibbles = [vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8::<4>(bytes)];
            for (nibble, picked) in nibbles.into_iter().enumerate() {
                let byte: [uint8x16_t; 4] = core::array::from_fn(|at| vqtbl1q_u8(table[4 * nibble + at], picked));
                let low = [vzip1q_u8(byte[0], byte[1]), vzip2q_u8(byte[0], byte[1])];
                let high = [vzip1q_u8(byte[2], byte[3]), vzip2q_u8(byte[2], byte[3])];
                for half in 0..2 {
                    let (low, high) = (vreinterpretq_u16_u8(low[half]), vreinterpretq_u16_u8(high[half]));
                    let entries = [vzip1q_u16(low, high), vzip2q_u16(low, high)];
                    for (at, entries) in entries.into_iter().enumerate() {
                        let acc = &mut acc[2 * half + at];
                        *acc = vaddq_f32(*acc, vreinterpretq_f32_u16(entries));
                    }
                }
            }
        }
        for (at, acc) in acc.into_iter().enumerate() {
            // SAFETY: 64 sums.
            unsafe { vst1q_f32(sums.as_mut_ptr().add(16 * quarter + 4 * at), acc) };
        }
    }
    sums
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
    for row in 0..out.rows {
        for tile in 0..tiles.count {
            for group in 0..tiles.len.div_ceil(GROUP) {
                let tables = &tables.data[row * tables.stride + group * GROUP * kind.line_bytes()..];
                let unit = units.data[row * units.stride + group];
                let scale = scales.data.get(tile * scales.stride + group);
                let out = &mut out.sums[tile * out.stride + row];
                // SAFETY: NEON is in every 64-bit Arm; `check_integers` has seen to the tables.
                unsafe { forward_group::<PLANES>(tiles, tables, (tile, group), unit, scale, out) };
            }
        }
    }
}

/// # Safety
/// Tables for all lines of the group.
#[target_feature(enable = "neon")]
unsafe fn forward_group<const PLANES: usize>(
    tiles: &Tiles<'_>,
    tables: &[u8],
    (tile, group): (usize, usize),
    unit: f32,
    scale: Option<&Sums>,
    out: &mut Sums,
) {
    let lines = &tiles.tile(tile)[group * GROUP..tiles.len.min((group + 1) * GROUP)];
    let bias = 2 * lines.len() as i32 * if PLANES == 1 { ONE_BIAS } else { TWO_BIAS };
    for quarter in 0..4 {
        let mut all = [vdupq_n_u16(0); PLANES];
        let mut odd = [vdupq_n_u16(0); PLANES];
        for (index, line) in lines.iter().enumerate() {
            // SAFETY: a line has 64 bytes.
            let bytes = unsafe { vld1q_u8(line.0.as_ptr().add(16 * quarter)) };
            let (low, high) = (vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8::<4>(bytes));
            for plane in 0..PLANES {
                // SAFETY: the caller's promise: tables of `32 · PLANES` bytes a line.
                let [first, second] = unsafe {
                    let table = tables.as_ptr().add(32 * (PLANES * index + plane));
                    [vld1q_u8(table), vld1q_u8(table.add(16))]
                };
                let entries = vreinterpretq_u16_u8(vaddq_u8(vqtbl1q_u8(first, low), vqtbl1q_u8(second, high)));
                all[plane] = vaddq_u16(all[plane], entries);
                odd[plane] = vsraq_n_u16::<8>(odd[plane], entries);
            }
        }
        // By byte of the double words: even ones first.
        for byte in 0..4 {
            let mut value = vdupq_n_s32(-bias);
            for plane in (0..PLANES).rev() {
                let sums = match byte % 2 {
                    0 => vsubq_u16(all[plane], vshlq_n_u16::<8>(odd[plane])),
                    _ => odd[plane],
                };
                let sums = vreinterpretq_u32_u16(sums);
                let sums = match byte / 2 {
                    0 => vandq_u32(sums, vdupq_n_u32(0xffff)),
                    _ => vshrq_n_u32::<16>(sums),
                };
                let sums = if plane == 1 { vshlq_n_u32::<7>(sums) } else { sums };
                value = vaddq_s32(value, vreinterpretq_s32_u32(sums));
            }
            let output = 16 * byte + 4 * quarter;
            // SAFETY: 64 sums, and 64 scales if any.
            unsafe {
                let mut value = vmulq_n_f32(vcvtq_f32_s32(value), unit);
                if let Some(scale) = scale {
                    value = vmulq_f32(value, vld1q_f32(scale.as_ptr().add(output)));
                }
                let to = out.as_mut_ptr().add(output);
                vst1q_f32(to, vaddq_f32(vld1q_f32(to), value));
            }
        }
    }
}
