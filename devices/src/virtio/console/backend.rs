//! The host side of the named ports: a Unix socket each.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use rustix::event::epoll::EventFlags;

use super::parameters::{ConsoleParameters, ConsoleParametersError};
use crate::HostSocketError;
use crate::host_socket::HostSocket;
use crate::virtio::{HostBackend, HostError};
use crate::watch::HostWatch;

/// The host side of the named ports. Opening it puts no sockets into the file system: they are there while this process
/// holds the locks ([`HostBackend`]), which is while it runs the guest.
#[derive(Debug)]
pub struct ConsoleBackend {
    names: Vec<String>,
    /// One for each name.
    sockets: Vec<HostSocket>,
    /// Watches the sockets and the programs that have connected.
    watch: HostWatch,
}

/// Why ports cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleBackendError {
    /// The ports' names or their number are not valid.
    #[error(transparent)]
    Parameters(#[from] ConsoleParametersError),
    /// A port's socket cannot be used.
    #[error("port {name:?}")]
    Socket {
        /// The port.
        name: String,
        /// The cause.
        #[source]
        source: HostSocketError,
    },
    /// Two ports with one socket.
    #[error("port {name:?}: expected a socket of its own, got that of another port: {}", path.display())]
    Shared {
        /// The port.
        name: String,
        /// The socket.
        path: PathBuf,
    },
    /// The sockets cannot be watched.
    #[error("ports: cannot watch their sockets")]
    Watch(#[source] io::Error),
}

impl ConsoleBackend {
    /// A backend for ports with these names and sockets at these paths.
    pub fn open(ports: &[(String, PathBuf)]) -> Result<Self, ConsoleBackendError> {
        let names: Vec<_> = ports.iter().map(|(name, _)| name.clone()).collect();
        let parameters = ConsoleParameters {
            has_terminal: false,
            ports: names,
        };
        parameters.check()?;
        let mut paths = BTreeSet::new();
        let mut sockets = Vec::with_capacity(ports.len());
        for (name, path) in ports {
            let socket = HostSocket::at(path, named_socket::PATH_MAX).map_err(|source| {
                ConsoleBackendError::Socket {
                    name: name.clone(),
                    source,
                }
            })?;
            if !paths.insert(path) {
                let (name, path) = (name.clone(), path.clone());
                return Err(ConsoleBackendError::Shared { name, path });
            }
            sockets.push(socket);
        }
        Ok(Self {
            names: parameters.ports,
            sockets,
            watch: HostWatch::new().map_err(ConsoleBackendError::Watch)?,
        })
    }

    /// The ports' names.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Readable when there is something to [`ConsoleBackend::poll`] at.
    pub(super) fn events(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }

    /// Handles events, and returns the ports, counted from 0, whose program has closed.
    pub(super) fn poll(&self) -> io::Result<Vec<usize>> {
        // One poll returns more events than there are sockets.
        let (events, _) = self.watch.poll()?;
        let gone = events.into_iter().filter_map(|(token, flags)| {
            let port = usize::try_from(token).ok()?.checked_sub(self.sockets.len())?;
            flags
                .intersects(EventFlags::HUP | EventFlags::ERR)
                .then_some(port)
        });
        Ok(gone.collect())
    }

    /// Accepts the next program that has connected to a port, and watches it; `None` if none waits.
    pub(super) fn accept(&self, port: usize) -> io::Result<Option<UnixStream>> {
        let Some(stream) = self
            .sockets
            .get(port)
            .map(HostSocket::accept)
            .transpose()?
            .flatten()
        else {
            return Ok(None);
        };
        let events = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP;
        self.watch
            .add(&stream, (self.sockets.len() + port) as u64, events)?;
        Ok(Some(stream))
    }
}

impl HostBackend for ConsoleBackend {
    fn take_locks(&self) -> Result<(), HostError> {
        let listened = (0..)
            .zip(&self.sockets)
            .try_for_each(|(token, socket)| socket.listen(&self.watch, token));
        if listened.is_err() {
            // All of them or none.
            self.sockets.iter().for_each(HostSocket::close);
        }
        Ok(listened?)
    }

    fn release_locks(&self) -> Result<(), HostError> {
        self.sockets.iter().for_each(HostSocket::close);
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
