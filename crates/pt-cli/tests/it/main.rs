//! The `pt` binary as a user meets it: what each command does, named errors, runs that survive being killed.
#![allow(clippy::unwrap_used)]

mod adapters;
mod bad_input;
mod commands;
mod common;
mod delta;
mod dpo;
mod interop;
#[cfg(unix)]
mod interruptions;
mod quantize;
mod reward;
mod rl;
mod runs;
