//! The one place that gives guest addresses to the kernel, and marks the pages that the kernel writes.

#![allow(
    unsafe_code,
    reason = "positioned and vectored I/O on guest memory has no safe wrapper"
)]

mod ring;
mod transfer;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use guest_memory::PageMarks;
use vm_memory::bitmap::{Bitmap, BitmapSlice, RefSlice};
use vm_memory::{
    GuestMemoryBackend, GuestMemoryError, ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile,
};

use super::Buffers;
use crate::GuestMemory;

pub(super) use ring::IoRing;
pub(super) use transfer::Durability;

/// A place in a file, to copy from and to guest memory. The offset moves on with each copy; the file's own offset does
/// not change.
pub(super) struct FilePosition<'a> {
    pub(super) file: &'a File,
    /// In bytes.
    pub(super) offset: u64,
}

impl FilePosition<'_> {
    fn file_offset(&self) -> Result<libc::off_t, VolatileMemoryError> {
        libc::off_t::try_from(self.offset)
            .map_err(|_| VolatileMemoryError::IOError(io::ErrorKind::InvalidInput.into()))
    }

    /// Moves on by the result of a call, or turns it into an error.
    fn advance(&mut self, result: libc::ssize_t) -> Result<usize, VolatileMemoryError> {
        let count = count(result).map_err(VolatileMemoryError::IOError)?;
        self.offset = self.offset.saturating_add(count as u64);
        Ok(count)
    }
}

impl ReadVolatile for FilePosition<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buffer: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let offset = self.file_offset()?;
        let guard = buffer.ptr_guard_mut();
        let (fd, into) = (self.file.as_raw_fd(), guard.as_ptr().cast());
        // SAFETY: the descriptor is open as long as `self.file` lives; a `VolatileSlice` promises that its
        // pointer is valid for writes of its length, and the guard keeps it so during the call.
        let result = unsafe { libc::pread(fd, into, buffer.len(), offset) };
        let copied = self.advance(result);
        // After an error any part may have been written.
        buffer
            .bitmap()
            .mark_dirty(0, *copied.as_ref().unwrap_or(&buffer.len()));
        copied
    }
}

impl WriteVolatile for FilePosition<'_> {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        buffer: &VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let offset = self.file_offset()?;
        let guard = buffer.ptr_guard();
        let (fd, from) = (self.file.as_raw_fd(), guard.as_ptr().cast());
        // SAFETY: as in `read_volatile`, for reads.
        let result = unsafe { libc::pwrite(fd, from, buffer.len(), offset) };
        self.advance(result)
    }
}

/// Buffers in guest memory for one `readv` or `writev`: a packet, which no two calls could share.
pub(super) struct PacketVectors<'a> {
    memory: &'a GuestMemory,
    slices: Vec<VolatileSlice<'a, RefSlice<'a, PageMarks>>>,
    vectors: Vec<libc::iovec>,
}

impl<'a> PacketVectors<'a> {
    /// Most buffers that Linux takes in one call (`UIO_MAXIOV`).
    pub(super) const MAX: usize = 1024;

    /// An empty list.
    pub(super) fn new(memory: &'a GuestMemory) -> Self {
        Self {
            memory,
            slices: Vec::new(),
            vectors: Vec::new(),
        }
    }

    /// Adds buffers, all of which must lie in memory.
    pub(super) fn push(&mut self, buffers: &Buffers) -> Result<(), GuestMemoryError> {
        for (address, len) in buffers.iter() {
            for slice in self.memory.get_slices(address, len as usize) {
                let slice = slice?;
                self.vectors.push(libc::iovec {
                    // The guard that ends here does nothing: this memory is mapped for good, and not page by page as
                    // Xen's is. The mapping lives as long as the memory that is borrowed for 'a.
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
                self.slices.push(slice);
            }
        }
        Ok(())
    }

    /// Fills the buffers by one read and marks their pages; returns the bytes read.
    pub(super) fn read_from(&self, file: BorrowedFd<'_>) -> io::Result<usize> {
        let len = self.vectors.len() as libc::c_int;
        // SAFETY: the vectors point to slices of guest memory, which `self.slices` keeps valid for writes of their
        // length; no Rust reference to that memory exists.
        let result = unsafe { libc::readv(file.as_raw_fd(), self.vectors.as_ptr(), len) };
        let read = count(result);
        match &read {
            Ok(count) => self.mark(*count),
            // Nothing was read, so nothing was written to memory.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // Any part may have been written.
            Err(_) => self.mark(usize::MAX),
        }
        read
    }

    /// Writes what the buffers hold by one write; returns the bytes written.
    pub(super) fn write_to(&self, file: BorrowedFd<'_>) -> io::Result<usize> {
        let len = self.vectors.len() as libc::c_int;
        // SAFETY: as above, for reads.
        count(unsafe { libc::writev(file.as_raw_fd(), self.vectors.as_ptr(), len) })
    }

    fn mark(&self, mut count: usize) {
        for slice in &self.slices {
            if count == 0 {
                return;
            }
            let part = count.min(slice.len());
            slice.bitmap().mark_dirty(0, part);
            count -= part;
        }
    }
}

/// The bytes that a call moved, or why it moved none.
fn count(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
