//! Slices of an [`Element`] as slices of the one type of their format.

use crate::element::ElementKind;
use crate::{Bf16, Element, F16};

/// A slice, by format.
pub(crate) enum View<'a> {
    F32(&'a [f32]),
    Bf16(&'a [Bf16]),
    F16(&'a [F16]),
}

/// A mutable slice, by format.
pub(crate) enum ViewMut<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [Bf16]),
    F16(&'a mut [F16]),
}

impl<'a> View<'a> {
    pub(crate) fn of<T: Element>(slice: &'a [T]) -> Self {
        let (start, len) = (slice.as_ptr(), slice.len());
        // SAFETY: `Element` is sealed. The types of a kind are `f32` alone, or wrappers of `u16` with its layout and no invalid bits,
        // as `Bf16` and `F16` are; so the same memory is a slice of that type, borrowed as long.
        unsafe {
            match T::KIND {
                ElementKind::F32 => Self::F32(core::slice::from_raw_parts(start.cast(), len)),
                ElementKind::Bf16 => Self::Bf16(core::slice::from_raw_parts(start.cast(), len)),
                ElementKind::F16 => Self::F16(core::slice::from_raw_parts(start.cast(), len)),
            }
        }
    }
}

impl<'a> ViewMut<'a> {
    pub(crate) fn of<T: Element>(slice: &'a mut [T]) -> Self {
        let (start, len) = (slice.as_mut_ptr(), slice.len());
        // SAFETY: as in `View::of`; any bits written are a number of `T` too, and the borrow is exclusive as long.
        unsafe {
            match T::KIND {
                ElementKind::F32 => Self::F32(core::slice::from_raw_parts_mut(start.cast(), len)),
                ElementKind::Bf16 => Self::Bf16(core::slice::from_raw_parts_mut(start.cast(), len)),
                ElementKind::F16 => Self::F16(core::slice::from_raw_parts_mut(start.cast(), len)),
            }
        }
    }
}

/// Little-endian numbers where they lie, if this processor is little-endian and they lie at a multiple of 4 bytes; `None` too when bytes are left over.
#[cfg(feature = "safetensors")]
pub(crate) fn f32s_in(bytes: &[u8]) -> Option<&[f32]> {
    if cfg!(target_endian = "big") {
        return None;
    }
    // SAFETY: any four bytes are an `f32`; `align_to` sees to the alignment.
    match unsafe { bytes.align_to::<f32>() } {
        ([], numbers, []) => Some(numbers),
        _ => None,
    }
}

/// Numbers as little-endian bytes, copied only on a big-endian processor.
#[cfg(feature = "safetensors")]
pub(crate) fn bytes_of(numbers: &[f32]) -> alloc::borrow::Cow<'_, [u8]> {
    if cfg!(target_endian = "big") {
        return numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    }
    // SAFETY: an `f32` is four bytes without padding, and bytes lie anywhere.
    unsafe { core::slice::from_raw_parts(numbers.as_ptr().cast::<u8>(), size_of_val(numbers)) }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_shows_the_same_bits() {
        let mut numbers = [Bf16(1), Bf16(2)];
        if let ViewMut::Bf16(view) = ViewMut::of(&mut numbers) {
            view[1] = Bf16(7);
        }
        assert!(matches!(View::of(&numbers), View::Bf16([Bf16(1), Bf16(7)])));
        assert!(matches!(View::of(&[1.5f32]), View::F32([1.5])));
        assert!(matches!(View::of(&[F16(3)]), View::F16([F16(3)])));
        assert!(matches!(View::of::<f32>(&[]), View::F32([])));
    }

    #[cfg(feature = "half")]
    #[test]
    fn numbers_of_the_half_crate_are_viewed_too() {
        let numbers = [half::bf16::from_f32(1.0)];
        assert!(matches!(View::of(&numbers), View::Bf16([Bf16(0x3f80)])));
        let numbers = [half::f16::from_f32(1.0)];
        assert!(matches!(View::of(&numbers), View::F16([F16(0x3c00)])));
    }
}
