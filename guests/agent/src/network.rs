//! The network card's address, given to the kernel by netlink: a guest may have no program for it.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use rustix::net::netdevice::name_to_index;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with};

const CARD: &str = "eth0";

/// The kernel, as far as a message is for it.
const KERNEL: SocketAddrNetlink = SocketAddrNetlink::new(0, 0);
/// Bytes of `nlmsghdr`.
const HEADER: usize = 16;
/// `NLM_F_REQUEST | NLM_F_ACK`, and with `NLM_F_CREATE | NLM_F_EXCL`.
const CHANGE: u16 = 0x5;
const CREATE: u16 = 0x605;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const AF_INET: u8 = 2;
const IFF_UP: u32 = 1;

/// Gives the card its address and turns it on.
pub(crate) fn set_up(address: Ipv4Addr, prefix: u8) -> io::Result<()> {
    let socket = netlink()?;
    let index = index()?;
    let mut ifaddrmsg = vec![AF_INET, prefix, 0, 0];
    ifaddrmsg.extend(index.to_ne_bytes());
    for kind in [IFA_LOCAL, IFA_ADDRESS] {
        ifaddrmsg.extend([8, kind].map(u16::to_ne_bytes).concat());
        ifaddrmsg.extend(address.octets());
    }
    request(&socket, RTM_NEWADDR, CREATE, &ifaddrmsg)?;
    turn(&socket, index, IFF_UP)
}

/// Turns the card off, where there is one. Linux 6.1 may not find its end otherwise: it takes cards away from drivers
/// that still send, and they try for ever.
pub(crate) fn take_down() -> io::Result<()> {
    turn(&netlink()?, index()?, 0)
}

fn turn(socket: &OwnedFd, index: u32, flags: u32) -> io::Result<()> {
    let ifinfomsg = [0, index, flags, IFF_UP].map(u32::to_ne_bytes).concat();
    request(socket, RTM_NEWLINK, CHANGE, &ifinfomsg)
}

fn netlink() -> io::Result<OwnedFd> {
    // Protocol 0 is NETLINK_ROUTE.
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        None,
    )?;
    Ok(socket)
}

fn index() -> io::Result<u32> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    Ok(name_to_index(socket, CARD)?)
}

fn request(socket: &OwnedFd, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
    let mut message = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
    message.extend([kind, flags].map(u16::to_ne_bytes).concat());
    // Sequence number and sender: there is one question at a time, and the kernel knows who asks.
    message.extend([0; 8]);
    message.extend(body);
    sendto(socket, &message, SendFlags::empty(), &KERNEL)?;
    let mut answer = [0; 1024];
    recv(socket, &mut answer[..], RecvFlags::empty())?;
    let [.., a, b, c, d] = *answer.first_chunk::<{ HEADER + 4 }>().unwrap_or(&[0; HEADER + 4]);
    match i32::from_ne_bytes([a, b, c, d]) {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}
