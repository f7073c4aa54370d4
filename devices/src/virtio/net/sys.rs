//! The requests to a tap that no safe wrapper offers.

#![allow(unsafe_code, reason = "the ioctls of a tap have no safe wrapper")]

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

/// Makes an opened `/dev/net/tun` the queue of the tap `name`, with a header before each packet.
pub(super) fn attach(file: &File, name: &str) -> io::Result<()> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the request reads and writes an `ifreq`, which this is.
    done(unsafe { ioctl_with_mut_ref(file, libc::TUNSETIFF as libc::c_ulong, &mut request) })
}

/// Sets the length of that header, in bytes.
pub(super) fn set_header_len(file: &File, len: libc::c_int) -> io::Result<()> {
    // SAFETY: the request reads an `int`, which this is.
    done(unsafe { ioctl_with_ref(file, libc::TUNSETVNETHDRSZ as libc::c_ulong, &len) })
}

/// Says what the kernel may leave to the reader of a packet: `TUN_F_*`.
pub(super) fn set_offloads(file: &File, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: the request takes a number and no pointer.
    done(unsafe { ioctl_with_val(file, libc::TUNSETOFFLOAD as libc::c_ulong, flags.into()) })
}

/// The MTU of an interface in the network namespace of `socket`.
pub(super) fn mtu(socket: impl AsFd, name: &str) -> io::Result<libc::c_int> {
    let mut request = request(name)?;
    // SAFETY: the request reads and writes an `ifreq`, which this is.
    done(unsafe { ioctl_with_mut_ref(&socket.as_fd(), libc::SIOCGIFMTU, &mut request) })?;
    // SAFETY: the kernel has filled in this field of the union, and any bytes are a number.
    Ok(unsafe { request.ifr_ifru.ifru_mtu })
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    let mut ifr_name = [0; libc::IFNAMSIZ];
    // The last byte stays the end of the name.
    let room = &mut ifr_name[..libc::IFNAMSIZ - 1];
    let to = room.get_mut(..name.len()).ok_or(io::ErrorKind::InvalidInput)?;
    for (to, from) in to.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let ifr_ifru = libc::__c_anonymous_ifr_ifru {
        ifru_map: libc::__c_anonymous_ifru_map {
            mem_start: 0,
            mem_end: 0,
            base_addr: 0,
            irq: 0,
            dma: 0,
            port: 0,
        },
    };
    Ok(libc::ifreq { ifr_name, ifr_ifru })
}

fn done(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
