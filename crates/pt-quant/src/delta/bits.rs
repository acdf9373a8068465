//! Matrices of signs, one bit a weight.

use alloc::string::ToString;
use alloc::vec;
use alloc::vec::Vec;

use crate::QuantError;
use crate::error::check_len;

/// Signs of a matrix `[out_features, in_features]`, borrowed. A set bit is +1, a clear bit -1.
///
/// Rows follow each other; in a row, weight `k` is bit `k % 64` of word `k / 64`, the lowest bit first. A row starts at a word of its own, and the
/// bits beyond its last weight are clear. On a little-endian machine the words are also bytes of 8 weights each, the lowest bit first: the order of
/// GGUF's Q1_0 and, transposed, of BitDelta.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitMatrixRef<'a> {
    words: &'a [u64],
    out_features: usize,
    in_features: usize,
}

/// As [`BitMatrixRef`], owned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitMatrix {
    pub(super) words: Vec<u64>,
    pub(super) out_features: usize,
    pub(super) in_features: usize,
}

/// Words in a matrix of that shape.
fn num_words(out_features: usize, in_features: usize) -> Result<usize, QuantError> {
    out_features.checked_mul(in_features.div_ceil(64)).ok_or(QuantError::Overflow { what: "out_features" })
}

impl<'a> BitMatrixRef<'a> {
    /// Views `words`, `[out_features, ceil(in_features / 64)]`, as a matrix.
    ///
    /// # Errors
    /// [`QuantError::Length`] when the number of words is another; [`QuantError::Value`] when a bit beyond the end of a row is set.
    pub fn new(words: &'a [u64], out_features: usize, in_features: usize) -> Result<Self, QuantError> {
        check_len("words", words.len(), num_words(out_features, in_features)?)?;
        let this = Self { words, out_features, in_features };
        let padding = match in_features % 64 {
            0 => 0,
            used => u64::MAX << used,
        };
        for word in words.iter().skip(this.words_per_row().wrapping_sub(1)).step_by(this.words_per_row().max(1)) {
            if word & padding != 0 {
                let found = (word & padding).to_string();
                return Err(QuantError::Value { what: "words", found, expected: "no bits beyond the end of a row" });
            }
        }
        Ok(this)
    }

    /// N: rows, one an output.
    #[must_use]
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// K: columns, one an input.
    #[must_use]
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// `ceil(in_features / 64)`.
    #[must_use]
    pub fn words_per_row(&self) -> usize {
        self.in_features.div_ceil(64)
    }

    /// All words: `[out_features, words_per_row]`.
    #[must_use]
    pub fn words(&self) -> &'a [u64] {
        self.words
    }

    /// The words of a row. Panics when there is no such row, as slices do.
    #[must_use]
    pub fn row(&self, row: usize) -> &'a [u64] {
        &self.words[row * self.words_per_row()..][..self.words_per_row()]
    }

    /// Whether the weight is +1. Panics when there is no such weight, as slices do.
    #[must_use]
    pub fn is_positive(&self, row: usize, column: usize) -> bool {
        assert!(column < self.in_features, "column {column} of {}", self.in_features);
        self.row(row)[column / 64] >> (column % 64) & 1 == 1
    }

    /// A copy.
    #[must_use]
    pub fn to_owned(&self) -> BitMatrix {
        BitMatrix { words: self.words.to_vec(), out_features: self.out_features, in_features: self.in_features }
    }
}

impl BitMatrix {
    /// A matrix of `words`, `[out_features, ceil(in_features / 64)]`.
    ///
    /// # Errors
    /// As [`BitMatrixRef::new`].
    pub fn new(words: Vec<u64>, out_features: usize, in_features: usize) -> Result<Self, QuantError> {
        BitMatrixRef::new(&words, out_features, in_features)?;
        Ok(Self { words, out_features, in_features })
    }

    /// All signs -1.
    pub(crate) fn cleared(out_features: usize, in_features: usize) -> Result<Self, QuantError> {
        Ok(Self { words: vec![0; num_words(out_features, in_features)?], out_features, in_features })
    }

    pub(crate) fn words_mut(&mut self) -> &mut [u64] {
        &mut self.words
    }

    /// The matrix, borrowed.
    #[must_use]
    pub fn as_ref(&self) -> BitMatrixRef<'_> {
        BitMatrixRef { words: &self.words, out_features: self.out_features, in_features: self.in_features }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_bit_comes_first_and_rows_start_at_words() {
        let words = [0b101, 0, 1, 0b10];
        let bits = BitMatrixRef::new(&words, 2, 70).unwrap();
        assert_eq!(bits.words_per_row(), 2);
        let set: Vec<(usize, usize)> =
            (0..2).flat_map(|n| (0..70).map(move |k| (n, k))).filter(|(n, k)| bits.is_positive(*n, *k)).collect();
        assert_eq!(set, [(0, 0), (0, 2), (1, 0), (1, 65)]);
        assert_eq!(bits.to_owned().as_ref(), bits);
    }

    #[test]
    fn wrong_sizes_and_stray_bits_are_errors() {
        assert!(matches!(BitMatrixRef::new(&[0; 3], 2, 70), Err(QuantError::Length { found: 3, expected: 4, .. })));
        assert!(matches!(BitMatrixRef::new(&[0, 1 << 6], 1, 70), Err(QuantError::Value { .. })));
        assert!(matches!(BitMatrixRef::new(&[0, 0, 0, 1 << 6], 2, 70), Err(QuantError::Value { .. })));
        assert!(matches!(BitMatrixRef::new(&[], usize::MAX, 65), Err(QuantError::Overflow { .. })));
        assert!(BitMatrixRef::new(&[], 0, 70).is_ok() && BitMatrixRef::new(&[], 7, 0).is_ok());
        assert!(BitMatrix::new(vec![u64::MAX], 1, 64).is_ok());
    }
}
