//! One byte stream to a peer, and how it is connected. Connecting never blocks, so that a cancel can end it.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt};

use super::{Endpoint, TransportError};
use crate::control::Control;

/// Kernel buffer of a Unix socket: some milliseconds of a fast network, so that neither side waits for the
/// other's scheduler.
const SOCKET_BUFFER: usize = 4 << 20;

/// Kernel buffer of a TCP stream to a peer that is near, of which the kernel makes twice as much: what it holds
/// stays in a core's cache until it is read. Over loopback, two streams with the buffer that TCP tunes itself to
/// (4 MiB) take 40 % more CPU time for the same content.
const NEAR_BUFFER: usize = 512 << 10;
/// The longest round trip to a peer that is near: 100 Gbit/s carry in it as much as the kernel makes of that buffer. Two
/// streams, the default, hold twice as much, so that the buffer does not hold a network up.
const NEAR: Duration = Duration::from_micros(80);

/// One byte stream to a peer.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: StreamSocket,
    peer: Endpoint,
}

/// The socket of a connection.
#[derive(Debug)]
enum StreamSocket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Connection {
    /// Connects, and gives up after `timeout` or when `control` is cancelled.
    pub(crate) fn connect(
        endpoint: &Endpoint,
        timeout: Duration,
        control: &Control,
    ) -> Result<Self, TransportError> {
        let deadline = Instant::now() + timeout;
        let connected = match endpoint {
            Endpoint::Tcp(addresses) => connect_tcp(addresses, deadline, control)
                .map(|(socket, address)| (StreamSocket::Tcp(socket.into()), address.into())),
            Endpoint::Unix(path) => connect_unix(path, deadline, control)
                .map(|stream| (StreamSocket::Unix(stream), endpoint.clone())),
        };
        match connected.and_then(|(stream, peer)| Self::prepare(stream, peer)) {
            Ok(connection) => Ok(connection),
            Err(_) if control.is_cancelled() => Err(TransportError::Cancelled),
            Err(error) if matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => {
                Err(TransportError::ConnectTimedOut {
                    endpoint: endpoint.clone(),
                    after: timeout,
                })
            }
            Err(source) => Err(TransportError::Connect {
                endpoint: endpoint.clone(),
                source,
            }),
        }
    }

    /// The peer's endpoint: of several addresses the one that answered.
    pub(crate) fn peer(&self) -> &Endpoint {
        &self.peer
    }

    /// Whether file descriptors can be sent over it.
    pub(crate) fn passes_files(&self) -> bool {
        matches!(self.stream, StreamSocket::Unix(_))
    }

    /// Ends one direction or both. Threads that wait for data, on either side, wake up.
    pub(crate) fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        match &self.stream {
            StreamSocket::Tcp(stream) => stream.shutdown(how),
            StreamSocket::Unix(stream) => stream.shutdown(how),
        }
    }

    /// Sets the kernel's buffer for page content to a peer at this distance. The buffer matters for speed alone, and only a
    /// privileged process may set it: otherwise TCP tunes it itself.
    pub(crate) fn carry_pages(&self, round_trip: Duration) {
        if round_trip <= NEAR && matches!(self.stream, StreamSocket::Tcp(_)) {
            let _ = sockopt::set_socket_send_buffer_size_force(self, NEAR_BUFFER);
        }
    }

    pub(super) fn from_tcp(stream: TcpStream, peer: SocketAddr) -> io::Result<Self> {
        Self::prepare(StreamSocket::Tcp(stream), peer.into())
    }

    pub(super) fn from_unix(stream: UnixStream, peer: Endpoint) -> io::Result<Self> {
        Self::prepare(StreamSocket::Unix(stream), peer)
    }

    fn prepare(stream: StreamSocket, peer: Endpoint) -> io::Result<Self> {
        if let StreamSocket::Tcp(stream) = &stream {
            stream.set_nodelay(true)?;
        }
        let connection = Self { stream, peer };
        connection.enlarge_buffers();
        Ok(connection)
    }

    /// Enlarges the buffers of a Unix socket; TCP tunes its own. Their size matters for speed alone, and only a privileged
    /// process gets more than the system's default limit.
    fn enlarge_buffers(&self) {
        if matches!(self.stream, StreamSocket::Unix(_))
            && sockopt::set_socket_send_buffer_size_force(self, SOCKET_BUFFER).is_err()
        {
            let _ = sockopt::set_socket_send_buffer_size(self, SOCKET_BUFFER);
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.stream {
            StreamSocket::Tcp(stream) => stream.as_fd(),
            StreamSocket::Unix(stream) => stream.as_fd(),
        }
    }
}

fn connect_unix(path: &Path, deadline: Instant, control: &Control) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket = new_socket(AddressFamily::UNIX)?;
    loop {
        check(deadline, control)?;
        match connect(&socket, &address) {
            Ok(()) | Err(Errno::ISCONN) => break,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                wait(&[], deadline.min(Instant::now() + QUEUE_RETRY), control)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    ioctl_fionbio(&socket, false)?;
    Ok(socket.into())
}

/// The pause before a connect is tried again while a Unix socket's queue is full: there is no event for room in it.
const QUEUE_RETRY: Duration = Duration::from_millis(10);

/// How long an address may stay silent before the next one is tried as well (RFC 8305).
const HEAD_START: Duration = Duration::from_millis(250);

/// Tries addresses of one host until one answers: the next one when the one before has failed, or has been silent for
/// [`HEAD_START`]. Attempts that were begun go on until one succeeds or the time is over.
fn connect_tcp(
    addresses: &[SocketAddr],
    deadline: Instant,
    control: &Control,
) -> io::Result<(OwnedFd, SocketAddr)> {
    let mut rest = alternate(addresses).into_iter();
    let mut tried: Vec<(OwnedFd, SocketAddr)> = Vec::new();
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "there is no address");
    let mut next_at = Instant::now();
    loop {
        check(deadline, control)?;
        if (tried.is_empty() || next_at <= Instant::now())
            && let Some(address) = rest.next()
        {
            match start_connect(address) {
                Ok(socket) => tried.push((socket, address)),
                Err(error) => failure = error,
            }
            next_at = Instant::now() + HEAD_START;
            continue;
        }
        if tried.is_empty() {
            return Err(failure);
        }
        let until = if rest.len() == 0 {
            deadline
        } else {
            deadline.min(next_at)
        };
        let sockets: Vec<BorrowedFd<'_>> = tried.iter().map(|(socket, _)| socket.as_fd()).collect();
        let Some(at) = wait(&sockets, until, control)? else {
            continue;
        };
        let (socket, address) = tried.swap_remove(at);
        match sockopt::socket_error(&socket)? {
            Ok(()) => {
                ioctl_fionbio(&socket, false)?;
                return Ok((socket, address));
            }
            Err(error) => {
                failure = error.into();
                next_at = Instant::now();
            }
        }
    }
}

/// Addresses in their order, but one of each family in turn: where one family does not work, the second attempt is
/// with the other.
fn alternate(addresses: &[SocketAddr]) -> Vec<SocketAddr> {
    let first_is_v6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let of = |v6: bool| {
        addresses
            .iter()
            .copied()
            .filter(move |address| address.is_ipv6() == v6)
    };
    let (mut ones, mut others) = (of(first_is_v6), of(!first_is_v6));
    let mut order = Vec::with_capacity(addresses.len());
    while order.len() < addresses.len() {
        order.extend(ones.next());
        order.extend(others.next());
    }
    order
}

/// Begins to connect. The socket becomes writable when that has succeeded or failed.
fn start_connect(address: SocketAddr) -> io::Result<OwnedFd> {
    let socket = new_socket(match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    })?;
    match connect(&socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS | Errno::INTR) => Ok(socket),
        Err(error) => Err(error.into()),
    }
}

/// A socket that does not block while it connects, so that a cancel can end the wait.
fn new_socket(family: AddressFamily) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(family, SocketType::STREAM, flags, None)?)
}

/// An error once the time is over or the connecting was cancelled.
fn check(deadline: Instant, control: &Control) -> io::Result<()> {
    if control.is_cancelled() {
        Err(io::ErrorKind::Interrupted.into())
    } else if Instant::now() >= deadline {
        Err(io::ErrorKind::TimedOut.into())
    } else {
        Ok(())
    }
}

/// Waits until one of the sockets is writable, `until` has come or a cancel has; may return early. Returns the index of a
/// socket that is writable.
fn wait(sockets: &[BorrowedFd<'_>], until: Instant, control: &Control) -> io::Result<Option<usize>> {
    let left = until.saturating_duration_since(Instant::now());
    let left = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut events: Vec<PollFd<'_>> = sockets.iter().map(|fd| PollFd::new(fd, PollFlags::OUT)).collect();
    events.push(PollFd::from_borrowed_fd(control.wake(), PollFlags::IN));
    match poll(&mut events, Some(&left)) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let ready = events.iter().position(|event| !event.revents().is_empty());
    Ok(ready.filter(|at| *at < sockets.len()))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn control() -> Control {
        Control::new().unwrap()
    }

    /// An address that drops connections: its queue is full, and stays so while the returned sockets live.
    fn black_hole() -> (SocketAddr, (TcpListener, Vec<OwnedFd>)) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let address = listener.local_addr().unwrap();
        let mut waiting = Vec::new();
        loop {
            let socket = start_connect(address).unwrap();
            let until = Instant::now() + Duration::from_millis(200);
            let answered = wait(&[socket.as_fd()], until, &control()).unwrap();
            waiting.push(socket);
            if answered.is_none() {
                return (address, (listener, waiting));
            }
        }
    }

    #[test]
    fn an_address_that_swallows_everything_costs_a_moment() {
        let (dead, _full) = black_hole();
        let alive = TcpListener::bind("127.0.0.1:0").unwrap();
        let there = alive.local_addr().unwrap();
        let endpoint = Endpoint::Tcp(vec![dead, there]);
        let began = Instant::now();
        let connection = Connection::connect(&endpoint, Duration::from_secs(5), &control()).unwrap();
        assert_eq!(
            *connection.peer(),
            there.into(),
            "the address that answered is remembered"
        );
        let took = began.elapsed();
        assert!(took >= HEAD_START && took < Duration::from_secs(3), "{took:?}");
    }

    #[test]
    fn an_address_that_refuses_costs_nothing() {
        let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let alive = TcpListener::bind("127.0.0.1:0").unwrap();
        let there = alive.local_addr().unwrap();
        let (dead, _full) = black_hole();
        // The last one is not waited for.
        let endpoint = Endpoint::Tcp(vec![gone, there, dead]);
        let connection = Connection::connect(&endpoint, Duration::from_secs(5), &control()).unwrap();
        assert_eq!(*connection.peer(), there.into());
        let error = Connection::connect(&gone.into(), Duration::from_secs(5), &control()).unwrap_err();
        assert!(matches!(error, TransportError::Connect { .. }), "{error}");
        let endpoint = Endpoint::Tcp(vec![dead, gone]);
        let error = Connection::connect(&endpoint, Duration::from_millis(600), &control()).unwrap_err();
        assert!(matches!(error, TransportError::ConnectTimedOut { .. }), "{error}");
    }

    #[test]
    fn families_take_turns() {
        let of = |text: &str| match text.parse().unwrap() {
            Endpoint::Tcp(addresses) => addresses,
            Endpoint::Unix(_) => panic!("TCP only"),
        };
        assert_eq!(
            alternate(&of("tcp:[::1]:1,[::1]:2,[::1]:3,1.1.1.1:4,1.1.1.1:5")),
            of("tcp:[::1]:1,1.1.1.1:4,[::1]:2,1.1.1.1:5,[::1]:3")
        );
        assert_eq!(
            alternate(&of("tcp:1.1.1.1:1,[::1]:2")),
            of("tcp:1.1.1.1:1,[::1]:2")
        );
    }
}
