//! From a description to a machine that waits at the gate.

use std::sync::{Arc, Mutex};

use devices::GuestMemory;
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_cpuid_entry2, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::backends;
use super::config::MachineConfig;
use super::devices::{DeviceSet, NamedDevice};
use super::{EventSink, Machine, MachineError, MachineEvent, generation, kvm_error, open_kvm, vmclock};
use crate::boot::{self, BootError, BootSource, layout};
use crate::clock::TscFrequency;
use crate::console::Console;
use crate::cpu::{self, Template};
use crate::memory::{RingLog, WatchedMemory};
use crate::vcpu::{Buses, MsrList, VcpuSet, set_msr};
use crate::{kvm, memory};

/// What a machine is built from, whether it boots or is received.
pub(crate) struct MachineSpec {
    /// Guest RAM.
    pub(crate) memory: GuestMemory,
    /// Whether vCPUs log their writes in rings, see [`RingLog`].
    pub(crate) dirty_ring: bool,
    /// Number of vCPUs.
    pub(crate) cpus: u8,
    /// Name of the CPU template that `cpuid` was made with.
    pub(crate) template: Template,
    /// What the guest sees, see [`cpu::machine_cpuid`].
    pub(crate) cpuid: Vec<kvm_cpuid_entry2>,
    /// Guest TSC frequency, where it must not be the host's.
    pub(crate) tsc_khz: Option<u32>,
    /// Virtio devices in bus order.
    pub(crate) devices: Vec<NamedDevice>,
}

impl Machine {
    /// Builds a machine that boots `source`, with its disks locked. It waits for [`Machine::start`].
    pub fn boot(config: &MachineConfig, console: &Console, events: EventSink) -> Result<Self, MachineError> {
        let kvm = open_kvm()?;
        let cpuid = cpu::machine_cpuid(&cpu::host_cpuid(&kvm)?, config.template, config.cpus);
        let spec = MachineSpec {
            memory: guest_memory(config)?,
            dirty_ring: config.dirty_ring,
            cpus: config.cpus,
            template: config.template,
            cpuid,
            tsc_khz: None,
            devices: backends::open(config)?,
        };
        let vm = create_vm(&kvm)?;
        let machine = Self::build(kvm, spec, console, events, vm)?;
        machine.devices.take_locks()?;
        machine.load(&config.boot)?;
        Ok(machine)
    }

    /// Builds a machine in the new `vm`, whose vCPUs are in their reset state and wait at the gate.
    ///
    /// The VM is the last parameter, as the last one is the first to be dropped: where this fails half-way, KVM lets go
    /// of the memory before the memory goes.
    pub(crate) fn build(
        kvm: Kvm,
        spec: MachineSpec,
        console: &Console,
        events: EventSink,
        vm: VmFd,
    ) -> Result<Self, MachineError> {
        // First of all: KVM waits for the readers of what it changes, and for those of what it changed before. Once
        // there are interrupt controllers that takes 7 ms, now 0.1 ms.
        memory::register(&vm, &spec.memory)?;
        let watched = WatchedMemory::new(&spec.memory);
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
        let ring_entries = choose_log(&vm, spec.dirty_ring)?;
        let vcpus = create_vcpus(&vm, &spec)?;
        let vm = Arc::new(vm);
        let rings = match ring_entries {
            Some(entries) => {
                let rings = RingLog::new(vm.clone(), spec.memory.clone(), &vcpus, entries)?;
                Some(Arc::new(rings))
            }
            None => None,
        };
        let tsc = TscFrequency {
            khz: vcpus[0].get_tsc_khz().map_err(kvm_error("KVM_GET_TSC_KHZ"))?,
            scaled: spec.tsc_khz.is_some() && vm.check_extension(Cap::TscControl),
        };
        let devices = DeviceSet::build(&vm, &spec.memory, spec.devices, console, events.clone())?;
        let buses = Buses {
            pio: devices.pio.clone(),
            mmio: devices.mmio.clone(),
            rings: rings.clone(),
        };
        let on_failure = Arc::new(move |failure| events(MachineEvent::VcpuFailed(failure)));
        let vcpus = VcpuSet::start(vcpus, buses, on_failure)?;
        Ok(Self {
            vcpus,
            devices,
            rings,
            vm,
            msrs: MsrList::of(&kvm)?,
            _watched: watched,
            memory: spec.memory,
            page_source: None,
            baseline: Mutex::default(),
            made_disks: Mutex::default(),
            cpuid: spec.cpuid,
            template: spec.template,
            cpus: spec.cpus,
            tsc,
        })
    }

    fn load(&self, source: &BootSource) -> Result<(), MachineError> {
        let entry = boot::load(&self.memory, source, self.cpus, &self.devices.slots())?;
        generation::write_new(&self.memory)?;
        vmclock::write_new(&self.memory)?;
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
}

/// A VM without anything in it.
pub(super) fn create_vm(kvm: &Kvm) -> Result<VmFd, MachineError> {
    kvm.create_vm().map_err(kvm_error("KVM_CREATE_VM"))
}

fn guest_memory(config: &MachineConfig) -> Result<GuestMemory, MachineError> {
    let memory = memory::create(&layout::ram_ranges(config.memory), config.memory_kind)?;
    if config.prealloc {
        memory::make_resident(&memory)?;
    }
    Ok(memory)
}

/// Every machine can be migrated one day, and its dirty log can only be chosen now. Returns how many entries a
/// vCPU's ring has, if it is to be rings: they and bitmaps exclude each other.
fn choose_log(vm: &VmFd, dirty_ring: bool) -> Result<Option<usize>, MachineError> {
    if dirty_ring {
        return Ok(Some(memory::enable_rings(vm)?));
    }
    if !kvm::has_manual_protect(vm) {
        return Err(MachineError::NoManualProtect);
    }
    kvm::enable_manual_protect(vm).map_err(kvm_error("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"))?;
    Ok(None)
}

fn create_vcpus(vm: &VmFd, spec: &MachineSpec) -> Result<Vec<VcpuFd>, MachineError> {
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
