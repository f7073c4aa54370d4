//! Options of sockets.
#![allow(unsafe_code)] // setsockopt for options that rustix does not set.

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
