//! The machine: KVM, memory, vCPUs, devices, and what can be done to them as a whole.

mod arrival;
mod description;
mod destination;
mod device_thread;
mod devices;
mod source;
mod state;

use std::sync::Arc;
use std::time::Instant;

use ::devices::virtio::HostError;
use ::devices::virtio::block::{Backend, BackendError};
use ::devices::virtio::mmio::TransportError;
use ::devices::{GuestExit, GuestMemory};
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_cpuid_entry2, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use migration::PageSet;
use thiserror::Error;

use crate::boot::{self, BootError, BootSource, layout};
use crate::clock::ClockError;
use crate::console::Console;
use crate::cpu::{self, CpuError, Template};
use crate::memory::{self, MemoryError};
use crate::vcpu::{Buses, Holder, VcpuError, VcpuFailure, VcpuSet, VcpuStateError, set_msr};

pub use arrival::Arrival;
pub use destination::MigrationDestination;
pub use source::MigrationSource;

pub(crate) use self::devices::{INSTANCE_PREFIX, RNG_ID};

use self::devices::DeviceSet;

/// The machine could not be built, run, saved or restored.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum MachineError {
    #[error("/dev/kvm: {0}; `godwit probe` says what this host offers")]
    NoKvm(kvm_ioctls::Error),
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
    #[error(transparent)]
    VcpuState(#[from] VcpuStateError),
    #[error(transparent)]
    Clock(#[from] ClockError),
    #[error(transparent)]
    Disk(#[from] BackendError),
    #[error("{id}")]
    Backend { id: String, source: HostError },
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error(transparent)]
    Serial(#[from] ::devices::legacy::SerialError),
    #[error(transparent)]
    Bus(#[from] ::devices::bus::BusError),
    #[error("saved state")]
    State(#[from] migration_state::StateError),
    #[error("saved state: {what}: expected {expected}, got {got}")]
    Mismatch {
        what: &'static str,
        expected: String,
        got: String,
    },
}

/// What a machine is built from, whether it boots or is received.
pub(crate) struct Spec {
    /// Guest RAM as `(gpa, length)`.
    pub(crate) ranges: Vec<(u64, u64)>,
    /// Whether RAM is a memfd.
    pub(crate) shared_memory: bool,
    /// Number of vCPUs.
    pub(crate) cpus: u8,
    /// Name of the CPU template that `cpuid` was made with.
    pub(crate) template: Template,
    /// What the guest sees, see [`cpu::machine_cpuid`].
    pub(crate) cpuid: Vec<kvm_cpuid_entry2>,
    /// Guest TSC frequency, where it must not be the host's.
    pub(crate) tsc_khz: Option<u32>,
    /// Disks by name, in bus order.
    pub(crate) disks: Vec<(String, Arc<Backend>)>,
}

/// What a machine tells whoever owns it, from its own threads.
pub enum MachineEvent {
    /// The guest wants to end.
    Exit(GuestExit),
    /// A vCPU cannot go on.
    VcpuFailed(VcpuFailure),
}

/// Takes a machine's events.
pub type EventSink = Arc<dyn Fn(MachineEvent) + Send + Sync>;

/// A machine. Its methods may be called from several threads; its owner sees to it that calls which exclude
/// each other do not meet.
///
/// Lock order: a vCPU (in order of ids), then a device. A vCPU thread holds its vCPU while it is in the guest
/// and takes a device's lock for one access; nobody who holds a device's lock waits for a vCPU.
pub struct Machine {
    // Dropped in this order: no vCPU runs when devices end, no device runs when the VM ends, and memory goes
    // last.
    vcpus: VcpuSet,
    devices: DeviceSet,
    vm: VmFd,
    kvm: Kvm,
    memory: GuestMemory,
    cpuid: Vec<kvm_cpuid_entry2>,
    template: Template,
    cpus: u8,
    tsc_khz: u32,
}

/// Opens `/dev/kvm`.
pub fn open_kvm() -> Result<Kvm, MachineError> {
    Kvm::new().map_err(MachineError::NoKvm)
}

impl Machine {
    /// Builds a machine that boots `source`, with its disks locked. It waits for [`Machine::start`].
    pub fn boot(config: &crate::Config, console: &Console, events: EventSink) -> Result<Self, MachineError> {
        let kvm = open_kvm()?;
        let cpuid = cpu::machine_cpuid(&cpu::host_cpuid(&kvm)?, config.template, config.cpus);
        let mut disks = Vec::new();
        for disk in &config.disks {
            let backend = Backend::open(&disk.path, disk.read_only)?;
            backend.lock()?;
            disks.push((disk.id.clone(), Arc::new(backend)));
        }
        let spec = Spec {
            ranges: layout::ram_ranges(config.memory),
            shared_memory: config.shared_memory,
            cpus: config.cpus,
            template: config.template,
            cpuid,
            tsc_khz: None,
            disks,
        };
        let machine = Self::build(kvm, spec, console, events)?;
        machine.load(&config.boot)?;
        Ok(machine)
    }

    /// Builds a machine whose vCPUs are in their reset state and wait at the gate.
    pub(crate) fn build(
        kvm: Kvm,
        spec: Spec,
        console: &Console,
        events: EventSink,
    ) -> Result<Self, MachineError> {
        let vm = kvm.create_vm().map_err(kvm_error("KVM_CREATE_VM"))?;
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(kvm_error("KVM_SET_IDENTITY_MAP_ADDR"))?;
        vm.set_tss_address(layout::KVM_TSS as usize)
            .map_err(kvm_error("KVM_SET_TSS_ADDR"))?;
        vm.create_irq_chip().map_err(kvm_error("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        vm.create_pit2(pit).map_err(kvm_error("KVM_CREATE_PIT2"))?;
        let memory = memory::create(&spec.ranges, spec.shared_memory)?;
        memory::register(&vm, &memory)?;
        let vcpus = create_vcpus(&vm, &spec)?;
        let tsc_khz = vcpus[0].get_tsc_khz().map_err(kvm_error("KVM_GET_TSC_KHZ"))?;
        let devices = DeviceSet::build(&vm, &memory, &spec.disks, console, events.clone())?;
        let buses = Buses {
            pio: devices.pio.clone(),
            mmio: devices.mmio.clone(),
        };
        let on_failure = Arc::new(move |failure| events(MachineEvent::VcpuFailed(failure)));
        let vcpus = VcpuSet::start(vcpus, buses, on_failure)?;
        Ok(Self {
            vcpus,
            devices,
            vm,
            kvm,
            memory,
            cpuid: spec.cpuid,
            template: spec.template,
            cpus: spec.cpus,
            tsc_khz,
        })
    }

    fn load(&self, source: &BootSource) -> Result<(), MachineError> {
        let entry = boot::load(&self.memory, source, self.cpus, &self.devices.slots())?;
        entry.write_descriptors(&self.memory).map_err(BootError::from)?;
        let vcpus = self.vcpus.lock_all();
        for vcpu in &vcpus {
            set_boot_msrs(vcpu)?;
            set_local_interrupts(vcpu)?;
        }
        let mut sregs = vcpus[0].get_sregs().map_err(kvm_error("KVM_GET_SREGS"))?;
        entry.adjust_sregs(&mut sregs);
        vcpus[0].set_sregs(&sregs).map_err(kvm_error("KVM_SET_SREGS"))?;
        vcpus[0]
            .set_regs(&entry.regs())
            .map_err(kvm_error("KVM_SET_REGS"))?;
        Ok(())
    }

    /// Lets a new machine's vCPUs into the guest.
    pub fn start(&self) {
        self.devices.resume();
        self.vcpus.resume(Holder::Startup);
    }

    /// Holds the vCPUs out of the guest for `holder`. Returns the instant at which the first was asked to
    /// leave.
    pub fn pause(&self, holder: Holder) -> Result<Instant, MachineError> {
        Ok(self.vcpus.pause(holder)?)
    }

    /// Lets go for `holder`.
    pub fn resume(&self, holder: Holder) {
        for vcpu in self.vcpus.lock_parked() {
            // Tells the guest that it stood still, so that its watchdogs keep quiet. A guest without
            // kvmclock has none to tell.
            let _ = vcpu.kvmclock_ctrl();
        }
        self.vcpus.resume(holder);
    }

    /// Ends a migration's hold on a machine that stays. The disk locks come first: the migration may have given
    /// them up, and without them the guest must not run. To take one that is held is harmless.
    pub fn take_back(&self) -> Result<(), MachineError> {
        self.devices.take_locks()?;
        self.devices.resume();
        self.resume(Holder::Migration);
        Ok(())
    }

    /// Whether `holder` holds the vCPUs.
    pub fn is_held_by(&self, holder: Holder) -> bool {
        self.vcpus.gate().held_by(holder)
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

    /// The serial port, for input from the console.
    pub fn serial(&self) -> Arc<std::sync::Mutex<::devices::legacy::Serial>> {
        self.devices.serial.clone()
    }

    /// Number of vCPUs.
    pub fn cpus(&self) -> u8 {
        self.cpus
    }

    /// Guest RAM in bytes.
    pub fn memory_size(&self) -> u64 {
        use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
        self.memory.iter().map(GuestMemoryRegion::len).sum()
    }

    /// CPU template in force.
    pub fn template(&self) -> Template {
        self.template
    }

    fn set_dirty_log(&self, on: bool) -> Result<(), MachineError> {
        Ok(memory::set_dirty_log(&self.vm, &self.memory, on)?)
    }

    fn harvest(&self, into: &mut PageSet) -> Result<(), MachineError> {
        Ok(memory::harvest(&self.vm, &self.memory, into)?)
    }
}

fn create_vcpus(vm: &VmFd, spec: &Spec) -> Result<Vec<VcpuFd>, MachineError> {
    (0..spec.cpus)
        .map(|id| {
            let vcpu = vm.create_vcpu(id.into()).map_err(kvm_error("KVM_CREATE_VCPU"))?;
            vcpu.set_cpuid2(&cpu::for_vcpu(&spec.cpuid, id)?)
                .map_err(kvm_error("KVM_SET_CPUID2"))?;
            if let Some(khz) = spec.tsc_khz
                && vm.check_extension(Cap::TscControl)
            {
                vcpu.set_tsc_khz(khz).map_err(kvm_error("KVM_SET_TSC_KHZ"))?;
            }
            Ok(vcpu)
        })
        .collect()
}

/// What firmware leaves behind: fast string operations on, memory write-back by default.
fn set_boot_msrs(vcpu: &VcpuFd) -> Result<(), MachineError> {
    const IA32_MISC_ENABLE: u32 = 0x1a0;
    const FAST_STRINGS: u64 = 1;
    const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
    const ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;
    set_msr(vcpu, IA32_MISC_ENABLE, FAST_STRINGS)?;
    set_msr(vcpu, IA32_MTRR_DEF_TYPE, ENABLED_WRITE_BACK)?;
    Ok(())
}

/// LINT0 takes the 8259's interrupts, LINT1 the NMI (Intel SDM vol. 3A, 11.5.1).
fn set_local_interrupts(vcpu: &VcpuFd) -> Result<(), MachineError> {
    const LINT0: usize = 0x350;
    const LINT1: usize = 0x360;
    const MODE_NMI: u32 = 0x4 << 8;
    const MODE_EXTINT: u32 = 0x7 << 8;
    let mut lapic = vcpu.get_lapic().map_err(kvm_error("KVM_GET_LAPIC"))?;
    for (offset, mode) in [(LINT0, MODE_EXTINT), (LINT1, MODE_NMI)] {
        for (to, byte) in lapic.regs[offset..offset + 4].iter_mut().zip(mode.to_le_bytes()) {
            *to = byte as std::ffi::c_char;
        }
    }
    vcpu.set_lapic(&lapic).map_err(kvm_error("KVM_SET_LAPIC"))
}

fn kvm_error(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { what, source }
}
