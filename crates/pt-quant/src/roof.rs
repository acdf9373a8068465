//! What memory and arithmetic can do at best: the roofs that benchmarks hold kernels against, in the same run and on the same threads.

use core::sync::atomic::{AtomicU32, Ordering};

use crate::error::check_len;
use crate::simd::roof::kernels;
use crate::{Exec, QuantError};

/// Numbers that a thread takes at a time: 256 KiB.
const CHUNK: usize = 1 << 16;

/// Reads all of `data`; what comes back keeps the compiler from leaving it out.
#[must_use]
pub fn read(data: &[f32], exec: &Exec<'_>) -> u32 {
    let (kernels, all) = (kernels(exec.isa()), AtomicU32::new(0));
    exec.for_each(data.len().div_ceil(CHUNK), |index| {
        let chunk = &data[index * CHUNK..data.len().min((index + 1) * CHUNK)];
        all.fetch_xor((kernels.read)(chunk), Ordering::Relaxed);
    });
    all.into_inner()
}

/// Writes `value` everywhere, past the caches where the processor can.
pub fn write(out: &mut [f32], value: f32, exec: &Exec<'_>) {
    let kernels = kernels(exec.isa());
    exec.for_each_chunk(out, CHUNK, |_, out| (kernels.write)(out, value));
}

/// Copies, past the caches where the processor can.
///
/// # Errors
/// [`QuantError::Length`] when the lengths differ.
pub fn copy(from: &[f32], to: &mut [f32], exec: &Exec<'_>) -> Result<(), QuantError> {
    check_len("to", to.len(), from.len())?;
    let kernels = kernels(exec.isa());
    exec.for_each_chunk(to, CHUNK, |index, to| (kernels.copy)(&from[index * CHUNK..][..to.len()], to));
    Ok(())
}

/// `operations` multiplications and additions of f32 in registers, at least.
#[must_use]
pub fn multiply_f32(operations: usize, exec: &Exec<'_>) -> u32 {
    multiply(kernels(exec.isa()).multiply_f32, operations, exec)
}

/// As [`multiply_f32`], of bf16 with sums in f32, where the processor has instructions for that.
#[must_use]
pub fn multiply_bf16(operations: usize, exec: &Exec<'_>) -> u32 {
    multiply(kernels(exec.isa()).multiply_bf16, operations, exec)
}

fn multiply(kernel: fn(usize) -> u32, operations: usize, exec: &Exec<'_>) -> u32 {
    let all = AtomicU32::new(0);
    let tasks = operations.div_ceil(OPERATIONS);
    exec.for_each(tasks, |_| _ = all.fetch_xor(kernel(operations.div_ceil(tasks)), Ordering::Relaxed));
    all.into_inner()
}

/// Operations that a thread takes at a time.
const OPERATIONS: usize = 1 << 21;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;
    use alloc::vec;
    use alloc::vec::Vec;

    #[test]
    fn roofs_read_write_and_copy_everything() {
        for isa in Isa::available() {
            let exec = Exec::single().with_isa(isa).unwrap();
            let _ = (multiply_f32(OPERATIONS + 1, &exec), multiply_bf16(1, &exec), multiply_f32(0, &exec));
            for len in [0, 1, 15, 16, 17, 100, CHUNK - 1, CHUNK + 77] {
                let data: Vec<f32> = (0..len).map(|index| index as f32 + 0.5).collect();
                let expected = data.iter().fold(0, |all, value| all ^ value.to_bits());
                assert_eq!(read(&data, &exec), expected, "{isa}, {len}");
                for offset in 0..4.min(len) {
                    let mut out = vec![0.0; len];
                    copy(&data[offset..], &mut out[offset..], &exec).unwrap();
                    assert_eq!((&out[..offset], &out[offset..]), (&vec![0.0; offset][..], &data[offset..]));
                    write(&mut out[offset..], 3.0, &exec);
                    assert!(
                        out[offset..].iter().all(|&value| value == 3.0)
                            && out[..offset].iter().all(|&value| value == 0.0)
                    );
                }
            }
        }
    }
}
