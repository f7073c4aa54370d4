//! Emulated hosts with a network between them: see `DESIGN.md`.

pub mod cpio;
