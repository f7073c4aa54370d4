//! The requests to a tap that no safe wrapper offers.

#![allow(unsafe_code, reason = "the ioctls of a tap have no safe wrapper")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

/// Makes an opened `/dev/net/tun` the queue of the tap `name`, or one of `many`, with a header before each packet.
pub(super) fn attach(file: &File, name: &str, many: bool) -> io::Result<()> {
    let mut request = request(name)?;
    let queues = if many { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | queues;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the request reads and writes an `ifreq`, which this is.
    done(unsafe { ioctl_with_mut_ref(file, libc::TUNSETIFF as libc::c_ulong, &mut request) })
}

/// Attaches one of many queues to its tap, or detaches it.
pub(super) fn set_active(file: &File, active: bool) -> io::Result<()> {
    let mut request = request("")?;
    let flag = if active {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    };
    request.ifr_ifru.ifru_flags = flag as libc::c_short;
    // SAFETY: the request reads an `ifreq`, which this is.
    done(unsafe { ioctl_with_ref(file, libc::TUNSETQUEUE as libc::c_ulong, &request) })
}

/// The name of the interface that a queue belongs to, and its flags: `IFF_*`.
pub(super) fn interface(file: &File) -> io::Result<(String, libc::c_int)> {
    let mut request = request("")?;
    // SAFETY: the request writes an `ifreq`, which this is.
    done(unsafe { ioctl_with_mut_ref(file, libc::TUNGETIFF as libc::c_ulong, &mut request) })?;
    let name = request.ifr_name.iter().take_while(|byte| **byte != 0);
    let name: Vec<u8> = name.map(|byte| *byte as u8).collect();
    // SAFETY: the kernel has filled in this field of the union, and any bytes are a number.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((
        String::from_utf8_lossy(&name).into(),
        libc::c_int::from(flags as u16),
    ))
}

/// Duplicates a descriptor that was inherited from the parent process. Neither the duplicate nor the original is passed
/// on to programs that this one starts.
pub(super) fn inherit(descriptor: RawFd) -> io::Result<File> {
    // SAFETY: whatever the number is, the call makes a new descriptor or fails.
    let ours = unsafe { libc::fcntl(descriptor, libc::F_DUPFD_CLOEXEC, 0) };
    done(ours)?;
    // SAFETY: the descriptor is new, and no other code knows it.
    let ours = unsafe { OwnedFd::from_raw_fd(ours) };
    // SAFETY: the call changes a flag of a descriptor that is open, as there is a copy of it; it closes nothing.
    done(unsafe { libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    Ok(ours.into())
}

/// Sets the length of the header before each packet, in bytes.
pub(super) fn set_header_len(file: &File, len: libc::c_int) -> io::Result<()> {
    // SAFETY: the request reads an `int`, which this is.
    done(unsafe { ioctl_with_ref(file, libc::TUNSETVNETHDRSZ as libc::c_ulong, &len) })
}

/// Sets what the kernel may leave to the reader of a packet: `TUN_F_*`.
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
