//! The machine (KVM, memory, vCPUs, boot, life cycle), its supervisor and its API server.
//!
//! The way of a request: command line or HTTP ([`server`]) → [`supervisor`] → [`machine`] → vCPUs, memory,
//! devices. `DESIGN.md` beside this crate's manifest has the picture.

#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]
// Tests start threads that may take their test along.
#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod boot;
pub mod clock;
pub mod config;
pub mod console;
pub mod cpu;
pub mod footprint;
mod kvm;
pub mod machine;
pub mod memory;
pub mod privacy;
pub mod probe;
pub mod server;
pub mod snapshot;
pub mod supervisor;
#[cfg(test)]
mod testing;
pub mod vcpu;
