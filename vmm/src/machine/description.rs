//! What a machine is, in the migration engine's terms, and what this host can take.

use devices::virtio::block::{Backend, BlockState};
use devices::virtio::rng::RngState;
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use migration::{CpuidLeaf, DeviceDescription, MachineDescription, MemoryRegion};
use migration_state::Record;

use super::Machine;
use super::devices::VirtioSlot;
use crate::memory;

impl Machine {
    /// What a destination must be able to run.
    pub(super) fn describe(&self) -> MachineDescription {
        let region = |(gpa, len)| MemoryRegion { gpa, len };
        MachineDescription {
            memory: memory::ranges(&self.memory).into_iter().map(region).collect(),
            shared_memory: memory::is_shared(&self.memory),
            cpus: self.cpus,
            cpu_template: self.template.to_string(),
            cpuid: self.cpuid.iter().map(leaf).collect(),
            tsc_khz: self.tsc_khz,
            devices: self.devices.virtio.iter().map(device).collect(),
        }
    }
}

fn leaf(entry: &kvm_cpuid_entry2) -> CpuidLeaf {
    CpuidLeaf {
        function: entry.function,
        index: entry.index,
        registers: [entry.eax, entry.ebx, entry.ecx, entry.edx],
    }
}

/// KVM's table from the peer's. Whether a leaf has sub-leaves is the processor's architecture and not sent:
/// KVM's own table says it, or the leaf is there more than once.
pub(super) fn cpuid_entries(leaves: &[CpuidLeaf], host: &[kvm_cpuid_entry2]) -> Vec<kvm_cpuid_entry2> {
    let indexed = |function: u32| {
        let by_host = |entry: &kvm_cpuid_entry2| {
            entry.function == function && entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0
        };
        host.iter().any(by_host) || leaves.iter().filter(|leaf| leaf.function == function).count() > 1
    };
    leaves
        .iter()
        .map(|leaf| {
            let [eax, ebx, ecx, edx] = leaf.registers;
            let flags = if indexed(leaf.function) {
                KVM_CPUID_FLAG_SIGNIFCANT_INDEX
            } else {
                0
            };
            kvm_cpuid_entry2 {
                function: leaf.function,
                index: leaf.index,
                flags,
                eax,
                ebx,
                ecx,
                edx,
                ..Default::default()
            }
        })
        .collect()
}

fn device(slot: &VirtioSlot) -> DeviceDescription {
    match &slot.disk {
        Some(disk) => disk_description(&slot.id, disk),
        None => rng_description(&slot.id),
    }
}

pub(super) fn disk_description(id: &str, disk: &Backend) -> DeviceDescription {
    DeviceDescription {
        id: id.into(),
        kind: BlockState::KIND.into(),
        version: BlockState::VERSION,
        backend_size: disk.size(),
        read_only: disk.read_only(),
    }
}

pub(super) fn rng_description(id: &str) -> DeviceDescription {
    DeviceDescription {
        id: id.into(),
        kind: RngState::KIND.into(),
        version: RngState::VERSION,
        backend_size: 0,
        read_only: false,
    }
}
