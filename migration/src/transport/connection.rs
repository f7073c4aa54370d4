use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::addr::SocketAddrArg;
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
/// A peer is near if 100 Gbit/s carry no more than that buffer holds in a round trip. Two streams, the default, then
/// hold twice as much, so that it holds up no network.
const NEAR: Duration = Duration::from_micros(80);

/// One byte stream to a peer.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: Stream,
    peer: String,
}

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Connection {
    /// Connects, and gives up after `timeout` or when `control` is cancelled (name resolution not counted: the
    /// system's own limits hold).
    pub(crate) fn connect(
        endpoint: &Endpoint,
        timeout: Duration,
        control: &Control,
    ) -> Result<Self, TransportError> {
        let connected = match endpoint {
            Endpoint::Tcp { host, port } => {
                let resolve = |source| TransportError::Resolve {
                    endpoint: endpoint.clone(),
                    source,
                };
                let addresses = (host.as_str(), *port).to_socket_addrs().map_err(resolve)?;
                connect_tcp(addresses, timeout, control)
            }
            Endpoint::Unix(path) => connect_unix(path, timeout, control).map(Stream::Unix),
        };
        match connected.and_then(|stream| Self::prepare(stream, endpoint.to_string())) {
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

    /// Whom it leads to, for messages.
    pub(crate) fn peer(&self) -> &str {
        &self.peer
    }

    /// Whether file descriptors can be sent over it.
    pub(crate) fn passes_files(&self) -> bool {
        matches!(self.stream, Stream::Unix(_))
    }

    /// Ends one direction or both; whoever waits for data then, on either side, wakes up.
    pub(crate) fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        match &self.stream {
            Stream::Tcp(stream) => stream.shutdown(how),
            Stream::Unix(stream) => stream.shutdown(how),
        }
    }

    /// Suits the connection to page content that goes to a peer so far away. That is a matter of speed alone, and
    /// only a privileged process may: else TCP tunes its buffer itself.
    pub(crate) fn carry_pages(&self, round_trip: Duration) {
        if round_trip <= NEAR && matches!(self.stream, Stream::Tcp(_)) {
            let _ = sockopt::set_socket_send_buffer_size_force(self, NEAR_BUFFER);
        }
    }

    pub(super) fn from_tcp(stream: TcpStream, peer: SocketAddr) -> io::Result<Self> {
        Self::prepare(Stream::Tcp(stream), format!("tcp:{peer}"))
    }

    pub(super) fn from_unix(stream: UnixStream, peer: String) -> io::Result<Self> {
        Self::prepare(Stream::Unix(stream), peer)
    }

    fn prepare(stream: Stream, peer: String) -> io::Result<Self> {
        if let Stream::Tcp(stream) = &stream {
            stream.set_nodelay(true)?;
        }
        let connection = Self { stream, peer };
        connection.enlarge_buffers();
        Ok(connection)
    }

    /// Larger buffers are a matter of speed alone. Only a privileged process gets more than the system's
    /// default limit. TCP tunes its buffers itself.
    fn enlarge_buffers(&self) {
        if matches!(self.stream, Stream::Unix(_))
            && sockopt::set_socket_send_buffer_size_force(self, SOCKET_BUFFER).is_err()
        {
            let _ = sockopt::set_socket_send_buffer_size(self, SOCKET_BUFFER);
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.stream {
            Stream::Tcp(stream) => stream.as_fd(),
            Stream::Unix(stream) => stream.as_fd(),
        }
    }
}

/// Tries one address after the other, all within the time.
fn connect_tcp(
    addresses: impl Iterator<Item = SocketAddr>,
    timeout: Duration,
    control: &Control,
) -> io::Result<Stream> {
    let deadline = Instant::now() + timeout;
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in addresses {
        let family = match address {
            SocketAddr::V4(_) => AddressFamily::INET,
            SocketAddr::V6(_) => AddressFamily::INET6,
        };
        match connect_until(family, &address, deadline, control) {
            Ok(socket) => return Ok(Stream::Tcp(socket.into())),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn connect_unix(path: &Path, timeout: Duration, control: &Control) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let deadline = Instant::now() + timeout;
    Ok(connect_until(AddressFamily::UNIX, &address, deadline, control)?.into())
}

/// A listener's queue on a Unix socket is full, and nothing tells when it is not: looked at so often.
const FULL_QUEUE: Duration = Duration::from_millis(10);

/// Connects without blocking in the call, so that a cancel is heard. The socket that is returned blocks, as
/// others do: whoever does not want to wait says so in each call.
fn connect_until(
    family: AddressFamily,
    address: &impl SocketAddrArg,
    deadline: Instant,
    control: &Control,
) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    loop {
        if control.is_cancelled() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let pending = match connect(&socket, address) {
            Ok(()) | Err(Errno::ISCONN) => break,
            Err(Errno::INPROGRESS | Errno::ALREADY | Errno::INTR) => true,
            Err(Errno::AGAIN) => false,
            Err(error) => return Err(error.into()),
        };
        let wait = if pending { left } else { left.min(FULL_QUEUE) };
        let wait = Timespec::try_from(wait).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut events = vec![PollFd::from_borrowed_fd(control.wake(), PollFlags::IN)];
        if pending {
            events.push(PollFd::new(&socket, PollFlags::OUT));
        }
        match poll(&mut events, Some(&wait)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        sockopt::socket_error(&socket)??;
    }
    ioctl_fionbio(&socket, false)?;
    Ok(socket)
}
