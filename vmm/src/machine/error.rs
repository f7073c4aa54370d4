//! What can go wrong with a machine.

use devices::HostSocketError;
use devices::virtio::HostError;
use devices::virtio::block::BlockBackendError;
use devices::virtio::console;
use devices::virtio::mmio::MmioTransportError;
use devices::virtio::net::TapError;
use thiserror::Error;

use crate::boot::BootError;
use crate::clock::ClockError;
use crate::cpu::CpuError;
use crate::memory::MemoryError;
use crate::vcpu::{VcpuError, VcpuStateError};

/// The machine could not be built, run, saved or restored.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum MachineError {
    #[error("/dev/kvm: {0}; `godwit probe` says what this host offers")]
    NoKvm(kvm_ioctls::Error),
    #[error("KVM: expected dirty logs with manual protection, initially set (since Linux 5.7), got none")]
    NoManualProtect,
    #[error("KVM: expected to hear a VM's TSC frequency (KVM_GET_TSC_KHZ of VMs, since Linux 5.17): {0}")]
    VmTscKhz(vmm_sys_util::errno::Error),
    #[error("{what}")]
    Kvm {
        what: &'static str,
        source: kvm_ioctls::Error,
    },
    #[error("{what}")]
    Io {
        what: &'static str,
        source: std::io::Error,
    },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Cpu(#[from] CpuError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error("a page that a vCPU waits for does not come from the page-fault handler")]
    NoPage(#[source] VcpuError),
    #[error("a page that a vCPU waits for has not come from its snapshot yet")]
    NoPageYet(#[source] VcpuError),
    #[error(
        "live snapshot: expected a machine without a balloon, as what the guest gives up would be gone: leave out --live"
    )]
    LiveBalloon,
    #[error(
        "live snapshot: expected memory that is all here, found some that comes when it is needed: wait until \
         `godwit status` shows no `prefetch`, or leave out --live"
    )]
    LivePages,
    #[error(transparent)]
    VcpuState(#[from] VcpuStateError),
    #[error(transparent)]
    Clock(#[from] ClockError),
    #[error(transparent)]
    Disk(#[from] BlockBackendError),
    #[error(transparent)]
    Blank(#[from] super::blank::BlankError),
    #[error("{}", super::VSOCK_ID)]
    Vsock(#[from] HostSocketError),
    #[error("{}", super::CONSOLE_ID)]
    Console(#[from] console::ConsoleBackendError),
    #[error("the VM is to end")]
    CalledOff,
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error("{id}")]
    Backend { id: String, source: HostError },
    #[error(transparent)]
    Transport(#[from] MmioTransportError),
    #[error(transparent)]
    Serial(#[from] devices::legacy::SerialError),
    #[error(transparent)]
    Bus(#[from] devices::bus::BusError),
    #[error("saved state")]
    State(#[from] migration_state::StateError),
    #[error(transparent)]
    Snapshot(#[from] crate::snapshot::SnapshotError),
    #[error(
        "no base for a difference: expected an earlier snapshot with --keep-running, or a start by `godwit restore` \
         without --prefetch, --preload, --uffd and shared memory, and no migration since: make a whole snapshot first"
    )]
    NoBase,
    #[error("log of the pages written since the last snapshot")]
    DirtyLog(#[source] migration::PortError),
    #[error("this host cannot run the machine: {}", migration::list(.0))]
    Unfit(Vec<migration::Difference>),
    #[error("saved state: {what}: expected {expected}, got {got}")]
    Mismatch {
        what: &'static str,
        expected: String,
        got: String,
    },
}
