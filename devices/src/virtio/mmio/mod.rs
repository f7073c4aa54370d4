//! The MMIO transport, version 2 (virtio 1.2, 4.2).
//!
//! Two halves: the [`MmioTransport`] has the registers and lives on the bus, where vCPUs reach it; the [`TransportWorker`]
//! serves the queues on the device thread. They share the device behind a lock of its own, so that a vCPU
//! that reads the interrupt status never waits for a disk.

mod driver;
mod error;
mod registers;
mod shared;
mod state;
mod transport;

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;

pub use error::MmioTransportError;
pub use registers::LEN;
pub use shared::TransportWorker;
pub use state::{MmioTransportState, QueueRecord};
pub use transport::MmioTransport;
