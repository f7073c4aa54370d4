//! Compares the CPUID that a guest has seen with what this host can offer, and names every feature that is missing.

use kvm_bindings::kvm_cpuid_entry2;
use migration::{CpuidLeaf, Difference};

use super::features;

const REGISTERS: [&str; 4] = ["eax", "ebx", "ecx", "edx"];

/// Leaves whose bits are features, as `(function, index, bits of EAX, EBX, ECX, EDX that are features)`.
const FEATURE_LEAVES: &[(u32, u32, [u32; 4])] = &[
    (1, 0, [0, 0, u32::MAX, !HTT]),
    (6, 0, [u32::MAX, 0, 0, 0]),
    (7, 0, [0, u32::MAX, u32::MAX, u32::MAX]),
    (7, 1, [u32::MAX, 0, 0, u32::MAX]),
    (7, 2, [0, 0, 0, u32::MAX]),
    (0xd, 0, [u32::MAX, 0, 0, u32::MAX]),
    (0xd, 1, [u32::MAX, 0, u32::MAX, u32::MAX]),
    (0x4000_0001, 0, [u32::MAX, 0, 0, u32::MAX]),
    (0x8000_0001, 0, [0, 0, u32::MAX, u32::MAX]),
    (0x8000_0007, 0, [0, 0, 0, u32::MAX]),
    (0x8000_0008, 0, [0, u32::MAX, 0, 0]),
    (0x8000_0021, 0, [u32::MAX, 0, 0, 0]),
];

/// Hyper-threading is part of the topology, which is the machine's, not the host's.
const HTT: u32 = 1 << 28;

/// Every feature that the guest has seen (`guest`) and this host cannot offer (`host`, see
/// [`super::host_cpuid`]), and a difference of vendor.
pub fn compare(guest: &[CpuidLeaf], host: &[kvm_cpuid_entry2]) -> Vec<Difference> {
    let mut differences = Vec::new();
    let (expected, got) = (vendor_of(guest), vendor_of_host(host));
    if expected != got {
        differences.push(Difference {
            what: "cpu vendor".into(),
            expected,
            got,
        });
    }
    differences.extend(compare_address_bits(guest, host));
    for (function, index, mask) in FEATURE_LEAVES {
        let Some(leaf) = guest
            .iter()
            .find(|leaf| leaf.function == *function && leaf.index == *index)
        else {
            continue;
        };
        let offered = host
            .iter()
            .find(|entry| entry.function == *function && entry.index == *index)
            .map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx]);
        for register in 0..4 {
            let missing = leaf.registers[register] & !offered[register] & mask[register];
            for bit in (0..32).filter(|bit| missing & (1 << bit) != 0) {
                differences.push(missing_bit(*function, *index, register, bit));
            }
        }
    }
    differences
}

/// A guest that believes in more physical address bits than the host has could use addresses that fault.
fn compare_address_bits(guest: &[CpuidLeaf], host: &[kvm_cpuid_entry2]) -> Option<Difference> {
    const ADDRESS_SIZES: u32 = 0x8000_0008;
    let expected = guest
        .iter()
        .find(|leaf| leaf.function == ADDRESS_SIZES)?
        .registers[0]
        & 0xff;
    let entry = host.iter().find(|entry| entry.function == ADDRESS_SIZES);
    let got = entry.map_or(0, |entry| entry.eax & 0xff);
    (expected > got).then(|| Difference {
        what: "physical address bits".into(),
        expected: expected.to_string(),
        got: got.to_string(),
    })
}

fn missing_bit(function: u32, index: u32, register: usize, bit: u32) -> Difference {
    let name = features::name(function, index, register, bit)
        .map_or_else(|| format!("bit {bit}"), |name| format!("{name} (bit {bit})"));
    let subleaf = if index == 0 {
        String::new()
    } else {
        format!(".{index}")
    };
    Difference {
        what: format!("cpuid {function:#x}{subleaf} {} {name}", REGISTERS[register]),
        expected: "present".into(),
        got: "absent".into(),
    }
}

fn vendor_of(guest: &[CpuidLeaf]) -> String {
    let leaf = guest.iter().find(|leaf| leaf.function == 0);
    leaf.map_or_else(String::new, |leaf| {
        vendor([leaf.registers[1], leaf.registers[3], leaf.registers[2]])
    })
}

fn vendor_of_host(host: &[kvm_cpuid_entry2]) -> String {
    let entry = host.iter().find(|entry| entry.function == 0);
    entry.map_or_else(String::new, |entry| vendor([entry.ebx, entry.edx, entry.ecx]))
}

fn vendor(words: [u32; 3]) -> String {
    words
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .map(char::from)
        .filter(char::is_ascii_graphic)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn leaf(function: u32, registers: [u32; 4]) -> CpuidLeaf {
        CpuidLeaf {
            function,
            index: 0,
            registers,
        }
    }

    #[test]
    fn each_missing_bit_is_named() {
        let host = [entry(1, [0, 0, 1 << 0, 0])];
        let guest = [leaf(1, [0, 0, 1 << 0 | 1 << 28 | 1 << 13, HTT])];
        let what: Vec<_> = compare(&guest, &host).into_iter().map(|d| d.what).collect();
        assert_eq!(
            what,
            ["cpuid 0x1 ecx cx16 (bit 13)", "cpuid 0x1 ecx avx (bit 28)"]
        );
    }

    #[test]
    fn more_address_bits_than_the_host_has_are_refused() {
        let host = [entry(0x8000_0008, [0x302e, 0, 0, 0])];
        assert!(compare(&[leaf(0x8000_0008, [0x302e, 0, 0, 0])], &host).is_empty());
        let found = compare(&[leaf(0x8000_0008, [0x3034, 0, 0, 0])], &host);
        assert_eq!((found[0].expected.as_str(), found[0].got.as_str()), ("52", "46"));
    }

    #[test]
    fn a_host_with_more_is_fine_and_another_vendor_is_not() {
        let amd = [0, 0x6874_7541, 0x444d_4163, 0x6974_6e65];
        let intel = [0, 0x756e_6547, 0x6c65_746e, 0x4965_6e69];
        assert!(compare(&[leaf(7, [0, 1, 0, 0])], &[entry(7, [0, 3, 0, 0])]).is_empty());
        let found = compare(&[leaf(0, amd)], &[entry(0, intel)]);
        assert_eq!(
            (found[0].expected.as_str(), found[0].got.as_str()),
            ("AuthenticAMD", "GenuineIntel")
        );
    }
}
