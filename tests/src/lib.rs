//! The end-to-end harness: VMs as processes, their output as events, guests that print what they measure.
//!
//! The scenarios are in `tests/tests/`; `cargo xtask test` builds what they need and runs them. See `DESIGN.md`.

mod disk_work;
mod fixtures;
mod guest;
mod host;
mod http;
mod huge_pages;
mod image;
mod journey;
mod lab_journey;
mod memory_group;
mod network;
mod output;
mod pings;
mod process;
pub mod saved;
mod shell;
mod sink;
mod small;
mod stock;
mod tap_queues;
mod terminal;
mod tiny;
mod tool;
mod vsock;
mod wait;

pub use disk_work::DiskWork;
pub use fixtures::{Fixtures, count, memory};
pub use guest::{GuestEvent, Tick, check_ticks};
pub use host::{Migration, TestHost, Vm};
pub use http::{http, http_as};
pub use huge_pages::ReservedHugePages;
pub use image::{Image, qemu};
pub use journey::{BareGuest, Journey};
pub use lab_journey::{LabJourney, ended, payload};
pub use memory_group::MemoryGroup;
pub use network::Network;
pub use output::TestOutput;
pub use pings::{Pinged, Pings};
pub use process::{Elsewhere, Finished, TestProcess};
pub use shell::Shell;
pub use sink::OutputSink;
pub use small::{LoopDevice, SmallFileSystem};
pub use stock::{GUEST, StockGuest, TAP};
pub use tap_queues::TapQueues;
pub use terminal::TestTerminal;
pub use tiny::TinyGuest;
pub use vsock::{ECHO_PORT, Echo};
pub use wait::{PATIENCE, wait_for, wait_until};
