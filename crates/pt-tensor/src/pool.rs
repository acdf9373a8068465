//! libtorch's threads for the kernels of `pt-quant`, so that one pool serves both.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;

use pt_quant::delta::DeltaWorkspace;
use pt_quant::dense::Workspace;
use pt_quant::{Exec, Pool};

unsafe extern "C" {
    /// Calls `task(ctx)` `count` times, side by side on libtorch's threads.
    fn pt_parallel(count: i64, task: unsafe extern "C" fn(*mut c_void), ctx: *mut c_void);
}

/// The threads of libtorch's CPU operations, as many as [`crate::set_num_threads`] says.
#[derive(Debug, Clone, Copy, Default)]
pub struct TorchPool;

struct Task<'a> {
    task: &'a (dyn Fn() + Sync),
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

unsafe extern "C" fn call(ctx: *mut c_void) {
    // SAFETY: `ctx` is the task that `run` keeps alive until `pt_parallel` has returned; it is shared among threads, as it may be.
    let task = unsafe { &*ctx.cast::<Task<'_>>() };
    // A panic must not unwind into C++; `run` goes on with it.
    if let Err(panic) = catch_unwind(AssertUnwindSafe(task.task)) {
        task.panic.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(panic);
    }
}

impl Pool for TorchPool {
    fn num_threads(&self) -> usize {
        usize::try_from(tch::get_num_threads()).unwrap_or(1).max(1)
    }

    fn run(&self, task: &(dyn Fn() + Sync)) {
        let task = Task { task, panic: Mutex::new(None) };
        // SAFETY: `call` matches the declaration, catches panics, and reads `ctx` as what it is.
        unsafe { pt_parallel(self.num_threads() as i64, call, (&raw const task).cast_mut().cast()) };
        if let Some(panic) = task.panic.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
            resume_unwind(panic);
        }
    }
}

/// How the kernels of `pt-quant` run in this process: the best instruction set, on libtorch's threads.
pub(crate) fn exec() -> Exec<'static> {
    Exec::single().with_pool(&TorchPool)
}

thread_local! {
    static WORKSPACE: RefCell<Workspace> = RefCell::new(Workspace::new());
    static DELTA_WORKSPACE: RefCell<DeltaWorkspace> = RefCell::new(DeltaWorkspace::new());
}

/// This thread's scratch memory for products. `work` is one product: it asks for no scratch itself.
pub(crate) fn with_workspace<T>(work: impl FnOnce(&mut Workspace) -> T) -> T {
    WORKSPACE.with(|workspace| work(&mut workspace.borrow_mut()))
}

/// As [`with_workspace`], for products with 1-bit deltas.
pub(crate) fn with_delta_workspace<T>(work: impl FnOnce(&mut DeltaWorkspace) -> T) -> T {
    DELTA_WORKSPACE.with(|workspace| work(&mut workspace.borrow_mut()))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn a_task_is_called_once_a_thread() {
        let calls = AtomicUsize::new(0);
        TorchPool.run(&|| {
            calls.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(calls.into_inner(), TorchPool.num_threads());
    }

    #[test]
    fn a_panic_reaches_the_caller_and_not_cpp() {
        let outcome = catch_unwind(|| TorchPool.run(&|| panic!("in a task")));
        assert_eq!(outcome.unwrap_err().downcast_ref(), Some(&"in a task"));
    }
}
