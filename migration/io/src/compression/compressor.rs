//! Compresses pages of guest memory into blocks.

use lz4_flex::block::{compress_into, get_maximum_output_size};
use zstd::zstd_safe::compress_bound;

use super::{CompressionError, MAX_BLOCK, Method, total};
use crate::copy::copy_out;
use crate::{GuestMemory, MemoryRange};

/// A block that is larger than this share of its pages, in percent, does not save enough for the time that it takes to
/// unpack.
const MAX_PERCENT: usize = 85;

/// A zstd level that keeps up with links of a Gbit/s.
const ZSTD_LEVEL: i32 = 1;

/// Compresses batches of pages, one block each, with buffers and contexts that are used again.
pub struct Compressor {
    codec: Codec,
    /// The pages' content as it was at one moment: a codec must not see bytes change.
    pages: Vec<u8>,
    block: Vec<u8>,
}

enum Codec {
    Lz4,
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Compressor {
    /// For blocks of one method.
    pub fn new(method: Method) -> Result<Self, CompressionError> {
        let (codec, most) = match method {
            Method::Lz4 => (Codec::Lz4, get_maximum_output_size(MAX_BLOCK)),
            Method::Zstd => {
                let context = zstd::bulk::Compressor::new(ZSTD_LEVEL).map_err(CompressionError::Zstd)?;
                (Codec::Zstd(context), compress_bound(MAX_BLOCK))
            }
        };
        Ok(Self {
            codec,
            pages: Vec::with_capacity(MAX_BLOCK),
            block: vec![0; most],
        })
    }

    /// The content of `ranges`, at most [`MAX_BLOCK`] bytes, as one block; `None` if it is hardly smaller than
    /// the pages themselves.
    ///
    /// The guest may write a range meanwhile: the block then holds a mixture, and the page is dirty.
    pub fn compress(
        &mut self,
        memory: &GuestMemory,
        ranges: &[MemoryRange],
    ) -> Result<Option<&[u8]>, CompressionError> {
        let total = total(ranges)?;
        copy_out(memory, ranges, &mut self.pages)?;
        let len = match &mut self.codec {
            Codec::Lz4 => compress_into(&self.pages, &mut self.block).map_err(CompressionError::Lz4)?,
            Codec::Zstd(context) => context
                .compress_to_buffer(&self.pages, self.block.as_mut_slice())
                .map_err(CompressionError::Zstd)?,
        };
        let pays = len * 100 <= total * MAX_PERCENT;
        Ok(self.block.get(..len).filter(|_| pays))
    }
}
