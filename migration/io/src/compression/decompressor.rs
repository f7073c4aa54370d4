//! Puts the pages of a compressed block into guest memory.

use lz4_flex::block::decompress_into;

use super::{CompressionError, MAX_BLOCK, Method, total};
use crate::copy::copy_in;
use crate::{GuestMemory, MemoryRange};

/// Unpacks blocks into guest memory, with a buffer and a context that are used again.
pub struct Decompressor {
    zstd: zstd::bulk::Decompressor<'static>,
    pages: Vec<u8>,
}

impl Decompressor {
    /// For blocks of either method.
    pub fn new() -> Result<Self, CompressionError> {
        Ok(Self {
            zstd: zstd::bulk::Decompressor::new().map_err(CompressionError::Zstd)?,
            pages: vec![0; MAX_BLOCK],
        })
    }

    /// Unpacks a block, whatever it holds, into `ranges`: it must hold exactly as much as these, at most
    /// [`MAX_BLOCK`] bytes. The memory's dirty bitmap is left alone. Where the block is refused the memory is
    /// as before.
    pub fn decompress(
        &mut self,
        method: Method,
        block: &[u8],
        memory: &GuestMemory,
        ranges: &[MemoryRange],
    ) -> Result<(), CompressionError> {
        let expected = total(ranges)?;
        // `total` allows no more than the buffer has.
        let pages = self.pages.get_mut(..expected).unwrap_or_default();
        let got = match method {
            Method::Lz4 => decompress_into(block, pages)
                .map_err(|source| CompressionError::BadLz4 { expected, source })?,
            Method::Zstd => self
                .zstd
                .decompress_to_buffer(block, pages)
                .map_err(|source| CompressionError::BadZstd { expected, source })?,
        };
        if got != expected {
            return Err(CompressionError::Length { expected, got });
        }
        copy_in(memory, ranges, &self.pages)?;
        Ok(())
    }
}
