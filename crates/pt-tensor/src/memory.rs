//! How many bytes of tensors a computation takes.

use crate::Result;
use crate::autograd::check;
use std::ffi::{c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

unsafe extern "C" {
    fn pt_peak_allocation(ctx: *mut c_void, run: unsafe extern "C" fn(*mut c_void), peak: *mut i64) -> *mut c_char;
}

/// A closure on its way through C++, and what came of it.
struct Call<F, T> {
    run: Option<F>,
    outcome: Option<std::thread::Result<T>>,
}

unsafe extern "C" fn call<F: FnOnce() -> T, T>(ctx: *mut c_void) {
    // SAFETY: `ctx` is the `Call` that `peak_tensor_bytes` holds on its stack and borrows to nobody else meanwhile.
    let call = unsafe { &mut *ctx.cast::<Call<F, T>>() };
    if let Some(run) = call.run.take() {
        call.outcome = Some(catch_unwind(AssertUnwindSafe(run)));
    }
}

/// Runs a computation, and counts the most bytes of tensors that were alive in it at once, beyond those alive before.
///
/// What libtorch's allocators hand out on this thread counts, in the memory of any device: tensors, and whatever a graph
/// keeps for its backward pass. Unlike [`peak_memory_bytes`](crate::peak_memory_bytes) this knows nothing of the process
/// around it, so computations can be compared one after another.
///
/// # Errors
/// When libtorch does.
pub fn peak_tensor_bytes<T>(run: impl FnOnce() -> T) -> Result<(T, u64)> {
    fn through<F: FnOnce() -> T, T>(call_of: &mut Call<F, T>, peak: &mut i64) -> Result<()> {
        // SAFETY: `call` gets back the pointer given here, with the types that it has, while `call_of` is borrowed; it
        // catches panics. The shim writes one i64.
        check(unsafe { pt_peak_allocation(std::ptr::from_mut(call_of).cast(), call::<F, T>, peak) })
    }
    let mut call_of = Call { run: Some(run), outcome: None };
    let mut peak = 0;
    through(&mut call_of, &mut peak)?;
    match call_of.outcome {
        Some(Ok(value)) => Ok((value, peak.max(0) as u64)),
        Some(Err(panic)) => resume_unwind(panic),
        None => Err(crate::TensorError::argument("run", "not called", "called")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn the_most_that_is_alive_at_once_is_counted() {
        let zeros = |bytes: i64| Tensor::zeros([bytes / 4], (Kind::Float, Device::Cpu));
        let before = zeros(1 << 20);
        let (kept, peak) = peak_tensor_bytes(|| {
            drop(zeros(1 << 16));
            let kept = [zeros(1 << 14), zeros(1 << 14)];
            drop(before);
            kept
        })
        .unwrap();
        assert_eq!((kept.len(), peak), (2, 1 << 16));
        let ((), peak) = peak_tensor_bytes(|| ()).unwrap();
        assert_eq!(peak, 0);
    }

    #[test]
    fn a_panic_passes_through() {
        let outcome = catch_unwind(|| peak_tensor_bytes(|| panic!("on purpose")));
        assert!(outcome.is_err());
    }

    #[test]
    fn a_frozen_product_keeps_no_input() {
        let weight = Tensor::ones([64, 64], (Kind::Float, Device::Cpu));
        let peak = |is_trained: bool| {
            let weight = weight.copy().set_requires_grad(is_trained);
            let x = Tensor::ones([1024, 64], (Kind::Float, Device::Cpu)).set_requires_grad(true);
            // Each product's input is the last one's output, of 256 KiB.
            let run = || (0..8).fold(x * 1.0, |x, _| crate::linear(&x, &weight, None).unwrap());
            peak_tensor_bytes(run).unwrap().1 >> 18
        };
        assert_eq!((peak(false), peak(true)), (2, 9));
    }
}
