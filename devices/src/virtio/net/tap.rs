//! What backs a network device: a tap of the host.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::{HEADER_LEN, offloads, sys};

const TUN: &str = "/dev/net/tun";

/// An open tap. Each packet that is read from it or written to it has a header of 12 bytes as virtio's.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    mtu: u16,
    uso: bool,
}

/// Why a tap cannot be used. Every message is one line that names the tap.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Nothing has that name.
    #[error(
        "tap {tap}: expected a tap of that name, found none; make one: \
         ip tuntap add dev {tap} mode tap && ip link set dev {tap} up"
    )]
    Missing {
        /// The tap.
        tap: String,
    },
    /// Somebody else has it open.
    #[error(
        "tap {tap}: expected a tap that nobody uses, but a process has it open; each device needs one of its own"
    )]
    Busy {
        /// The tap.
        tap: String,
    },
    /// It is no tap, or one with several queues.
    #[error(
        "tap {tap}: expected a tap with one queue, got something else of that name; `ip -d link show dev {tap}` says what"
    )]
    NotATap {
        /// The tap.
        tap: String,
    },
    /// The process may not open it.
    #[error("tap {tap}: no permission; give it to this user: ip tuntap add dev {tap} mode tap user NAME")]
    Permission {
        /// The tap.
        tap: String,
    },
    /// Its packets are too small for the guest.
    #[error(
        "tap {tap}: expected an MTU of at least {expected}, got {got}; ip link set dev {tap} mtu {expected}"
    )]
    Mtu {
        /// The tap.
        tap: String,
        /// What the guest was told.
        expected: u16,
        /// What the tap has.
        got: u16,
    },
    /// A system call failed.
    #[error("tap {tap}: cannot {what}: {source}")]
    Io {
        /// The tap.
        tap: String,
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl Tap {
    /// Opens the tap `name`, which must be there.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let failed = |what| {
            move |source| TapError::Io {
                tap: name.into(),
                what,
                source,
            }
        };
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)
            .map_err(|errno| failed("open a socket")(errno.into()))?;
        // To attach to what is not there would make it.
        if name_to_index(&socket, name).is_err() {
            return Err(TapError::Missing { tap: name.into() });
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(TUN)
            .map_err(failed("open /dev/net/tun"))?;
        sys::attach(&file, name).map_err(|source| attach_error(name, source))?;
        sys::set_header_len(&file, HEADER_LEN as libc::c_int).map_err(failed("set its header's length"))?;
        // A kernel that does not know them refuses them.
        let uso = sys::set_offloads(&file, offloads::ALL_BUT_USO | offloads::TAP_USO).is_ok();
        sys::set_offloads(&file, 0).map_err(failed("turn its offloads off"))?;
        let mtu = sys::mtu(&socket, name).map_err(failed("find its MTU"))?;
        Ok(Self {
            file,
            name: name.into(),
            mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
            uso,
        })
    }

    /// The same open tap once more: it is attached to as long as one of them is there.
    pub fn try_clone(&self) -> Result<Self, TapError> {
        let file = self.file.try_clone().map_err(|source| TapError::Io {
            tap: self.name.clone(),
            what: "open it once more",
            source,
        })?;
        Ok(Self {
            file,
            name: self.name.clone(),
            ..*self
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Largest packet, without Ethernet's header, in bytes, as it was when the tap was opened.
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    /// The features that it can serve.
    pub(super) fn features(&self) -> u64 {
        offloads::EVERYWHERE | if self.uso { offloads::USO } else { 0 }
    }

    /// From now on the kernel leaves to the guest what its `features` say.
    pub(super) fn set_features(&self, features: u64) -> io::Result<()> {
        sys::set_offloads(&self.file, offloads::of(features))
    }

    /// Writes a packet of our own.
    pub(super) fn write(&self, packet: &[u8]) -> io::Result<()> {
        Ok(rustix::io::write(&self.file, packet).map(drop)?)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn attach_error(name: &str, source: io::Error) -> TapError {
    let tap = name.to_owned();
    match source.raw_os_error() {
        Some(libc::EBUSY) => TapError::Busy { tap },
        Some(libc::EINVAL) => TapError::NotATap { tap },
        Some(libc::EPERM) => TapError::Permission { tap },
        _ => TapError::Io {
            tap,
            what: "attach to it",
            source,
        },
    }
}
