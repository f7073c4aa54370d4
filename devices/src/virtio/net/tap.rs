//! What backs a network device: a tap of the host.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::{HEADER_LEN, offloads, sys};

const TUN: &str = "/dev/net/tun";

/// MTU of an interface that is in another network namespace than this process: Ethernet's.
const UNKNOWN_MTU: u16 = 1500;

/// Which tap of the host, and how it is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TapSource {
    /// By its name.
    Name(String),
    /// By descriptors that were open when this program started, one for each of its queues.
    Descriptors(Vec<RawFd>),
}

/// An open tap. Each packet that is read from it or written to it has a header of 12 bytes as virtio's.
#[derive(Debug)]
pub struct Tap {
    /// At least one.
    queues: Vec<File>,
    /// The number of attached queues, to which the kernel delivers packets: the first ones.
    active: usize,
    /// Whether the tap may have more than one queue.
    many: bool,
    /// Whether the queues are descriptors of the parent process.
    inherited: bool,
    name: String,
    mtu: u16,
    uso: bool,
    /// What the kernel leaves to the guest: the `TUN_F_*` flags that were set last.
    offloads: u32,
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
    /// Another process has it open.
    #[error(
        "tap {tap}: expected a tap that nobody uses, but a process has it open; each device needs one of its own"
    )]
    Busy {
        /// The tap.
        tap: String,
    },
    /// It is no tap.
    #[error(
        "tap {tap}: expected a tap, got something else of that name; `ip -d link show dev {tap}` says what"
    )]
    NotATap {
        /// The tap.
        tap: String,
    },
    /// It was made for one queue.
    #[error(
        "tap {tap}: expected a tap that may have {expected} queues, got one for a single queue; make it with \
         `ip tuntap add dev {tap} mode tap multi_queue`"
    )]
    OneQueue {
        /// The tap.
        tap: String,
        /// Queues that it must have.
        expected: usize,
    },
    /// Too few or too many descriptors.
    #[error("tap {tap}: expected {expected} descriptors, one for each queue, got {got}")]
    Descriptors {
        /// The tap.
        tap: String,
        /// Queues that the device has.
        expected: usize,
        /// Descriptors of the tap.
        got: usize,
    },
    /// A descriptor is none of a tap that can be used.
    #[error("descriptor {descriptor}: expected {expected}, got {got}")]
    Descriptor {
        /// Its number.
        descriptor: RawFd,
        /// What it must be.
        expected: &'static str,
        /// What it is.
        got: String,
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
        /// The MTU that the device shows to the guest.
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
    /// Opens the tap, which must be there.
    pub fn open(source: &TapSource) -> Result<Self, TapError> {
        match source {
            TapSource::Name(name) => Self::named(name),
            TapSource::Descriptors(descriptors) => Self::inherited(descriptors),
        }
    }

    fn named(name: &str) -> Result<Self, TapError> {
        let socket = socket(name)?;
        // Attaching to a name without an interface would make one.
        if name_to_index(&socket, name).is_err() {
            return Err(TapError::Missing { tap: name.into() });
        }
        let file = open_tun(name)?;
        // A tap is made for one queue or for many, and attaching must name the same kind.
        let many = match sys::attach(&file, name, false) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                sys::attach(&file, name, true).map_err(|source| attach_error(name, source))?;
                true
            }
            attached => attached
                .map(|()| false)
                .map_err(|source| attach_error(name, source))?,
        };
        Self::set_up(vec![file], name, many, false)
    }

    fn inherited(descriptors: &[RawFd]) -> Result<Self, TapError> {
        let mut queues = Vec::new();
        let mut first: Option<(String, bool)> = None;
        for &descriptor in descriptors {
            let (file, name, many) = inherit(descriptor)?;
            let (expected, _) = first.get_or_insert((name.clone(), many));
            if *expected != name {
                return Err(TapError::Descriptor {
                    descriptor,
                    expected: "one of the same tap as those before it",
                    got: format!("one of {name}, not of {expected}"),
                });
            }
            queues.push(file);
        }
        match first {
            Some((name, many)) => Self::set_up(queues, &name, many, true),
            None => Err(TapError::Descriptors {
                tap: "of no name".into(),
                expected: 1,
                got: 0,
            }),
        }
    }

    fn set_up(queues: Vec<File>, name: &str, many: bool, inherited: bool) -> Result<Self, TapError> {
        let failed = |what| failure(name, what);
        let file = &queues[0];
        sys::set_header_len(file, HEADER_LEN as libc::c_int).map_err(failed("set its header's length"))?;
        // A kernel without UDP segmentation refuses the flags.
        let uso = sys::set_offloads(file, offloads::ALL_BUT_USO | offloads::TAP_USO).is_ok();
        sys::set_offloads(file, 0).map_err(failed("turn its offloads off"))?;
        let mtu = match sys::mtu(socket(name)?, name) {
            Ok(mtu) => u16::try_from(mtu).unwrap_or(u16::MAX),
            Err(_) if inherited => UNKNOWN_MTU,
            Err(error) => return Err(failed("find its MTU")(error)),
        };
        Ok(Self {
            active: queues.len(),
            queues,
            many,
            inherited,
            name: name.into(),
            mtu,
            uso,
            offloads: 0,
        })
    }

    /// Opens queues until there are `count`, at least one. All of them are attached.
    pub(super) fn with_queues(mut self, count: u16) -> Result<Self, TapError> {
        let (expected, got) = (usize::from(count), self.queues.len());
        if self.inherited && got != expected {
            return Err(TapError::Descriptors {
                tap: self.name.clone(),
                expected,
                got,
            });
        }
        if expected > 1 && !self.many {
            return Err(TapError::OneQueue {
                tap: self.name.clone(),
                expected,
            });
        }
        while self.queues.len() < expected {
            let file = open_tun(&self.name)?;
            sys::attach(&file, &self.name, true).map_err(|source| attach_error(&self.name, source))?;
            self.queues.push(file);
            self.active += 1;
        }
        Ok(self)
    }

    /// A second handle of the same tap. The process stays attached to it until the last handle is dropped.
    pub fn try_clone(&self) -> Result<Self, TapError> {
        let queues = self.queues.iter().map(File::try_clone).collect::<Result<_, _>>();
        Ok(Self {
            queues: queues.map_err(failure(&self.name, "open it once more"))?,
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

    /// The virtio features that the tap can serve.
    pub(super) fn features(&self) -> u64 {
        offloads::EVERYWHERE | if self.uso { offloads::USO } else { 0 }
    }

    /// Attaches the first `count` queues to the tap and detaches the others. Packets that are in those are lost.
    ///
    /// A detached queue cannot be added to an epoll either: the device thread adds every queue before the first is
    /// detached.
    pub(super) fn set_active(&mut self, count: u16) -> io::Result<()> {
        let count = usize::from(count).clamp(1, self.queues.len());
        while self.active > count {
            sys::set_active(&self.queues[self.active - 1], false)?;
            self.active -= 1;
        }
        while self.active < count {
            sys::set_active(&self.queues[self.active], true)?;
            self.active += 1;
        }
        Ok(())
    }

    /// The queue of that number, or the first one if that queue is detached.
    pub(super) fn queue(&self, index: usize) -> BorrowedFd<'_> {
        let index = if index < self.active { index } else { 0 };
        self.queues[index].as_fd()
    }

    /// All queues.
    pub(super) fn queues(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.queues.iter().map(File::as_fd)
    }

    /// Sets the kernel's offloads to what a guest with these `features` can take.
    pub(super) fn set_features(&mut self, features: u64) -> io::Result<()> {
        let offloads = offloads::of(features);
        // The call takes a lock that all of the host's network needs, so it is made for a change only.
        if offloads != self.offloads {
            sys::set_offloads(&self.queues[0], offloads)?;
            self.offloads = offloads;
        }
        Ok(())
    }

    /// Writes a packet that the device itself has made.
    pub(super) fn write(&self, packet: &[u8]) -> io::Result<()> {
        Ok(rustix::io::write(self.queue(0), packet).map(drop)?)
    }
}

impl Drop for Tap {
    /// Attaches all queues again, for another clone of the same tap.
    fn drop(&mut self) {
        // It fails if the tap was deleted, and then there is nothing to attach to.
        let _ = self.set_active(u16::MAX);
    }
}

/// A socket for requests about interfaces.
fn socket(tap: &str) -> Result<OwnedFd, TapError> {
    let flags = SocketFlags::CLOEXEC;
    socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)
        .map_err(|errno| failure(tap, "open a socket")(errno.into()))
}

/// An open `/dev/net/tun`, which becomes a queue when it is attached to a tap.
fn open_tun(tap: &str) -> Result<File, TapError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(TUN)
        .map_err(failure(tap, "open /dev/net/tun"))
}

/// A queue that this program has inherited, the name of its tap, and whether the tap may have many queues.
fn inherit(descriptor: RawFd) -> Result<(File, String, bool), TapError> {
    let refused = |expected, got| TapError::Descriptor {
        descriptor,
        expected,
        got,
    };
    let file = sys::inherit(descriptor)
        .map_err(|error| refused("one that was open when this program started", error.to_string()))?;
    let (name, flags) = sys::interface(&file)
        .map_err(|error| refused("a queue of a tap", format!("something else: {error}")))?;
    let wanted = libc::IFF_TAP | libc::IFF_VNET_HDR | libc::IFF_NO_PI;
    if flags & wanted != wanted {
        return Err(refused(
            "a tap with IFF_TAP, IFF_VNET_HDR and IFF_NO_PI",
            format!("{name} with flags {flags:#x}"),
        ));
    }
    let nonblocking = fcntl_getfl(&file).and_then(|flags| fcntl_setfl(&file, flags | OFlags::NONBLOCK));
    nonblocking.map_err(|errno| failure(&name, "set O_NONBLOCK")(errno.into()))?;
    Ok((file, name, flags & libc::IFF_MULTI_QUEUE != 0))
}

/// Makes an error of the tap from what was tried.
fn failure(tap: &str, what: &'static str) -> impl Fn(io::Error) -> TapError {
    move |source| TapError::Io {
        tap: tap.into(),
        what,
        source,
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
