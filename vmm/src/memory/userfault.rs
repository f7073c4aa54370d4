//! Page faults of guest memory that somebody else than the kernel resolves: another process, or a thread of this one
//! (userfaultfd(2), ioctl_userfaultfd(2)).
#![allow(unsafe_code)] // A system call that lets others fill this process's memory, its ioctls, and events that are a union.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use devices::GuestMemory;
use linux_raw_sys::general::{
    _UFFDIO_API, _UFFDIO_COPY, _UFFDIO_REGISTER, _UFFDIO_WAKE, _UFFDIO_WRITEPROTECT, _UFFDIO_ZEROPAGE,
    UFFD_API, UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMOVE, UFFD_FEATURE_EVENT_REMOVE,
    UFFD_FEATURE_MISSING_HUGETLBFS, UFFD_FEATURE_PAGEFAULT_FLAG_WP, UFFDIO, UFFDIO_REGISTER_MODE_MISSING,
    UFFDIO_REGISTER_MODE_WP, uffd_msg, uffdio_api, uffdio_copy, uffdio_range, uffdio_register,
    uffdio_writeprotect, uffdio_zeropage,
};
use migration::MemoryKind;
use rustix::io::Errno;
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr};

use super::{MemoryError, kind};

ioctl_io_nr!(USERFAULTFD_IOC_NEW, UFFDIO, 0);
ioctl_iowr_nr!(UFFDIO_API, UFFDIO, _UFFDIO_API, uffdio_api);
ioctl_iowr_nr!(UFFDIO_REGISTER, UFFDIO, _UFFDIO_REGISTER, uffdio_register);
ioctl_ior_nr!(UFFDIO_WAKE, UFFDIO, _UFFDIO_WAKE, uffdio_range);
ioctl_iowr_nr!(UFFDIO_COPY, UFFDIO, _UFFDIO_COPY, uffdio_copy);
ioctl_iowr_nr!(
    UFFDIO_WRITEPROTECT,
    UFFDIO,
    _UFFDIO_WRITEPROTECT,
    uffdio_writeprotect
);
ioctl_iowr_nr!(UFFDIO_ZEROPAGE, UFFDIO, _UFFDIO_ZEROPAGE, uffdio_zeropage);

/// UFFDIO_WRITEPROTECT_MODE_WP of linux/userfaultfd.h: protects, and does not lift the protection.
const WRITEPROTECT_MODE_WP: u64 = 1;

/// Gives a descriptor to every process that may open it, since Linux 6.1.
const DEVICE: &str = "/dev/userfaultfd";

/// A descriptor of memory whose faults are answered through it, whether this process or KVM touches a page. Of memory that
/// is registered for missing pages: a fault waits until the page is filled, giving pages up is an event, and once the last
/// copy of the descriptor is closed, missing pages are zero. Of memory that is registered for writes: a write to a protected
/// page waits until its protection is lifted, and closing the descriptor lifts all.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

/// What the kernel reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UserfaultEvent {
    /// A thread waits for the page at this address.
    Fault {
        /// Anywhere in the page.
        address: u64,
    },
    /// Pages are being given up: they are zero from now on. Until this event is read, whoever gives them up waits, and no
    /// page can be filled.
    Remove {
        /// The first byte.
        start: u64,
        /// The byte after the last.
        end: u64,
    },
}

/// What became of an attempt to fill pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// The first so many bytes are filled: all, or fewer for a reason that another attempt at the rest shows.
    Bytes(u64),
    /// None: the first page is there already.
    There,
    /// None: there is an event that has to be read first, or pages are just being given up.
    Blocked,
}

impl Userfault {
    /// From here on faults on missing pages of this memory wait.
    pub fn register(memory: &GuestMemory) -> Result<Self, MemoryError> {
        let mut features = u64::from(UFFD_FEATURE_EVENT_REMOVE);
        if kind(memory) == MemoryKind::HugePages {
            features |= u64::from(UFFD_FEATURE_MISSING_HUGETLBFS);
        }
        Self::open(memory, features, UFFDIO_REGISTER_MODE_MISSING, _UFFDIO_COPY)
    }

    /// From here on writes to pages of this memory that are protected wait; none is yet. Since Linux 5.7.
    pub fn register_for_writes(memory: &GuestMemory) -> Result<Self, MemoryError> {
        let features = u64::from(UFFD_FEATURE_PAGEFAULT_FLAG_WP);
        Self::open(memory, features, UFFDIO_REGISTER_MODE_WP, _UFFDIO_WRITEPROTECT)
    }

    fn open(memory: &GuestMemory, features: u64, mode: u32, needed: u32) -> Result<Self, MemoryError> {
        let descriptor = open().map_err(|errno| MemoryError::Userfaultfd(errno.into()))?;
        let mut api = uffdio_api {
            api: UFFD_API.into(),
            features,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes one `uffdio_api`.
        check("UFFDIO_API", unsafe {
            ioctl_with_mut_ref(&descriptor, UFFDIO_API(), &mut api)
        })?;
        for region in memory.iter() {
            let mut register = uffdio_register {
                range: uffdio_range {
                    start: region.as_ptr() as u64,
                    len: region.len(),
                },
                mode: mode.into(),
                ioctls: 0,
            };
            // SAFETY: the kernel reads and writes one `uffdio_register`. The range is a mapping of guest memory, which
            // no Rust reference points to; the handler that fills its pages does no more than the guest could.
            check("UFFDIO_REGISTER", unsafe {
                ioctl_with_mut_ref(&descriptor, UFFDIO_REGISTER(), &mut register)
            })?;
            if register.ioctls >> needed & 1 == 0 {
                let cause = errno::Error::new(libc::EOPNOTSUPP);
                return Err(MemoryError::Userfault {
                    what: "UFFDIO_REGISTER for such memory",
                    cause,
                });
            }
        }
        Ok(Self(descriptor))
    }

    /// The next event, if there is one.
    pub fn next_event(&self) -> Result<Option<UserfaultEvent>, MemoryError> {
        let mut bytes = [0; size_of::<uffd_msg>()];
        let failed = |errno: Errno| MemoryError::Userfault {
            what: "reading an event",
            cause: errno::Error::new(errno.raw_os_error()),
        };
        match rustix::io::read(&self.0, &mut bytes) {
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            read => read.map_err(failed)?,
        };
        // SAFETY: the kernel writes whole events, and any bytes are one.
        let event: uffd_msg = unsafe { std::mem::transmute(bytes) };
        // SAFETY: each variant is plain numbers, and the kind says which of them was written.
        Ok(Some(unsafe {
            match u32::from(event.event) {
                UFFD_EVENT_PAGEFAULT => UserfaultEvent::Fault {
                    address: event.arg.pagefault.address,
                },
                UFFD_EVENT_REMOVE => UserfaultEvent::Remove {
                    start: event.arg.remove.start,
                    end: event.arg.remove.end,
                },
                _ => return Err(failed(Errno::PROTO)),
            }
        }))
    }

    /// Fills the missing pages of `len` bytes at `to` with what `from` has at `gpa`; threads that wait for one of them go on.
    pub fn copy(&self, to: u64, from: &GuestMemory, gpa: u64, len: u64) -> Result<Filled, MemoryError> {
        // This checks that the source is all there.
        let source = from
            .get_slice(GuestAddress(gpa), len as usize)
            .map_err(|error| MemoryError::Regions(error.to_string()))?;
        let mut copy = uffdio_copy {
            dst: to,
            src: source.ptr_guard().as_ptr() as u64,
            len,
            mode: 0,
            copy: 0,
        };
        // SAFETY: the kernel reads and writes one `uffdio_copy`, and reads the source, which is borrowed. It writes to
        // nothing but missing pages of memory that is registered, which is guest memory.
        let result = unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_COPY(), &mut copy) };
        filled("UFFDIO_COPY", result, copy.copy, len)
    }

    /// Fills missing pages with zeroes, as [`Userfault::copy`] does with content. Not for huge pages of hugetlbfs.
    pub fn zero(&self, to: u64, len: u64) -> Result<Filled, MemoryError> {
        let mut zero = uffdio_zeropage {
            range: uffdio_range { start: to, len },
            mode: 0,
            zeropage: 0,
        };
        // SAFETY: the kernel reads and writes one `uffdio_zeropage`, and fills nothing but missing guest memory.
        let result = unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_ZEROPAGE(), &mut zero) };
        filled("UFFDIO_ZEROPAGE", result, zero.zeropage, len)
    }

    /// Protects the pages that are there in this range: a write to one of them waits until its protection is lifted. A page
    /// that comes to be there later is not protected.
    pub fn protect(&self, start: u64, len: u64) -> Result<(), MemoryError> {
        self.write_protect(start, len, WRITEPROTECT_MODE_WP)
    }

    /// Lifts the protection of these pages; the threads that wait go on.
    pub fn unprotect(&self, start: u64, len: u64) -> Result<(), MemoryError> {
        self.write_protect(start, len, 0)
    }

    fn write_protect(&self, start: u64, len: u64, mode: u64) -> Result<(), MemoryError> {
        loop {
            let mut protect = uffdio_writeprotect {
                range: uffdio_range { start, len },
                mode,
            };
            // SAFETY: the kernel reads one `uffdio_writeprotect`; what it does to the range, which is guest memory, changes
            // no content.
            let result = unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_WRITEPROTECT(), &mut protect) };
            // Mappings of this process are just being changed.
            if result < 0 && errno::Error::last().errno() == libc::EAGAIN {
                std::thread::yield_now();
                continue;
            }
            return check("UFFDIO_WRITEPROTECT", result);
        }
    }

    /// Has the threads that wait for pages in this range touch them again.
    pub fn wake(&self, start: u64, len: u64) -> Result<(), MemoryError> {
        // SAFETY: the kernel reads one `uffdio_range`.
        check("UFFDIO_WAKE", unsafe {
            ioctl_with_ref(&self.0, UFFDIO_WAKE(), &uffdio_range { start, len })
        })
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What an ioctl has done that reported `count` of `len` bytes, or a negative error.
fn filled(what: &'static str, result: libc::c_int, count: i64, len: u64) -> Result<Filled, MemoryError> {
    if result == 0 {
        return Ok(Filled::Bytes(len));
    }
    let cause = errno::Error::last();
    match (cause.errno(), u64::try_from(count)) {
        (_, Ok(count @ 1..)) => Ok(Filled::Bytes(count)),
        (libc::EAGAIN, _) => Ok(Filled::Blocked),
        (libc::EEXIST, _) => Ok(Filled::There),
        _ => Err(MemoryError::Userfault { what, cause }),
    }
}

/// Opens a userfaultfd that handles the kernel's own accesses as well: by the system call, or where that is not allowed by
/// the device.
fn open() -> Result<OwnedFd, Errno> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: nothing is registered with it yet.
    let refused = match unsafe { userfaultfd(flags) } {
        Err(errno @ (Errno::PERM | Errno::NOSYS)) => errno,
        opened => return opened,
    };
    let Ok(device) = File::options().read(true).write(true).open(DEVICE) else {
        return Err(refused);
    };
    // SAFETY: the ioctl has no argument but flags.
    let descriptor = unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), flags.bits().into()) };
    if descriptor < 0 {
        return Err(refused);
    }
    // SAFETY: the kernel has just made the descriptor, for this call alone.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn check(what: &'static str, result: libc::c_int) -> Result<(), MemoryError> {
    if result == 0 {
        return Ok(());
    }
    let cause = errno::Error::last();
    Err(MemoryError::Userfault { what, cause })
}
