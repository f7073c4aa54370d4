//! Sockets of both sorts, and waiting for them with a way to be woken.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use rustix::cmsg_space;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, Shutdown, accept, recvmsg, sendmsg, shutdown, sockopt,
};

/// Most open files that come with one piece of data: the kernel's own limit is 253.
const MAX_FILES: usize = 64;

/// Where a listener is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `tcp:IP:PORT`.
    Tcp(SocketAddr),
    /// `unix:PATH`.
    Unix(PathBuf),
}

/// A text that is no address.
#[derive(Debug, thiserror::Error)]
#[error("expected tcp:IP:PORT or unix:PATH, got {got:?}")]
pub struct AddressError {
    got: String,
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let tcp = text.strip_prefix("tcp:").and_then(|rest| rest.parse().ok());
        let unix = text.strip_prefix("unix:").filter(|rest| !rest.is_empty());
        tcp.map(Address::Tcp)
            .or_else(|| unix.map(|path| Address::Unix(path.into())))
            .ok_or_else(|| AddressError { got: text.into() })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(address) => write!(f, "tcp:{address}"),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Wakes the threads that wait for a socket, for good.
#[derive(Debug)]
pub(crate) struct Bell(OwnedFd);

impl Bell {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    pub(crate) fn ring(&self) {
        // Can only fail when the counter is at its limit, and then it rings already.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Waits so long, or for ever. Answers whether it was not woken.
    pub(crate) fn rest(&self, time: Option<Duration>) -> bool {
        let deadline = time.map(|time| Instant::now() + time);
        let mut events = [PollFd::new(&self.0, PollFlags::IN)];
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let spec = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut events, spec.as_ref()) {
                Ok(0) => return true,
                Ok(_) => return false,
                Err(_) => {}
            }
        }
    }
}

/// Why nothing more can be done with a socket.
#[derive(Debug)]
pub(crate) enum Gone {
    /// The bell rang.
    Woken,
    /// The peer has reset it, or is dead.
    Lost,
}

/// One end of a byte stream.
#[derive(Debug)]
pub(crate) struct ProxySocket(OwnedFd);

impl ProxySocket {
    pub(crate) fn connect(to: &Address) -> io::Result<Self> {
        Ok(Self(match to {
            Address::Tcp(address) => {
                let stream = TcpStream::connect(address)?;
                stream.set_nodelay(true)?;
                stream.into()
            }
            Address::Unix(path) => UnixStream::connect(path)?.into(),
        }))
    }

    /// Receives what there is, up to the buffer's length; 0 at the end. Open files go to `files`.
    pub(crate) fn receive(
        &self,
        buffer: &mut [u8],
        files: &mut Vec<OwnedFd>,
        bell: &Bell,
    ) -> Result<usize, Gone> {
        loop {
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FILES))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            match recvmsg(&self.0, &mut [IoSliceMut::new(buffer)], &mut control, flags) {
                Ok(received) => {
                    for message in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(came) = message {
                            files.extend(came);
                        }
                    }
                    return Ok(received.bytes);
                }
                Err(Errno::AGAIN) => self.wait(PollFlags::IN, bell)?,
                Err(Errno::INTR) => {}
                Err(_) => return Err(Gone::Lost),
            }
        }
    }

    /// Sends all of it; the files go with the first byte.
    pub(crate) fn send(&self, mut bytes: &[u8], mut files: &[OwnedFd], bell: &Bell) -> Result<(), Gone> {
        while !bytes.is_empty() {
            let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FILES))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
                return Err(Gone::Lost);
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, flags) {
                Ok(sent) => {
                    bytes = &bytes[sent..];
                    files = &[];
                }
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, bell)?,
                Err(Errno::INTR) => {}
                Err(_) => return Err(Gone::Lost),
            }
        }
        Ok(())
    }

    /// Nothing more will be sent.
    pub(crate) fn end(&self) {
        // The peer may be gone already.
        let _ = shutdown(&self.0, Shutdown::Write);
    }

    /// When it is closed, its peer gets a reset, where sockets of its family have resets.
    pub(crate) fn reset_on_close(&self) {
        let _ = sockopt::set_socket_linger(&self.0, Some(Duration::ZERO));
    }

    fn wait(&self, wanted: PollFlags, bell: &Bell) -> Result<(), Gone> {
        wait(self.0.as_fd(), wanted, bell)
    }
}

/// Waits for connections.
#[derive(Debug)]
pub(crate) struct ProxyListener {
    socket: OwnedFd,
    address: Address,
}

impl ProxyListener {
    pub(crate) fn bind(address: &Address) -> io::Result<Self> {
        let (socket, address) = match address {
            Address::Tcp(address) => {
                let listener = TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                let address = Address::Tcp(listener.local_addr()?);
                (listener.into(), address)
            }
            Address::Unix(path) => {
                let listener = UnixListener::bind(path)?;
                listener.set_nonblocking(true)?;
                (listener.into(), address.clone())
            }
        };
        Ok(Self { socket, address })
    }

    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    /// The next connection; nothing once the bell rang.
    pub(crate) fn accept(&self, bell: &Bell) -> Option<ProxySocket> {
        loop {
            match accept(&self.socket) {
                Ok(socket) => {
                    if matches!(self.address, Address::Tcp(_)) {
                        // Only a matter of speed.
                        let _ = sockopt::set_tcp_nodelay(&socket, true);
                    }
                    return Some(ProxySocket(socket));
                }
                Err(Errno::AGAIN) => wait(self.socket.as_fd(), PollFlags::IN, bell).ok()?,
                // The peer was gone again before it was its turn.
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(_) => return None,
            }
        }
    }
}

impl Drop for ProxyListener {
    fn drop(&mut self) {
        if let Address::Unix(path) = &self.address {
            // Another process may have removed it before.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn wait(socket: BorrowedFd<'_>, wanted: PollFlags, bell: &Bell) -> Result<(), Gone> {
    let mut events = [
        PollFd::from_borrowed_fd(socket, wanted),
        PollFd::new(&bell.0, PollFlags::IN),
    ];
    match poll(&mut events, None) {
        Ok(_) if events[1].revents().is_empty() => Ok(()),
        Err(Errno::INTR) => Ok(()),
        Ok(_) => Err(Gone::Woken),
        Err(_) => Err(Gone::Lost),
    }
}
