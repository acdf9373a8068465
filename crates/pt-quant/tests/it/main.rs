//! Integration tests of pt-quant, one binary.

#![allow(clippy::unwrap_used)]

mod block4;
mod files;
mod golden_quant;
mod guard;
mod product;
