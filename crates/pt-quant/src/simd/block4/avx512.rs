//! Quantizing and dequantizing with AVX-512 (F, BW, DQ, VL, VBMI).
//!
//! ```text
//! quantize, 64 weights:   s = x · (1 / absmax); cell = round(s · 15.375); rank = ranks[cell] + (thresholds[cell] < s)
//! dequantize, 16 weights: broadcast 8 bytes; shift nibble j into lane j; out = (values · absmax)[lane & 15]
//! ```
//! A cell holds one border at most ([`Cells`](crate::codebook::Cells)); codebooks whose borders lie closer are searched by bisection.
//! Lookups read the lowest bits of a lane only, so nibbles need no masking, and dequantizing looks up finished outputs: a block has 16.

use core::arch::x86_64::*;

use super::{Kernels, check, dequantize_tail, scalar};
use crate::codebook::{CELLS, ROUND, Search};
use crate::{Bf16, Element, F16};

pub(super) static KERNELS: Kernels = Kernels {
    quantize_f32: quantize,
    quantize_bf16: quantize,
    quantize_f16: quantize,
    dequantize_f32,
    dequantize_bf16,
    dequantize_f16,
};

/// Formats that 16 numbers are loaded from.
trait Load: Element {
    /// # Safety
    /// 16 numbers readable at `from`; AVX-512 F and BW.
    unsafe fn load(from: *const Self) -> __m512;
}

impl Load for f32 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_ps(from) }
    }
}

impl Load for Bf16 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> __m512 {
        // SAFETY: the caller's promise: 32 bytes.
        unsafe {
            let half = _mm256_loadu_si256(from.cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
        }
    }
}

impl Load for F16 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> __m512 {
        // SAFETY: the caller's promise: 32 bytes.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
}

fn quantize<T: Load>(search: &Search<'_>, block_size: usize, input: &[T], packed: &mut [u8], absmax: &mut [f32]) {
    check(input.len(), packed.len(), absmax.len(), block_size);
    assert!(block_size.is_power_of_two() && block_size >= 32, "blocks are whole vectors");
    let whole = input.len() - input.len() % block_size;
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked. `check` has seen to the lengths; `whole` is a
    // number of blocks.
    unsafe {
        match (&search.cells, block_size) {
            (Some(cells), _) => {
                let rank = ByCell::new(cells);
                quantize_blocks(&rank, search, block_size, &input[..whole], packed, absmax);
            }
            (None, _) => {
                let rank = ByBisection::new(&search.book.thresholds);
                quantize_blocks(&rank, search, block_size, &input[..whole], packed, absmax);
            }
        }
    }
    if whole < input.len() {
        absmax[whole / block_size] =
            scalar::quantize_short_block(search.book, &input[whole..], &mut packed[whole / 2..]);
    }
}

/// Finds ranks of 16 scaled numbers; `QUARTER` is the byte of a lane that they go to.
trait Rank {
    /// # Safety
    /// AVX-512 F.
    unsafe fn rank<const QUARTER: usize>(&self, scaled: __m512) -> __m512i;
}

struct ByCell {
    thresholds: [__m512; 2],
    /// The ranks in each byte of a lane.
    ranks: [[__m512i; 2]; 4],
    ones: [__m512i; 4],
    cells: __m512,
    round: __m512,
}

impl ByCell {
    /// # Safety
    /// AVX-512 F.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn new(cells: &crate::codebook::Cells) -> Self {
        // SAFETY: both tables have 32 entries of 4 bytes.
        let (thresholds, low, high) = unsafe {
            let thresholds = cells.thresholds.as_ptr();
            let ranks = cells.ranks.as_ptr();
            (
                [_mm512_loadu_ps(thresholds), _mm512_loadu_ps(thresholds.add(16))],
                _mm512_loadu_si512(ranks.cast()),
                _mm512_loadu_si512(ranks.add(16).cast()),
            )
        };
        let ranks = [
            [low, high],
            [_mm512_slli_epi32::<8>(low), _mm512_slli_epi32::<8>(high)],
            [_mm512_slli_epi32::<16>(low), _mm512_slli_epi32::<16>(high)],
            [_mm512_slli_epi32::<24>(low), _mm512_slli_epi32::<24>(high)],
        ];
        let ones = [1, 1 << 8, 1 << 16, 1 << 24].map(|one| _mm512_set1_epi32(one));
        Self { thresholds, ranks, ones, cells: _mm512_set1_ps(CELLS), round: _mm512_set1_ps(ROUND) }
    }
}

impl Rank for ByCell {
    #[inline(always)]
    unsafe fn rank<const QUARTER: usize>(&self, scaled: __m512) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe {
            // The permutes read the lowest 5 bits: the cell.
            let cell = _mm512_castps_si512(_mm512_fmadd_ps(scaled, self.cells, self.round));
            let threshold = _mm512_permutex2var_ps(self.thresholds[0], cell, self.thresholds[1]);
            let above = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(threshold, scaled);
            let [low, high] = self.ranks[QUARTER];
            let rank = _mm512_permutex2var_epi32(low, cell, high);
            _mm512_mask_add_epi32(rank, above, rank, self.ones[QUARTER])
        }
    }
}

/// Four comparisons with borders 7, then 3 or 11, and so on; `steps[s][i]` is the border that follows `i` borders found below.
struct ByBisection {
    first: __m512,
    steps: [__m512; 3],
}

impl ByBisection {
    /// # Safety
    /// AVX-512 F.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn new(thresholds: &[f32; 15]) -> Self {
        let step = |ahead: usize| {
            let table: [f32; 16] =
                core::array::from_fn(|index| thresholds.get(index + ahead).copied().unwrap_or(f32::INFINITY));
            // SAFETY: the table has 16 numbers; AVX-512 by the caller's promise.
            unsafe { _mm512_loadu_ps(table.as_ptr()) }
        };
        Self { first: _mm512_set1_ps(thresholds[7]), steps: [step(3), step(1), step(0)] }
    }
}

impl Rank for ByBisection {
    #[inline(always)]
    unsafe fn rank<const QUARTER: usize>(&self, scaled: __m512) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe {
            let above = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.first, scaled);
            let mut rank = _mm512_maskz_set1_epi32(above, 8);
            for (table, step) in self.steps.into_iter().zip([4, 2, 1]) {
                let threshold = _mm512_permutexvar_ps(rank, table);
                let above = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(threshold, scaled);
                rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(step));
            }
            match QUARTER {
                0 => rank,
                1 => _mm512_slli_epi32::<8>(rank),
                2 => _mm512_slli_epi32::<16>(rank),
                _ => _mm512_slli_epi32::<24>(rank),
            }
        }
    }
}

/// # Safety
/// `input` is a number of blocks, and there are bytes and scales for them; AVX-512 F, BW, DQ, VL and VBMI.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,f16c")]
unsafe fn quantize_blocks<T: Load, R: Rank>(
    rank: &R,
    search: &Search<'_>,
    block_size: usize,
    input: &[T],
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    // SAFETY: the tables have 16 and 32 bytes; the rest is arithmetic.
    let pack = unsafe {
        let codes = _mm512_broadcast_i32x4(_mm_loadu_si128(search.book.codes.as_ptr().cast()));
        // Byte p of quarter q comes from byte q of pair p.
        let order: [u8; 64] =
            core::array::from_fn(|byte| if byte < 32 { (8 * (byte % 8) + byte / 8) as u8 } else { 0 });
        let order = _mm512_loadu_si512(order.as_ptr().cast());
        move |x: [__m512; 4], low: f32, high: f32| {
            let (low, high) = (_mm512_set1_ps(low), _mm512_set1_ps(high));
            let ranks = _mm512_or_si512(
                _mm512_or_si512(rank.rank::<0>(_mm512_mul_ps(x[0], low)), rank.rank::<1>(_mm512_mul_ps(x[1], low))),
                _mm512_or_si512(rank.rank::<2>(_mm512_mul_ps(x[2], high)), rank.rank::<3>(_mm512_mul_ps(x[3], high))),
            );
            let codes = _mm512_shuffle_epi8(codes, ranks);
            // Lanes 2p and 2p + 1 hold the first and the second weights of pairs p: both into the lower of the two.
            let pairs = _mm512_or_si512(_mm512_slli_epi64::<4>(codes), _mm512_srli_epi64::<32>(codes));
            _mm512_castsi512_si256(_mm512_permutexvar_epi8(order, pairs))
        }
    };
    let sign = _mm512_set1_epi32(i32::MAX);
    let magnitude = |x: __m512| _mm512_and_si512(_mm512_castps_si512(x), sign);
    // Bits of magnitudes order as they do; infinity and NaN are at the top, and go to the plain code.
    let is_finite = |bits: u32| bits < 0x7f80_0000;
    let reciprocal = |absmax: f32| 1.0 / absmax.max(scalar::MIN_ABSMAX);

    let num_groups = input.len() / 64;
    // SAFETY: group `g` is 64 numbers of `input` and 32 bytes of `packed`.
    let load = |group: usize| unsafe {
        let from = input.as_ptr().add(64 * group);
        [T::load(from), T::load(from.add(16)), T::load(from.add(32)), T::load(from.add(48))]
    };
    let out = packed.as_mut_ptr();
    // SAFETY: as above.
    let store = |group: usize, bytes: __m256i| unsafe { _mm256_storeu_si256(out.add(32 * group).cast(), bytes) };

    match block_size {
        32 => {
            for group in 0..num_groups {
                let x = load(group);
                let max = |a, b| _mm512_reduce_max_epu32(_mm512_max_epu32(magnitude(a), magnitude(b)));
                let (low, high) = (max(x[0], x[1]), max(x[2], x[3]));
                if is_finite(low.max(high)) {
                    let (low, high) = (f32::from_bits(low), f32::from_bits(high));
                    (absmax[2 * group], absmax[2 * group + 1]) = (low, high);
                    store(group, pack(x, reciprocal(low), reciprocal(high)));
                } else {
                    for block in [2 * group, 2 * group + 1] {
                        plain_block(search, 32, block, input, packed, absmax);
                    }
                }
            }
            if !input.len().is_multiple_of(64) {
                plain_block(search, 32, 2 * num_groups, input, packed, absmax);
            }
        }
        64 => {
            let mut group = 0;
            // Four blocks at a time: their largest are found side by side.
            while group + 4 <= num_groups {
                let mut largest = [_mm512_setzero_si512(); 4];
                // A loop, not a `map`: its closure would be called, its vectors passed in memory.
                for (block, largest) in largest.iter_mut().enumerate() {
                    let x = load(group + block);
                    let max = |a, b| _mm512_max_epu32(magnitude(a), magnitude(b));
                    *largest = _mm512_max_epu32(max(x[0], x[1]), max(x[2], x[3]));
                }
                let largest = max_of_each(largest);
                if _mm_cmpge_epu32_mask(largest, _mm_set1_epi32(0x7f80_0000)) == 0 {
                    let largest = _mm_castsi128_ps(largest);
                    // SAFETY: one scale for each of the four blocks, which `absmax` holds.
                    unsafe { _mm_storeu_ps(absmax[group..group + 4].as_mut_ptr(), largest) };
                    let mut reciprocals = [0.0; 4];
                    let reciprocal = _mm_div_ps(_mm_set1_ps(1.0), _mm_max_ps(largest, _mm_set1_ps(scalar::MIN_ABSMAX)));
                    // SAFETY: four numbers.
                    unsafe { _mm_storeu_ps(reciprocals.as_mut_ptr(), reciprocal) };
                    for (block, reciprocal) in reciprocals.into_iter().enumerate() {
                        store(group + block, pack(load(group + block), reciprocal, reciprocal));
                    }
                } else {
                    for block in group..group + 4 {
                        plain_block(search, 64, block, input, packed, absmax);
                    }
                }
                group += 4;
            }
            for block in group..num_groups {
                plain_block(search, 64, block, input, packed, absmax);
            }
        }
        _ => {
            let groups = block_size / 64;
            for block in 0..input.len() / block_size {
                let mut largest = [_mm512_setzero_si512(); 4];
                for group in block * groups..(block + 1) * groups {
                    for (largest, x) in largest.iter_mut().zip(load(group)) {
                        *largest = _mm512_max_epu32(*largest, magnitude(x));
                    }
                }
                let [a, b, c, d] = largest;
                let largest = _mm512_reduce_max_epu32(_mm512_max_epu32(_mm512_max_epu32(a, b), _mm512_max_epu32(c, d)));
                if is_finite(largest) {
                    let largest = f32::from_bits(largest);
                    absmax[block] = largest;
                    let reciprocal = reciprocal(largest);
                    for group in block * groups..(block + 1) * groups {
                        store(group, pack(load(group), reciprocal, reciprocal));
                    }
                } else {
                    plain_block(search, block_size, block, input, packed, absmax);
                }
            }
        }
    }
}

/// The largest number of each vector.
#[inline]
#[target_feature(enable = "avx512f")]
fn max_of_each([a, b, c, d]: [__m512i; 4]) -> __m128i {
    // Lanes of a and b in turn, then of all four: each quarter is the largest of its quarters of a, b, c and d.
    let ab = _mm512_max_epu32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let cd = _mm512_max_epu32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    let four = _mm512_max_epu32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    let two = _mm256_max_epu32(_mm512_castsi512_si256(four), _mm512_extracti64x4_epi64::<1>(four));
    _mm_max_epu32(_mm256_castsi256_si128(two), _mm256_extracti128_si256::<1>(two))
}

/// A block that holds something that is not finite, or one left over.
#[cold]
fn plain_block<T: Element>(
    search: &Search<'_>,
    block_size: usize,
    block: usize,
    input: &[T],
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    let start = block * block_size;
    let (from, to) = (&input[start..start + block_size], &mut packed[start / 2..(start + block_size) / 2]);
    absmax[block] = scalar::quantize_block(search.book, from, to);
}

/// Where vectors of outputs go, one after the other.
trait Sink {
    /// # Safety
    /// Room for the vector; AVX-512 F and BW.
    unsafe fn push(&mut self, vector: __m512i);

    /// Writes what is held back.
    ///
    /// # Safety
    /// As `push`, and it is the last call.
    unsafe fn finish(self);
}

/// Into the caches.
struct Cached {
    to: *mut u8,
}

impl Sink for Cached {
    #[inline(always)]
    unsafe fn push(&mut self, vector: __m512i) {
        // SAFETY: the caller's promise.
        unsafe {
            _mm512_storeu_si512(self.to.cast(), vector);
            self.to = self.to.add(64);
        }
    }

    #[inline(always)]
    unsafe fn finish(self) {}
}

/// Past the caches. That takes whole aligned lines, so the vectors are cut anew where lines begin: each line is the end of one and the
/// start of the next.
struct Streamed {
    to: *mut u8,
    last: __m512i,
    /// Lanes of 16 bits: the line's part of `last`, then the next vector's.
    cut: __m512i,
    /// Lanes before the first line, in two bytes each.
    head: usize,
    is_first: bool,
}

impl Streamed {
    /// # Safety
    /// AVX-512 F and BW. `to` is a multiple of 2.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn new(to: *mut u8) -> Self {
        let head = to.align_offset(64) / 2;
        let cut: [u16; 32] = core::array::from_fn(|lane| (lane + head) as u16);
        // SAFETY: the table has 64 bytes.
        let cut = unsafe { _mm512_loadu_si512(cut.as_ptr().cast()) };
        Self { to, last: _mm512_setzero_si512(), cut, head, is_first: true }
    }
}

impl Sink for Streamed {
    #[inline(always)]
    unsafe fn push(&mut self, vector: __m512i) {
        // SAFETY: the caller's promise: room for `vector`, whose first `head` lanes end at a line's start, or for the vector before it.
        unsafe {
            if self.is_first {
                self.is_first = false;
                _mm512_mask_storeu_epi16(self.to.cast(), ((1u64 << self.head) - 1) as u32, vector);
                self.to = self.to.add(2 * self.head);
            } else {
                let line = _mm512_permutex2var_epi16(self.last, self.cut, vector);
                _mm512_stream_si512(self.to.cast(), line);
                self.to = self.to.add(64);
            }
            self.last = vector;
        }
    }

    #[inline(always)]
    unsafe fn finish(self) {
        // SAFETY: the caller's promise: the last vector's lanes after its first `head` have room.
        unsafe {
            if !self.is_first {
                let rest = _mm512_permutex2var_epi16(self.last, self.cut, self.last);
                _mm512_mask_storeu_epi16(self.to.cast(), u32::MAX >> self.head, rest);
            }
            // The lines must be there for whoever is told that we are done.
            _mm_sfence();
        }
    }
}

fn dequantize_f32(values: &[f32; 16], packed: &[u8], absmax: &[f32], block_size: usize, out: &mut [f32], stream: bool) {
    check(out.len(), packed.len(), absmax.len(), block_size);
    let to = out.as_mut_ptr().cast::<u8>();
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked. `check` has seen to the lengths; an f32 lies at
    // a multiple of 4.
    let done = unsafe {
        if stream {
            blocks_f32(values, packed, absmax, block_size, out.len(), Streamed::new(to))
        } else {
            blocks_f32(values, packed, absmax, block_size, out.len(), Cached { to })
        }
    };
    dequantize_tail(values, packed, absmax, block_size, out, done);
}

/// The whole vectors; returns how many weights they are.
///
/// # Safety
/// Codes and scales are there for `len` weights, and room where the sink starts; AVX-512 F, BW, DQ, VL and VBMI.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
unsafe fn blocks_f32(
    values: &[f32; 16],
    packed: &[u8],
    absmax: &[f32],
    block_size: usize,
    len: usize,
    mut sink: impl Sink,
) -> usize {
    // Lane 2q is the high half of byte q, lane 2q + 1 the low half; only the first byte of a lane matters.
    let shifts: [u8; 64] = core::array::from_fn(|byte| (8 * (byte / 8) + [4, 0][byte % 8 / 4]) as u8);
    // SAFETY: the table has 64 bytes.
    let shifts = unsafe { _mm512_loadu_si512(shifts.as_ptr().cast()) };
    // SAFETY: 16 values.
    let book = unsafe { _mm512_loadu_ps(values.as_ptr()) };
    let mut start = 0;
    for &absmax in &absmax[..len.div_ceil(block_size)] {
        let table = _mm512_mul_ps(book, _mm512_set1_ps(absmax));
        let end = len.min(start + block_size);
        while start + 16 <= end {
            // SAFETY: the 8 bytes of weights `start .. start + 16`, which is even, and room for these.
            unsafe {
                let bytes = _mm512_set1_epi64(packed.as_ptr().add(start / 2).cast::<i64>().read_unaligned());
                let codes = _mm512_multishift_epi64_epi8(shifts, bytes);
                sink.push(_mm512_castps_si512(_mm512_permutexvar_ps(codes, table)));
            }
            start += 16;
        }
        if start < end {
            assert!(end == len, "blocks are whole vectors");
            break;
        }
    }
    // SAFETY: all vectors had room.
    unsafe { sink.finish() };
    start
}

/// 16 products rounded to bf16, ties to even, each twice in its lane: the permute's lowest bit is then of no matter.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn table_bf16(products: __m512, absmax: f32) -> __m512i {
    let bits = _mm512_castps_si512(products);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let mut rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    if !absmax.is_finite() {
        // NaN stays and becomes quiet. A finite scale makes none.
        let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(products, products);
        rounded = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x40_0000));
    }
    twice(rounded)
}

/// The upper half of each lane in both halves.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn twice(lanes: __m512i) -> __m512i {
    let order = _mm512_set4_epi32(0x0f0e_0f0e, 0x0b0a_0b0a, 0x0706_0706, 0x0302_0302);
    _mm512_shuffle_epi8(lanes, order)
}

/// 16 products rounded to f16, ties to even, each twice in its lane; NaN stays and becomes quiet.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn table_f16(products: __m512, _absmax: f32) -> __m512i {
    let rounded = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(products);
    twice(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(rounded)))
}

macro_rules! dequantize_16_bits {
    ($name:ident, $blocks:ident, $type:ty, $table:ident) => {
        fn $name(
            values: &[f32; 16],
            packed: &[u8],
            absmax: &[f32],
            block_size: usize,
            out: &mut [$type],
            stream: bool,
        ) {
            check(out.len(), packed.len(), absmax.len(), block_size);
            let to = out.as_mut_ptr().cast::<u8>();
            // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked. `check` has seen to the lengths; 16-bit
            // numbers lie at multiples of 2.
            let done = unsafe {
                if stream {
                    $blocks(values, packed, absmax, block_size, out.len(), Streamed::new(to))
                } else {
                    $blocks(values, packed, absmax, block_size, out.len(), Cached { to })
                }
            };
            dequantize_tail(values, packed, absmax, block_size, out, done);
        }

        /// The whole vectors; returns how many weights they are.
        ///
        /// # Safety
        /// Codes and scales are there for `len` weights, and room where the sink starts; AVX-512 F, BW, DQ, VL and VBMI.
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
        unsafe fn $blocks(
            values: &[f32; 16],
            packed: &[u8],
            absmax: &[f32],
            block_size: usize,
            len: usize,
            mut sink: impl Sink,
        ) -> usize {
            // Quarter q of 4 weights is 2 bytes: their halves, high before low. Only the first byte of a lane matters, and of that bits 1 to 4.
            let shifts: [u8; 64] = core::array::from_fn(|byte| [3, 63, 11, 7][byte % 8 / 2]);
            // SAFETY: the table has 64 bytes.
            let shifts = unsafe { _mm512_loadu_si512(shifts.as_ptr().cast()) };
            // SAFETY: 16 values.
            let book = unsafe { _mm512_loadu_ps(values.as_ptr()) };
            let mut start = 0;
            for &absmax in &absmax[..len.div_ceil(block_size)] {
                let table = $table(_mm512_mul_ps(book, _mm512_set1_ps(absmax)), absmax);
                let end = len.min(start + block_size);
                while start + 32 <= end {
                    // SAFETY: the 16 bytes of weights `start .. start + 32`, which is even, and room for these.
                    unsafe {
                        let bytes = _mm512_cvtepu16_epi64(_mm_loadu_si128(packed.as_ptr().add(start / 2).cast()));
                        let codes = _mm512_multishift_epi64_epi8(shifts, bytes);
                        sink.push(_mm512_permutexvar_epi16(codes, table));
                    }
                    start += 32;
                }
                if start < end {
                    assert!(end == len, "blocks are whole vectors");
                    break;
                }
            }
            // SAFETY: all vectors had room.
            unsafe { sink.finish() };
            start
        }
    };
}

dequantize_16_bits!(dequantize_bf16, blocks_bf16, Bf16, table_bf16);
dequantize_16_bits!(dequantize_f16, blocks_f16, F16, table_f16);
