//! The block device (virtio 1.2, 5.2) on an image or a block device of the host.

mod backend;
mod configuration;
mod control;
mod device;
mod engine;
mod error;
mod execute;
mod io;
mod log;
mod metrics;
mod parameters;
mod request;
mod serve;
mod state;
mod sys;
mod write_out;

#[cfg(test)]
mod tests;

pub use backend::{Access, BackingFile, BlockBackend, ImageFormat, ImageFormatError};
pub use control::BlockControl;
pub use device::VirtioBlock;
pub use error::BlockBackendError;
pub use log::BlockLog;
pub use metrics::BlockMetrics;
pub use parameters::{BlockParameters, CacheMode, CacheModeError, IoEngine};
pub use state::BlockState;

/// The unit of addresses and capacity on the wire, in bytes, whatever the disk's own blocks are.
pub const SECTOR_SIZE: u64 = 512;

/// Bytes of a device's identity string.
pub const ID_LEN: usize = virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES as usize;

/// Bytes of a request's header: type, a reserved word, sector, each little-endian (virtio 1.2, 5.2.6).
const REQUEST_HEADER_LEN: usize = 16;
