//! An eventfd by which another thread wakes the device thread.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::{EventfdFlags, eventfd};

/// Readable from [`WakeEvent::raise`] to [`WakeEvent::clear`]. Both may be called from any thread, and neither blocks.
///
/// What KVM raises or waits for is a `vmm_sys_util::eventfd::EventFd`, as KVM's bindings take no other; that type does
/// not implement [`AsFd`], by which a device lends its events.
#[derive(Debug)]
pub(crate) struct WakeEvent(OwnedFd);

impl WakeEvent {
    /// An event that is not raised. Fails if the process is out of file descriptors.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?))
    }

    /// Raises the event.
    pub(crate) fn raise(&self) {
        // Fails only if the counter is full, and then the event is raised already.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Takes the event back; whether it was raised.
    pub(crate) fn clear(&self) -> bool {
        rustix::io::read(&self.0, &mut [0; 8]).is_ok()
    }
}

impl AsFd for WakeEvent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for WakeEvent {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_raised_until_it_is_cleared() {
        let event = WakeEvent::new().unwrap();
        assert!(!event.clear());
        event.raise();
        event.raise();
        assert!(event.clear());
        assert!(!event.clear());
    }
}
