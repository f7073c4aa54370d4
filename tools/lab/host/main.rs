//! The first program of an emulated host.
fn main() {}
