//! The system calls behind a disk that no safe wrapper offers.

#![allow(
    unsafe_code,
    reason = "open-file-description locks and BLKFLSBUF have no safe wrapper"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// A lock on some bytes of a file.
#[derive(Clone, Copy, Debug)]
pub(super) enum FileLock {
    /// Other processes may lock them too, but not exclusively.
    Shared,
    /// No other process may lock them.
    Exclusive,
    /// None.
    Unlocked,
}

/// A range of bytes of a file, which may be beyond its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ByteRange {
    /// The first.
    pub(super) start: u64,
    /// How many; 0 stands for all from the first on, however the file grows.
    pub(super) len: u64,
}

impl ByteRange {
    /// All of a file.
    pub(super) const ALL: Self = Self { start: 0, len: 0 };

    /// One byte.
    pub(super) const fn byte(start: u64) -> Self {
        Self { start, len: 1 }
    }
}

/// Sets a lock of the open file description; `Ok(false)` if the lock of another one conflicts.
pub(super) fn set_lock(file: &File, range: ByteRange, lock: FileLock) -> io::Result<bool> {
    let kind = match lock {
        FileLock::Shared => libc::F_RDLCK,
        FileLock::Exclusive => libc::F_WRLCK,
        FileLock::Unlocked => libc::F_UNLCK,
    };
    let request = request(kind, range)?;
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

/// One of the locks, shared or exclusive, that other open file descriptions have on some of these bytes.
pub(super) fn find_lock(file: &File, range: ByteRange) -> io::Result<Option<ByteRange>> {
    let mut request = request(libc::F_WRLCK, range)?;
    // SAFETY: the descriptor is open as long as `file` lives, and the call reads and writes `request` alone.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if i32::from(request.l_type) == libc::F_UNLCK {
        return Ok(None);
    }
    let number = |number: i64| u64::try_from(number).map_err(io::Error::other);
    Ok(Some(ByteRange {
        start: number(request.l_start)?,
        len: number(request.l_len)?,
    }))
}

/// Builds a request, whose process ID must be 0.
fn request(kind: libc::c_int, range: ByteRange) -> io::Result<libc::flock> {
    let number = |number: u64| i64::try_from(number).map_err(io::Error::other);
    Ok(libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: number(range.start)?,
        l_len: number(range.len)?,
        l_pid: 0,
    })
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
