//! Backward passes written in Rust.
//!
//! [`attach_backward`] makes tensors that were computed without a graph depend on their inputs through a closure;
//! libtorch calls it once, with the gradients of the outputs, when its turn comes. A panic in the closure becomes
//! an error of the backward pass; it never crosses into C++.

use crate::{Result, TensorError};
use std::ffi::{CStr, CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use tch::Tensor;

type RawTensor = *mut c_void;

unsafe extern "C" {
    fn pt_attach_backward(
        inputs: *const RawTensor,
        num_inputs: usize,
        outputs: *const RawTensor,
        num_outputs: usize,
        ctx: *mut c_void,
        backward: unsafe extern "C" fn(*mut c_void, *const RawTensor, usize, *mut RawTensor, usize) -> *mut c_char,
        drop: unsafe extern "C" fn(*mut c_void),
    ) -> *mut c_char;
    fn pt_backward(outputs: *const RawTensor, grad_outputs: *const RawTensor, count: usize) -> *mut c_char;
    fn pt_free_message(message: *mut c_char);
}

/// Gradients of the outputs in (`None`: not needed), gradients of the inputs out (`None`: none).
type BackwardClosure = Box<dyn Fn(Vec<Option<Tensor>>) -> Result<Vec<Option<Tensor>>>>;

struct Callback {
    name: &'static str,
    backward: BackwardClosure,
}

pub(crate) fn raw(tensor: &Tensor) -> RawTensor {
    tensor.as_ptr().cast_mut().cast()
}

/// Turns a message of the shim into a result.
pub(crate) fn check(message: *mut c_char) -> Result<()> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: the shim returns null or a NUL-terminated string from malloc, which is ours to free once.
    let text = unsafe { CStr::from_ptr(message).to_string_lossy().into_owned() };
    // SAFETY: as above; `message` is not used afterwards.
    unsafe { pt_free_message(message) };
    Err(TensorError::Torch(tch::TchError::Torch(text)))
}

unsafe extern "C" fn call_backward(
    ctx: *mut c_void,
    grad_outputs: *const RawTensor,
    num_outputs: usize,
    grad_inputs: *mut RawTensor,
    num_inputs: usize,
) -> *mut c_char {
    let outcome = catch_unwind(AssertUnwindSafe(|| -> std::result::Result<(), String> {
        // SAFETY: `ctx` is the box made in `attach_backward`; the node that holds it calls us before it drops it.
        let callback = unsafe { &*ctx.cast::<Callback>() };
        let grads = (0..num_outputs)
            .map(|i| {
                // SAFETY: the shim passes `num_outputs` pointers, each null or a live tensor; the clone is a new
                // handle to the same storage.
                unsafe {
                    let grad = *grad_outputs.add(i);
                    (!grad.is_null()).then(|| Tensor::clone_from_ptr(grad.cast()))
                }
            })
            .collect();
        let fail = |e: &dyn std::fmt::Display| format!("{}: {e}", callback.name);
        let inputs = (callback.backward)(grads).map_err(|e| fail(&e))?;
        if inputs.len() != num_inputs {
            return Err(fail(&format!("{} input gradients for {num_inputs} inputs", inputs.len())));
        }
        for (i, grad) in inputs.into_iter().enumerate() {
            if let Some(grad) = grad {
                // SAFETY: `grad_inputs` has room for `num_inputs` pointers; the handle passes to the shim, which
                // deletes it, so it is forgotten here.
                unsafe { *grad_inputs.add(i) = raw(&grad) };
                std::mem::forget(grad);
            }
        }
        Ok(())
    }));
    let message = match outcome {
        Ok(Ok(())) => return std::ptr::null_mut(),
        Ok(Err(message)) => message,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
            format!("a backward pass panicked: {}", text.unwrap_or_default())
        }
    };
    let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
    // SAFETY: the shim frees the message with free(), so it has to come from malloc, as strdup's does.
    unsafe { libc::strdup(message.as_ptr()) }
}

unsafe extern "C" fn drop_callback(ctx: *mut c_void) {
    // SAFETY: `ctx` came from Box::into_raw in `attach_backward`, and the node drops it exactly once.
    let callback = unsafe { Box::from_raw(ctx.cast::<Callback>()) };
    // A destructor that panics must not unwind into C++.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(callback)));
}

/// Makes `outputs`, computed from `inputs` under [`tch::no_grad`], depend on them through `backward`.
///
/// `backward` gets one gradient per output (`None` where nothing flows back) and returns one per input (`None`
/// where there is none). It runs without a graph, at most once, and must not capture the outputs themselves
/// (that would be a cycle); where no input requires a gradient it is dropped at once.
///
/// libtorch runs it on the thread that asked for gradients (CPU) or on the one worker of the device, while the
/// asking thread waits. So it need not be `Send`, because nothing else runs beside it: a graph that spans two
/// accelerators, which would break that, is refused by the model loader, which puts a model on one device.
///
/// # Errors
/// [`TensorError::Torch`] when libtorch refuses an output, such as a view of an input.
///
/// # Example
/// y = x³ with its own derivative.
/// ```
/// # use pt_tensor::{Tensor, autograd::attach_backward, no_grad};
/// let x = Tensor::from_slice(&[2f64]).set_requires_grad(true);
/// let y = no_grad(|| x.pow_tensor_scalar(3));
/// let saved = x.detach();
/// attach_backward("cube", &[&x], &[&y], move |grads| {
///     Ok(vec![grads[0].as_ref().map(|g| g * 3.0 * saved.pow_tensor_scalar(2))])
/// })?;
/// y.sum(None).backward();
/// assert_eq!(x.grad().double_value(&[0]), 12.0);
/// # Ok::<(), pt_tensor::TensorError>(())
/// ```
pub fn attach_backward(
    name: &'static str,
    inputs: &[&Tensor],
    outputs: &[&Tensor],
    backward: impl Fn(Vec<Option<Tensor>>) -> Result<Vec<Option<Tensor>>> + 'static,
) -> Result<()> {
    let inputs: Vec<RawTensor> = inputs.iter().map(|t| raw(t)).collect();
    let outputs: Vec<RawTensor> = outputs.iter().map(|t| raw(t)).collect();
    let callback = Box::new(Callback { name, backward: Box::new(backward) });
    // SAFETY: both arrays hold live tensors for the length of the call; the shim takes the box over and gives it
    // to `drop_callback` exactly once, also when it fails.
    check(unsafe {
        pt_attach_backward(
            inputs.as_ptr(),
            inputs.len(),
            outputs.as_ptr(),
            outputs.len(),
            Box::into_raw(callback).cast(),
            call_backward,
            drop_callback,
        )
    })
}

/// Back-propagates `grad_outputs` from `outputs` and accumulates into the `.grad` of every leaf.
///
/// # Errors
/// Whatever libtorch or a [`attach_backward`] closure reports.
pub fn backward(outputs: &[Tensor], grad_outputs: &[Tensor]) -> Result<()> {
    if outputs.len() != grad_outputs.len() {
        return Err(TensorError::argument("grad_outputs", grad_outputs.len(), "one gradient per output"));
    }
    let outputs: Vec<RawTensor> = outputs.iter().map(raw).collect();
    let grads: Vec<RawTensor> = grad_outputs.iter().map(raw).collect();
    // SAFETY: both arrays hold `count` live tensors for the length of the call.
    check(unsafe { pt_backward(outputs.as_ptr(), grads.as_ptr(), outputs.len()) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Kind, no_grad};

    fn leaf() -> Tensor {
        Tensor::from_slice(&[1f32, 2.]).set_requires_grad(true)
    }

    #[test]
    fn a_panic_in_a_backward_pass_is_an_error() {
        let x = leaf();
        let y = no_grad(|| &x * 2.0);
        attach_backward("careless", &[&x], &[&y], |_| panic!("boom")).unwrap();
        let error = backward(&[y.sum(Kind::Float)], &[Tensor::from(1f32)]).unwrap_err().to_string();
        assert!(error.contains("boom"), "{error}");
    }

    #[test]
    fn an_error_in_a_backward_pass_names_its_function() {
        let x = leaf();
        let y = no_grad(|| &x * 2.0);
        attach_backward("picky", &[&x], &[&y], |_| Err(TensorError::argument("x", 1, "2"))).unwrap();
        let error = backward(&[y.sum(Kind::Float)], &[Tensor::from(1f32)]).unwrap_err().to_string();
        assert!(error.contains("picky: `x` is 1, expected 2"), "{error}");
    }

    #[test]
    fn a_wrong_number_of_gradients_is_an_error() {
        let x = leaf();
        let y = no_grad(|| &x * 2.0);
        attach_backward("short", &[&x], &[&y], |_| Ok(vec![])).unwrap();
        assert!(backward(&[y], &[Tensor::ones([2], (Kind::Float, tch::Device::Cpu))]).is_err());
    }

    #[test]
    fn without_a_gradient_to_compute_the_closure_is_dropped_at_once() {
        let flag = std::sync::Arc::new(());
        let held = flag.clone();
        let x = Tensor::from(1f32);
        let y = &x * 2.0;
        attach_backward("unused", &[&x], &[&y], move |_| {
            let _ = &held;
            Ok(vec![None])
        })
        .unwrap();
        assert_eq!(std::sync::Arc::strong_count(&flag), 1);
        assert!(!y.requires_grad());
    }
}
