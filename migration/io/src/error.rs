//! Why guest memory could not be sent, received or read.

use std::io;

/// Why guest memory could not be sent, received or read.
#[derive(Debug, thiserror::Error)]
pub enum MemoryIoError {
    /// A range is not within one region of guest RAM.
    #[error("guest memory range {gpa:#x}+{len:#x} is not within one region of guest RAM")]
    OutOfBounds {
        /// First guest-physical address.
        gpa: u64,
        /// Bytes.
        len: u64,
        /// The cause.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
    /// An address is not that of a page.
    #[error("guest-physical address {gpa:#x} is not a multiple of 4096")]
    Unaligned {
        /// The address.
        gpa: u64,
    },
    /// The kernel could not make memory resident.
    #[error("cannot make guest memory range {gpa:#x}+{len:#x} resident")]
    Populate {
        /// First guest-physical address.
        gpa: u64,
        /// Bytes.
        len: u64,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The peer closed the connection.
    #[error("the peer closed the connection")]
    Closed,
    /// A thread that was to compute a digest panicked.
    #[error("a part of the digest is missing: the thread that was to compute it panicked")]
    DigestFailed,
    /// The socket failed.
    #[error("the connection failed")]
    Socket(#[source] io::Error),
}
