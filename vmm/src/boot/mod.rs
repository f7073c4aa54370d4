//! From files to a guest that is ready to execute its first instruction: kernel, initrd, command line,
//! firmware tables.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use devices::GuestMemory;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

pub mod acpi;
pub mod cmdline;
pub mod entry;
mod format;
pub mod layout;
mod linux;
mod mptable;
mod pvh;
#[cfg(test)]
mod tests;

pub use acpi::VirtioMmioSlot;
pub use entry::EntryPoint;

use format::KernelFormat;

/// The command line for a Linux guest that is given none.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 reboot=k panic=1 pci=off";
/// The same for a guest whose console is the virtio console. Until the kernel has found that, it prints to the serial
/// port.
pub const VIRTIO_CONSOLE_CMDLINE: &str = "earlyprintk=ttyS0 console=hvc0 reboot=k panic=1 pci=off";

/// What can go wrong before the first instruction.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum BootError {
    #[error("{what} {path}")]
    Open {
        what: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{what} {path}: expected a file, got {got}")]
    NotAFile {
        what: &'static str,
        path: PathBuf,
        got: &'static str,
    },
    #[error("kernel {0}: expected an ELF vmlinux or a bzImage, got neither magic number")]
    UnknownFormat(PathBuf),
    #[error("kernel {path}: truncated: its header promises {expected} bytes, the file has {got}")]
    Truncated { path: PathBuf, expected: u64, got: u64 },
    #[error("kernel {path}: {cause} (too little memory?)")]
    Load {
        path: PathBuf,
        cause: linux_loader::loader::Error,
    },
    #[error(
        "kernel {path}: needs memory up to {end:#x} to unpack itself, the guest's ends at {limit:#x}: expected more"
    )]
    KernelTooLarge { path: PathBuf, end: u64, limit: u64 },
    #[error("kernel {0}: expected a bzImage with a 64-bit entry point (boot protocol 2.12 or later)")]
    No64BitEntry(PathBuf),
    #[error(
        "initrd {path}: {size} bytes do not fit between the unpacked kernel's end at {kernel_end:#x} and {limit:#x}"
    )]
    InitrdTooLarge {
        path: PathBuf,
        size: u64,
        kernel_end: u64,
        limit: u64,
    },
    #[error("kernel command line: {got} bytes, at most {limit} fit")]
    CmdlineTooLong { got: usize, limit: usize },
    #[error("kernel command line: a NUL byte at position {0}")]
    CmdlineNul(usize),
    #[error("guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// What to boot.
#[derive(Clone, Debug)]
pub struct BootSource {
    /// ELF `vmlinux` (PVH or 64-bit Linux entry) or bzImage.
    pub kernel: PathBuf,
    /// Initial RAM file system.
    pub initrd: Option<PathBuf>,
    /// Kernel command line; the machine adds its `virtio_mmio.device=` words.
    pub cmdline: String,
}

/// Puts kernel, initrd, command line and firmware tables into guest memory.
///
/// Returns how the first vCPU enters the guest.
pub fn load(
    memory: &GuestMemory,
    source: &BootSource,
    cpus: u8,
    slots: &[VirtioMmioSlot],
) -> Result<EntryPoint, BootError> {
    let size: u64 = memory.iter().map(vm_memory::GuestMemoryRegion::len).sum();
    let (image, format) = open_kernel(&source.kernel)?;
    let loaded = load_kernel(memory, &source.kernel, image, format)?;
    let low_end = layout::ram_ranges(size)[0].1;
    let kernel_end = kernel_end(&loaded);
    if kernel_end > low_end {
        return Err(BootError::KernelTooLarge {
            path: source.kernel.clone(),
            end: kernel_end,
            limit: low_end,
        });
    }
    let limit = match &loaded.setup_header {
        Some(header) if header.initrd_addr_max != 0 => low_end.min(u64::from(header.initrd_addr_max) + 1),
        _ => low_end,
    };
    let initrd = match &source.initrd {
        Some(path) => Some(load_initrd(memory, path, kernel_end, limit)?),
        None => None,
    };
    cmdline::write(memory, &cmdline::with_devices(&source.cmdline, slots))?;
    memory.write_slice(&mptable::build(cpus), GuestAddress(layout::MP_TABLE))?;
    memory.write_slice(&acpi::build(cpus, slots), GuestAddress(layout::ACPI))?;

    match (loaded.pvh_boot_cap, loaded.setup_header) {
        (PvhBootCapability::PvhEntryPresent(entry), _) => {
            pvh::write_start_info(memory, size, initrd)?;
            Ok(EntryPoint::Pvh { rip: entry.0 })
        }
        (_, header) => {
            let is_bzimage = header.is_some();
            linux::write_zero_page(memory, size, header, initrd)?;
            linux::write_page_tables(memory)?;
            let offset = if is_bzimage { linux::BZIMAGE_64BIT_ENTRY } else { 0 };
            Ok(EntryPoint::Linux64 {
                rip: loaded.kernel_load.0 + offset,
            })
        }
    }
}

/// Where the initrd lies.
#[derive(Clone, Copy, Debug)]
struct Initrd {
    gpa: u64,
    /// In bytes.
    len: u64,
}

/// Opens a regular file; returns it with its length in bytes.
fn open(what: &'static str, path: &Path) -> Result<(File, u64), BootError> {
    let wrap = |source| BootError::Open {
        what,
        path: path.into(),
        source,
    };
    // Without O_NONBLOCK a FIFO would block before it could be refused.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(wrap)?;
    let metadata = file.metadata().map_err(wrap)?;
    if !metadata.is_file() {
        let got = if metadata.is_dir() {
            "a directory"
        } else {
            "something else"
        };
        return Err(BootError::NotAFile {
            what,
            path: path.into(),
            got,
        });
    }
    Ok((file, metadata.len()))
}

/// Opens a kernel of a known format that is as long as its header promises.
fn open_kernel(path: &Path) -> Result<(File, KernelFormat), BootError> {
    let (mut file, size) = open("kernel", path)?;
    let wrap = |source| BootError::Open {
        what: "kernel",
        path: path.into(),
        source,
    };
    let mut head = Vec::new();
    Read::by_ref(&mut file)
        .take(format::HEAD_LEN)
        .read_to_end(&mut head)
        .map_err(wrap)?;
    file.seek(SeekFrom::Start(0)).map_err(wrap)?;
    let (format, expected) = format::recognise(&head).ok_or_else(|| BootError::UnknownFormat(path.into()))?;
    if size < expected {
        return Err(BootError::Truncated {
            path: path.into(),
            expected,
            got: size,
        });
    }
    Ok((file, format))
}

fn load_kernel(
    memory: &GuestMemory,
    path: &Path,
    mut image: File,
    format: KernelFormat,
) -> Result<KernelLoaderResult, BootError> {
    let start = Some(GuestAddress(layout::HIGH_MEMORY));
    let loaded = match format {
        KernelFormat::Elf => Elf::load(memory, None, &mut image, start),
        KernelFormat::BzImage => BzImage::load(memory, None, &mut image, start),
    }
    .map_err(|cause| BootError::Load {
        path: path.into(),
        cause,
    })?;
    if let Some(header) = &loaded.setup_header
        && (header.version < 0x20c || header.xloadflags & linux::XLF_KERNEL_64 == 0)
    {
        return Err(BootError::No64BitEntry(path.into()));
    }
    Ok(loaded)
}

/// Where the memory ends that the kernel uses before it knows where the initrd is.
fn kernel_end(loaded: &KernelLoaderResult) -> u64 {
    let unpacked = loaded
        .setup_header
        .as_ref()
        .map_or(0, |header| linux::unpacked_end(header, loaded.kernel_load.0));
    loaded.kernel_end.max(unpacked)
}

/// Puts the initrd as high below `limit` as it fits: the kernel unpacks itself from below.
fn load_initrd(memory: &GuestMemory, path: &Path, kernel_end: u64, limit: u64) -> Result<Initrd, BootError> {
    let (mut file, size) = open("initrd", path)?;
    let too_large = || BootError::InitrdTooLarge {
        path: path.into(),
        size,
        kernel_end,
        limit,
    };
    let gpa = limit.checked_sub(size).ok_or_else(too_large)? & !(layout::PAGE_SIZE - 1);
    if gpa < kernel_end.max(layout::HIGH_MEMORY) {
        return Err(too_large());
    }
    memory.read_exact_volatile_from(GuestAddress(gpa), &mut file, size as usize)?;
    Ok(Initrd { gpa, len: size })
}
