//! Why pages could not be compressed, or a block could not be unpacked.

use std::io;

use lz4_flex::block::{CompressError, DecompressError};

use super::MAX_BLOCK;
use crate::MemoryIoError;

/// Why pages could not be compressed, or a block could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum CompressionError {
    /// A range is not guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryIoError),
    /// The ranges hold more than one block may.
    #[error("a block of {got} bytes of pages, where {MAX_BLOCK} are the most")]
    TooLarge {
        /// Bytes of all ranges.
        got: u64,
    },
    /// LZ4 could not compress.
    #[error("cannot compress with lz4")]
    Lz4(#[source] CompressError),
    /// Zstandard could not compress, or not be set up.
    #[error("cannot compress with zstd")]
    Zstd(#[source] io::Error),
    /// A block is not what LZ4 makes of the pages.
    #[error("a block is no lz4 block of {expected} bytes")]
    BadLz4 {
        /// Bytes of all ranges.
        expected: usize,
        /// What is wrong with it.
        #[source]
        source: DecompressError,
    },
    /// A block is not what Zstandard makes of the pages.
    #[error("a block is no zstd frame of {expected} bytes")]
    BadZstd {
        /// Bytes of all ranges.
        expected: usize,
        /// What is wrong with it.
        #[source]
        source: io::Error,
    },
    /// A block holds less than the ranges.
    #[error("a block holds {got} bytes where its pages have {expected}")]
    Length {
        /// Bytes of all ranges.
        expected: usize,
        /// Bytes in the block.
        got: usize,
    },
}
