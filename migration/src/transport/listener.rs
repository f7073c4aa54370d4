//! Where sources connect: every address of a TCP endpoint, or a Unix socket.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use named_socket::NamedListener;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};

use super::{Connection, Endpoint, TransportError};
use crate::control::Control;

/// Waits for connections. A Unix socket's file goes with the listener.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: ListeningSocket,
    endpoint: Endpoint,
}

#[derive(Debug)]
enum ListeningSocket {
    Tcp(Vec<TcpListener>),
    Unix(NamedListener),
}

impl Listener {
    /// Listens. A socket file that a dead process left behind is taken over.
    pub(crate) fn bind(endpoint: &Endpoint) -> Result<Self, TransportError> {
        let failed = |source| TransportError::Listen {
            endpoint: endpoint.clone(),
            source,
        };
        let (socket, endpoint) = match endpoint {
            Endpoint::Tcp(addresses) => {
                let listeners = bind_all(addresses).map_err(failed)?;
                let bound = listeners.iter().map(TcpListener::local_addr);
                let bound = bound.collect::<io::Result<_>>().map_err(failed)?;
                (ListeningSocket::Tcp(listeners), Endpoint::Tcp(bound))
            }
            Endpoint::Unix(path) => {
                let listener = NamedListener::bind(path)?;
                listener.listener().set_nonblocking(true).map_err(failed)?;
                (ListeningSocket::Unix(listener), endpoint.clone())
            }
        };
        Ok(Self { socket, endpoint })
    }

    /// Where it listens, with the port that the system chose if it was to choose one.
    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Waits for the next connection until `until` (then nothing), or until `control` is cancelled (an error).
    pub(crate) fn accept(
        &self,
        control: &Control,
        until: Option<Instant>,
    ) -> Result<Option<Connection>, TransportError> {
        let failed = |source| TransportError::Accept {
            endpoint: self.endpoint.clone(),
            source,
        };
        loop {
            if control.is_cancelled() {
                return Err(TransportError::Cancelled);
            }
            match self.try_accept() {
                Ok(connection) => return Ok(Some(connection)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let left = until.map(|until| until.saturating_duration_since(Instant::now()));
                    if left.is_some_and(|left| left.is_zero()) {
                        return Ok(None);
                    }
                    let left = left.and_then(|left| Timespec::try_from(left).ok());
                    let mut events: Vec<PollFd<'_>> = self
                        .sockets()
                        .chain([control.wake()])
                        .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
                        .collect();
                    match poll(&mut events, left.as_ref()) {
                        Ok(_) | Err(Errno::INTR) => {}
                        Err(error) => return Err(failed(error.into())),
                    }
                }
                // The peer had gone before its connection was accepted.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error)),
            }
        }
    }

    fn try_accept(&self) -> io::Result<Connection> {
        match &self.socket {
            ListeningSocket::Tcp(listeners) => {
                let mut last_error = io::ErrorKind::WouldBlock.into();
                for listener in listeners {
                    match listener.accept() {
                        Ok((stream, peer)) => return Connection::from_tcp(stream, peer),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        Err(error) => last_error = error,
                    }
                }
                Err(last_error)
            }
            ListeningSocket::Unix(listener) => {
                let (stream, _) = listener.listener().accept()?;
                Connection::from_unix(stream, self.endpoint.clone())
            }
        }
    }

    fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let (tcp, unix) = match &self.socket {
            ListeningSocket::Tcp(listeners) => (&listeners[..], None),
            ListeningSocket::Unix(listener) => (&[][..], Some(listener.listener().as_fd())),
        };
        tcp.iter().map(AsFd::as_fd).chain(unix)
    }
}

/// How many ports of the system's choice for the first address are tried, as each may be taken at another address.
const MAX_PORTS_TRIED: u32 = 16;

/// Listens on every address that this host has, on one port where the system is to choose it.
fn bind_all(addresses: &[SocketAddr]) -> io::Result<Vec<TcpListener>> {
    let chosen = addresses.len() > 1 && addresses.iter().all(|address| address.port() == 0);
    let mut tries = 0;
    loop {
        tries += 1;
        match bind_each(addresses, chosen) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && chosen && tries < MAX_PORTS_TRIED => {}
            bound => return bound,
        }
    }
}

/// Listens on every address that this host has. With `one_port` all of them get the port of the first.
fn bind_each(addresses: &[SocketAddr], one_port: bool) -> io::Result<Vec<TcpListener>> {
    let mut listeners: Vec<TcpListener> = Vec::new();
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "there is no address");
    for address in addresses {
        let mut address = *address;
        if let (true, Some(first)) = (one_port, listeners.first()) {
            address.set_port(first.local_addr()?.port());
        }
        match bind_tcp(address, addresses.len() > 1) {
            Ok(listener) => listeners.push(listener),
            // A name has addresses of other hosts' interfaces, or of a family that is switched off here.
            Err(error @ (Errno::ADDRNOTAVAIL | Errno::AFNOSUPPORT)) => {
                tracing::info!(%address, %error, "not listening on an address");
                failure = error.into();
            }
            Err(error) => return Err(error.into()),
        }
    }
    if listeners.is_empty() {
        Err(failure)
    } else {
        Ok(listeners)
    }
}

/// The most connections that wait to be accepted.
const MAX_QUEUE: i32 = 128;

/// Listens on one address. `among_others` says whether there are others, of IPv4 perhaps.
fn bind_tcp(address: SocketAddr, among_others: bool) -> Result<TcpListener, Errno> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if among_others && address.is_ipv6() {
        // Otherwise the IPv6 wildcard would take the port at the IPv4 wildcard as well.
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    bind(&socket, &address)?;
    listen(&socket, MAX_QUEUE)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::thread;
    use std::time::Duration;

    use named_socket::NamedListenerError;

    use super::*;

    fn unix(path: &Path) -> Endpoint {
        Endpoint::Unix(path.to_owned())
    }

    #[test]
    fn a_unix_socket_is_its_owners_alone_and_takes_nothing_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let listener = Listener::bind(&unix(&path)).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        let in_use = Listener::bind(&unix(&path)).unwrap_err();
        assert!(matches!(
            in_use,
            TransportError::Named(NamedListenerError::InUse { .. })
        ));
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn every_address_is_listened_on() {
        // All of 127/8 is this host's; the last address belongs to no host (RFC 5737).
        let all: Endpoint = "tcp:127.0.0.1:0,127.0.0.2:0,192.0.2.1:0".parse().unwrap();
        let listener = Listener::bind(&all).unwrap();
        let Endpoint::Tcp(bound) = listener.endpoint().clone() else {
            panic!("TCP only")
        };
        assert_eq!(bound.len(), 2, "{bound:?}");
        assert_eq!(bound[0].port(), bound[1].port());
        let control = Control::new().unwrap();
        for address in bound.iter().rev() {
            let connection = Connection::connect(&(*address).into(), PATIENT, &control).unwrap();
            assert!(
                listener
                    .accept(&control, Some(Instant::now() + PATIENT))
                    .unwrap()
                    .is_some()
            );
            drop(connection);
        }
        let elsewhere = Listener::bind(&"tcp:192.0.2.1:0".parse().unwrap());
        assert!(
            matches!(elsewhere, Err(TransportError::Listen { .. })),
            "{elsewhere:?}"
        );
        // One that is taken is no reason to be content with the others.
        let taken = Endpoint::Tcp(vec![([127, 0, 0, 3], 0).into(), bound[0]]);
        let both = Listener::bind(&taken);
        assert!(matches!(both, Err(TransportError::Listen { .. })), "{both:?}");
    }

    const PATIENT: Duration = Duration::from_secs(10);

    #[test]
    fn a_listener_that_waits_is_woken_by_cancel() {
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let control = Control::new().unwrap();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| listener.accept(&control, None));
            control.cancel();
            assert!(matches!(waiting.join().unwrap(), Err(TransportError::Cancelled)));
        });
    }

    #[test]
    fn a_listener_waits_no_longer_than_asked() {
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let control = Control::new().unwrap();
        let until = Instant::now() + Duration::from_millis(20);
        assert!(listener.accept(&control, Some(until)).unwrap().is_none());
        assert!(Instant::now() >= until);
    }

    #[test]
    fn a_connection_that_is_refused_is_an_error_with_the_endpoint() {
        let control = Control::new().unwrap();
        let endpoint = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap())
            .unwrap()
            .endpoint()
            .clone();
        let error = Connection::connect(&endpoint, Duration::from_secs(5), &control).unwrap_err();
        assert!(error.to_string().contains(&endpoint.to_string()), "{error}");
        let error = Connection::connect(
            &unix(Path::new("/nonexistent/x")),
            Duration::from_secs(5),
            &control,
        )
        .unwrap_err();
        assert!(matches!(error, TransportError::Connect { .. }), "{error}");
    }

    #[test]
    fn a_connect_that_is_not_accepted_times_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("full");
        let listener = UnixListener::bind(&path).unwrap();
        // Linux takes a second listen as a change of the queue's length.
        listen(&listener, 1).unwrap();
        let (patience, control) = (Duration::from_millis(20), Control::new().unwrap());
        let mut waiting = Vec::new();
        let error = loop {
            match Connection::connect(&unix(&path), patience, &control) {
                Ok(connection) => waiting.push(connection),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, TransportError::ConnectTimedOut { .. }), "{error}");
    }
}
