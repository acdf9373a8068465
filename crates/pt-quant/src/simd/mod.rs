//! Kernels by instruction set: all the unsafe code of the crate, but for the hand-out of slices in `exec.rs`.

pub(crate) mod dense;
