//! The `pt` binary as a user meets it: named errors, runs that survive being killed.
#![allow(clippy::unwrap_used)]

mod bad_input;
mod common;
#[cfg(unix)]
mod interruptions;
