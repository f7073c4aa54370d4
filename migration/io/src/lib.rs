//! Ranges of guest memory to and from sockets, without a user-space buffer in between.
//!
//! [`Gather`] sends ranges with their headers, [`Scatter`] receives ranges in place; neither ever blocks, so
//! that the caller decides how long to wait, and for what else. [`zero_pages`], [`zero_range`] and
//! [`digest`] scan, clear and hash memory. See `DESIGN.md` beside this crate's `Cargo.toml`.

#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]
// Tests start threads that may take their test along.
#![cfg_attr(test, allow(clippy::disallowed_methods))]

mod compression;
mod copy;
mod digest;
mod error;
mod gather;
mod memory;
mod populate;
mod receiver;
mod scatter;
mod sender;
mod socket;
mod vectors;
mod zero;
mod zerocopy;

#[cfg(test)]
mod tests;

pub use compression::{Chooser, CompressionError, Compressor, Decompressor, MAX_BLOCK, Method};
pub use digest::{digest, digest_block, digest_blocks, digest_of_blocks};
pub use error::MemoryIoError;
pub use gather::{Gather, Piece};
pub use memory::{GuestMemory, MemoryRange, PAGE_SIZE, zeroed_words};
pub use populate::populate;
pub use receiver::PageReceiver;
pub use scatter::Scatter;
pub use sender::{PageSender, SendCounters, SendPath};
pub use socket::in_flight;
pub use vectors::CallProgress;
pub use zero::{zero_pages, zero_range};
