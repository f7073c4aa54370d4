//! What a device waits for on the host, as one descriptor for the device thread.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use rustix::time::Timespec;

/// The most events that one look takes.
const EVENTS: usize = 64;

/// Descriptors, watched edge by edge, each with a number that comes with its events. It is itself readable when there
/// are some. What is closed is watched no more.
#[derive(Debug)]
pub(crate) struct HostWatch(OwnedFd);

impl HostWatch {
    /// One that watches nothing.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(CreateFlags::CLOEXEC)?))
    }

    /// Watches one more.
    pub(crate) fn add(&self, source: impl AsFd, token: u64, events: EventFlags) -> io::Result<()> {
        let data = EventData::new_u64(token);
        Ok(epoll::add(&self.0, source, data, events | EventFlags::ET)?)
    }

    /// Watches one for something else.
    pub(crate) fn change(&self, source: impl AsFd, token: u64, events: EventFlags) -> io::Result<()> {
        let data = EventData::new_u64(token);
        Ok(epoll::modify(&self.0, source, data, events | EventFlags::ET)?)
    }

    /// What has happened since the last look, and whether there may be more.
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
