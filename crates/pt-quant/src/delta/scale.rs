//! The magnitudes that signs are multiplied by.

use alloc::vec::Vec;

use super::BitMatrixRef;
use crate::QuantError;
use crate::error::check_len;

/// Weights that share a scale in [`DeltaScale::Group128`].
pub const SCALE_GROUP: usize = 128;

/// What weights share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum ScaleAxis {
    /// The whole matrix: what BitDelta does.
    #[default]
    Matrix,
    /// A row: one scale an output.
    Row,
    /// 128 weights of a row (the last may be fewer): one scale for each group of inputs of an output, as in GGUF's Q1_0.
    Group128,
}

impl ScaleAxis {
    /// Scales of a matrix `[out_features, in_features]`.
    ///
    /// # Errors
    /// [`QuantError::Overflow`] when the number fits no `usize`.
    pub fn num_scales(self, out_features: usize, in_features: usize) -> Result<usize, QuantError> {
        match self {
            Self::Matrix => Ok(1),
            Self::Row => Ok(out_features),
            Self::Group128 => out_features
                .checked_mul(in_features.div_ceil(SCALE_GROUP))
                .ok_or(QuantError::Overflow { what: "out_features" }),
        }
    }
}

/// `delta_scale`, borrowed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum DeltaScale<'a> {
    /// One.
    Matrix(f32),
    /// `[out_features]`
    Row(&'a [f32]),
    /// `[out_features, ceil(in_features / 128)]`
    Group128(&'a [f32]),
}

/// `delta_scale`, owned.
#[derive(Debug, Clone, PartialEq)]
pub enum DeltaScaleBuf {
    /// One.
    Matrix(f32),
    /// `[out_features]`
    Row(Vec<f32>),
    /// `[out_features, ceil(in_features / 128)]`
    Group128(Vec<f32>),
}

impl DeltaScale<'_> {
    /// What weights share one.
    #[must_use]
    pub fn axis(&self) -> ScaleAxis {
        match self {
            Self::Matrix(_) => ScaleAxis::Matrix,
            Self::Row(_) => ScaleAxis::Row,
            Self::Group128(_) => ScaleAxis::Group128,
        }
    }

    /// The scales as they lie in memory.
    #[must_use]
    pub fn values(&self) -> &[f32] {
        match self {
            Self::Matrix(scale) => core::slice::from_ref(scale),
            Self::Row(scales) | Self::Group128(scales) => scales,
        }
    }

    /// A copy.
    #[must_use]
    pub fn to_owned(&self) -> DeltaScaleBuf {
        match *self {
            Self::Matrix(scale) => DeltaScaleBuf::Matrix(scale),
            Self::Row(scales) => DeltaScaleBuf::Row(scales.to_vec()),
            Self::Group128(scales) => DeltaScaleBuf::Group128(scales.to_vec()),
        }
    }

    /// The scale of a weight of a matrix with that many inputs.
    pub(crate) fn at(&self, row: usize, column: usize, in_features: usize) -> f32 {
        match self {
            Self::Matrix(scale) => *scale,
            Self::Row(scales) => scales[row],
            Self::Group128(scales) => scales[row * in_features.div_ceil(SCALE_GROUP) + column / SCALE_GROUP],
        }
    }

    /// Whether there are as many as the matrix needs.
    pub(crate) fn check(&self, bits: BitMatrixRef<'_>) -> Result<(), QuantError> {
        let expected = self.axis().num_scales(bits.out_features(), bits.in_features())?;
        check_len("scale", self.values().len(), expected)
    }
}

impl DeltaScaleBuf {
    /// Of values as they lie in memory, in number as the axis and the shape ask for.
    pub(crate) fn from_values(axis: ScaleAxis, values: Vec<f32>) -> Self {
        match axis {
            ScaleAxis::Matrix => Self::Matrix(values[0]),
            ScaleAxis::Row => Self::Row(values),
            ScaleAxis::Group128 => Self::Group128(values),
        }
    }

    /// The scales, borrowed.
    #[must_use]
    pub fn as_ref(&self) -> DeltaScale<'_> {
        match self {
            Self::Matrix(scale) => DeltaScale::Matrix(*scale),
            Self::Row(scales) => DeltaScale::Row(scales),
            Self::Group128(scales) => DeltaScale::Group128(scales),
        }
    }

    /// The scales as they lie in memory, to be trained.
    pub fn values_mut(&mut self) -> &mut [f32] {
        match self {
            Self::Matrix(scale) => core::slice::from_mut(scale),
            Self::Row(scales) | Self::Group128(scales) => scales,
        }
    }
}
