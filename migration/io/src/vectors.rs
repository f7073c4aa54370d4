//! A list of memory ranges for `sendmsg` and `recvmsg`, and how far the calls got with it.
#![allow(unsafe_code)] // Calls into libc with pointers into guest memory, which has no Rust reference.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::MemoryIoError;
use crate::memory::GuestSlice;

/// How far one call of `sendmsg` or `recvmsg` got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallProgress {
    /// Everything is done.
    Done,
    /// This many bytes were moved, and more are left.
    Moved(usize),
    /// The socket has no room, or no data: wait for it.
    WouldBlock,
}

/// The most vectors that Linux takes in one call (`UIO_MAXIOV`).
const MAX_VECTORS: usize = 1024;

/// How much one call may move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limit {
    pub(crate) vectors: usize,
    pub(crate) bytes: usize,
}

impl Limit {
    pub(crate) const NONE: Self = Self {
        vectors: usize::MAX,
        bytes: usize::MAX,
    };
}

/// Ranges of memory that live for `'a`, of which those before `at` are done.
pub(crate) struct Vectors<'a> {
    vectors: Vec<libc::iovec>,
    at: usize,
    /// The indices at which runs begin. Runs of guest memory and of the monitor's own bytes take turns, guest memory first.
    run_starts: Vec<usize>,
    moved: u64,
    memory: PhantomData<&'a [u8]>,
}

/// Neighbouring vectors of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VectorRun {
    /// Whether they are guest memory, rather than bytes of the monitor's own.
    pub(crate) guest: bool,
    pub(crate) vectors: usize,
    pub(crate) bytes: usize,
}

impl<'a> Vectors<'a> {
    pub(crate) fn with_capacity(len: usize) -> Self {
        Self {
            vectors: Vec::with_capacity(len),
            at: 0,
            run_starts: Vec::new(),
            moved: 0,
            memory: PhantomData,
        }
    }

    /// Adds bytes of the monitor's own, to send.
    pub(crate) fn push_bytes(&mut self, bytes: &'a [u8]) {
        self.push(bytes.as_ptr().cast_mut(), bytes.len(), false);
    }

    /// Adds guest memory, to send or to receive into.
    pub(crate) fn push_guest(&mut self, slice: &GuestSlice<'a>) {
        // The mapping lives as long as the memory that the slice borrows for 'a; no guard is needed for a
        // mapping that is always there (only Xen's come and go).
        self.push(slice.ptr_guard_mut().as_ptr(), slice.len(), true);
    }

    /// Bytes moved so far.
    pub(crate) fn moved(&self) -> u64 {
        self.moved
    }

    /// The run that comes next, and the one after it.
    pub(crate) fn runs(&self) -> [Option<VectorRun>; 2] {
        let mut starts = self
            .run_starts
            .iter()
            .copied()
            .enumerate()
            .filter(|(_, start)| *start > self.at);
        let mut begin = self.at;
        std::array::from_fn(|_| {
            let (number, end) = starts
                .next()
                .unwrap_or((self.run_starts.len(), self.vectors.len()));
            let vectors = self
                .vectors
                .get(begin..end)
                .filter(|vectors| !vectors.is_empty())?;
            begin = end;
            Some(VectorRun {
                // A start with an even number begins guest memory, so the run that ends there is of the other kind.
                guest: !number.is_multiple_of(2),
                vectors: vectors.len(),
                bytes: vectors.iter().map(|vector| vector.iov_len).sum(),
            })
        })
    }

    /// Sends what is left, but no more than the limit, without waiting. `flags` are added to the call's own.
    pub(crate) fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        limit: Limit,
        flags: libc::c_int,
    ) -> Result<CallProgress, MemoryIoError> {
        self.transfer(limit, |header| {
            // SAFETY: the header's vectors point to bytes that stay mapped for 'a, which `self` cannot outlive;
            // the kernel only reads them. That the guest may write meanwhile does not matter: no Rust
            // reference to guest memory exists. With MSG_ZEROCOPY, which is for guest memory alone, the kernel
            // reads pages after the call as well: it holds them itself, whatever becomes of the mapping.
            unsafe {
                libc::sendmsg(
                    socket.as_raw_fd(),
                    header,
                    libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT | flags,
                )
            }
        })
    }

    /// Receives into what is left, without waiting. All vectors must be guest memory.
    pub(crate) fn receive(&mut self, socket: BorrowedFd<'_>) -> Result<CallProgress, MemoryIoError> {
        let progress = self.transfer(Limit::NONE, |header| {
            // SAFETY: as in `send`, and the only caller, `Scatter`, pushes guest memory alone, which may be
            // written through a pointer at any time.
            unsafe { libc::recvmsg(socket.as_raw_fd(), header, libc::MSG_DONTWAIT) }
        })?;
        if progress == CallProgress::Moved(0) {
            Err(MemoryIoError::Closed)
        } else {
            Ok(progress)
        }
    }

    fn push(&mut self, base: *mut u8, len: usize, guest: bool) {
        if len > 0 {
            // After an odd number of starts the last vector is guest memory.
            if guest == self.run_starts.len().is_multiple_of(2) {
                self.run_starts.push(self.vectors.len());
            }
            self.vectors.push(libc::iovec {
                iov_base: base.cast(),
                iov_len: len,
            });
        }
    }

    /// Makes one call with the vectors that are left.
    fn transfer(
        &mut self,
        limit: Limit,
        mut call: impl FnMut(&mut libc::msghdr) -> libc::ssize_t,
    ) -> Result<CallProgress, MemoryIoError> {
        let left = &mut self.vectors[self.at..];
        if left.is_empty() {
            return Ok(CallProgress::Done);
        }
        // SAFETY: a message header is plain data for which zeroes mean "no address, no control data".
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        let count = left.len().min(MAX_VECTORS).min(limit.vectors);
        let cut = cut(&mut left[..count], limit.bytes);
        header.msg_iov = left.as_mut_ptr();
        header.msg_iovlen = cut.map_or(count, |(last, _)| last + 1);
        let moved = loop {
            match usize::try_from(call(&mut header)) {
                Ok(moved) => break Ok(moved),
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => break Err(error),
                },
            }
        };
        if let Some((last, len)) = cut {
            self.vectors[self.at + last].iov_len = len;
        }
        let moved = match moved {
            Ok(moved) => moved,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(CallProgress::WouldBlock),
            Err(error) => return Err(MemoryIoError::Socket(error)),
        };
        self.advance(moved);
        Ok(if self.at == self.vectors.len() {
            CallProgress::Done
        } else {
            CallProgress::Moved(moved)
        })
    }

    /// Takes away what was moved.
    fn advance(&mut self, mut moved: usize) {
        self.moved += moved as u64;
        while let Some(vector) = self.vectors.get_mut(self.at) {
            if moved < vector.iov_len {
                // The kernel moved no more than it was given, so this stays within the vector.
                vector.iov_base = vector.iov_base.cast::<u8>().wrapping_add(moved).cast();
                vector.iov_len -= moved;
                return;
            }
            moved -= vector.iov_len;
            self.at += 1;
        }
    }
}

/// Shortens the vector in which a limit lies. Returns its index and the length that it had; nothing where all of them
/// are within the limit.
fn cut(vectors: &mut [libc::iovec], limit: usize) -> Option<(usize, usize)> {
    let mut left = limit;
    for (index, vector) in vectors.iter_mut().enumerate() {
        if vector.iov_len >= left {
            let len = std::mem::replace(&mut vector.iov_len, left);
            return Some((index, len));
        }
        left -= vector.iov_len;
    }
    None
}
