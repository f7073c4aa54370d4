//! What backs a device on the host: a Unix socket that programs connect to, and those of programs that wait for
//! the guest.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use rustix::time::Timespec;

use super::packet::{PORT_ANY, Ports};
use crate::named_listener::{NamedListener, NamedListenerError, connect_now};
use crate::timer::Timer;
use crate::virtio::{HostBackend, HostError};

/// Most bytes of the socket's path: what `sockaddr_un` has, less its end, less `_4294967295`.
const PATH_MAX: usize = 108 - 1 - 11;
/// The most events that one look takes.
const EVENTS: usize = 64;

/// The host's side of a device. Opening it puts no socket in the file system: that belongs to whoever runs the
/// guest, and comes and goes with the locks ([`HostBackend`]).
#[derive(Debug)]
pub struct Backend {
    path: PathBuf,
    /// Watches everything below.
    epoll: OwnedFd,
    timer: Timer,
    listener: Mutex<Option<NamedListener>>,
}

/// Why there can be no socket at a path.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The path is too long for a socket.
    #[error("socket {}: expected a path of 1 to {PATH_MAX} bytes, got {got}", path.display())]
    Length {
        /// The socket.
        path: PathBuf,
        /// Bytes of its path.
        got: usize,
    },
    /// There is no folder for it.
    #[error("socket {}: expected its folder to be there, found none", path.display())]
    NoFolder {
        /// The socket.
        path: PathBuf,
    },
    /// The path cannot be had.
    #[error(transparent)]
    Listener(#[from] NamedListenerError),
    /// A system call failed.
    #[error("socket {}: cannot {what}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// What has happened on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HostEvent {
    /// A program has connected to the socket.
    Accept,
    /// The time that [`Backend::wake_in`] was told has passed.
    Time,
    /// A program that has not said where to, known by its port, has something to say.
    Greeting(u32),
    /// A connection's socket has changed.
    Stream(Ports, EventFlags),
}

impl Backend {
    /// For a socket at `path`.
    pub fn open(path: &Path) -> Result<Self, BackendError> {
        let got = path.as_os_str().len();
        if !(1..=PATH_MAX).contains(&got) {
            return Err(BackendError::Length {
                path: path.into(),
                got,
            });
        }
        let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        if folder.is_some_and(|folder| !folder.is_dir()) {
            return Err(BackendError::NoFolder { path: path.into() });
        }
        NamedListener::check_kind(path)?;
        let failed = |what| {
            move |errno: Errno| BackendError::Io {
                path: path.into(),
                what,
                source: errno.into(),
            }
        };
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(failed("watch it"))?;
        let timer = Timer::new().map_err(|source| BackendError::Io {
            path: path.into(),
            what: "make a timer",
            source,
        })?;
        let edges = EventFlags::IN | EventFlags::ET;
        epoll::add(&epoll, &timer, Token::Time.data(), edges).map_err(failed("watch its timer"))?;
        Ok(Self {
            path: path.into(),
            epoll,
            timer,
            listener: Mutex::new(None),
        })
    }

    /// Where programs connect.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Readable when there is something to [`Backend::poll`].
    pub(super) fn events(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// What has happened since the last look, and whether there may be more.
    pub(super) fn poll(&self) -> io::Result<(Vec<HostEvent>, bool)> {
        let mut events: Vec<Event> = Vec::with_capacity(EVENTS);
        let at_once = Timespec::default();
        loop {
            match epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                Some(&at_once),
            ) {
                Ok(count) => {
                    let decoded = events
                        .iter()
                        .map(|event| Token::event(event.data.u64(), event.flags));
                    return Ok((decoded.collect(), count == EVENTS));
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Has a [`HostEvent::Time`] happen, once.
    pub(super) fn wake_in(&self, time: Duration) -> io::Result<()> {
        self.timer.set(time)
    }

    /// The next program that has connected; `None` if none waits.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        let listener = self.listener();
        let Some(listener) = listener.as_ref() else {
            return Ok(None);
        };
        match listener.listener().accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true)?;
                Ok(Some(stream))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Connects to the program that waits for the guest on `port`.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{port}"));
        connect_now(Path::new(&path))
    }

    /// Watches a program that has not said where to.
    pub(super) fn watch_greeting(&self, stream: &UnixStream, host_port: u32) -> io::Result<()> {
        let edges = EventFlags::IN | EventFlags::ET;
        Ok(epoll::add(
            &self.epoll,
            stream,
            Token::Greeting(host_port).data(),
            edges,
        )?)
    }

    /// Watches a connection's socket, which was a greeting's if `greeted`.
    pub(super) fn watch(&self, stream: &UnixStream, ports: Ports, greeted: bool) -> io::Result<()> {
        let edges = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        let data = Token::Stream(ports).data();
        if greeted {
            Ok(epoll::modify(&self.epoll, stream, data, edges)?)
        } else {
            Ok(epoll::add(&self.epoll, stream, data, edges)?)
        }
    }

    fn listener(&self) -> MutexGuard<'_, Option<NamedListener>> {
        self.listener.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listen(&self) -> Result<(), BackendError> {
        let mut listener = self.listener();
        if listener.is_some() {
            return Ok(());
        }
        let failed = |what| {
            move |source| BackendError::Io {
                path: self.path.clone(),
                what,
                source,
            }
        };
        let bound = NamedListener::bind(&self.path)?;
        bound
            .listener()
            .set_nonblocking(true)
            .map_err(failed("listen without waiting"))?;
        let edges = EventFlags::IN | EventFlags::ET;
        epoll::add(&self.epoll, bound.listener(), Token::Accept.data(), edges)
            .map_err(|errno| failed("watch it")(errno.into()))?;
        *listener = Some(bound);
        Ok(())
    }
}

impl HostBackend for Backend {
    fn take_locks(&self) -> Result<(), HostError> {
        Ok(self.listen()?)
    }

    fn release_locks(&self) -> Result<(), HostError> {
        *self.listener() = None;
        Ok(())
    }

    /// Streams are not stored anywhere.
    fn flush(&self) -> Result<(), HostError> {
        Ok(())
    }

    /// Nor read ahead.
    fn invalidate(&self) -> Result<(), HostError> {
        Ok(())
    }
}

/// What is watched, as the number that comes with its events: the ports of a connection, or, where the guest's
/// would be the one that no socket has, something else.
enum Token {
    Accept,
    Time,
    Greeting(u32),
    Stream(Ports),
}

impl Token {
    fn data(self) -> EventData {
        let of = |host, guest| u64::from(host) << 32 | u64::from(guest);
        EventData::new_u64(match self {
            Self::Accept => of(0, PORT_ANY),
            Self::Time => of(1, PORT_ANY),
            Self::Greeting(host) => of(host, PORT_ANY),
            Self::Stream(ports) => of(ports.host, ports.guest),
        })
    }

    fn event(data: u64, flags: EventFlags) -> HostEvent {
        let (host, guest) = ((data >> 32) as u32, data as u32);
        match (host, guest) {
            (0, PORT_ANY) => HostEvent::Accept,
            (1, PORT_ANY) => HostEvent::Time,
            (host, PORT_ANY) => HostEvent::Greeting(host),
            (host, guest) => HostEvent::Stream(Ports { host, guest }, flags),
        }
    }
}
