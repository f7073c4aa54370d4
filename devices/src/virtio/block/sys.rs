//! The system calls behind a disk that no safe wrapper offers.

#![allow(
    unsafe_code,
    reason = "positioned I/O on guest memory, open-file-description locks and BLKFLSBUF have no safe wrapper"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

/// A place in a file, to copy from and to guest memory. Moves on with what was copied; the file's own offset
/// is left alone.
pub(super) struct At<'a> {
    pub(super) file: &'a File,
    /// In bytes.
    pub(super) offset: u64,
}

impl At<'_> {
    fn file_offset(&self) -> Result<libc::off_t, VolatileMemoryError> {
        libc::off_t::try_from(self.offset)
            .map_err(|_| VolatileMemoryError::IOError(io::ErrorKind::InvalidInput.into()))
    }

    /// Moves on by the result of a call, or turns it into an error.
    fn advance(&mut self, result: libc::ssize_t) -> Result<usize, VolatileMemoryError> {
        let count =
            usize::try_from(result).map_err(|_| VolatileMemoryError::IOError(io::Error::last_os_error()))?;
        self.offset = self.offset.saturating_add(count as u64);
        Ok(count)
    }
}

impl ReadVolatile for At<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buffer: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let offset = self.file_offset()?;
        let guard = buffer.ptr_guard_mut();
        // SAFETY: the descriptor is open as long as `self.file` lives; a `VolatileSlice` promises that its
        // pointer is valid for writes of its length, and the guard keeps it so during the call.
        let result =
            unsafe { libc::pread(self.file.as_raw_fd(), guard.as_ptr().cast(), buffer.len(), offset) };
        let copied = self.advance(result);
        // After an error any part may have been written.
        buffer
            .bitmap()
            .mark_dirty(0, *copied.as_ref().unwrap_or(&buffer.len()));
        copied
    }
}

impl WriteVolatile for At<'_> {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        buffer: &VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let offset = self.file_offset()?;
        let guard = buffer.ptr_guard();
        // SAFETY: as above, for reads.
        let result =
            unsafe { libc::pwrite(self.file.as_raw_fd(), guard.as_ptr().cast(), buffer.len(), offset) };
        self.advance(result)
    }
}

/// A lock on a whole file.
#[derive(Clone, Copy, Debug)]
pub(super) enum Lock {
    /// Others may lock it too, but not exclusively.
    Shared,
    /// Nobody else has a lock.
    Exclusive,
    /// None.
    Unlocked,
}

/// Sets the lock of the open file description; `Ok(false)` if somebody else's lock is in the way.
pub(super) fn set_lock(file: &File, lock: Lock) -> io::Result<bool> {
    let kind = match lock {
        Lock::Shared => libc::F_RDLCK,
        Lock::Exclusive => libc::F_WRLCK,
        Lock::Unlocked => libc::F_UNLCK,
    };
    // Start 0 and length 0 mean the whole file, however it grows; the process ID must be 0.
    let request = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open as long as `file` lives, and the call only reads `request`.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const request) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

/// Writes back and drops what the host has cached of a block device.
pub(super) fn flush_buffers(device: &File) -> io::Result<()> {
    /// `_IO(0x12, 97)` of `linux/fs.h`.
    const BLKFLSBUF: libc::Ioctl = 0x1261;
    // SAFETY: the descriptor is open as long as `device` lives; this request takes no argument.
    if unsafe { libc::ioctl(device.as_raw_fd(), BLKFLSBUF, 0) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
