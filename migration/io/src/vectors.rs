//! A list of memory ranges for `sendmsg` and `recvmsg`, and how far it got.
#![allow(unsafe_code)] // Calls into libc with pointers into guest memory, which has no Rust reference.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::MemoryIoError;
use crate::memory::GuestSlice;

/// How far one call got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Everything is done.
    Done,
    /// This many bytes were moved, and more are left.
    Moved(usize),
    /// The socket has no room, or no data: wait for it.
    WouldBlock,
}

/// Most vectors that Linux takes in one call (`UIO_MAXIOV`).
const MAX_VECTORS: usize = 1024;

/// Ranges of memory that live for `'a`, of which those before `at` are done.
pub(crate) struct Vectors<'a> {
    vectors: Vec<libc::iovec>,
    at: usize,
    memory: PhantomData<&'a [u8]>,
}

impl<'a> Vectors<'a> {
    pub(crate) fn with_capacity(len: usize) -> Self {
        Self {
            vectors: Vec::with_capacity(len),
            at: 0,
            memory: PhantomData,
        }
    }

    /// Adds bytes of the monitor's own, to send.
    pub(crate) fn push_bytes(&mut self, bytes: &'a [u8]) {
        self.push(bytes.as_ptr().cast_mut(), bytes.len());
    }

    /// Adds guest memory, to send or to receive into.
    pub(crate) fn push_guest(&mut self, slice: &GuestSlice<'a>) {
        // The mapping lives as long as the memory that the slice borrows for 'a; no guard is needed for a
        // mapping that is always there (only Xen's come and go).
        self.push(slice.ptr_guard_mut().as_ptr(), slice.len());
    }

    /// Sends what is left, without waiting.
    pub(crate) fn send(&mut self, socket: BorrowedFd<'_>) -> Result<Step, MemoryIoError> {
        self.transfer(|header| {
            // SAFETY: the header's vectors point to bytes that stay mapped for 'a, which `self` cannot outlive;
            // the kernel only reads them. That the guest may write meanwhile does not matter: no Rust
            // reference to guest memory exists.
            unsafe {
                libc::sendmsg(
                    socket.as_raw_fd(),
                    header,
                    libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
                )
            }
        })
    }

    /// Receives into what is left, without waiting. All vectors must be guest memory.
    pub(crate) fn receive(&mut self, socket: BorrowedFd<'_>) -> Result<Step, MemoryIoError> {
        let step = self.transfer(|header| {
            // SAFETY: as in `send`, and the only caller, `Scatter`, pushes guest memory alone, which may be
            // written through a pointer at any time.
            unsafe { libc::recvmsg(socket.as_raw_fd(), header, libc::MSG_DONTWAIT) }
        })?;
        if step == Step::Moved(0) {
            Err(MemoryIoError::Closed)
        } else {
            Ok(step)
        }
    }

    fn push(&mut self, base: *mut u8, len: usize) {
        if len > 0 {
            self.vectors.push(libc::iovec {
                iov_base: base.cast(),
                iov_len: len,
            });
        }
    }

    fn transfer(
        &mut self,
        mut call: impl FnMut(&mut libc::msghdr) -> libc::ssize_t,
    ) -> Result<Step, MemoryIoError> {
        let left = &mut self.vectors[self.at..];
        if left.is_empty() {
            return Ok(Step::Done);
        }
        // SAFETY: a message header is plain data for which zeroes mean "no address, no control data".
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = left.as_mut_ptr();
        header.msg_iovlen = left.len().min(MAX_VECTORS);
        let moved = loop {
            let Ok(moved) = usize::try_from(call(&mut header)) else {
                let error = io::Error::last_os_error();
                match error.kind() {
                    io::ErrorKind::Interrupted => continue,
                    io::ErrorKind::WouldBlock => return Ok(Step::WouldBlock),
                    _ => return Err(MemoryIoError::Socket(error)),
                }
            };
            break moved;
        };
        self.advance(moved);
        Ok(if self.at == self.vectors.len() {
            Step::Done
        } else {
            Step::Moved(moved)
        })
    }

    fn advance(&mut self, mut moved: usize) {
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
