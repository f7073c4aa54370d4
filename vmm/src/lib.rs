//! The machine (KVM, memory, vCPUs, boot, life cycle) and everything that the program `godwit` is made of.
//!
//! The way of a request: command line or HTTP ([`api`]) → [`supervisor`] → [`machine`] → vCPUs, memory,
//! devices. `DESIGN.md` beside this crate's manifest has the picture.

#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]
// Tests start threads that may take their test along.
#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod api;
pub mod boot;
pub mod cli;
pub mod clock;
pub mod config;
pub mod console;
pub mod cpu;
mod footprint;
mod kvm;
pub mod machine;
pub mod memory;
mod output;
mod privacy;
pub mod probe;
pub mod report;
pub mod rundir;
pub mod snapshot;
pub mod supervisor;
#[cfg(test)]
mod testing;
pub mod vcpu;

pub use config::Config;

/// The version of this program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
