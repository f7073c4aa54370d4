use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::{Endpoint, TransportError};

/// Kernel buffer of either direction: some milliseconds of a fast network, so that neither side waits for the
/// other's scheduler.
const SOCKET_BUFFER: usize = 4 << 20;

/// One byte stream to a peer.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    peer: String,
}

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Connection {
    /// Connects, and gives up after `timeout` (name resolution not counted: the system's own limits hold).
    pub fn connect(endpoint: &Endpoint, timeout: Duration) -> Result<Self, TransportError> {
        let connected = match endpoint {
            Endpoint::Tcp { host, port } => {
                let resolve = |source| TransportError::Resolve {
                    endpoint: endpoint.clone(),
                    source,
                };
                let addresses = (host.as_str(), *port).to_socket_addrs().map_err(resolve)?;
                connect_tcp(addresses, timeout)
            }
            Endpoint::Unix(path) => connect_unix(path, timeout).map(Stream::Unix),
        };
        match connected.and_then(|stream| Self::prepare(stream, endpoint.to_string())) {
            Ok(connection) => Ok(connection),
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
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Whether file descriptors can be sent over it.
    pub fn passes_files(&self) -> bool {
        matches!(self.stream, Stream::Unix(_))
    }

    /// Ends one direction or both; whoever waits for data then, on either side, wakes up.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        match &self.stream {
            Stream::Tcp(stream) => stream.shutdown(how),
            Stream::Unix(stream) => stream.shutdown(how),
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
    /// default limit; for TCP, the kernel's own tuning then does better than the limit.
    fn enlarge_buffers(&self) {
        let forced = sockopt::set_socket_send_buffer_size_force(self, SOCKET_BUFFER)
            .and_then(|()| sockopt::set_socket_recv_buffer_size_force(self, SOCKET_BUFFER));
        if forced.is_err() && matches!(self.stream, Stream::Unix(_)) {
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
fn connect_tcp(addresses: impl Iterator<Item = SocketAddr>, timeout: Duration) -> io::Result<Stream> {
    let deadline = Instant::now() + timeout;
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in addresses {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match TcpStream::connect_timeout(&address, left) {
            Ok(stream) => return Ok(Stream::Tcp(stream)),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// A connect to a Unix socket waits while the listener's queue is full; its limit is the send time-out.
fn connect_unix(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    sockopt::set_socket_timeout(&socket, Timeout::Send, Some(timeout))?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}
