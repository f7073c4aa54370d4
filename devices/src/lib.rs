//! The devices that a guest sees: virtio over MMIO and a few legacy ones.
//!
//! A device knows guest memory, eventfds for kicks and interrupts, and what backs it on the host. It does not
//! know KVM: the machine maps addresses to a [`bus::Bus`], registers the eventfds, and decides when devices
//! stop and go on. `DESIGN.md` beside this crate's manifest has the picture and the rules.

#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

pub mod bus;
pub mod legacy;
pub mod virtio;

#[cfg(test)]
mod cases;
mod exit;
mod helper;
mod host_socket;
mod log_damper;
mod metrics;
mod rate;
mod timer;
mod wake_event;
mod watch;

pub use exit::{ExitEvent, GuestExit};
pub use host_socket::HostSocketError;
pub use metrics::{Counter, Counters};
pub use rate::{Bucket, BucketError, Limits};

/// Guest RAM. Every write of a device to it goes through `vm-memory`, which marks the pages; a raw pointer or iovec would
/// not.
pub use guest_memory::GuestMemory;
