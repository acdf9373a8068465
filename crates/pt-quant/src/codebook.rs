//! Tables of 16 values that a 4-bit code stands for.

/// The values of the 16 codes, and how a number finds its code.
///
/// Every kernel takes any codebook, so NF4, FP4, IQ4_NL and MXFP4 share them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Codebook {
    /// The value of each code.
    pub(crate) values: [f32; 16],
    /// Ascending borders between the values in order of size: a number has the rank of the number of borders strictly below it.
    pub(crate) thresholds: [f32; 15],
    /// The code of each rank.
    pub(crate) codes: [u8; 16],
}

/// The values of NF4, codes 0 to 15: quantiles of the normal distribution (Dettmers et al. 2023, <https://arxiv.org/abs/2305.14314>),
/// as bitsandbytes writes them down.
#[allow(clippy::excessive_precision)]
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_800_998_687_7,
    -0.525_073_051_452_636_7,
    -0.394_917_488_098_144_53,
    -0.284_441_381_692_886_35,
    -0.184_773_430_228_233_34,
    -0.091_050_036_251_544_95,
    0.0,
    0.079_580_299_556_255_34,
    0.160_930_201_411_247_25,
    0.246_112_301_945_686_34,
    0.337_915_241_718_292_24,
    0.440_709_829_330_444_34,
    0.562_617_003_917_694_1,
    0.722_956_836_223_602_3,
    1.0,
];

impl Codebook {
    /// NF4 ("4-bit NormalFloat"), as bitsandbytes has it.
    #[must_use]
    pub const fn nf4() -> Self {
        Self::from_sorted(NF4)
    }

    /// A codebook whose values ascend with the code; a number halfway between two takes the lower.
    pub(crate) const fn from_sorted(values: [f32; 16]) -> Self {
        let mut thresholds = [0.0; 15];
        let mut codes = [0; 16];
        let mut rank = 0;
        while rank < 15 {
            thresholds[rank] = f32::midpoint(values[rank], values[rank + 1]);
            codes[rank] = rank as u8;
            rank += 1;
        }
        codes[15] = 15;
        Self { values, thresholds, codes }
    }

    /// The values of codes 0 to 15.
    #[must_use]
    pub const fn values(&self) -> &[f32; 16] {
        &self.values
    }
}
