//! The machine: KVM, memory, vCPUs, devices, and what can be done to them as a whole.

mod arrival;
mod backends;
mod baseline;
mod blank;
mod build;
mod config;
mod description;
mod destination;
mod device_thread;
mod devices;
mod error;
mod generation;
mod source;
mod standstill;
mod state;
mod vmclock;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use ::devices::{GuestExit, GuestMemory};
use api::SnapshotProgress;
use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{Kvm, VmFd};
use migration::{DirtyLog, MemoryRange, PageSet};

use crate::clock::TscFrequency;
use crate::console::Keyboard;
use crate::cpu::Template;
use crate::memory::{self, BitmapLog, FaultHandler, MemoryError, RingLog, WatchedMemory};
use crate::snapshot::Prefetch;
use crate::vcpu::{Holder, MsrList, VcpuFailure, VcpuSet, park_deadline};

pub use arrival::{DiskBackend, HostOffer};
pub use baseline::Tracking;
pub use config::{
    BalloonConfig, ConsoleConfig, DiskConfig, MAX_CPUS, MAX_DEVICES, MachineConfig, NetConfig, VsockConfig,
};
pub use destination::MigrationDestination;
pub use error::MachineError;
pub use source::MigrationSource;
pub use standstill::{SnapshotClocks, SnapshotMemory, Standstill};

pub(crate) use self::backends::{BALLOON_ID, CONSOLE_ID, RNG_ID, VSOCK_ID};
pub(crate) use self::devices::INSTANCE_PREFIX;

use self::baseline::Baseline;
use self::blank::Blank;
use self::devices::DeviceSet;

/// What a machine's threads report to its owner.
pub enum MachineEvent {
    /// The guest wants to end.
    Exit(GuestExit),
    /// A vCPU cannot go on.
    VcpuFailed(VcpuFailure),
}

/// Takes a machine's events.
pub type EventSink = Arc<dyn Fn(MachineEvent) + Send + Sync>;

/// What brings pages of guest memory when they are needed.
enum PageSource {
    /// Another process.
    Handler { _handler: FaultHandler },
    /// Threads of this one, from a snapshot.
    Prefetch(Prefetch),
}

/// A machine. Its methods may be called from several threads; its owner sees to it that calls which exclude
/// each other do not meet.
///
/// Lock order: a vCPU (in order of ids), then a device. A vCPU thread holds its vCPU while it is in the guest
/// and takes a device's lock for one access; a thread that holds a device's lock never waits for a vCPU.
pub struct Machine {
    // Dropped in this order: no vCPU runs when devices end, no device runs when the VM ends, and memory goes
    // last. A dirty log keeps VM and memory, in that order, as long as it is needed.
    vcpus: VcpuSet,
    devices: DeviceSet,
    /// The rings in which vCPUs log their writes, if the machine uses rings.
    rings: Option<Arc<RingLog>>,
    vm: Arc<VmFd>,
    msrs: MsrList,
    /// Dropped before the memory itself, whose addresses may be reused afterwards.
    _watched: WatchedMemory,
    memory: GuestMemory,
    /// What brings its pages when they are needed, if they were not all there from the beginning.
    page_source: Option<PageSource>,
    /// The snapshot to which a difference would be; `None` where there is no such snapshot.
    baseline: Mutex<Option<Baseline>>,
    /// Disks that were made for the machine when it arrived.
    made_disks: Mutex<Vec<Arc<Blank>>>,
    cpuid: Vec<kvm_cpuid_entry2>,
    template: Template,
    cpus: u8,
    tsc: TscFrequency,
}

/// Opens `/dev/kvm`.
pub fn open_kvm() -> Result<Kvm, MachineError> {
    Kvm::new().map_err(MachineError::NoKvm)
}

impl Machine {
    /// Lets a new machine's vCPUs into the guest.
    pub fn start(&self) {
        self.resume_devices();
        self.vcpus.resume(Holder::Startup);
    }

    /// Holds the vCPUs out of the guest for `holder`, if all are out at `until`. Returns the instant at which the first
    /// was asked to leave.
    pub fn pause(&self, holder: Holder, until: Instant) -> Result<Instant, MachineError> {
        self.vcpus
            .pause(holder, until)
            .map_err(|error| match &self.page_source {
                Some(PageSource::Handler { .. }) => MachineError::NoPage(error),
                Some(PageSource::Prefetch(prefetch)) if !prefetch.is_complete() => {
                    MachineError::NoPageYet(error)
                }
                Some(PageSource::Prefetch(_)) | None => error.into(),
            })
    }

    /// Pauses the guest for its user. Nothing is in flight then, and all completed writes are in the files of its
    /// disks, so that the user can copy them.
    pub fn pause_for_user(&self) -> Result<(), MachineError> {
        let was_paused = self.is_held_by(Holder::User);
        self.pause(Holder::User, park_deadline())?;
        let settled = self.settle_devices();
        if settled.is_err() && !was_paused {
            self.resume_for_user();
        }
        settled
    }

    /// Lets the guest go on for its user.
    pub fn resume_for_user(&self) {
        self.devices.resume();
        self.resume(Holder::User);
    }

    fn settle_devices(&self) -> Result<(), MachineError> {
        // A device that waits for a page of a fault handler may wait for ever.
        if !matches!(self.page_source, Some(PageSource::Handler { .. })) {
            self.devices.drain(Instant::now() + devices::DRAIN_TIME)?;
        }
        self.devices.write_out()
    }

    /// Resumes the devices, unless the user has paused the guest.
    fn resume_devices(&self) {
        if !self.is_held_by(Holder::User) {
            self.devices.resume();
        }
    }

    /// Ends the hold of `holder`.
    pub fn resume(&self, holder: Holder) {
        for vcpu in self.vcpus.lock_parked() {
            // Announces to the guest that it was paused, so that its watchdogs do not fire. Has no effect on a guest
            // without kvmclock.
            let _ = vcpu.kvmclock_ctrl();
        }
        self.vcpus.resume(holder);
    }

    /// Ends a migration's hold on a machine that stays. The disk locks come first: the migration may have released
    /// them, and without them the guest must not run. To take a lock that is held already is harmless.
    pub fn resume_after_migration(&self) -> Result<(), MachineError> {
        self.devices.take_locks()?;
        self.resume_devices();
        self.resume(Holder::Migration);
        Ok(())
    }

    /// Whether `holder` holds the vCPUs.
    pub fn is_held_by(&self, holder: Holder) -> bool {
        self.vcpus.gate().held_by(holder)
    }

    /// How the guest ended, if it did, which a [`MachineEvent`] says as well.
    pub fn exit_reason(&self) -> Option<GuestExit> {
        self.devices.exit_reason()
    }

    /// Whether a vCPU has failed, which a [`MachineEvent`] says as well.
    fn has_failed_vcpu(&self) -> bool {
        self.vcpus.gate().has_retired()
    }

    /// Presses the power button.
    pub fn press_power_button(&self) -> Result<(), MachineError> {
        self.devices
            .press_power_button()
            .map_err(|source| MachineError::Io {
                what: "power button",
                source,
            })
    }

    /// What gets the input from the console.
    pub fn keyboard(&self) -> Keyboard {
        match self.devices.terminal() {
            Some(terminal) => Keyboard::Virtio(terminal),
            None => Keyboard::Serial(self.devices.serial.clone()),
        }
    }

    /// The host's end of its balloon, if it has one.
    pub fn balloon(&self) -> Option<Arc<::devices::virtio::balloon::BalloonControl>> {
        self.devices.balloon()
    }

    /// What the devices have counted, by their names. Waits for no thread.
    pub fn metrics(&self) -> BTreeMap<String, BTreeMap<String, u64>> {
        self.devices.metrics()
    }

    /// The host's end of the disk of that name.
    pub fn disk(&self, id: &str) -> Option<Arc<::devices::virtio::block::BlockControl>> {
        self.devices.disk(id)
    }

    /// Number of vCPUs.
    pub fn cpus(&self) -> u8 {
        self.cpus
    }

    /// Fails if some of its memory is lost, as a file that it is mapped from has become shorter.
    pub fn check_memory(&self) -> Result<(), MachineError> {
        Ok(memory::check_whole(&self.memory)?)
    }

    /// Guest RAM in bytes.
    pub fn memory_size(&self) -> u64 {
        use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
        self.memory.iter().map(GuestMemoryRegion::len).sum()
    }

    /// Whether a thread that touches a page may wait for it for ever.
    pub fn may_miss_pages(&self) -> bool {
        match &self.page_source {
            // Another process brings them.
            Some(PageSource::Handler { .. }) => true,
            // A disk brings them, which may fail or hang.
            Some(PageSource::Prefetch(prefetch)) => !prefetch.is_complete(),
            None => false,
        }
    }

    /// How much of its snapshot's memory is there; nothing once all is.
    pub fn prefetch_progress(&self) -> Option<SnapshotProgress> {
        match &self.page_source {
            Some(PageSource::Prefetch(prefetch)) => prefetch.progress(),
            Some(PageSource::Handler { .. }) | None => None,
        }
    }

    /// Ends a machine whose threads must not be waited for: they end with the process. Removes what other processes can
    /// see of it, and brings all completed writes to the files of its disks.
    pub fn abandon(self: Arc<Self>) {
        self.devices.close_sockets();
        self.devices.close_disks();
        std::mem::forget(self);
    }

    fn set_made_disks(&self, disks: Vec<Arc<Blank>>) {
        *self.made_disks.lock().unwrap_or_else(PoisonError::into_inner) = disks;
    }

    /// Removes the disks that were made for the machine when it arrived, as it never ran with them.
    pub fn remove_made_disks(&self) {
        let made = std::mem::take(&mut *self.made_disks.lock().unwrap_or_else(PoisonError::into_inner));
        made.iter().for_each(|disk| disk.remove());
    }

    /// Adds every page that may hold something to `into`.
    fn populated(&self, into: &mut PageSet) -> Result<(), MachineError> {
        match &self.page_source {
            // Only the handler knows what the missing pages hold.
            Some(PageSource::Handler { .. }) => {
                for (gpa, len) in memory::ranges(&self.memory) {
                    into.insert_range(MemoryRange { gpa, len })
                        .map_err(MemoryError::from)?;
                }
                return Ok(());
            }
            // This comes first: a page that is placed in between is found among those that are there.
            Some(PageSource::Prefetch(prefetch)) => prefetch.unplaced(into)?,
            None => {}
        }
        Ok(memory::populated(&self.memory, &self.replaced(), into)?)
    }

    /// What its balloon has given up of the snapshot's file that it is mapped from; see [`::devices::virtio::balloon`].
    fn replaced(&self) -> Vec<(u64, u64)> {
        self.balloon()
            .map(|balloon| balloon.replaced())
            .unwrap_or_default()
    }

    /// CPU template in force.
    pub fn template(&self) -> Template {
        self.template
    }

    fn throttle(&self, shares: &[f64]) -> Result<(), MachineError> {
        Ok(self.vcpus.throttle(shares)?)
    }

    fn turn_dirty_log_on(&self) -> Result<Arc<dyn DirtyLog>, MachineError> {
        if let Some(rings) = &self.rings {
            rings.reset()?;
            memory::set_dirty_log(&self.vm, &self.memory, true)?;
            return Ok(rings.clone());
        }
        memory::set_dirty_log(&self.vm, &self.memory, true)?;
        Ok(Arc::new(BitmapLog::new(self.vm.clone(), self.memory.clone())))
    }

    fn turn_dirty_log_off(&self) -> Result<(), MachineError> {
        // KVM waits for a kernel thread (SRCU's) that a vCPU which never leaves its CPU can keep from running for
        // 300 ms, as measured. Short slices let that thread run, and the guest as well.
        if let Err(error) = self.throttle(&vec![OUT_OF_THE_WAY; self.cpus.into()]) {
            // Without the slices it only takes longer.
            tracing::debug!(%error, "vCPUs stay where they are");
        }
        let stopped = memory::set_dirty_log(&self.vm, &self.memory, false);
        self.throttle(&vec![0.0; self.cpus.into()])?;
        Ok(stopped?)
    }
}

/// Share of time that vCPUs spend outside of the guest while dirty logging is turned off.
const OUT_OF_THE_WAY: f64 = 0.8;

fn kvm_error(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { what, source }
}
