//! Reading, writing and copying as fast as memory lets one.

#[cfg(target_arch = "x86_64")]
mod avx512;

use crate::Isa;

/// The kernels of one instruction set.
pub(crate) struct Kernels {
    /// The exclusive or of all the bits.
    pub(crate) read: fn(&[f32]) -> u32,
    pub(crate) write: fn(&mut [f32], f32),
    /// Of equal lengths.
    pub(crate) copy: fn(&[f32], &mut [f32]),
}

/// What the compiler and the C library make of it.
static PLAIN: Kernels = Kernels {
    read: |data| data.iter().fold(0, |all, value| all ^ value.to_bits()),
    write: |out, value| out.fill(value),
    copy: |from, to| to.copy_from_slice(from),
};

pub(crate) fn kernels(isa: Isa) -> &'static Kernels {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => &avx512::KERNELS,
        _ => &PLAIN,
    }
}
