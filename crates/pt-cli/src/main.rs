//! The `pt` command.
fn main() {}
