//! virtio 1.2 devices: what they share, the MMIO transport, and the devices themselves.

pub mod balloon;
pub mod block;
pub mod console;
pub mod mmio;
pub mod net;
pub mod rng;
pub mod vsock;

mod chain;
mod device;
mod interrupt;
mod queue;
mod sys;

#[cfg(test)]
mod testing;

pub use chain::{Buffers, Chain, ChainError};
pub use device::{Description, DeviceError, HostBackend, HostError, VirtioDevice};
pub use interrupt::Interrupt;
pub use queue::{ChainHead, PoppedChain, QueueAccess, QueueError, QueueProgress, Queues, Served, Turn};

/// Largest queue that our devices offer, in descriptors.
pub const QUEUE_SIZE: u16 = 256;
