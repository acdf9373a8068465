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
    /// At least as many multiplications and additions, and something that depends on all of them.
    pub(crate) multiply_f32: fn(usize) -> u32,
    pub(crate) multiply_bf16: fn(usize) -> u32,
}

/// What the compiler and the C library make of it.
static PLAIN: Kernels = Kernels {
    read: |data| data.iter().fold(0, |all, value| all ^ value.to_bits()),
    write: |out, value| out.fill(value),
    copy: |from, to| to.copy_from_slice(from),
    multiply_f32: multiply,
    multiply_bf16: multiply,
};

fn multiply(operations: usize) -> u32 {
    let mut sums = [1.0f32; 64];
    let factor = core::hint::black_box(0.5);
    for _ in 0..operations.div_ceil(2 * sums.len()) {
        sums.iter_mut().for_each(|sum| *sum = *sum * factor + factor);
    }
    sums.iter().fold(0, |all, sum| all ^ sum.to_bits())
}

pub(crate) fn kernels(isa: Isa) -> &'static Kernels {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => &avx512::KERNELS,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 => &avx512::KERNELS_BF16,
        _ => &PLAIN,
    }
}
