//! CPUID leaves that describe the topology: N cores of one thread each in one socket (Intel SDM vol. 2A;
//! AMD APM vol. 3, appendix E).

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const HTT: u32 = 1 << 28;
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// Rewrites the leaves for `cpus` cores.
pub(super) fn apply(entries: &mut Vec<kvm_cpuid_entry2>, cpus: u8) {
    let count = u32::from(cpus);
    let bits = u32::from(cpus).next_power_of_two().trailing_zeros();
    let has_extended = entries.iter().any(|entry| entry.function == 0xb);
    entries.retain(|entry| !matches!(entry.function, 0xb | 0x1f));
    for entry in entries.iter_mut() {
        match entry.function {
            1 => {
                entry.ebx = (entry.ebx & 0x0000_ffff) | (count << 16);
                entry.edx = (entry.edx & !HTT) | if cpus > 1 { HTT } else { 0 };
            }
            4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
                let level = (entry.eax >> 5) & 7;
                let sharing = if level >= 3 { count - 1 } else { 0 };
                let cores = if entry.function == 4 {
                    ((1 << bits) - 1) << 26
                } else {
                    0
                };
                entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | cores;
            }
            0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | (bits << 12) | (count - 1),
            0x8000_001e => {
                entry.ebx = 0;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    if has_extended {
        entries.push(level(0, LEVEL_SMT, 0, 1));
        entries.push(level(1, LEVEL_CORE, bits, count));
        entries.push(level(2, 0, 0, 0));
    }
}

/// Sets the leaves that name the CPU they are read on.
pub(super) fn set_apic_id(entries: &mut [kvm_cpuid_entry2], id: u8) {
    let id = u32::from(id);
    for entry in entries {
        match entry.function {
            1 => entry.ebx = (entry.ebx & 0x00ff_ffff) | (id << 24),
            0xb => entry.edx = id,
            0x8000_001e => {
                entry.eax = id;
                entry.ebx = id;
            }
            _ => {}
        }
    }
}

fn level(index: u32, kind: u32, shift: u32, count: u32) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: index | (kind << 8),
        edx: 0,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_cores() {
        let mut entries = vec![
            kvm_cpuid_entry2 {
                function: 1,
                ebx: 0xff01_0800,
                ..Default::default()
            },
            kvm_cpuid_entry2 {
                function: 0xb,
                ..Default::default()
            },
        ];
        apply(&mut entries, 4);
        set_apic_id(&mut entries, 3);
        assert_eq!(entries[0].ebx, 0x0304_0800);
        assert_ne!(entries[0].edx & HTT, 0);
        let core = entries
            .iter()
            .find(|e| e.function == 0xb && e.index == 1)
            .unwrap();
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (2, 4, 0x201, 3));
    }
}
