//! Options and queues of sockets, for which there is no safe wrapper.
#![allow(unsafe_code)] // setsockopt for options that rustix does not set, and ioctl for the length of a queue.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::net::{AddressFamily, SocketType, sockopt};

/// Whether it is a TCP socket.
pub(crate) fn is_tcp(socket: BorrowedFd<'_>) -> bool {
    matches!(
        sockopt::socket_domain(socket),
        Ok(AddressFamily::INET | AddressFamily::INET6)
    ) && matches!(sockopt::socket_type(socket), Ok(SocketType::STREAM))
}

/// Sets an option of the socket layer whose value is an int.
pub(crate) fn set_option(socket: BorrowedFd<'_>, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the value is an int, which lives on the stack during the call, and its size is right.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// How many bytes were sent on a stream socket that the peer's system does not have yet. On a Unix socket these are the
/// bytes that were not read, with the kernel's own memory for them (tcp(7), unix(7): SIOCOUTQ).
pub fn in_flight(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the request stores an int, for which `bytes` has room during the call.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if done == 0 {
        Ok(u64::try_from(bytes).unwrap_or(0))
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

    fn check(mut near: impl Write + AsFd, mut far: impl Read) {
        assert_eq!(in_flight(near.as_fd()).unwrap(), 0);
        // Little enough to fit without a reader.
        let sent = [7; 32 << 10];
        near.write_all(&sent).unwrap();
        far.read_exact(&mut [0; 32 << 10]).unwrap();
        // An acknowledgement may be under way.
        while in_flight(near.as_fd()).unwrap() > 0 {
            thread::yield_now();
        }
    }

    #[test]
    fn what_has_arrived_is_in_flight_no_more() {
        let (near, far) = UnixStream::pair().unwrap();
        (&near).write_all(&[7; 1000]).unwrap();
        assert!(in_flight(near.as_fd()).unwrap() >= 1000, "nobody has read it");
        (&far).read_exact(&mut [0; 1000]).unwrap();
        check(near, far);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        check(near, listener.accept().unwrap().0);
    }
}
