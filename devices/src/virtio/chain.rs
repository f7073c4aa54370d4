//! A descriptor chain as plain lists of buffers, checked for what the specification demands of a driver.

use std::collections::VecDeque;
use std::ops::Range;

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::GuestMemory;

/// The buffers of one descriptor chain (virtio 1.2, 2.7.4): first those that the device reads, then those
/// that it writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// What the device reads.
    pub readable: Buffers,
    /// What the device writes.
    pub writable: Buffers,
}

/// What is wrong with a driver's chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// More descriptors than the queue has.
    #[error("descriptor chain: expected at most {limit} descriptors, got more")]
    TooLong {
        /// The queue's size.
        limit: usize,
    },
    /// A buffer for the device to read follows one for it to write.
    #[error("descriptor chain: expected readable buffers before writable ones, got one after")]
    Order,
    /// A link of the chain leads nowhere: it points outside the table, outside memory or back into the chain, or the
    /// chain is longer than 4 GiB.
    #[error("descriptor chain: expected an end after {got} descriptors, got a broken link")]
    Broken {
        /// Descriptors until then.
        got: usize,
    },
}

impl Chain {
    /// Collects the chain's buffers, at most `limit` of them. The buffers may still lie outside memory.
    pub(super) fn collect(chain: DescriptorChain<&GuestMemory>, limit: usize) -> Result<Self, ChainError> {
        let mut collected = Self::default();
        let mut count = 0;
        let mut open = true;
        for descriptor in chain {
            if count == limit {
                return Err(ChainError::TooLong { limit });
            }
            count += 1;
            open = descriptor.has_next();
            let buffer = Buffer {
                address: descriptor.addr(),
                len: descriptor.len(),
            };
            if descriptor.is_write_only() {
                collected.writable.0.push_back(buffer);
            } else if collected.writable.0.is_empty() {
                collected.readable.0.push_back(buffer);
            } else {
                return Err(ChainError::Order);
            }
        }
        if open {
            Err(ChainError::Broken { got: count })
        } else {
            Ok(collected)
        }
    }

    /// Bytes of all buffers together.
    pub fn len(&self) -> u64 {
        self.readable.len() + self.writable.len()
    }

    /// Whether there is not a single byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A list of buffers in guest memory, consumed from either end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Buffers(VecDeque<Buffer>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Buffer {
    address: GuestAddress,
    len: u32,
}

impl Buffers {
    /// Bytes of all buffers together.
    pub fn len(&self) -> u64 {
        self.0.iter().map(|buffer| u64::from(buffer.len)).sum()
    }

    /// Whether there is not a single byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The buffers' addresses and lengths in bytes, in order.
    pub fn iter(&self) -> impl Iterator<Item = (GuestAddress, u32)> + '_ {
        self.0.iter().map(|buffer| (buffer.address, buffer.len))
    }

    /// Whether address and length of every buffer are multiples of `unit` bytes.
    pub(super) fn are_aligned(&self, unit: u32) -> bool {
        let aligned =
            |buffer: &Buffer| buffer.address.0.is_multiple_of(unit.into()) && buffer.len.is_multiple_of(unit);
        self.0.iter().all(aligned)
    }

    /// How many buffers there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Takes the first bytes off and reads them into `into`; returns how many there were. A buffer outside
    /// memory is an error.
    pub fn read(&mut self, memory: &GuestMemory, into: &mut [u8]) -> Result<usize, GuestMemoryError> {
        self.consume(into.len(), |address, range| {
            memory.read_slice(&mut into[range], address)
        })
    }

    /// Takes the first bytes off and fills them from `from`; returns how many there were. A buffer outside
    /// memory is an error.
    pub fn fill(&mut self, memory: &GuestMemory, from: &[u8]) -> Result<usize, GuestMemoryError> {
        self.consume(from.len(), |address, range| {
            memory.write_slice(&from[range], address)
        })
    }

    /// Writes `bytes` at `offset` into the buffers, which are that long.
    pub(super) fn write_at(
        &self,
        memory: &GuestMemory,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), GuestMemoryError> {
        let mut rest = self.clone();
        rest.skip(offset)?;
        rest.fill(memory, bytes).map(drop)
    }

    /// Takes the first bytes off without reading them.
    pub(super) fn skip(&mut self, count: usize) -> Result<usize, GuestMemoryError> {
        self.consume(count, |_, _| Ok(()))
    }

    fn consume(
        &mut self,
        count: usize,
        mut copy: impl FnMut(GuestAddress, Range<usize>) -> Result<(), GuestMemoryError>,
    ) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        while done < count {
            let Some(buffer) = self.0.front_mut() else { break };
            let part = (count - done).min(buffer.len as usize);
            copy(buffer.address, done..done + part)?;
            done += part;
            if part == buffer.len as usize {
                self.0.pop_front();
            } else {
                // `part` is less than the buffer's length, a u32, and the copy proved that the end is in memory.
                buffer.len -= part as u32;
                buffer.address = GuestAddress(buffer.address.0.saturating_add(part as u64));
            }
        }
        Ok(done)
    }

    /// Takes the last byte off and returns its address; `None` if there is no byte.
    pub fn take_last_byte(&mut self) -> Option<GuestAddress> {
        while let Some(buffer) = self.0.back_mut() {
            if let Some(rest) = buffer.len.checked_sub(1) {
                buffer.len = rest;
                return buffer.address.0.checked_add(u64::from(rest)).map(GuestAddress);
            }
            self.0.pop_back();
        }
        None
    }
}
