//! Batches of pages as one compressed block each.

mod chooser;
mod compressor;
mod decompressor;
mod error;

#[cfg(test)]
mod tests;

pub use chooser::Chooser;
pub use compressor::Compressor;
pub use decompressor::Decompressor;
pub use error::CompressionError;

use crate::MemoryRange;

/// Most bytes of pages in one block: bounds the buffers of both sides.
pub const MAX_BLOCK: usize = 1 << 20;

/// How a block is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// An LZ4 block without length or frame.
    Lz4,
    /// A Zstandard frame, made at level 1.
    Zstd,
}

/// Bytes of all ranges, within [`MAX_BLOCK`].
fn total(ranges: &[MemoryRange]) -> Result<usize, CompressionError> {
    let got = ranges
        .iter()
        .fold(0u64, |sum, range| sum.saturating_add(range.len));
    match usize::try_from(got) {
        Ok(total) if total <= MAX_BLOCK => Ok(total),
        _ => Err(CompressionError::TooLarge { got }),
    }
}
