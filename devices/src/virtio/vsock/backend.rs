//! The device's host side: a Unix socket that programs connect to, and the sockets of programs that wait for the guest.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use named_socket::connect_now;
use rustix::event::epoll::EventFlags;

use super::packet::{PORT_ANY, PortPair};
use crate::host_socket::{HostSocket, HostSocketError};
use crate::timer::Timer;
use crate::virtio::{HostBackend, HostError};
use crate::watch::HostWatch;

/// Most bytes of the socket's path: those of the guest's connections end in `_4294967295`.
const PATH_MAX: usize = named_socket::PATH_MAX - 11;

/// The host side of a device. Opening it puts no socket into the file system: the socket is there while this process
/// holds the locks ([`HostBackend`]), which is while it runs the guest.
#[derive(Debug)]
pub struct VsockBackend {
    socket: HostSocket,
    /// Watches the socket, the timer and all streams.
    watch: HostWatch,
    timer: Timer,
}

/// What has happened on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HostEvent {
    /// A program has connected to the socket.
    Accept,
    /// The time of [`VsockBackend::wake_in`] has passed.
    Time,
    /// A program that has not sent its line, known by its port, has sent something.
    Greeting(u32),
    /// There is an epoll event of a connection's stream.
    Stream(PortPair, EventFlags),
}

impl VsockBackend {
    /// A backend with its socket at `path`.
    pub fn open(path: &Path) -> Result<Self, HostSocketError> {
        let socket = HostSocket::at(path, PATH_MAX)?;
        let watch = HostWatch::new().map_err(socket.failed("watch it"))?;
        let timer = Timer::new().map_err(socket.failed("make a timer"))?;
        watch
            .add(&timer, VsockToken::Time.data(), EventFlags::IN)
            .map_err(socket.failed("watch its timer"))?;
        Ok(Self { socket, watch, timer })
    }

    /// Where programs connect.
    pub fn path(&self) -> &Path {
        self.socket.path()
    }

    /// Readable when there is something to [`VsockBackend::poll`].
    pub(super) fn events(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }

    /// The events since the last call, and whether there may be more.
    pub(super) fn poll(&self) -> io::Result<(Vec<HostEvent>, bool)> {
        let (events, more) = self.watch.poll()?;
        let decoded = events
            .into_iter()
            .map(|(data, flags)| VsockToken::event(data, flags));
        Ok((decoded.collect(), more))
    }

    /// Sets the timer for one [`HostEvent::Time`].
    pub(super) fn wake_in(&self, time: Duration) -> io::Result<()> {
        self.timer.set(time)
    }

    /// The next program that has connected; `None` if none waits.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        self.socket.accept()
    }

    /// Connects to the program that waits for the guest on `port`.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = OsString::from(self.path());
        path.push(format!("_{port}"));
        connect_now(Path::new(&path))
    }

    /// Watches a program that has not sent its line.
    pub(super) fn watch_greeting(&self, stream: &UnixStream, host_port: u32) -> io::Result<()> {
        self.watch
            .add(stream, VsockToken::Greeting(host_port).data(), EventFlags::IN)
    }

    /// Watches a connection's socket, which was a greeting's if `greeted`.
    pub(super) fn watch(&self, stream: &UnixStream, ports: PortPair, greeted: bool) -> io::Result<()> {
        let events = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP;
        let data = VsockToken::Stream(ports).data();
        if greeted {
            self.watch.change(stream, data, events)
        } else {
            self.watch.add(stream, data, events)
        }
    }
}

impl HostBackend for VsockBackend {
    fn take_locks(&self) -> Result<(), HostError> {
        Ok(self.socket.listen(&self.watch, VsockToken::Accept.data())?)
    }

    fn release_locks(&self) -> Result<(), HostError> {
        self.socket.close();
        Ok(())
    }

    /// Nothing to do: streams are not stored.
    fn flush(&self) -> Result<(), HostError> {
        Ok(())
    }

    /// Nothing to do: streams are not cached.
    fn invalidate(&self) -> Result<(), HostError> {
        Ok(())
    }
}

/// What is watched, encoded as the number that comes with its events: the ports of a connection, or something else
/// where the guest's port is [`PORT_ANY`], which no socket has.
enum VsockToken {
    Accept,
    Time,
    Greeting(u32),
    Stream(PortPair),
}

impl VsockToken {
    fn data(self) -> u64 {
        let of = |host, guest| u64::from(host) << 32 | u64::from(guest);
        match self {
            Self::Accept => of(0, PORT_ANY),
            Self::Time => of(1, PORT_ANY),
            Self::Greeting(host) => of(host, PORT_ANY),
            Self::Stream(ports) => of(ports.host, ports.guest),
        }
    }

    fn event(data: u64, flags: EventFlags) -> HostEvent {
        let (host, guest) = ((data >> 32) as u32, data as u32);
        match (host, guest) {
            (0, PORT_ANY) => HostEvent::Accept,
            (1, PORT_ANY) => HostEvent::Time,
            (host, PORT_ANY) => HostEvent::Greeting(host),
            (host, guest) => HostEvent::Stream(PortPair { host, guest }, flags),
        }
    }
}
