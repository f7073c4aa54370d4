//! What can go wrong with guest memory.

use std::io;
use std::path::PathBuf;

use thiserror::Error;
use vm_memory::mmap::MmapRegionError;

use super::huge_pages::HUGE_PAGE;
use super::mapping::MIN_MEMORY;
use crate::memory::PAGE_SIZE;

/// Guest memory could not be made, mapped, or tracked.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum MemoryError {
    #[error("memory: expected a multiple of {page} bytes, got {0}", page = PAGE_SIZE)]
    NotPages(u64),
    #[error("memory: expected at least {MIN_MEMORY} bytes, got {0}")]
    TooSmall(u64),
    #[error("memory: {got} bytes, but this host has {host}")]
    MoreThanHost { got: u64, host: u64 },
    #[error("memory: expected at most {bytes} bytes, which is what {by} has left, got {got}")]
    NotAvailable { got: u64, bytes: u64, by: String },
    #[error("memory that is available on this host")]
    Available(#[source] io::Error),
    #[error("memory in huge pages: expected a multiple of {HUGE_PAGE} bytes, got {0}")]
    NotHugePages(u64),
    #[error(
        "huge pages: expected {needed} of 2 MiB that are free, got {free}: add {missing} or more to \
         /proc/sys/vm/nr_hugepages"
    )]
    TooFewHugePages { needed: u64, free: u64, missing: u64 },
    #[error("huge pages of 2 MiB on this host")]
    HugePagePool(#[source] io::Error),
    #[error(
        "userfaultfd: expected CAP_SYS_PTRACE, access to /dev/userfaultfd, or 1 in \
         /proc/sys/vm/unprivileged_userfaultfd: KVM's accesses are to be handled as well, not only this process's own"
    )]
    Userfaultfd(#[source] io::Error),
    #[error("userfaultfd: {what}: {cause}")]
    Userfault {
        what: &'static str,
        cause: vmm_sys_util::errno::Error,
    },
    #[error("page-fault handler {}", path.display())]
    FaultHandler { path: PathBuf, source: io::Error },
    #[error("memory that other processes share cannot come from a page-fault handler")]
    SharedFaults,
    #[error("memfd of {len} bytes")]
    Memfd { len: u64, source: io::Error },
    #[error("mapping the memory file of a snapshot")]
    Private(#[source] io::Error),
    #[error("mapping {len} bytes of guest memory")]
    Map { len: u64, source: MmapRegionError },
    #[error("guest memory")]
    Regions(String),
    #[error("memory handed over: expected {expected} files, got {got}")]
    FileCount { expected: usize, got: usize },
    #[error("memory handed over: file {index}")]
    File { index: usize, source: io::Error },
    #[error("memory handed over: file {index}: expected a memfd of {expected} bytes, got {got} bytes")]
    FileSize { index: usize, expected: u64, got: u64 },
    #[error("memory handed over: file {index}: expected a memfd, which has seals")]
    NotMemfd { index: usize, source: io::Error },
    #[error(
        "memory handed over: file {index}: expected a memfd sealed against shrinking, got seals {got:#x}"
    )]
    NotSealed { index: usize, got: u32 },
    #[error("making {len} bytes of guest memory resident (MADV_POPULATE_WRITE, since Linux 5.14)")]
    Populate { len: u64, source: io::Error },
    #[error("guest memory that shares no pages (MADV_UNMERGEABLE)")]
    Unmerge(#[source] io::Error),
    #[error("threads to make guest memory resident")]
    Thread(#[source] io::Error),
    #[error("/proc/self/pagemap")]
    Pagemap(#[source] io::Error),
    #[error("looking for data in the file behind guest memory")]
    Seek(#[source] io::Error),
    #[error(
        "the file behind guest memory: expected at least {expected} bytes, got {got}: the rest of it is lost"
    )]
    Shrunk { expected: u64, got: u64 },
    #[error("KVM_SET_USER_MEMORY_REGION slot {slot}")]
    Slot { slot: u32, source: kvm_ioctls::Error },
    #[error("KVM_GET_DIRTY_LOG slot {slot}: {cause}")]
    DirtyLog {
        slot: u32,
        cause: vmm_sys_util::errno::Error,
    },
    #[error("KVM_CLEAR_DIRTY_LOG slot {slot}, {pages} pages from {first}: {cause}")]
    ClearDirtyLog {
        slot: u32,
        first: u64,
        pages: u64,
        cause: vmm_sys_util::errno::Error,
    },
    #[error(
        "region {region}: expected a stretch of whole words within {expected} pages, got {got} words from page {first}"
    )]
    MarkedWords {
        region: usize,
        expected: u64,
        first: u64,
        got: usize,
    },
    #[error("KVM: expected dirty rings (KVM_CAP_DIRTY_LOG_RING_ACQ_REL, since Linux 6.1), got none")]
    NoRings,
    #[error("KVM_CAP_DIRTY_LOG_RING_ACQ_REL")]
    EnableRings(#[source] kvm_ioctls::Error),
    #[error("mapping a vCPU's dirty ring")]
    MapRing(#[source] io::Error),
    #[error("KVM_RESET_DIRTY_RINGS: expected {entries} entries, got {done}")]
    RingsNotReset { entries: usize, done: usize },
    #[error("shared memory {index}: expected a memfd of ordinary pages, got another file system")]
    OtherPages { index: usize },
    #[error("KVM_RESET_DIRTY_RINGS: {0}")]
    ResetRings(vmm_sys_util::errno::Error),
    #[error("page set")]
    PageSet(#[from] migration::PageSetError),
}
