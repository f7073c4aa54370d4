//! What is asked of io_uring: one operation, and how far it is.

#![allow(
    unsafe_code,
    reason = "what is submitted to io_uring names memory by its address"
)]

use std::io;

use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{opcode, squeue};

use crate::virtio::Buffers;

/// What the kernel is asked for.
pub(super) enum RingOperation {
    Read(Transfer),
    Write(Transfer, Durability),
    Flush,
}

/// When a write counts as done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Durability {
    /// When the host's cache has it.
    Cached,
    /// When it is on the disk.
    Durable,
}

/// Buffers that data are moved to or from, and how far that is.
pub(super) struct Transfer {
    pub(super) buffers: Buffers,
    pub(super) vectors: Vec<Vector>,
    /// Vectors that are done.
    pub(super) done: usize,
    /// Of what is left, in bytes from the file's beginning.
    pub(super) offset: u64,
}

/// A part of guest memory, in the form that the kernel takes.
#[repr(transparent)]
pub(super) struct Vector(pub(super) libc::iovec);

// SAFETY: it is an address and a length. No code here dereferences the address, and guest memory, to which it points,
// belongs to no thread.
unsafe impl Send for Vector {}

/// How far an operation is.
pub(super) enum RingStep {
    Done(io::Result<()>),
    /// A part of it is done.
    More,
    /// The kernel would have to wait.
    Blocked,
}

impl RingOperation {
    pub(super) fn entry(&self) -> squeue::Entry {
        match self {
            Self::Read(transfer) => match transfer.next() {
                TransferPart::One(address, len) => opcode::Read::new(FILE, address.cast(), len as u32)
                    .offset(transfer.offset)
                    .build(),
                TransferPart::Many(many) => opcode::Readv::new(FILE, many.as_ptr().cast(), many.len() as u32)
                    .offset(transfer.offset)
                    .build(),
            },
            Self::Write(transfer, durability) => {
                let flags = match durability {
                    Durability::Cached => 0,
                    Durability::Durable => libc::RWF_DSYNC,
                };
                match transfer.next() {
                    TransferPart::One(address, len) => {
                        opcode::Write::new(FILE, address.cast_const().cast(), len as u32)
                            .offset(transfer.offset)
                            .rw_flags(flags)
                            .build()
                    }
                    TransferPart::Many(many) => {
                        opcode::Writev::new(FILE, many.as_ptr().cast(), many.len() as u32)
                            .offset(transfer.offset)
                            .rw_flags(flags)
                            .build()
                    }
                }
            }
            Self::Flush => opcode::Fsync::new(FILE).flags(FsyncFlags::DATASYNC).build(),
        }
    }

    /// Takes the result of a completion into account.
    pub(super) fn advance(&mut self, result: i32) -> RingStep {
        let Ok(count) = usize::try_from(result) else {
            return match -result {
                libc::EINTR => RingStep::More,
                libc::EAGAIN => RingStep::Blocked,
                errno => RingStep::Done(Err(io::Error::from_raw_os_error(errno))),
            };
        };
        let (transfer, nothing) = match self {
            Self::Flush => return RingStep::Done(Ok(())),
            Self::Read(transfer) => (transfer, io::ErrorKind::UnexpectedEof),
            Self::Write(transfer, _) => (transfer, io::ErrorKind::WriteZero),
        };
        transfer.advance(count);
        match (transfer.rest().is_empty(), count) {
            (true, _) => RingStep::Done(Ok(())),
            (false, 0) => RingStep::Done(Err(nothing.into())),
            (false, _) => RingStep::More,
        }
    }
}

/// The only registered file.
pub(super) const FILE: Fixed = Fixed(0);

/// Most bytes that are moved by one entry, where the vectors allow it: data in the page cache are copied while the
/// entry is submitted, and a cancelled transfer ends after such a part.
const SLICE: usize = 1 << 20;
/// Parts of a transfer end where direct I/O can go on.
const UNIT: usize = 64 << 10;

/// What one entry moves.
enum TransferPart<'a> {
    One(*mut libc::c_void, usize),
    Many(&'a [Vector]),
}

impl Transfer {
    fn rest(&self) -> &[Vector] {
        &self.vectors[self.done..]
    }

    /// The part that the next entry moves.
    fn next(&self) -> TransferPart<'_> {
        let rest = self.rest();
        if let [Vector(first), ..] = rest
            && first.iov_len >= SLICE
        {
            return TransferPart::One(first.iov_base, first.iov_len.min(SLICE));
        }
        let (mut count, mut len) = (rest.len(), 0);
        for (index, Vector(vector)) in rest.iter().enumerate() {
            len += vector.iov_len;
            if len > SLICE {
                break;
            }
            if len.is_multiple_of(UNIT) || index + 1 == rest.len() {
                count = index + 1;
            }
        }
        match &rest[..count] {
            [Vector(one)] => TransferPart::One(one.iov_base, one.iov_len),
            many => TransferPart::Many(many),
        }
    }

    fn advance(&mut self, mut count: usize) {
        self.offset = self.offset.saturating_add(count as u64);
        while let Some(Vector(first)) = self.vectors.get_mut(self.done) {
            if count < first.iov_len {
                first.iov_base = first.iov_base.wrapping_byte_add(count);
                first.iov_len -= count;
                return;
            }
            count -= first.iov_len;
            self.done += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_transfers_go_in_parts_that_end_where_the_next_can_begin() {
        let vector = |len| {
            Vector(libc::iovec {
                iov_base: std::ptr::null_mut(),
                iov_len: len,
            })
        };
        let parts = |lens: &[usize]| {
            let mut transfer = Transfer {
                buffers: Buffers::default(),
                vectors: lens.iter().copied().map(vector).collect(),
                done: 0,
                offset: 0,
            };
            let mut parts = Vec::new();
            while !transfer.rest().is_empty() {
                let len = match transfer.next() {
                    TransferPart::One(_, len) => len,
                    TransferPart::Many(many) => many.iter().map(|vector| vector.0.iov_len).sum(),
                };
                parts.push(len);
                transfer.advance(len);
            }
            parts
        };
        assert_eq!(parts(&[512, 512, 4096]), [5120]);
        assert_eq!(parts(&[5 << 19]), [SLICE, SLICE, SLICE / 2]);
        assert_eq!(parts(&[4096; 600]), [SLICE, SLICE, 88 * 4096]);
        assert_eq!(parts(&[100, 5 << 19, 412]), [(5 << 19) + 512]);
        assert_eq!(parts(&[UNIT, SLICE, 512]), [UNIT, SLICE, 512]);
    }
}
