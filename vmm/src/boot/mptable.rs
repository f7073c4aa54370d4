//! The MP table (Intel MultiProcessor Specification 1.4), for kernels without ACPI.

use super::layout;

const BUS_ISA: u8 = 0;
const VERSION_1_4: u8 = 4;
const APIC_VERSION: u8 = 0x14;

/// The floating pointer and the configuration table for `cpus` vCPUs, to be put at
/// [`layout::MP_TABLE`]. Interrupts 0 to 23 go straight to the I/O APIC's pins of the same number.
pub(super) fn build(cpus: u8) -> Vec<u8> {
    let ioapic_id = cpus;
    let mut entries = Vec::new();
    let mut count = 0u16;
    for id in 0..cpus {
        let flags = 1 | if id == 0 { 2 } else { 0 };
        entries.extend([0, id, APIC_VERSION, flags]);
        entries.extend(0x600u32.to_le_bytes()); // family 6: the guest believes CPUID, not this
        entries.extend(0x201u32.to_le_bytes()); // FPU, APIC
        entries.extend([0; 8]);
        count += 1;
    }
    entries.extend([1, BUS_ISA]);
    entries.extend(b"ISA   ");
    entries.extend([2, ioapic_id, 0x11, 1]);
    entries.extend(layout::IOAPIC.to_le_bytes());
    count += 2;
    for irq in 0..24 {
        // Conforming polarity and trigger: edge, active high on an ISA bus.
        entries.extend([3, 0, 0, 0, BUS_ISA, irq, ioapic_id, irq]);
        count += 1;
    }
    // LINT0 takes the 8259's interrupts, LINT1 the NMI, on every CPU.
    entries.extend([4, 3, 0, 0, BUS_ISA, 0, 0, 0]);
    entries.extend([4, 1, 0, 0, BUS_ISA, 0, 0xff, 1]);
    count += 2;

    let mut table = Vec::with_capacity(44 + entries.len());
    table.extend(b"PCMP");
    table.extend(((44 + entries.len()) as u16).to_le_bytes());
    table.extend([VERSION_1_4, 0]);
    table.extend(b"GODWIT  ");
    table.extend(b"MICROVM     ");
    table.extend([0; 6]);
    table.extend(count.to_le_bytes());
    table.extend(layout::LAPIC.to_le_bytes());
    table.extend([0; 4]);
    table.extend(&entries);
    table[7] = checksum(&table);

    let mut pointer = Vec::with_capacity(16 + table.len());
    pointer.extend(b"_MP_");
    pointer.extend((layout::MP_TABLE as u32 + 16).to_le_bytes());
    pointer.extend([1, VERSION_1_4, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    pointer.extend(table);
    pointer
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn checksums_hold_and_the_largest_machine_fits() {
        for cpus in [1, 2, 32] {
            let bytes = build(cpus);
            assert!(
                bytes.len() <= layout::MP_TABLE_MAX,
                "{cpus} CPUs take {} bytes",
                bytes.len()
            );
            assert_eq!(sum(&bytes[..16]), 0);
            assert_eq!(sum(&bytes[16..]), 0);
            let length = u16::from_le_bytes([bytes[20], bytes[21]]) as usize;
            assert_eq!(length, bytes.len() - 16);
            let count = u16::from_le_bytes([bytes[16 + 34], bytes[16 + 35]]);
            assert_eq!(count, u16::from(cpus) + 28);
        }
    }
}
