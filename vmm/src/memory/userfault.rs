//! Page faults of guest memory that another process resolves (userfaultfd(2), ioctl_userfaultfd(2)).
#![allow(unsafe_code)] // A system call that lets others fill this process's memory, and its ioctls.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};

use devices::GuestMemory;
use linux_raw_sys::general::{
    _UFFDIO_API, _UFFDIO_COPY, _UFFDIO_REGISTER, UFFD_API, UFFD_FEATURE_EVENT_REMOVE,
    UFFD_FEATURE_MISSING_HUGETLBFS, UFFDIO, UFFDIO_REGISTER_MODE_MISSING, uffdio_api, uffdio_range,
    uffdio_register,
};
use migration::MemoryKind;
use rustix::io::Errno;
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_iowr_nr};

use super::{MemoryError, kind};

ioctl_io_nr!(USERFAULTFD_IOC_NEW, UFFDIO, 0);
ioctl_iowr_nr!(UFFDIO_API, UFFDIO, _UFFDIO_API, uffdio_api);
ioctl_iowr_nr!(UFFDIO_REGISTER, UFFDIO, _UFFDIO_REGISTER, uffdio_register);

/// Gives a descriptor to every process that may open it, since Linux 6.1.
const DEVICE: &str = "/dev/userfaultfd";

/// From here on a fault on a missing page of the memory waits until the fault handler resolves it through the
/// descriptor, whether this process or KVM touches the page; giving pages up is an event. Once the last copy of the
/// descriptor is closed, missing pages are zero.
pub(super) fn register(memory: &GuestMemory) -> Result<OwnedFd, MemoryError> {
    let descriptor = open().map_err(|errno| MemoryError::Userfaultfd(errno.into()))?;
    let mut features = u64::from(UFFD_FEATURE_EVENT_REMOVE);
    if kind(memory) == MemoryKind::HugePages {
        features |= u64::from(UFFD_FEATURE_MISSING_HUGETLBFS);
    }
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
            mode: UFFDIO_REGISTER_MODE_MISSING.into(),
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes one `uffdio_register`. The range is a mapping of guest memory, which
        // no Rust reference points to; the handler that fills its pages does no more than the guest could.
        check("UFFDIO_REGISTER", unsafe {
            ioctl_with_mut_ref(&descriptor, UFFDIO_REGISTER(), &mut register)
        })?;
        if register.ioctls >> _UFFDIO_COPY & 1 == 0 {
            let cause = errno::Error::new(libc::EOPNOTSUPP);
            return Err(MemoryError::Userfault {
                what: "UFFDIO_COPY",
                cause,
            });
        }
    }
    Ok(descriptor)
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
