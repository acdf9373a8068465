//! Integration tests of pt-quant, one binary.

#![allow(clippy::unwrap_used)]

mod block4;
mod delta;
mod files;
mod golden_delta;
mod golden_quant;
mod guard;
mod product;
