//! The system calls behind a disk that no safe wrapper offers.

#![allow(
    unsafe_code,
    reason = "open-file-description locks and BLKFLSBUF have no safe wrapper"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

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
