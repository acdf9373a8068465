//! Tables of 16 values that a 4-bit code stands for.

use alloc::format;

use crate::QuantError;

/// The values of the 16 codes, and how a number finds its code.
///
/// Every kernel takes any codebook, so NF4, FP4, IQ4_NL and MXFP4 share them.
///
/// # Example
/// ```
/// use pt_quant::Codebook;
///
/// let nf4 = Codebook::nf4();
/// assert_eq!(nf4.nearest(0.43), 12);
/// assert_eq!(nf4.values()[12], 0.44070983);
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Codebook {
    /// The value of each code.
    pub(crate) values: [f32; 16],
    /// Ascending borders between the values in order of size, the values being divided by `max_magnitude`: a number has the rank of the
    /// number of borders below it. Infinite where there are fewer than 16 ranks.
    pub(crate) thresholds: [f32; 15],
    /// The code of each rank.
    pub(crate) codes: [u8; 16],
    /// The largest value without its sign.
    pub(crate) max_magnitude: f32,
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

/// bitsandbytes' FP4 times 12: sign, two bits of exponent with a bias of 2, one of mantissa. Its "minus zero" is a plain zero.
const FP4_TIMES_12: [f32; 16] =
    [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0];

/// Codes of FP4 by size, the two zeros in the order that bitsandbytes 0.50.2 gives them: tiny positive numbers take code 8.
const FP4_ORDER: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];

/// The values of llama.cpp's IQ4_NL.
const IQ4_NL: [f32; 16] =
    [-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0];

/// E2M1 of the OCP Microscaling formats: sign, two bits of exponent, one of mantissa.
const MXFP4: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Codes of MXFP4 by size. Code 8, minus zero, is never written.
const MXFP4_ORDER: [u8; 15] = [15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7];

const ASCENDING: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

impl Codebook {
    /// NF4 ("4-bit NormalFloat"), as bitsandbytes has it.
    #[must_use]
    pub const fn nf4() -> Self {
        Self::ordered(NF4, &ASCENDING)
    }

    /// FP4 as bitsandbytes has it, in [-1, 1]; not the FP4 of OCP, which is [`mxfp4`](Self::mxfp4). Bit for bit with bitsandbytes 0.50.2,
    /// code 8 is a second zero, and positive numbers that round to zero take it.
    #[must_use]
    pub const fn fp4() -> Self {
        let mut values = FP4_TIMES_12;
        let mut code = 0;
        while code < 16 {
            values[code] /= 12.0;
            code += 1;
        }
        Self::ordered(values, &FP4_ORDER)
    }

    /// The table of llama.cpp's IQ4_NL, from -127 to 113.
    #[must_use]
    pub const fn iq4_nl() -> Self {
        Self::ordered(IQ4_NL, &ASCENDING)
    }

    /// E2M1, the elements of MXFP4 (OCP Microscaling formats 1.0), from -6 to 6.
    #[must_use]
    pub const fn mxfp4() -> Self {
        Self::ordered(MXFP4, &MXFP4_ORDER)
    }

    /// A codebook of one's own: the value of each code, in any order and of any size. A number takes the code of the nearest value,
    /// halfway between two that of the lower.
    ///
    /// # Errors
    /// [`QuantError::Value`] for a value that is not finite, two values that are equal, or values too large or too small for an `f32`'s
    /// reciprocal to be exact enough: the largest magnitude must be from 1e-30 to 1e30.
    pub fn new(values: [f32; 16]) -> Result<Self, QuantError> {
        let mut codes = ASCENDING;
        codes.sort_by(|&a, &b| values[usize::from(a)].total_cmp(&values[usize::from(b)]));
        let wrong = |code: u8, expected| QuantError::Value {
            what: "values",
            found: format!("{} for code {code}", values[usize::from(code)]),
            expected,
        };
        for pair in codes.windows(2) {
            let [low, high] = [values[usize::from(pair[0])], values[usize::from(pair[1])]];
            // Infinities and NaN are first or last in the total order, so they are in some pair.
            if !low.is_finite() || !high.is_finite() {
                return Err(wrong(pair[usize::from(low.is_finite())], "finite numbers"));
            }
            if low == high {
                return Err(wrong(pair[1], "16 different numbers"));
            }
        }
        let book = Self::ordered(values, &codes);
        if !(1e-30..=1e30).contains(&book.max_magnitude) {
            return Err(wrong(codes[15], "a largest magnitude from 1e-30 to 1e30"));
        }
        Ok(book)
    }

    /// From the codes in ascending order of their values.
    const fn ordered(values: [f32; 16], order: &[u8]) -> Self {
        let mut max_magnitude = 0.0;
        let mut code = 0;
        while code < 16 {
            max_magnitude = f32::max(max_magnitude, values[code].abs());
            code += 1;
        }
        let mut thresholds = [f32::INFINITY; 15];
        let mut codes = [order[order.len() - 1]; 16];
        let mut rank = 0;
        while rank < order.len() {
            codes[rank] = order[rank];
            if rank + 1 < order.len() {
                let (low, high) = (values[order[rank] as usize], values[order[rank + 1] as usize]);
                let threshold = f32::midpoint(low / max_magnitude, high / max_magnitude);
                // Numbers go up to 1: none is above such a border.
                thresholds[rank] = if threshold >= 1.0 { f32::INFINITY } else { threshold };
            }
            rank += 1;
        }
        Self { values, thresholds, codes, max_magnitude }
    }

    /// The values of codes 0 to 15.
    #[must_use]
    pub const fn values(&self) -> &[f32; 16] {
        &self.values
    }

    /// The largest value without its sign: 1 for NF4 and FP4, 127 for IQ4_NL, 6 for MXFP4. A block's scale is its largest magnitude
    /// divided by this.
    #[must_use]
    pub const fn max_magnitude(&self) -> f32 {
        self.max_magnitude
    }

    /// The code for `scaled`, a number divided by the largest magnitude of its block: the nearest value in units of
    /// [`max_magnitude`](Self::max_magnitude); halfway between two, the lower. NaN takes the code of the largest value.
    #[must_use]
    pub fn nearest(&self, scaled: f32) -> u8 {
        // Not `threshold < scaled`, which would put NaN below everything; bitsandbytes has it above.
        #[allow(clippy::neg_cmp_op_on_partial_ord)]
        let rank = self.thresholds.iter().filter(|&&threshold| !(threshold >= scaled)).count();
        self.codes[rank]
    }
}

/// A codebook's borders, laid out for vector kernels.
pub(crate) struct Search<'a> {
    pub(crate) book: &'a Codebook,
    /// Borders of the cells of [`cell`](Self::cell), if no cell has two.
    pub(crate) cells: Option<Cells>,
}

/// Even cells over [-1, 1], each with at most one border in it.
pub(crate) struct Cells {
    /// The border in a cell, infinite if there is none.
    pub(crate) thresholds: [f32; 32],
    /// The rank of what is in the cell and not above its border.
    pub(crate) ranks: [u32; 32],
}

/// Cells to a unit.
pub(crate) const CELLS: f32 = 15.375;
/// Added to a small number it leaves the nearest integer in the mantissa's lowest bits.
pub(crate) const ROUND: f32 = 12_582_912.0;

impl<'a> Search<'a> {
    pub(crate) fn new(book: &'a Codebook) -> Self {
        Self { book, cells: Cells::new(&book.thresholds) }
    }
}

impl Cells {
    fn new(borders: &[f32; 15]) -> Option<Self> {
        let mut cell = [i32::MAX; 15];
        for (cell, &border) in cell.iter_mut().zip(borders).filter(|(_, border)| border.is_finite()) {
            let position = f64::from(border) * f64::from(CELLS);
            // The kernels' cell is the nearest integer to this. Where they might round another way, do without.
            let nearest = (position + if position < 0.0 { -0.5 } else { 0.5 }) as i32;
            if (position - f64::from(nearest)).abs() > 0.499_99 {
                return None;
            }
            *cell = nearest;
        }
        let mut cells = Self { thresholds: [f32::INFINITY; 32], ranks: [0; 32] };
        for index in -15i32..=15 {
            // The cell's number, rounded to an integer, in five bits of two's complement. Rounding is monotone: borders in lower cells are
            // below everything in this one.
            let slot = (index & 31) as usize;
            cells.ranks[slot] = cell.iter().filter(|&&other| other < index).count() as u32;
            let mut inside = (0..15).filter(|&border| cell[border] == index);
            if let Some(border) = inside.next() {
                cells.thresholds[slot] = borders[border];
            }
            if inside.next().is_some() {
                return None;
            }
        }
        Some(cells)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_nearest_to_itself() {
        for book in [Codebook::nf4(), Codebook::fp4(), Codebook::iq4_nl(), Codebook::mxfp4()] {
            for &value in book.values() {
                let code = book.nearest(value / book.max_magnitude());
                assert_eq!(book.values()[usize::from(code)], value);
            }
            assert!(book.thresholds.is_sorted());
        }
        assert_eq!(Codebook::new(NF4).unwrap(), Codebook::nf4());
    }

    #[test]
    fn nf4_borders_are_those_of_bitsandbytes() {
        let book = Codebook::nf4();
        for (rank, border) in [(0, -0.848_096_400_5), (7, 0.039_790_149_8), (14, 0.861_478_418_1)] {
            assert!((f64::from(book.thresholds[rank]) - border).abs() < 6e-8);
        }
    }

    #[test]
    fn a_tie_takes_the_lower_value() {
        let book = Codebook::nf4();
        for (rank, &border) in book.thresholds.iter().enumerate() {
            assert_eq!(usize::from(book.nearest(border)), rank);
            assert_eq!(usize::from(book.nearest(border.next_up())), rank + 1);
        }
    }

    #[test]
    fn values_must_be_finite_and_different() {
        let with = |code: usize, value| {
            let mut values = NF4;
            values[code] = value;
            Codebook::new(values)
        };
        for (code, value) in
            [(3, f32::NAN), (0, f32::INFINITY), (15, f32::NEG_INFINITY), (4, -f32::NAN), (4, 1.0), (4, -0.0)]
        {
            assert!(matches!(with(code, value), Err(QuantError::Value { what: "values", .. })), "{value}");
        }
        assert!(with(4, 1e31).is_err());
        assert!(with(4, -3.0).is_ok());
    }

    #[test]
    fn cells_rank_as_the_borders_do() {
        for book in [Codebook::nf4(), Codebook::iq4_nl()] {
            let cells = Cells::new(&book.thresholds).unwrap();
            let mut scaled = -1.0f32;
            while scaled <= 1.0 {
                let index = (f64::from(scaled) * f64::from(CELLS)).round_ties_even() as i32;
                let slot = (index & 31) as usize;
                let rank = cells.ranks[slot] + u32::from(cells.thresholds[slot] < scaled);
                assert_eq!(book.codes[rank as usize], book.nearest(scaled), "{scaled}");
                scaled += if cfg!(miri) { 0.01 } else { 1e-5 };
            }
        }
        assert!(Cells::new(&Codebook::fp4().thresholds).is_none());
    }
}
