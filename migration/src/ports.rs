//! The engine's ports: what it asks of a machine, and nothing about how the machine does it.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migration_io::GuestMemory;
use serde::{Deserialize, Serialize};

use crate::page_set::PageSet;

/// A machine's own error, as the engine passes it on: one line that names what was expected and what came.
pub type PortError = Box<dyn std::error::Error + Send + Sync>;

/// One range of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRegion {
    /// First guest-physical address, a multiple of 4096.
    pub gpa: u64,
    /// Bytes, a multiple of 4096.
    pub len: u64,
}

/// What guest RAM is made of. The destination's must be the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryKind {
    /// Anonymous memory, in transparent huge pages where the host gives them.
    Anonymous,
    /// A memfd, which other processes can share.
    Shared,
    /// Huge pages of 2 MiB that the host has set aside (hugetlbfs).
    HugePages,
}

/// One CPUID leaf as the guest sees it on vCPU 0 (Intel SDM vol. 2A, CPUID).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidLeaf {
    /// EAX on entry.
    pub function: u32,
    /// ECX on entry; 0 where the leaf has no sub-leaves.
    pub index: u32,
    /// EAX, EBX, ECX, EDX on return.
    pub registers: [u32; 4],
}

/// One device that moves with the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceDescription {
    /// The user's name for it, unique in the machine; the receiver names its own backend by it.
    pub id: String,
    /// The kind, e.g. `virtio-block`.
    pub kind: String,
    /// Version of the kind's saved state.
    pub version: u16,
    /// What the device offers to the guest, in bits that mean something to its kind. The destination's must offer
    /// all of it, or the guest would lose what it counts on.
    pub features: u64,
    /// Size of the backend in bytes where it has one (a disk), else 0.
    pub backend_size: u64,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// What the device was made with, in bytes that mean something to its kind.
    pub parameters: Vec<u8>,
}

/// What the source says about its machine; the destination compares it with what it can offer before it
/// builds anything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineDescription {
    /// Guest RAM, ascending and without overlap.
    pub memory: Vec<MemoryRegion>,
    /// What the RAM is made of.
    pub memory_kind: MemoryKind,
    /// Number of vCPUs.
    pub cpus: u8,
    /// Name of the CPU template in force.
    pub cpu_template: String,
    /// What the guest sees on vCPU 0.
    pub cpuid: Vec<CpuidLeaf>,
    /// Guest TSC frequency in kHz.
    pub tsc_khz: u32,
    /// Devices in bus order.
    pub devices: Vec<DeviceDescription>,
}

/// What the source says about its disks, besides the description of their devices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferedDisks {
    /// Whether the source sends the content of disks that the destination does not have.
    pub come: bool,
    /// Marks by which the destination recognises the source's disks.
    pub marks: Vec<DiskMark>,
}

/// Shows that a file is the disk that the source has open, on whichever host the two are: of all that is locked in it
/// the source has locked exactly one byte at an offset that it has chosen at random.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskMark {
    /// Which of the machine's devices the disk is behind.
    pub device: u32,
    /// The offset in bytes.
    pub offset: u64,
}

/// One reason why a destination cannot run the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// What differs, e.g. `cpuid 1.ecx avx`, `memory`, `disk "root"`.
    pub what: String,
    /// What the source's machine needs.
    pub expected: String,
    /// What the destination has.
    pub got: String,
}

/// Which pages of guest RAM were written: what vCPUs wrote (KVM's log) and what the machine's own devices wrote.
///
/// A page is marked from a write until it is cleared. Streams clear a page just before they read it, so a page
/// that is written while it is sent is marked again. Any thread may call, any number at a time.
pub trait DirtyLog: Send + Sync {
    /// Adds every marked page to `into`; the marks stay. Cheap enough to call a hundred times a second.
    fn peek(&self, into: &mut PageSet) -> Result<(), PortError>;

    /// Clears the marks of the pages whose bits are set in `words`: bit n of word m is page `first + 64 m + n`
    /// of region number `region`, and `first` is a multiple of 64. A write after this call marks again.
    fn clear(&self, region: usize, first: u64, words: &[u64]) -> Result<(), PortError>;

    /// Pages marked by each vCPU since the log was started, where the machine can tell (a dirty ring); else
    /// empty.
    fn by_vcpu(&self) -> Vec<u64>;
}

/// A disk at the source whose content comes along, and the log of what is written to it. Blocks are of
/// [`migration_io::PAGE_SIZE`] bytes. A block is marked from a write until it is cleared, as pages are in a
/// [`DirtyLog`]. Any thread may call, any number at a time.
pub trait SourceDisk: Send + Sync {
    /// Bytes, more than 0. They do not change while the disk is mirrored.
    fn size(&self) -> u64;

    /// Ranges that may hold something, as offset and length in bytes; all else is zero. Asked after the log was
    /// started.
    fn allocated(&self) -> Result<Vec<(u64, u64)>, PortError>;

    /// The blocks that are marked, one bit for each: bit n of word m is block `64 m + n`. The marks stay.
    fn marked(&self) -> Vec<u64>;

    /// Clears the marks of the blocks whose bits are set in `words`, the first of which is block `first`, a multiple
    /// of 64.
    fn clear(&self, first: u64, words: &[u64]);

    /// Reads what is there now; a range within the disk.
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), PortError>;
}

/// A disk that the destination has made anew, zeroed, to be filled with what comes. Any thread may call, any number
/// at a time.
pub trait BlankDisk: Send + Sync {
    /// Which of the machine's devices it is behind.
    fn device(&self) -> u32;

    /// Bytes, those of the source's disk.
    fn size(&self) -> u64;

    /// Writes; a range within the disk.
    fn write(&self, offset: u64, content: &[u8]) -> Result<(), PortError>;

    /// Reads what is there now; a range within the disk.
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), PortError>;

    /// Makes a range within the disk zero.
    fn zero(&self, offset: u64, len: u64) -> Result<(), PortError>;
}

/// What a vCPU's thread has got of the host's CPUs since it was started, as its scheduler counts it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuTime {
    /// How long it ran, in the guest or in the kernel.
    pub ran: Duration,
    /// How long it was ready to run and waited for a CPU.
    pub waited: Duration,
}

/// What [`Source::rehearse`] found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rehearsal {
    /// How long it took to get all vCPUs out of the guest.
    pub pause: Duration,
    /// How long it took to save what was saved.
    pub save: Duration,
    /// What was saved, for [`Destination::rehearse`]: an encoded envelope, at most 64 MiB.
    pub state: Vec<u8>,
}

/// The machine at the source.
///
/// Calls come from one migration job, in the order of a migration: `mirror`, `start_dirty_log`, then `throttle`,
/// `flush` and `rehearse` at any time, `pause`, `drain`, `save`, `release`. In a handover of memory there is no dirty
/// log. Whatever ends a migration before "go" is on its way, the engine calls `throttle` with zeros if it throttled,
/// `resume` if it called `pause`, then `stop_dirty_log` if it called `start_dirty_log` and
/// `stop_mirror` if it called `mirror`, also where that call failed or panicked. After "go" it calls `resume` only when
/// the destination has answered that it gave the machine up.
pub trait Source: Send {
    /// What the destination must be able to run.
    fn describe(&self) -> MachineDescription;

    /// Marks the disks for this migration. The marks stay until the next ones, or until the disks' locks are given up.
    /// Fails where the destination could not open a disk that does not `come` along, as it has no name any more.
    fn mark_disks(&mut self, come: bool) -> Result<Vec<DiskMark>, PortError>;

    /// Guest RAM; the regions are those of [`MachineDescription::memory`], in that order.
    fn memory(&self) -> GuestMemory;

    /// Adds every page that may hold something to `into`; all others were never touched and are zero. Asked
    /// after `start_dirty_log`.
    fn populated(&self, into: &mut PageSet) -> Result<(), PortError>;

    /// Whether it is worth asking the guest for its unused pages, if this many pages are populated. Returns within
    /// `at_most`.
    fn has_unused(&mut self, populated: u64, at_most: Duration) -> Result<bool, PortError>;

    /// Asks the guest for its unused pages, and adds what it reports within `at_most`: pages whose content was of no
    /// use to it at some time during this call. It may write to them again at any time, also before this returns; that
    /// marks them, as any write does. Called after `start_dirty_log`, with all marks cleared, and only if `has_unused`
    /// returned true. Afterwards the guest keeps nothing back for it, whatever came of it.
    fn unused(&mut self, at_most: Duration, into: &mut PageSet) -> Result<(), PortError>;

    /// The files behind guest RAM, in the order of its regions, for a destination on the same host that maps
    /// them as well; nothing where RAM is not shared memory.
    fn memory_files(&self) -> Option<Vec<OwnedFd>>;

    /// Begins to mark what is written to the disks behind these devices, which the destination does not have; one
    /// for each, in that order. Only called if there are any. The devices come from the peer: untrusted.
    fn mirror(&mut self, devices: &[u32]) -> Result<Vec<Arc<dyn SourceDisk>>, PortError>;

    /// Ends what `mirror` began; also called after a `mirror` that failed.
    fn stop_mirror(&mut self) -> Result<(), PortError>;

    /// Turns dirty logging on. Every page counts as marked at first, or is marked by the first write; either
    /// way the engine sends all of memory once.
    fn start_dirty_log(&mut self) -> Result<Arc<dyn DirtyLog>, PortError>;

    /// Turns dirty logging off; also called after a `start_dirty_log` that failed.
    fn stop_dirty_log(&mut self) -> Result<(), PortError>;

    /// What each vCPU has got of the host's CPUs so far, in the same order each time; empty where the host does not say.
    fn vcpu_times(&self) -> Vec<VcpuTime>;

    /// From now on keeps each vCPU out of the guest for a share of the time, 0 to 1, in slices of at most
    /// 10 ms. One share for each vCPU. Returns at once.
    fn throttle(&mut self, shares: &[f64]) -> Result<(), PortError>;

    /// Writes back what disk backends have cached, while the guest runs, so that little is left for `drain`.
    fn flush(&mut self) -> Result<(), PortError>;

    /// Takes the vCPUs out of the guest, saves as much of the state as can be saved without stopping devices,
    /// and lets them in again: what a pause will cost. Takes a few milliseconds at most.
    fn rehearse(&mut self) -> Result<Rehearsal, PortError>;

    /// Takes all vCPUs out of the guest and holds them out. Returns when the last one is out; the instant is
    /// the one at which the first one was asked to leave, the start of the downtime. An error if that is not done at
    /// `until`; then nothing is held.
    fn pause(&mut self, until: Instant) -> Result<Instant, PortError>;

    /// Finishes device work in flight and flushes disk backends; afterwards no device writes guest RAM. An error if
    /// that is not done at `until`.
    fn drain(&mut self, until: Instant) -> Result<(), PortError>;

    /// The state of vCPUs, interrupt controllers, clocks and devices: an encoded envelope
    /// (`migration_state::Envelope`), at most 64 MiB. The machine is paused and drained. Pages that this call
    /// writes are marked in the log; after that, nothing may write guest RAM any more.
    fn save(&mut self) -> Result<Vec<u8>, PortError>;

    /// Gives up the disk locks, right before "go" is sent: the point of no return. Should the connection not
    /// take a single byte of "go", `resume` follows, which takes the locks again.
    fn release(&mut self) -> Result<(), PortError>;

    /// Lets the guest run on after a pause that led to nothing. Devices and vCPUs go on where they were.
    /// The guest stays paused if the user had paused it before the migration. Also comes after a `pause` that
    /// failed, and takes back the disk locks where `release` gave them up.
    fn resume(&mut self) -> Result<(), PortError>;
}

/// The machine at the destination.
///
/// Calls come in this order: `check`, `create`, `rehearse` any number of times, `restore`, `resume`. Before
/// `resume`, `discard` may come at any time; afterwards the value is ready for another attempt.
pub trait Destination: Send {
    /// Every difference that forbids the move; empty if it can be made. A file without the mark of the source's disk is
    /// not that disk.
    fn check(&self, description: &MachineDescription, disks: &OfferedDisks) -> Vec<Difference>;

    /// Builds the machine, its backends open but its disks neither locked nor read, and returns its guest
    /// RAM, with the regions of the description in that order: zeroed, or, where `files` are given, a mapping of
    /// those files, one for each region. The files are untrusted: expected are memfds of the regions' lengths,
    /// sealed against shrinking.
    fn create(
        &mut self,
        description: &MachineDescription,
        files: Option<Vec<OwnedFd>>,
        disks: &OfferedDisks,
    ) -> Result<GuestMemory, PortError>;

    /// The disks that `create` made anew, in the order of their devices. Whatever was written to them is durable
    /// once `restore` has returned, and they have their names; `discard` leaves nothing of them.
    fn blank_disks(&self) -> Vec<Arc<dyn BlankDisk>>;

    /// Whether guest RAM is resident already, so that there is nothing to gain by populating it.
    fn is_resident(&self) -> bool;

    /// Does with what [`Source::rehearse`] saved as much of a restore as can be done again afterwards, so that
    /// the restore itself is short and its time known. Then does the same for `resume`, and returns how long that part
    /// took. Untrusted input.
    fn rehearse(&mut self, state: &[u8]) -> Result<Duration, PortError>;

    /// Makes the saved state the machine's own. Untrusted input. Afterwards the machine is paused and ready
    /// to run in every respect but the clocks and the disk locks.
    fn restore(&mut self, state: &[u8]) -> Result<(), PortError>;

    /// After "go": takes the disk locks, drops what was cached from the disks, moves the clocks on by the
    /// time since `stopped_at` (the source's pause, on this host's clock), and lets the vCPUs in. Returns when
    /// the last one was let in. On an error the machine stays paused, with its memory.
    fn resume(&mut self, stopped_at: Instant) -> Result<(), PortError>;

    /// Discards everything that was built.
    fn discard(&mut self);
}
