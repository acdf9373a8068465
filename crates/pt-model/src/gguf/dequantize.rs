//! The storage types of GGML, and their way back to f32: the same operations in the same order as the reference
//! Python package `gguf` 0.19 (`quants.py`), so that results agree bit for bit.

use half::{bf16, f16, slice::HalfFloatSliceExt};

/// How a tensor's elements are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GgmlType {
    id: u32,
    name: &'static str,
    /// Elements a block holds.
    block_size: u64,
    /// Bytes a block takes.
    block_bytes: u64,
}

const fn row(id: u32, name: &'static str, block_size: u64, block_bytes: u64) -> GgmlType {
    GgmlType { id, name, block_size, block_bytes }
}

/// Every type that a file may hold, so that a file is understood even where one of its tensors cannot be read.
const TYPES: [GgmlType; 34] = [
    row(0, "F32", 1, 4),
    row(1, "F16", 1, 2),
    row(2, "Q4_0", 32, 18),
    row(3, "Q4_1", 32, 20),
    row(6, "Q5_0", 32, 22),
    row(7, "Q5_1", 32, 24),
    row(8, "Q8_0", 32, 34),
    row(9, "Q8_1", 32, 40),
    row(10, "Q2_K", 256, 84),
    row(11, "Q3_K", 256, 110),
    row(12, "Q4_K", 256, 144),
    row(13, "Q5_K", 256, 176),
    row(14, "Q6_K", 256, 210),
    row(15, "Q8_K", 256, 292),
    row(16, "IQ2_XXS", 256, 66),
    row(17, "IQ2_XS", 256, 74),
    row(18, "IQ3_XXS", 256, 98),
    row(19, "IQ1_S", 256, 50),
    row(20, "IQ4_NL", 32, 18),
    row(21, "IQ3_S", 256, 110),
    row(22, "IQ2_S", 256, 82),
    row(23, "IQ4_XS", 256, 136),
    row(24, "I8", 1, 1),
    row(25, "I16", 1, 2),
    row(26, "I32", 1, 4),
    row(27, "I64", 1, 8),
    row(28, "F64", 1, 8),
    row(29, "IQ1_M", 256, 56),
    row(30, "BF16", 1, 2),
    row(34, "TQ1_0", 256, 54),
    row(35, "TQ2_0", 256, 66),
    row(39, "MXFP4", 32, 17),
    row(40, "NVFP4", 64, 36),
    row(41, "Q1_0", 128, 18),
];

const DEQUANTIZED: [&str; 9] = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K"];

impl GgmlType {
    /// The type of that id in the file.
    pub fn from_id(id: u32) -> Option<Self> {
        TYPES.into_iter().find(|known| known.id == id)
    }

    /// GGML's name for it.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// Elements and bytes of a block.
    pub fn block(self) -> (u64, u64) {
        (self.block_size, self.block_bytes)
    }

    pub(super) fn dequantized_names() -> String {
        DEQUANTIZED.join(", ")
    }
}

/// The elements that whole blocks hold, or `None` for a type that is not supported (or a part of a block).
pub fn dequantize(ggml_type: GgmlType, bytes: &[u8]) -> Option<Vec<f32>> {
    let (block_size, block_bytes) = (ggml_type.block_size as usize, ggml_type.block_bytes as usize);
    if !bytes.len().is_multiple_of(block_bytes) {
        return None;
    }
    let decode_block: fn(&[u8], &mut [f32]) = match ggml_type.name {
        "F32" => |block, out| out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
        "F16" => {
            return Some(halves(bytes, |halves, out| {
                halves.iter().map(|&h| f16::from_bits(h)).collect::<Vec<_>>().convert_to_f32_slice(out)
            }));
        }
        "BF16" => {
            return Some(halves(bytes, |halves, out| {
                halves.iter().map(|&h| bf16::from_bits(h)).collect::<Vec<_>>().convert_to_f32_slice(out)
            }));
        }
        "Q4_0" => q4_0,
        "Q4_1" => q4_1,
        "Q5_0" => q5_0,
        "Q8_0" => q8_0,
        "Q4_K" => q4_k,
        "Q6_K" => q6_k,
        _ => return None,
    };
    let num_blocks = bytes.len() / block_bytes;
    let mut out = vec![0f32; num_blocks * block_size];
    let decode = |bytes: &[u8], out: &mut [f32]| {
        for (block, out) in bytes.chunks_exact(block_bytes).zip(out.chunks_exact_mut(block_size)) {
            decode_block(block, out);
        }
    };
    // A thread is worth starting for a million elements; each takes one run of blocks.
    let num_threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(out.len() >> 20).max(1);
    let share = num_blocks.div_ceil(num_threads).max(1);
    std::thread::scope(|scope| {
        let shares = bytes.chunks(share * block_bytes).zip(out.chunks_mut(share * block_size));
        for (i, (bytes, out)) in shares.enumerate() {
            if (i + 1) * share >= num_blocks {
                decode(bytes, out);
            } else {
                scope.spawn(move || decode(bytes, out));
            }
        }
    });
    Some(out)
}

/// Widens 16-bit floats a few thousand at a time.
fn halves(bytes: &[u8], widen: impl Fn(&[u16], &mut [f32])) -> Vec<f32> {
    const TILE: usize = 4096;
    let mut out = vec![0f32; bytes.len() / 2];
    let mut tile = Vec::with_capacity(TILE);
    for (bytes, out) in bytes.chunks(2 * TILE).zip(out.chunks_mut(TILE)) {
        tile.clear();
        tile.extend(bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])));
        widen(&tile, out);
    }
    out
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// `d: f16 | 16 bytes`: low nibbles are elements 0..16, high ones 16..32; x = d · (q − 8).
fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    let (low, high) = out.split_at_mut(16);
    for ((&byte, low), high) in block[2..18].iter().zip(low).zip(high) {
        *low = d * f32::from((byte & 0x0f) as i8 - 8);
        *high = d * f32::from((byte >> 4) as i8 - 8);
    }
}

/// `d: f16 | m: f16 | 16 bytes`; x = d · q + m.
fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let (low, high) = out.split_at_mut(16);
    for ((&byte, low), high) in block[4..20].iter().zip(low).zip(high) {
        *low = d * f32::from(byte & 0x0f) + m;
        *high = d * f32::from(byte >> 4) + m;
    }
}

/// `d: f16 | 4 bytes of fifth bits | 16 bytes`; x = d · (q − 16).
fn q5_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    let fifth_bits = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    let (low, high) = out.split_at_mut(16);
    for (i, ((&byte, low), high)) in block[6..22].iter().zip(low).zip(high).enumerate() {
        let fifth = |i: usize| ((fifth_bits >> i & 1) << 4) as u8;
        *low = d * f32::from(((byte & 0x0f) | fifth(i)) as i8 - 16);
        *high = d * f32::from(((byte >> 4) | fifth(i + 16)) as i8 - 16);
    }
}

/// `d: f16 | 32 signed bytes`; x = q · d.
fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (&byte, out) in block[2..34].iter().zip(out) {
        *out = f32::from(byte as i8) * d;
    }
}

/// `d: f16 | dmin: f16 | 12 bytes of 6-bit scales and minima | 128 bytes`: eight runs of 32 elements, the first of
/// each pair in the low nibbles; x = (d · scale) · q − (dmin · min).
fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let packed = &block[4..16];
    // Runs 0..4 have their six bits in one byte; runs 4..8 have four bits in bytes 8..12 and two in the tops of those.
    let scale_and_min = |run: usize| match run {
        0..4 => (packed[run] & 0x3f, packed[run + 4] & 0x3f),
        _ => {
            let shared = packed[run + 4];
            ((shared & 0x0f) | (packed[run - 4] >> 2 & 0x30), (shared >> 4) | (packed[run] >> 2 & 0x30))
        }
    };
    for (run, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_and_min(run);
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        let bytes = &block[16 + run / 2 * 32..][..32];
        let shift = 4 * (run % 2);
        for (&byte, out) in bytes.iter().zip(out) {
            *out = scale * f32::from(byte >> shift & 0x0f) - min;
        }
    }
}

/// `128 bytes of low nibbles | 64 bytes of high pairs | 16 signed scales | d: f16`: eight runs of 32 elements;
/// x = (d · scale) · (q − 32), a scale for 16 elements.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (run, out) in out.chunks_exact_mut(32).enumerate() {
        // Runs 0 and 1 are the low nibbles of bytes 0..64, runs 2 and 3 their high nibbles; then bytes 64..128.
        let low = &low[run / 4 * 64 + run % 2 * 32..][..32];
        let low_shift = 4 * (run % 4 / 2);
        let high = &high[run / 4 * 32..][..32];
        let high_shift = 2 * (run % 4);
        for (i, out) in out.iter_mut().enumerate() {
            let scale = d * f32::from(scales[run * 2 + i / 16] as i8);
            let code = (low[i] >> low_shift & 0x0f) | (high[i] >> high_shift & 0x03) << 4;
            *out = scale * f32::from(code as i8 - 32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(name: &str, block: &[u8]) -> Vec<f32> {
        dequantize(TYPES.into_iter().find(|t| t.name == name).unwrap(), block).unwrap()
    }

    #[test]
    fn a_q4_0_block_by_hand() {
        let mut block = f16::from_f32(0.5).to_le_bytes().to_vec();
        block.extend([0xf0; 16]);
        let out = decode("Q4_0", &block);
        assert_eq!((out[0], out[15], out[16], out[31]), (-4.0, -4.0, 3.5, 3.5));
    }

    #[test]
    fn a_q8_0_block_by_hand() {
        let mut block = f16::from_f32(2.0).to_le_bytes().to_vec();
        block.extend((0..32).map(|i| (i - 16) as i8 as u8));
        assert_eq!(decode("Q8_0", &block), (0..32).map(|i| 2.0 * (i - 16) as f32).collect::<Vec<_>>());
    }

    #[test]
    fn threads_split_a_tensor_without_a_seam() {
        let bytes: Vec<u8> =
            (0..3 * 32769 * 34u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8 & 0x7b).collect();
        let parts: Vec<f32> = bytes.chunks(34 * 1000).flat_map(|part| decode("Q8_0", part)).collect();
        assert!(parts == decode("Q8_0", &bytes));
    }

    #[test]
    fn a_part_of_a_block_and_an_unread_type_are_refused() {
        assert!(dequantize(GgmlType::from_id(2).unwrap(), &[0; 17]).is_none());
        assert!(dequantize(GgmlType::from_id(10).unwrap(), &[0; 84]).is_none());
        assert!(GgmlType::from_id(4).is_none());
    }
}
