//! What a device waits for on the host, as one descriptor for the device thread (epoll).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use rustix::time::Timespec;

/// Most events that one poll returns.
const EVENTS: usize = 64;

/// Descriptors of the host, watched edge-triggered, each with a token that comes with its events. The epoll descriptor
/// itself is readable when there are events. A descriptor that is closed leaves the watch.
#[derive(Debug)]
pub(crate) struct HostWatch(OwnedFd);

impl HostWatch {
    /// A watch of no descriptors.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(CreateFlags::CLOEXEC)?))
    }

    /// Adds a descriptor.
    pub(crate) fn add(&self, source: impl AsFd, token: u64, events: EventFlags) -> io::Result<()> {
        let data = EventData::new_u64(token);
        Ok(epoll::add(&self.0, source, data, events | EventFlags::ET)?)
    }

    /// Changes a descriptor's token and events.
    pub(crate) fn change(&self, source: impl AsFd, token: u64, events: EventFlags) -> io::Result<()> {
        let data = EventData::new_u64(token);
        Ok(epoll::modify(&self.0, source, data, events | EventFlags::ET)?)
    }

    /// The events since the last call, and whether there may be more.
    pub(crate) fn poll(&self) -> io::Result<(Vec<(u64, EventFlags)>, bool)> {
        let mut events: Vec<Event> = Vec::with_capacity(EVENTS);
        let at_once = Timespec::default();
        loop {
            match epoll::wait(
                &self.0,
                rustix::buffer::spare_capacity(&mut events),
                Some(&at_once),
            ) {
                Ok(count) => {
                    let seen = events.iter().map(|event| (event.data.u64(), event.flags));
                    return Ok((seen.collect(), count == EVENTS));
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for HostWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
