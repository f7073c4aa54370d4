//! MSG_ZEROCOPY: allows it on a socket, and reads the kernel's completions from the error queue.
#![allow(unsafe_code)] // Control messages of the error queue.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::socket::{is_tcp, set_option};

/// `SO_ZEROCOPY` (asm-generic/socket.h).
const SO_ZEROCOPY: libc::c_int = 60;
/// Origin of a completion (linux/errqueue.h).
const SO_EE_ORIGIN_ZEROCOPY: u8 = 5;
/// The flag of a completion whose content the kernel copied after all.
const SO_EE_CODE_ZEROCOPY_COPIED: u8 = 1;

/// Room for a control message with an extended error and the address that some of them carry.
const CONTROL: usize = 256;

/// Sends that are done with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Completion {
    /// How many.
    pub(crate) sends: u64,
    /// Whether the kernel copied their content.
    pub(crate) copied: bool,
}

/// Makes a socket take MSG_ZEROCOPY. Returns whether it does: TCP, and a kernel that knows it.
pub(crate) fn enable(socket: BorrowedFd<'_>) -> bool {
    is_tcp(socket) && set_option(socket, SO_ZEROCOPY, 1).is_ok()
}

/// The next entry of the socket's error queue, without waiting: `None` if there is none. An entry that is no
/// completion counts as one of no sends.
pub(crate) fn next_completion(socket: BorrowedFd<'_>) -> io::Result<Option<Completion>> {
    // Of u64, so that the buffer is aligned as control messages must be.
    let mut control = [0u64; CONTROL / size_of::<u64>()];
    // SAFETY: a message header is plain data for which zeroes mean "no address, no buffers".
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = CONTROL;
    loop {
        // SAFETY: the header points to `control`, which is as long as it says and lives until the end.
        let got = unsafe {
            libc::recvmsg(
                socket.as_raw_fd(),
                &raw mut header,
                libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT,
            )
        };
        if got >= 0 {
            return Ok(Some(decode(&header)));
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => return Ok(None),
            _ => return Err(error),
        }
    }
}

/// The completions in a message of the error queue.
fn decode(header: &libc::msghdr) -> Completion {
    let mut completion = Completion {
        sends: 0,
        copied: false,
    };
    // SAFETY: recvmsg filled the header's control buffer, which is alive; the macros stay within its length.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !next.is_null() {
        // SAFETY: the macro gave a control message that lies within the buffer as a whole.
        let message = unsafe { next.read_unaligned() };
        let error_of_ip = matches!(
            (message.cmsg_level, message.cmsg_type),
            (libc::SOL_IP, libc::IP_RECVERR) | (libc::SOL_IPV6, libc::IPV6_RECVERR)
        );
        // SAFETY: arithmetic on a constant.
        let least = unsafe { libc::CMSG_LEN(size_of::<libc::sock_extended_err>() as libc::c_uint) };
        if error_of_ip && message.cmsg_len >= least as usize {
            // SAFETY: its data is at least as long as an extended error, which is plain data.
            let error = unsafe {
                libc::CMSG_DATA(next)
                    .cast::<libc::sock_extended_err>()
                    .read_unaligned()
            };
            if error.ee_origin == SO_EE_ORIGIN_ZEROCOPY {
                // Sends are numbered from 0 and wrap; the entry names the first and the last of a range.
                completion.sends += u64::from(error.ee_data.wrapping_sub(error.ee_info)) + 1;
                completion.copied |= error.ee_code & SO_EE_CODE_ZEROCOPY_COPIED != 0;
            }
        }
        // SAFETY: as for the first one.
        next = unsafe { libc::CMSG_NXTHDR(header, next) };
    }
    completion
}
