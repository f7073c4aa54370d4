//! Why a disk cannot be used, and why a request to it is not done.

use std::io;
use std::path::PathBuf;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP};
use vm_memory::GuestMemoryError;

use super::REQUEST_HEADER_LEN;

/// Why a disk cannot be used. Every message is one line that names the path.
#[derive(Debug, thiserror::Error)]
pub enum BlockBackendError {
    /// There is no file at the path.
    #[error("disk {}: expected a file or a block device, found nothing there", path.display())]
    Missing {
        /// The disk.
        path: PathBuf,
    },
    /// The disk's file has no name any more.
    #[error("disk {}: expected its file to be there for the process that takes the guest over, but it was removed; only a migration with its content (--with-disks) keeps it", path.display())]
    Removed {
        /// The path that it had.
        path: PathBuf,
    },
    /// The file is not a disk.
    #[error("disk {}: expected a file or a block device, got {got}", path.display())]
    NotADisk {
        /// The disk.
        path: PathBuf,
        /// What the file is.
        got: &'static str,
    },
    /// The process has no permission to open it in this mode.
    #[error("disk {}: no permission to open it {}", path.display(), mode(*read_only))]
    Permission {
        /// The disk.
        path: PathBuf,
        /// Whether it was to be opened read-only.
        read_only: bool,
    },
    /// It is not a raw image, or on a file system without direct I/O.
    #[error("disk {}: expected a raw disk that can be opened with O_DIRECT, got another; leave direct=on out", path.display())]
    NotDirect {
        /// The disk.
        path: PathBuf,
    },
    /// The file has become shorter.
    #[error("disk {}: expected its {expected} bytes, got {got}: it has shrunk", path.display())]
    Shrunk {
        /// The disk.
        path: PathBuf,
        /// The size that the guest knows, in bytes.
        expected: u64,
        /// Its size in bytes.
        got: u64,
    },
    /// Another process has it locked.
    #[error("disk {}: expected {} lock, but another process has it locked", path.display(), lock(*read_only))]
    Locked {
        /// The disk.
        path: PathBuf,
        /// Whether a shared lock was asked for.
        read_only: bool,
    },
    /// It does not have the mark of the source's disk.
    #[error("disk {}: expected the source's disk, got a file that the source has not locked", path.display())]
    NotTheSame {
        /// The disk, or a file that it is on.
        path: PathBuf,
    },
    /// A raw disk has no backing file.
    #[error("disk {}: expected no backing file of a raw disk, got {}", path.display(), got.display())]
    NoImage {
        /// The disk.
        path: PathBuf,
        /// The backing file that was named.
        got: PathBuf,
    },
    /// A system call failed.
    #[error("disk {}: cannot {what}: {source}", path.display())]
    Io {
        /// The disk.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn mode(read_only: bool) -> &'static str {
    if read_only {
        "for reading"
    } else {
        "for reading and writing"
    }
}

fn lock(read_only: bool) -> &'static str {
    if read_only { "a shared" } else { "an exclusive" }
}

/// Why a request is not done. `Unsupported` has a status of its own, all others are I/O errors to the guest.
#[derive(Debug, thiserror::Error)]
pub(super) enum BlockRequestError {
    #[error("expected a writable byte for the status, got none")]
    NoStatus,
    #[error("expected a header of {REQUEST_HEADER_LEN} bytes, got {got}")]
    Header { got: usize },
    #[error("request type {0} is not supported")]
    Unsupported(u32),
    #[error("expected buffers of one direction, got both")]
    Direction,
    #[error("expected whole sectors, got {len} bytes")]
    PartialSector { len: u64 },
    #[error("expected whole blocks of {block} bytes, got {len} bytes at sector {sector}")]
    PartialBlock { block: u32, sector: u64, len: u64 },
    #[error("expected at most {most} bytes of data, got {len}")]
    TooLong { most: u64, len: u64 },
    #[error("expected sectors below {capacity}, got {len} bytes at sector {sector}")]
    OutOfRange { capacity: u64, sector: u64, len: u64 },
    #[error("expected one range of at most {most} sectors, got {len} bytes of ranges, {sectors} sectors")]
    Segment { most: u32, len: u64, sectors: u32 },
    #[error("expected no flag {got:#x} in a range")]
    Flags { got: u32 },
    #[error("the thread that was to do it panicked")]
    Panicked,
    #[error("an earlier flush, of which the guest does not know, has failed")]
    FlushFailed,
    #[error("write to a read-only disk")]
    ReadOnly,
    #[error("guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
    #[error(transparent)]
    Backend(#[from] BlockBackendError),
}

impl BlockRequestError {
    /// The status byte for the guest.
    pub(super) fn status(&self) -> u8 {
        match self {
            Self::Unsupported(_) | Self::Flags { .. } => VIRTIO_BLK_S_UNSUPP as u8,
            _ => VIRTIO_BLK_S_IOERR as u8,
        }
    }
}
