//! Integration tests of pt-quant, one binary.

mod block4;
mod files;
mod golden_quant;
mod guard;
