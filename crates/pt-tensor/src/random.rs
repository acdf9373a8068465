//! The random generator that libtorch draws from on the CPU, saved and restored.

use crate::autograd::{check, raw};
use crate::{Result, TensorError};
use std::ffi::{c_char, c_void};
use tch::{Device, Kind, Tensor};

unsafe extern "C" {
    fn pt_cpu_generator_state(out: *mut *mut c_void) -> *mut c_char;
    fn pt_set_cpu_generator_state(state: *mut c_void) -> *mut c_char;
}

/// Seeds libtorch's generators on every device.
pub fn seed(seed: u64) {
    // libtorch takes the bits; the sign carries no meaning.
    tch::manual_seed(seed as i64);
}

/// The CPU generator's state, a `[n]` u8 tensor that safetensors can hold.
///
/// # Errors
/// [`TensorError::Torch`] when libtorch cannot give it.
pub fn state() -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: on success the shim writes one tensor handle from `new`, which is ours from then on.
    check(unsafe { pt_cpu_generator_state(&mut out) })?;
    // SAFETY: see above; `out` is not used again.
    Ok(unsafe { Tensor::from_ptr(out.cast()) })
}

/// Restores a state from [`state`].
///
/// # Errors
/// [`TensorError::Shape`] for another kind of tensor, [`TensorError::Torch`] when libtorch refuses the bytes.
pub fn set_state(state: &Tensor) -> Result<()> {
    if state.kind() != Kind::Uint8 || state.dim() != 1 {
        return Err(TensorError::shape("generator state", state, "[n] of u8"));
    }
    // SAFETY: `state` is a live tensor; the shim copies from it.
    check(unsafe { pt_set_cpu_generator_state(raw(state)) })
}

/// Draws on `device` such that the CPU generator's state alone decides the numbers.
///
/// A checkpoint keeps that state, and so does activation checkpointing; a device's own generator is kept by
/// neither. On the CPU this is `draw` itself.
///
/// # Errors
/// [`TensorError::Torch`] when libtorch cannot give or take the state.
pub fn led_by_cpu<T>(device: Device, draw: impl FnOnce() -> T) -> Result<T> {
    if device == Device::Cpu { Ok(draw()) } else { seeded_from_cpu(draw) }
}

/// Seeds every generator by a number from the CPU's, draws, and lets the CPU's go on after that number.
fn seeded_from_cpu<T>(draw: impl FnOnce() -> T) -> Result<T> {
    let number = Tensor::randint(i64::MAX, [1], (Kind::Int64, Device::Cpu)).int64_value(&[0]);
    let after = state()?;
    tch::manual_seed(number);
    let drawn = draw();
    set_state(&after)?;
    Ok(drawn)
}

/// Tests that draw and compare share one generator; they take turns, and each draws the same numbers whoever was first.
#[cfg(test)]
pub(crate) fn test_lock() -> std::sync::MutexGuard<'static, ()> {
    static LOCK: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let lock = LOCK.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    seed(0);
    lock
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restored_state_draws_the_same_numbers() {
        let _lock = test_lock();
        let before = state().unwrap();
        let first = Tensor::rand([8], (Kind::Float, Device::Cpu));
        set_state(&before).unwrap();
        assert_eq!(first, Tensor::rand([8], (Kind::Float, Device::Cpu)));
    }

    #[test]
    fn draws_of_a_device_follow_the_state_of_the_cpu() {
        let _lock = test_lock();
        let rand = || Tensor::rand([8], (Kind::Float, Device::Cpu));
        let before = state().unwrap();
        let first = (seeded_from_cpu(rand).unwrap(), seeded_from_cpu(rand).unwrap(), rand());
        assert_ne!(first.0, first.1);
        set_state(&before).unwrap();
        // What the device draws, and how much, does not show in the CPU's own numbers.
        let again = (seeded_from_cpu(rand).unwrap(), seeded_from_cpu(|| (rand(), rand()).0).unwrap(), rand());
        assert_eq!(first, again);
    }

    #[test]
    fn another_tensor_is_refused() {
        assert!(set_state(&Tensor::from(1f32)).is_err());
    }
}
