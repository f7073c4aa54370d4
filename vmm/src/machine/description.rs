//! What a machine is, in the migration engine's terms, and what this host can take.

use devices::virtio::Description;
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use migration::{CpuidLeaf, DeviceDescription, MachineDescription, MemoryRegion};

use super::Machine;
use crate::memory;

impl Machine {
    /// What a destination must be able to run.
    pub(super) fn describe(&self) -> MachineDescription {
        let region = |(gpa, len)| MemoryRegion { gpa, len };
        MachineDescription {
            memory: memory::ranges(&self.memory).into_iter().map(region).collect(),
            memory_kind: memory::kind(&self.memory),
            cpus: self.cpus,
            cpu_template: self.template.to_string(),
            cpuid: self.cpuid.iter().map(leaf).collect(),
            tsc_khz: self.tsc.khz,
            devices: self.devices.describe(),
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

/// A device in the engine's terms.
pub(super) fn device(id: &str, description: Description) -> DeviceDescription {
    DeviceDescription {
        id: id.into(),
        kind: description.kind.into(),
        version: description.version,
        features: description.features,
        backend_size: description.backend_size,
        read_only: description.read_only,
        parameters: description.parameters,
    }
}
