//! The ioctls and events of a userfaultfd (ioctl_userfaultfd(2)).
#![allow(unsafe_code)] // ioctls, and events that are a union.

use std::os::fd::OwnedFd;

use linux_raw_sys::general::{
    _UFFDIO_COPY, _UFFDIO_WAKE, UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMOVE, UFFDIO, uffd_msg, uffdio_copy,
    uffdio_range,
};
use rustix::io::{Errno, read};
use rustix::ioctl::{Setter, Updater, ioctl, opcode};

const COPY: rustix::ioctl::Opcode = opcode::read_write::<uffdio_copy>(UFFDIO as u8, _UFFDIO_COPY as u8);
const WAKE: rustix::ioctl::Opcode = opcode::read::<uffdio_range>(UFFDIO as u8, _UFFDIO_WAKE as u8);

/// What the kernel reports.
pub(super) enum HandlerEvent {
    /// A thread waits for a page.
    Fault { address: u64 },
    /// Pages were given up.
    Remove { start: u64, end: u64 },
}

/// The next event, if there is one.
pub(super) fn next(descriptor: &OwnedFd) -> Result<Option<HandlerEvent>, Errno> {
    let mut bytes = [0; size_of::<uffd_msg>()];
    match read(descriptor, &mut bytes) {
        Err(Errno::AGAIN) => return Ok(None),
        read => read?,
    };
    // SAFETY: the kernel writes whole events, and any bytes are one.
    let event: uffd_msg = unsafe { std::mem::transmute(bytes) };
    // SAFETY: each variant is plain numbers, and the kind says which of them was written.
    Ok(Some(unsafe {
        match u32::from(event.event) {
            UFFD_EVENT_PAGEFAULT => HandlerEvent::Fault {
                address: event.arg.pagefault.address,
            },
            UFFD_EVENT_REMOVE => HandlerEvent::Remove {
                start: event.arg.remove.start,
                end: event.arg.remove.end,
            },
            _ => return Err(Errno::PROTO),
        }
    }))
}

/// Fills the page at `to`; the threads that wait for it go on.
pub(super) fn copy(descriptor: &OwnedFd, to: u64, page: &[u8]) -> Result<(), Errno> {
    let mut copy = uffdio_copy {
        dst: to,
        src: page.as_ptr() as u64,
        len: page.len() as u64,
        mode: 0,
        copy: 0,
    };
    // SAFETY: the kernel reads and writes one `uffdio_copy`, and reads `page`; it writes to the process that made the
    // descriptor, which asked for that.
    unsafe { ioctl(descriptor, Updater::<COPY, _>::new(&mut copy)) }
}

/// The threads that wait for a page touch it again.
pub(super) fn wake(descriptor: &OwnedFd, start: u64, len: u64) -> Result<(), Errno> {
    // SAFETY: the kernel reads one `uffdio_range`.
    unsafe { ioctl(descriptor, Setter::<WAKE, _>::new(uffdio_range { start, len })) }
}
