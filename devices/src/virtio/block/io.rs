//! What a request makes the disk do, for the engine that carries it out.

use crate::virtio::Buffers;
use crate::virtio::sys::Durability;

/// How many bytes can be discarded in the time in which one is written, roughly.
const DISCARDED_PER_WRITTEN: u64 = 64;

/// What a request asks of the disk.
#[derive(Debug)]
pub(super) enum BlockIo {
    Read {
        into: Buffers,
        /// In bytes.
        offset: u64,
    },
    Write {
        from: Buffers,
        offset: u64,
        durability: Durability,
    },
    Discard {
        offset: u64,
        len: u64,
        durability: Durability,
    },
    Zero {
        offset: u64,
        len: u64,
        /// The range's space may be given up.
        unmap: bool,
        durability: Durability,
    },
    Flush,
    /// Writes an image's metadata to its file.
    WriteOut,
}

impl BlockIo {
    /// The work of this I/O, in bytes of a write of the same cost.
    pub(super) fn work(&self) -> u64 {
        match self {
            Self::Read { into: buffers, .. } | Self::Write { from: buffers, .. } => buffers.len(),
            Self::Discard { len, .. } => len / DISCARDED_PER_WRITTEN,
            Self::Zero { len, .. } => *len,
            Self::Flush | Self::WriteOut => 0,
        }
    }

    /// Whether the guest relies on all its earlier writes being durable (or as durable as its disk makes them) once
    /// this is done.
    pub(super) fn promises_durability(&self) -> bool {
        match self {
            Self::Flush | Self::WriteOut => true,
            Self::Write { durability, .. }
            | Self::Discard { durability, .. }
            | Self::Zero { durability, .. } => *durability == Durability::Durable,
            Self::Read { .. } => false,
        }
    }

    /// How many bytes of the disk the request is about, if it does not carry them as data.
    pub(super) fn range(&self) -> Option<u64> {
        match self {
            Self::Discard { len, .. } | Self::Zero { len, .. } => Some(*len),
            Self::Read { .. } | Self::Write { .. } | Self::Flush | Self::WriteOut => None,
        }
    }
}
