//! File descriptors over Unix sockets (SCM_RIGHTS).

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::cmsg_space;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg, sockopt::socket_domain,
};

use crate::Step;

/// Most descriptors that Linux passes in one message (`SCM_MAX_FD`).
pub const MAX_FDS: usize = 253;

/// Why descriptors could not be passed.
#[derive(Debug, thiserror::Error)]
pub enum DescriptorError {
    /// No bytes to send with them: descriptors travel with the first byte of a message.
    #[error("file descriptors cannot be sent without a byte")]
    NoBytes,
    /// Only Unix sockets pass descriptors; others would drop them without a word.
    #[error("file descriptors can only be sent over a Unix socket")]
    NotUnix,
    /// More than asked for, or than the system passes.
    #[error("more than {most} file descriptors in one message")]
    TooMany {
        /// Most that were allowed.
        most: usize,
    },
    /// The peer closed the connection.
    #[error("the peer closed the connection")]
    Closed,
    /// The socket failed.
    #[error("the connection failed")]
    Socket(#[source] std::io::Error),
}

/// What [`receive_fds`] got.
#[derive(Debug)]
pub struct Received {
    /// Bytes, at least one.
    pub bytes: usize,
    /// Descriptors, closed on exec, in the sender's order.
    pub fds: Vec<OwnedFd>,
}

/// Sends bytes with descriptors, without waiting, and never raises SIGPIPE. After `Moved(n)` the descriptors
/// are on their way, and the bytes from `n` on are to be sent without them; after `WouldBlock` nothing is.
pub fn send_fds(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<Step, DescriptorError> {
    if bytes.is_empty() {
        return Err(DescriptorError::NoBytes);
    }
    let domain = socket_domain(socket).map_err(|error| DescriptorError::Socket(error.into()))?;
    if domain != AddressFamily::UNIX {
        return Err(DescriptorError::NotUnix);
    }
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fits = fds.len() <= MAX_FDS && control.push(SendAncillaryMessage::ScmRights(fds));
    if !fits {
        return Err(DescriptorError::TooMany { most: MAX_FDS });
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    match retry_on_intr(|| sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)) {
        Ok(moved) if moved == bytes.len() => Ok(Step::Done),
        Ok(moved) => Ok(Step::Moved(moved)),
        Err(Errno::AGAIN) => Ok(Step::WouldBlock),
        Err(error) => Err(DescriptorError::Socket(error.into())),
    }
}

/// Receives bytes, and the descriptors that came with them, without waiting: `None` if there is nothing yet.
///
/// Up to `most` descriptors are taken; if more came, or the system had no room for them, all are closed and
/// it is an error. Descriptors that come with bytes read in any other way are lost (the kernel closes them),
/// so a receiver that expects some reads with this from the message's first byte on.
pub fn receive_fds(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
    most: usize,
) -> Result<Option<Received>, DescriptorError> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let got = match retry_on_intr(|| recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, flags)) {
        Ok(got) => got,
        Err(Errno::AGAIN) => return Ok(None),
        Err(error) => return Err(DescriptorError::Socket(error.into())),
    };
    // Owned from here on, whatever else is wrong: what is not handed out is closed.
    let fds: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    if fds.len() > most || got.flags.contains(ReturnFlags::CTRUNC) {
        return Err(DescriptorError::TooMany {
            most: most.min(MAX_FDS),
        });
    }
    if got.bytes == 0 && !bytes.is_empty() {
        return Err(DescriptorError::Closed);
    }
    Ok(Some(Received {
        bytes: got.bytes,
        fds,
    }))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use rustix::io::{FdFlags, fcntl_getfd};
    use rustix::net::{RecvFlags, recv, sockopt};

    use super::*;

    /// A pipe's ends: the reading one sees the end of file when nobody holds the writing one any more.
    fn pipe() -> (std::io::PipeReader, std::io::PipeWriter) {
        std::io::pipe().unwrap()
    }

    #[test]
    fn descriptors_arrive_with_their_bytes_in_order_and_close_on_exec() {
        let (a, b) = UnixStream::pair().unwrap();
        let files: Vec<File> = ["one", "two"]
            .iter()
            .map(|text| {
                let mut file = tempfile::tempfile().unwrap();
                file.write_all(text.as_bytes()).unwrap();
                file.rewind().unwrap();
                file
            })
            .collect();
        let mut bytes = [0; 64];
        assert!(receive_fds(b.as_fd(), &mut bytes, 2).unwrap().is_none());
        let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        assert_eq!(send_fds(a.as_fd(), b"head", &borrowed).unwrap(), Step::Done);
        assert_eq!(send_fds(a.as_fd(), b"tail", &[]).unwrap(), Step::Done);
        let received = receive_fds(b.as_fd(), &mut bytes[..4], 2).unwrap().unwrap();
        assert_eq!((received.bytes, received.fds.len()), (4, 2));
        assert_eq!(&bytes[..4], b"head");
        for (fd, text) in received.fds.into_iter().zip(["one", "two"]) {
            assert!(fcntl_getfd(&fd).unwrap().contains(FdFlags::CLOEXEC));
            let mut content = String::new();
            File::from(fd).read_to_string(&mut content).unwrap();
            assert_eq!(content, text);
        }
        let rest = receive_fds(b.as_fd(), &mut bytes, 2).unwrap().unwrap();
        assert_eq!((rest.bytes, rest.fds.len()), (4, 0));
        drop(a);
        assert!(matches!(
            receive_fds(b.as_fd(), &mut bytes, 2),
            Err(DescriptorError::Closed)
        ));
    }

    #[test]
    fn more_descriptors_than_allowed_are_an_error_and_none_stays_open() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut reader, writer) = pipe();
        let many = vec![writer.as_fd(); 5];
        let mut bytes = [0; 8];
        for most in [4, 0] {
            send_fds(a.as_fd(), b"x", &many).unwrap();
            assert!(matches!(
                receive_fds(b.as_fd(), &mut bytes, most),
                Err(DescriptorError::TooMany { .. })
            ));
        }
        drop(writer);
        assert_eq!(
            reader.read(&mut [0]).unwrap(),
            0,
            "the last writing end is closed"
        );
    }

    #[test]
    fn as_many_as_the_system_passes_pass() {
        let (a, b) = UnixStream::pair().unwrap();
        let (_reader, writer) = pipe();
        let mut bytes = [0; 8];
        assert!(matches!(
            send_fds(a.as_fd(), b"x", &[writer.as_fd(); MAX_FDS + 1]),
            Err(DescriptorError::TooMany { most: MAX_FDS })
        ));
        assert!(matches!(
            send_fds(a.as_fd(), b"", &[writer.as_fd()]),
            Err(DescriptorError::NoBytes)
        ));
        send_fds(a.as_fd(), b"x", &[writer.as_fd(); MAX_FDS]).unwrap();
        let received = receive_fds(b.as_fd(), &mut bytes, usize::MAX).unwrap().unwrap();
        assert_eq!(received.fds.len(), MAX_FDS);
    }

    #[test]
    fn a_full_socket_takes_a_part_and_the_descriptors_once() {
        let (a, b) = UnixStream::pair().unwrap();
        sockopt::set_socket_send_buffer_size(&a, 4096).unwrap();
        let (mut reader, writer) = pipe();
        let large = vec![7; 1 << 20];
        let Step::Moved(sent) = send_fds(a.as_fd(), &large, &[writer.as_fd()]).unwrap() else {
            panic!("a MiB fitted");
        };
        assert_eq!(
            send_fds(a.as_fd(), &large, &[writer.as_fd()]).unwrap(),
            Step::WouldBlock
        );
        drop(writer);
        let mut bytes = vec![0; 1 << 20];
        let (mut got, mut fds) = (0, Vec::new());
        while got < sent {
            let received = receive_fds(b.as_fd(), &mut bytes, 1).unwrap().unwrap();
            got += received.bytes;
            fds.extend(received.fds);
        }
        assert_eq!((got, fds.len()), (sent, 1));
        drop(fds);
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn tcp_is_refused_and_a_peer_that_is_gone_is_an_error() {
        let (a, b) = UnixStream::pair().unwrap();
        let (_reader, writer) = pipe();
        drop(b);
        assert!(matches!(
            send_fds(a.as_fd(), b"x", &[writer.as_fd()]),
            Err(DescriptorError::Socket(_))
        ));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert!(matches!(
            send_fds(tcp.as_fd(), b"x", &[writer.as_fd()]),
            Err(DescriptorError::NotUnix)
        ));
        let (far, _) = listener.accept().unwrap();
        assert!(matches!(
            recv(&far, &mut [0u8; 8], RecvFlags::DONTWAIT),
            Err(Errno::AGAIN)
        ));
    }
}
