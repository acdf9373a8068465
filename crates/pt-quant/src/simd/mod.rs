//! Kernels by instruction set: all the unsafe code of the crate, but for the hand-out of slices in `exec.rs`.

pub(crate) mod block4;
pub(crate) mod delta;
pub(crate) mod dense;
pub(crate) mod dynamic8;
#[cfg(target_arch = "x86_64")]
mod lanes;
pub(crate) mod product;
pub(crate) mod roof;
pub(crate) mod view;
