//! Where things lie in guest-physical memory.
//!
//! ```text
//! 0x0000_0500  GDT for the first instruction          0x0009_fc00  MP table (1 KiB)
//! 0x0000_6000  PVH start info, modules, memory map    0x000e_0000  RSDP and ACPI tables, VMClock, generation ID
//! 0x0000_7000  zero page (Linux boot protocol)        0x0010_0000  high memory: kernel, initrd, RAM
//! 0x0000_9000  page tables for 64-bit entry           0xc000_0000  hole: devices, IOAPIC, LAPIC
//! 0x0002_0000  kernel command line                    0x1_0000_0000 the rest of RAM
//! ```

pub use crate::memory::PAGE_SIZE;

/// Global descriptor table that the first vCPU starts with.
pub const GDT: u64 = 0x500;
/// Empty interrupt descriptor table that the first vCPU starts with.
pub const IDT: u64 = 0x520;
/// `hvm_start_info` of the PVH boot protocol.
pub const PVH_START_INFO: u64 = 0x6000;
/// List of PVH modules (the initrd).
pub const PVH_MODULES: u64 = 0x6040;
/// PVH memory map.
pub const PVH_MEMORY_MAP: u64 = 0x6100;
/// The Linux boot protocol's zero page.
pub const ZERO_PAGE: u64 = 0x7000;
/// Stack pointer at a 64-bit entry.
pub const BOOT_STACK: u64 = 0x8ff0;
/// First of the six pages of identity-mapping page tables (PML4, PDPT, four directories).
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Most bytes of a kernel command line, its NUL included.
pub const CMDLINE_MAX: usize = 2048;
/// End of conventional memory; the MP table begins here, where kernels search for it.
pub const MP_TABLE: u64 = 0x9_fc00;
/// Bytes for the MP table.
pub const MP_TABLE_MAX: usize = 0x400;
/// RSDP; kernels search for it between here and 1 MiB. The other ACPI tables follow.
pub const ACPI: u64 = 0xe_0000;
/// Bytes for ACPI tables.
pub const ACPI_MAX: usize = 0x1_e000;
/// The page of the machine's VMClock.
pub const VMCLOCK: u64 = 0xf_e000;
/// The page of the machine's generation ID, which has it to itself.
pub const GENERATION_ID: u64 = 0xf_f000;
/// Where kernels are loaded.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// Begin of the hole below 4 GiB.
pub const HOLE_START: u64 = 0xc000_0000;
/// End of the hole.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// Registers of the first virtio-mmio device; one page for each.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Bytes of registers of one virtio-mmio device.
pub const VIRTIO_MMIO_LEN: u64 = 0x1000;
/// I/O APIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APIC.
pub const LAPIC: u32 = 0xfee0_0000;
/// KVM's task state segment pages on processors that need them (three pages).
pub const KVM_TSS: u64 = 0xfffb_d000;
/// KVM's identity map page on processors that need it.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// Port of the first 16550.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Interrupt of the first 16550.
pub const SERIAL_GSI: u32 = 4;
/// Interrupt of the ACPI generic event device for the power button.
pub const POWER_GSI: u32 = 5;
/// Interrupt of the ACPI generic event device for a new generation ID.
pub const GENERATION_GSI: u32 = 6;
/// Interrupt of the ACPI generic event device for a disruption of the guest's clocks.
pub const VMCLOCK_GSI: u32 = 7;
/// First port of the keyboard controller.
pub const I8042_PORT: u16 = 0x60;
/// Port of the panic notifier, where QEMU has it.
pub const PVPANIC_PORT: u16 = 0x505;
/// First port of the ACPI sleep and reset registers.
pub const ACPI_POWER_PORT: u16 = 0x600;
/// Interrupts of virtio devices, in bus order: none that a legacy device would claim.
pub const VIRTIO_GSIS: [u32; 13] = [16, 17, 18, 19, 20, 21, 22, 23, 10, 11, 12, 14, 15];

/// RAM of a machine of `size` bytes as `(gpa, length)`, with the hole below 4 GiB left out.
pub fn ram_ranges(size: u64) -> Vec<(u64, u64)> {
    if size <= HOLE_START {
        vec![(0, size)]
    } else {
        vec![(0, HOLE_START), (HOLE_END, size - HOLE_START)]
    }
}

/// What a range of the firmware memory map is: the types of E820, which PVH uses as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RangeType {
    /// The guest may use it.
    Ram = 1,
    /// It holds the firmware tables.
    Reserved = 2,
}

/// The memory map that firmware would report, as `(gpa, length, type)`: RAM, with the MP table and everything
/// from there to 1 MiB reserved.
pub fn memory_map(size: u64) -> Vec<(u64, u64, RangeType)> {
    let mut map = vec![
        (0, MP_TABLE, RangeType::Ram),
        (MP_TABLE, HIGH_MEMORY - MP_TABLE, RangeType::Reserved),
    ];
    for (gpa, len) in ram_ranges(size) {
        let start = gpa.max(HIGH_MEMORY);
        if gpa + len > start {
            map.push((start, gpa + len - start, RangeType::Ram));
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_machines_have_one_range() {
        assert_eq!(ram_ranges(64 << 20), [(0, 64 << 20)]);
        let map = [
            (0, 0x9_fc00, RangeType::Ram),
            (0x9_fc00, 0x6_0400, RangeType::Reserved),
            (0x10_0000, 63 << 20, RangeType::Ram),
        ];
        assert_eq!(memory_map(64 << 20), map);
    }

    #[test]
    fn large_machines_go_on_above_the_hole() {
        let ranges = ram_ranges(5 << 30);
        assert_eq!(ranges, [(0, 3 << 30), (4 << 30, 2 << 30)]);
        assert_eq!(
            memory_map(5 << 30).last(),
            Some(&(4 << 30, 2 << 30, RangeType::Ram))
        );
    }
}
