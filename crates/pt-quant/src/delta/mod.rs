//! 1-bit deltas: a fine-tuned matrix as `base + delta_scale · signs` (BitDelta, Liu et al. 2024, <https://arxiv.org/abs/2402.10193>).
//!
//! [`BitDelta`] is what is stored and exchanged; [`DeltaMatrix`] holds the same in the order that the products read.

mod bits;
mod convert;
mod fit;
mod matrix;
mod merge;
mod product;
mod scale;
#[cfg(test)]
mod tests;

pub use bits::{BitMatrix, BitMatrixRef};
pub use convert::{Q1_0_BLOCK_BYTES, q1_0_len};
pub use matrix::DeltaMatrix;
pub use merge::MergeBackup;
pub use product::{DeltaArithmetic, DeltaOptions, DeltaWorkspace, add_tenants};
pub use scale::{DeltaScale, DeltaScaleBuf, SCALE_GROUP, ScaleAxis};

use crate::QuantError;

/// A 1-bit delta, borrowed: `fine_tuned ≈ base + delta_scale · signs`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BitDeltaRef<'a> {
    signs: BitMatrixRef<'a>,
    scale: DeltaScale<'a>,
}

/// A 1-bit delta, owned: `fine_tuned ≈ base + delta_scale · signs`.
#[derive(Debug, Clone, PartialEq)]
pub struct BitDelta {
    signs: BitMatrix,
    scale: DeltaScaleBuf,
}

impl<'a> BitDeltaRef<'a> {
    /// Puts signs and scale together.
    ///
    /// # Errors
    /// [`QuantError::Length`] when the matrix needs another number of scales.
    pub fn new(signs: BitMatrixRef<'a>, scale: DeltaScale<'a>) -> Result<Self, QuantError> {
        scale.check(signs)?;
        Ok(Self { signs, scale })
    }

    /// The signs: `[out_features, in_features]`.
    #[must_use]
    pub fn signs(&self) -> BitMatrixRef<'a> {
        self.signs
    }

    /// The scale.
    #[must_use]
    pub fn scale(&self) -> DeltaScale<'a> {
        self.scale
    }

    /// A copy.
    #[must_use]
    pub fn to_owned(&self) -> BitDelta {
        BitDelta { signs: self.signs.to_owned(), scale: self.scale.to_owned() }
    }
}

impl BitDelta {
    /// Puts signs and scale together.
    ///
    /// # Errors
    /// [`QuantError::Length`] when the matrix needs another number of scales.
    pub fn new(signs: BitMatrix, scale: DeltaScaleBuf) -> Result<Self, QuantError> {
        scale.as_ref().check(signs.as_ref())?;
        Ok(Self { signs, scale })
    }

    /// The delta, borrowed.
    #[must_use]
    pub fn as_ref(&self) -> BitDeltaRef<'_> {
        BitDeltaRef { signs: self.signs.as_ref(), scale: self.scale.as_ref() }
    }

    /// The signs: `[out_features, in_features]`.
    #[must_use]
    pub fn signs(&self) -> BitMatrixRef<'_> {
        self.signs.as_ref()
    }

    /// The scale.
    #[must_use]
    pub fn scale(&self) -> DeltaScale<'_> {
        self.scale.as_ref()
    }

    /// The scales as they lie in memory, to be trained.
    pub fn scale_mut(&mut self) -> &mut [f32] {
        self.scale.values_mut()
    }
}
