//! Ctrl-C: while a run trains, the first one asks for a checkpoint after the step at hand; at any other time, and the
//! second time, it ends the process at once. Files get their names when they are whole, so nothing is lost by that.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Whether a trainer looks at [`STOP`].
static IS_TRAINING: AtomicBool = AtomicBool::new(false);
/// Asked to stop.
static STOP: AtomicBool = AtomicBool::new(false);
/// What to type to go on, once there is a run to go on with.
static AGAIN: Mutex<Option<String>> = Mutex::new(None);

/// Takes Ctrl-C over from the system, so that an interrupted command ends with 130.
pub(crate) fn watch() {
    let handler = || {
        if IS_TRAINING.load(Ordering::Relaxed) && !STOP.swap(true, Ordering::Relaxed) {
            eprintln!("\nstopping after this step and saving; Ctrl-C again ends at once");
            return;
        }
        match AGAIN.lock().unwrap_or_else(PoisonError::into_inner).as_deref() {
            Some(again) => eprintln!("\ninterrupted; continue with: {again}"),
            None => eprintln!("\ninterrupted"),
        }
        // Not std::process::exit: libtorch may be computing.
        pt_tensor::exit_now(130);
    };
    // A second run in one process keeps the first handler, which does the same.
    let _ = ctrlc::set_handler(handler);
}

/// From now on there is a run that `again` continues.
pub(crate) fn can_continue_with(again: &str) {
    *AGAIN.lock().unwrap_or_else(PoisonError::into_inner) = Some(again.to_string());
}

/// Runs `work`, a trainer that saves and returns when the flag is set.
pub(crate) fn while_training<T>(work: impl FnOnce(&AtomicBool) -> T) -> T {
    IS_TRAINING.store(true, Ordering::Relaxed);
    let done = work(&STOP);
    IS_TRAINING.store(false, Ordering::Relaxed);
    done
}
