//! The number formats that weights come in and go out as.

/// A number in the bfloat16 format: the upper half of an `f32`. With the feature `half`, `half::bf16` converts to and from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
#[repr(transparent)]
pub struct Bf16(pub u16);

/// A number in the IEEE 754 half-precision format. With the feature `half`, `half::f16` converts to and from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
#[repr(transparent)]
pub struct F16(pub u16);

impl Bf16 {
    /// The nearest bfloat16, ties to even; NaN stays NaN and becomes quiet.
    #[must_use]
    pub const fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        if value.is_nan() {
            // The upper half alone could read as infinity.
            return Self((bits >> 16) as u16 | 0x40);
        }
        Self(((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16)
    }

    /// The same number as `f32`, exactly.
    #[must_use]
    pub const fn to_f32(self) -> f32 {
        f32::from_bits((self.0 as u32) << 16)
    }
}

impl F16 {
    /// The nearest half-precision number, ties to even; too large becomes infinity, NaN stays NaN and becomes quiet.
    #[must_use]
    pub const fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        let sign = ((bits >> 16) & 0x8000) as u16;
        let magnitude = bits & 0x7fff_ffff;
        if magnitude > 0x7f80_0000 {
            return Self(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff) as u16);
        }
        // 65520 is the first number that rounds to infinity.
        if magnitude >= 0x477f_f000 {
            return Self(sign | 0x7c00);
        }
        if magnitude < 0x3880_0000 {
            // Below 2^-14: adding 0.5 lines the sum's last bits up with multiples of 2^-24, and rounds to even.
            let rounded = f32::from_bits(magnitude) + 0.5;
            return Self(sign | (rounded.to_bits() - 0x3f00_0000) as u16);
        }
        // The exponent's bias falls from 127 to 15; the carry of rounding may go into the exponent, rightly.
        let rounded = magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1);
        Self(sign | (rounded >> 13) as u16)
    }

    /// The same number as `f32`, exactly; a NaN becomes quiet.
    #[must_use]
    pub const fn to_f32(self) -> f32 {
        let sign = ((self.0 & 0x8000) as u32) << 16;
        let magnitude = (self.0 & 0x7fff) as u32;
        let bits = if magnitude > 0x7c00 {
            0x7fc0_0000 | (magnitude & 0x3ff) << 13
        } else if magnitude == 0x7c00 {
            0x7f80_0000
        } else if magnitude < 0x400 {
            // Subnormal: magnitude · 2^-24, exact in f32.
            (magnitude as f32 * f32::from_bits(0x3380_0000)).to_bits()
        } else {
            (magnitude << 13) + (112 << 23)
        };
        f32::from_bits(sign | bits)
    }
}

mod sealed {
    pub trait Sealed: Sized {
        /// The slice as it is, if its elements are f32.
        fn as_f32(_: &[Self]) -> Option<&[f32]> {
            None
        }

        /// The bits of the elements, if they are bf16.
        fn as_bf16_bits(_: &[Self]) -> Option<&[u16]> {
            None
        }
    }
    impl Sealed for f32 {
        fn as_f32(slice: &[Self]) -> Option<&[f32]> {
            Some(slice)
        }
    }
    impl Sealed for super::Bf16 {
        fn as_bf16_bits(slice: &[Self]) -> Option<&[u16]> {
            // SAFETY: `Bf16` is `repr(transparent)` over `u16`, so length, layout and valid values are the same.
            Some(unsafe { core::slice::from_raw_parts(slice.as_ptr().cast(), slice.len()) })
        }
    }
    impl Sealed for super::F16 {}
    #[cfg(feature = "half")]
    impl Sealed for half::bf16 {
        fn as_bf16_bits(slice: &[Self]) -> Option<&[u16]> {
            Some(half::slice::HalfFloatSliceExt::reinterpret_cast(slice))
        }
    }
    #[cfg(feature = "half")]
    impl Sealed for half::f16 {}
}

/// Which format an [`Element`] has; kernels are chosen by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ElementKind {
    /// `f32`
    F32,
    /// [`Bf16`]
    Bf16,
    /// [`F16`]
    F16,
}

/// `f32`, [`Bf16`] or [`F16`] (with the feature `half`, `half::bf16` and `half::f16` too).
pub trait Element: sealed::Sealed + Copy + Send + Sync + 'static {
    /// Its format. Two types of one format have the same bits.
    const KIND: ElementKind;

    /// The same number as `f32`.
    fn to_f32(self) -> f32;

    /// The nearest number of this format, ties to even.
    fn from_f32(value: f32) -> Self;
}

macro_rules! element {
    ($type:ty, $kind:expr, $to:expr, $from:expr) => {
        impl Element for $type {
            const KIND: ElementKind = $kind;

            #[inline]
            fn to_f32(self) -> f32 {
                $to(self)
            }

            #[inline]
            fn from_f32(value: f32) -> Self {
                $from(value)
            }
        }
    };
}

element!(f32, ElementKind::F32, |value| value, |value| value);
element!(Bf16, ElementKind::Bf16, Bf16::to_f32, Bf16::from_f32);
element!(F16, ElementKind::F16, F16::to_f32, F16::from_f32);
#[cfg(feature = "half")]
element!(half::bf16, ElementKind::Bf16, |value: half::bf16| Bf16(value.to_bits()).to_f32(), |value| {
    half::bf16::from_bits(Bf16::from_f32(value).0)
});
#[cfg(feature = "half")]
element!(half::f16, ElementKind::F16, |value: half::f16| F16(value.to_bits()).to_f32(), |value| half::f16::from_bits(
    F16::from_f32(value).0
));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_precision_number_survives_the_round_trip() {
        for bits in 0..=u16::MAX {
            let value = F16(bits).to_f32();
            if value.is_nan() {
                assert!(F16::from_f32(value).to_f32().is_nan());
            } else {
                assert_eq!(F16::from_f32(value).0, bits);
            }
            let value = Bf16(bits).to_f32();
            if value.is_nan() {
                assert!(Bf16::from_f32(value).to_f32().is_nan());
            } else {
                assert_eq!(Bf16::from_f32(value).0, bits);
            }
        }
    }

    /// Rounding against the neighbours, computed in f64: the nearer one wins, in a tie the even one.
    fn check_nearest(value: f32, got: u16, to_f32: impl Fn(u16) -> f32) {
        let distance = |bits: u16| (f64::from(to_f32(bits)) - f64::from(value)).abs();
        for neighbour in [got.wrapping_sub(1), got.wrapping_add(1)] {
            if to_f32(neighbour).is_finite() && to_f32(got).is_finite() && to_f32(neighbour).signum() == value.signum()
            {
                let (ours, theirs) = (distance(got), distance(neighbour));
                assert!(ours < theirs || ours == theirs && got.is_multiple_of(2), "{value}: {got:#x}");
            }
        }
    }

    #[test]
    fn rounding_takes_the_nearest_and_even_in_a_tie() {
        for high in 0..=0xffffu32 {
            for low in [0, 1, 0xfff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(high << 16 | low);
                if value.is_finite() {
                    check_nearest(value, Bf16::from_f32(value).0, |bits| Bf16(bits).to_f32());
                    check_nearest(value, F16::from_f32(value).0, |bits| F16(bits).to_f32());
                }
            }
        }
        assert_eq!(F16::from_f32(65519.996).0, 0x7bff);
        assert_eq!(F16::from_f32(65520.0).0, 0x7c00);
        assert_eq!(F16::from_f32(2f32.powi(-25)).0, 0);
        assert_eq!(F16::from_f32(2f32.powi(-25) * 1.0001).0, 1);
    }
}
