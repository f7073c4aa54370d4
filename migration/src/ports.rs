//! The engine's ports: what it asks of a machine, and nothing about how the machine does it.

use std::time::Instant;

use migration_io::GuestMemory;
use serde::{Deserialize, Serialize};

use crate::page_set::PageSet;

/// A machine's own error, as the engine passes it on: one line that names what was expected and what came.
pub type MachineError = Box<dyn std::error::Error + Send + Sync>;

/// One range of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRegion {
    /// First guest-physical address, a multiple of 4096.
    pub gpa: u64,
    /// Bytes, a multiple of 4096.
    pub len: u64,
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
    /// Size of the backend in bytes where it has one (a disk), else 0.
    pub backend_size: u64,
    /// Whether the guest may only read.
    pub read_only: bool,
}

/// What the source says about its machine; the destination compares it with what it can offer before it
/// builds anything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineDescription {
    /// Guest RAM, ascending and without overlap.
    pub memory: Vec<MemoryRegion>,
    /// Whether the RAM is a memfd that can be shared.
    pub shared_memory: bool,
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

/// The machine at the source.
///
/// Calls come from one migration job, in the order of a migration: `start_dirty_log`, `harvest`… with a `flush`
/// or a few in between, `pause`, `drain`, `harvest`, `save`, `harvest` twice, `release`. Whatever ends a
/// migration before "go" is on its way, the engine calls `resume` if it called `pause`, then `stop_dirty_log`
/// if it called `start_dirty_log`, also where that call failed or panicked. After "go" it calls nothing.
pub trait Source: Send {
    /// What the destination must be able to run.
    fn describe(&self) -> MachineDescription;

    /// Guest RAM; the regions are those of [`MachineDescription::memory`], in that order.
    fn memory(&self) -> GuestMemory;

    /// Turns dirty logging on. Pages written from here on show up in `harvest`.
    fn start_dirty_log(&mut self) -> Result<(), MachineError>;

    /// Turns dirty logging off; also after a `start_dirty_log` that failed.
    fn stop_dirty_log(&mut self) -> Result<(), MachineError>;

    /// Adds every page written since the last harvest, by vCPUs or by devices, to `into` and forgets it.
    fn harvest(&mut self, into: &mut PageSet) -> Result<(), MachineError>;

    /// Writes back what disk backends have cached, while the guest runs, so that little is left for `drain`.
    fn flush(&mut self) -> Result<(), MachineError>;

    /// Takes all vCPUs out of the guest and holds them out. Returns when the last one is out; the instant is
    /// the one at which the first one was asked to leave, the start of the downtime.
    fn pause(&mut self) -> Result<Instant, MachineError>;

    /// Finishes device work in flight and flushes disk backends; afterwards no device writes guest RAM.
    fn drain(&mut self) -> Result<(), MachineError>;

    /// The state of vCPUs, interrupt controllers, clocks and devices: an encoded envelope
    /// (`migration_state::Envelope`), at most 64 MiB. The machine is paused and drained. Pages that this call
    /// writes show up in the next harvest; after that, nothing may write guest RAM any more.
    fn save(&mut self) -> Result<Vec<u8>, MachineError>;

    /// Gives up the disk locks, right before "go" is sent: the point of no return. Should the connection not
    /// take a single byte of "go", `resume` follows, which takes the locks again.
    fn release(&mut self) -> Result<(), MachineError>;

    /// Lets the guest run on after a pause that led to nothing. Devices and vCPUs go on where they were.
    /// The guest stays paused if the user had paused it before the migration. Also comes after a `pause` that
    /// failed, and takes back the disk locks where `release` gave them up.
    fn resume(&mut self) -> Result<(), MachineError>;
}

/// The machine at the destination.
///
/// Calls come in this order: `check`, `create`, `restore`, `resume`. Before `resume`, `discard` may come at
/// any time; afterwards the value is ready for another attempt.
pub trait Destination: Send {
    /// Every difference that forbids the move; empty means that it can be done.
    fn check(&self, description: &MachineDescription) -> Vec<Difference>;

    /// Builds the machine, its backends open but its disks neither locked nor read, and returns its guest
    /// RAM: zeroed, with the regions of the description in that order.
    fn create(&mut self, description: &MachineDescription) -> Result<GuestMemory, MachineError>;

    /// Makes the saved state the machine's own. Untrusted input. Afterwards the machine is paused and ready
    /// to run in every respect but the clocks and the disk locks.
    fn restore(&mut self, state: &[u8]) -> Result<(), MachineError>;

    /// After "go": takes the disk locks, drops what was cached from the disks, moves the clocks on by the
    /// time since `stopped_at` (the source's pause, on this host's clock), and lets the vCPUs in. Returns when
    /// the last one was let in. On an error the machine stays paused, with its memory.
    fn resume(&mut self, stopped_at: Instant) -> Result<(), MachineError>;

    /// Throws away whatever was built.
    fn discard(&mut self);
}
