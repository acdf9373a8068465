//! The random generator that libtorch draws from on the CPU, saved and restored.

use crate::autograd::{check, raw};
use crate::{Result, TensorError};
use std::ffi::{c_char, c_void};
use tch::{Kind, Tensor};

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

/// Tests that draw and compare share one generator; they take turns.
#[cfg(test)]
pub(crate) fn test_lock() -> std::sync::MutexGuard<'static, ()> {
    static LOCK: std::sync::Mutex<()> = std::sync::Mutex::new(());
    LOCK.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn a_restored_state_draws_the_same_numbers() {
        let _lock = test_lock();
        let before = state().unwrap();
        let first = Tensor::rand([8], (Kind::Float, Device::Cpu));
        set_state(&before).unwrap();
        assert_eq!(first, Tensor::rand([8], (Kind::Float, Device::Cpu)));
    }

    #[test]
    fn another_tensor_is_refused() {
        assert!(set_state(&Tensor::from(1f32)).is_err());
    }
}
