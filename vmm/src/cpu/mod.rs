//! What the guest sees through CPUID: what KVM supports, less a template's mask, with the machine's topology.

mod compare;
mod features;
mod template;
mod topology;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use thiserror::Error;

pub use compare::compare;
pub use template::Template;

/// CPUID could not be read or built.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum CpuError {
    #[error("KVM_GET_SUPPORTED_CPUID: {0}")]
    Supported(kvm_ioctls::Error),
    #[error("unknown CPU template {got:?}, expected one of {expected}")]
    UnknownTemplate { got: String, expected: String },
    #[error("CPUID: {0} leaves, more than KVM takes")]
    TooManyLeaves(usize),
}

const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_MONITOR: u32 = 1 << 3;
const EXT1_ECX_SVM: u32 = 1 << 2;

/// What this host can offer a guest, before any template: KVM's table and what KVM emulates on top.
/// Nested virtualisation is left out.
pub fn host_cpuid(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, CpuError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(CpuError::Supported)?;
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    let mut entries = supported.as_slice().to_vec();
    for entry in &mut entries {
        match entry.function {
            1 => {
                entry.ecx &= !(LEAF1_ECX_VMX | LEAF1_ECX_MONITOR);
                entry.ecx |= LEAF1_ECX_HYPERVISOR | if deadline { LEAF1_ECX_TSC_DEADLINE } else { 0 };
            }
            0x8000_0001 => entry.ecx &= !EXT1_ECX_SVM,
            _ => {}
        }
    }
    // Without the bit for SVM its own leaf has no meaning.
    entries.retain(|entry| entry.function != 0x8000_000a);
    Ok(entries)
}

/// The table of a new machine: the host's, masked by `template`, with a topology of `cpus` cores in one
/// socket. Leaves that name a CPU hold CPU 0's values; see [`for_vcpu`].
pub fn machine_cpuid(host: &[kvm_cpuid_entry2], template: Template, cpus: u8) -> Vec<kvm_cpuid_entry2> {
    let mut entries = host.to_vec();
    template.apply(&mut entries);
    topology::apply(&mut entries, cpus);
    entries
}

/// The machine's table as vCPU `id` sees it, with its own APIC ID.
pub fn for_vcpu(machine: &[kvm_cpuid_entry2], id: u8) -> Result<CpuId, CpuError> {
    let mut entries = machine.to_vec();
    topology::set_apic_id(&mut entries, id);
    CpuId::from_entries(&entries).map_err(|_| CpuError::TooManyLeaves(entries.len()))
}
