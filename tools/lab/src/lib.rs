//! Emulated hosts with a network between them: see `DESIGN.md`.
//!
//! ```no_run
//! # fn main() -> Result<(), lab::LabError> {
//! let payload = lab::Payload::new("target/guests").with("bin/godwit", "target/release/godwit");
//! let lab = lab::Lab::builder(payload).hosts(2).shared_disk(64 << 20).start()?;
//! let output = lab.host(0).run(&["godwit", "probe", "--json"])?;
//! println!("{}", output.stdout);
//! # Ok(())
//! # }
//! ```

pub mod cpio;
pub mod wire;

mod connection;
mod error;
mod host;
mod patience;
mod payload;
mod process;
mod qemu;
mod start;
mod switch;
mod tsc;

pub use error::LabError;
pub use host::LabHost;
pub use patience::{Deadline, WaitLimit, note_progress};
pub use payload::Payload;
pub use process::{LabOutput, LabProcess, Signal};
pub use start::{Lab, LabBuilder};
