//! What `cargo xtask bench` measures: godwit beside iperf3 and QEMU, alternately, in one run.
//!
//! [`ROWS`] says what each row means and what it must reach, [`run`] measures them. See `DESIGN.md`.

mod bench;
mod catalogue;
mod cpu;
mod experiments;
mod godwit;
mod guest;
mod iperf;
mod qemu;
mod qmp;
mod row;
mod run;
mod sentinel;
mod sparse;
mod stats;
mod strace;
mod warm;

pub use catalogue::ROWS;
pub use row::{BenchBar, Definition, Row, table};
pub use run::{RowSelection, run};
