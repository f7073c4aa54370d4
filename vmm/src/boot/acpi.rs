//! ACPI tables (ACPI 6.5): RSDP, XSDT, FADT (hardware-reduced), MADT, DSDT.

use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path,
    ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use devices::legacy::{AcpiPower, PvPanic};

use super::layout;

const OEM_ID: [u8; 6] = *b"GODWIT";
const OEM_TABLE_ID: [u8; 8] = *b"MICROVM ";
const OEM_REVISION: u32 = 1;
const DSDT_REVISION: u8 = 2;
const HEADER_LEN: u32 = 36;
/// A device notification: a button was pressed, or the state has changed (ACPI 6.5, 5.6.6).
const EVENT: u8 = 0x80;
const BOOT_NO_VGA: u16 = 1 << 2;
const BOOT_NO_MSI: u16 = 1 << 3;
const BOOT_NO_RTC: u16 = 1 << 5;

/// Port offset of the sleep control register in the block at [`layout::ACPI_POWER_PORT`].
pub const SLEEP_CONTROL: u16 = 0;
/// Port offset of the sleep status register.
pub const SLEEP_STATUS: u16 = 1;
/// Port offset of the reset register.
pub const RESET: u16 = 2;

/// A virtio-mmio device as firmware tables name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMmioSlot {
    /// GPA of the first register.
    pub base: u64,
    /// Number of the interrupt.
    pub gsi: u32,
}

/// All tables as one block for [`layout::ACPI`], the RSDP first.
pub fn build(cpus: u8, slots: &[VirtioMmioSlot]) -> Vec<u8> {
    let mut block = vec![0; Rsdp::len().next_multiple_of(16)];
    let mut place = |table: &dyn Aml| {
        let address = layout::ACPI + block.len() as u64;
        table.to_aml_bytes(&mut block);
        block.resize(block.len().next_multiple_of(16), 0);
        address
    };
    let dsdt_address = place(&dsdt(slots));
    let fadt_address = place(&fadt(dsdt_address));
    let madt_address = place(&madt(cpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt_address);
    xsdt.add_entry(madt_address);
    let xsdt_address = place(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt_address).to_aml_bytes(&mut rsdp);
    block[..rsdp.len()].copy_from_slice(&rsdp);
    block
}

/// A register of one byte in the block at [`layout::ACPI_POWER_PORT`].
fn port(offset: u16) -> GAS {
    let address = u64::from(layout::ACPI_POWER_PORT + offset);
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address)
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (BOOT_NO_VGA | BOOT_NO_MSI | BOOT_NO_RTC).into();
    fadt.reset_reg = port(RESET);
    fadt.reset_value = AcpiPower::RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL);
    fadt.sleep_status_reg = port(SLEEP_STATUS);
    fadt.finalize()
}

fn madt(cpus: u8) -> MADT {
    let controller = LocalInterruptController::Address(layout::LAPIC);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, controller);
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    madt
}

fn dsdt(slots: &[VirtioMmioSlot]) -> Sdt {
    let mut body = Vec::new();
    let names: Vec<String> = (0..slots.len()).map(|i| format!("V{i:03}")).collect();
    for (index, (slot, name)) in slots.iter().zip(&names).enumerate() {
        virtio_device(name, index as u64, *slot, &mut body);
    }
    serial_device(&mut body);
    power_button(&mut body);
    generation_counter(&mut body);
    vmclock(&mut body);
    panic_notifier(&mut body);
    event_device(&mut body);
    let scope = Scope::raw(Path::new("\\_SB_"), body);
    let s5 = Package::new(vec![
        &AcpiPower::SLEEP_TYPE_S5,
        &aml::ZERO,
        &aml::ZERO,
        &aml::ZERO,
    ]);

    let mut dsdt = Sdt::new(
        *b"DSDT",
        HEADER_LEN,
        DSDT_REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    dsdt.append_slice(&scope);
    let mut sleep = Vec::new();
    Name::new("\\_S5_".into(), &s5).to_aml_bytes(&mut sleep);
    dsdt.append_slice(&sleep);
    dsdt
}

/// An edge-triggered, active-high interrupt of one device alone.
fn interrupt(gsi: u32) -> Interrupt {
    let (is_consumer, is_edge_triggered, is_active_low, is_shared) = (true, true, false, false);
    Interrupt::new(is_consumer, is_edge_triggered, is_active_low, is_shared, gsi)
}

fn virtio_device(name: &str, uid: u64, slot: VirtioMmioSlot, body: &mut Vec<u8>) {
    let registers = Memory32Fixed::new(true, slot.base as u32, layout::VIRTIO_MMIO_LEN as u32);
    let interrupt = interrupt(slot.gsi);
    Device::new(
        name.into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &uid),
            &Name::new("_CCA".into(), &aml::ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&registers, &interrupt]),
            ),
        ],
    )
    .to_aml_bytes(body);
}

fn serial_device(body: &mut Vec<u8>) {
    let port = IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, 8);
    let interrupt = interrupt(layout::SERIAL_GSI);
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&port, &interrupt])),
        ],
    )
    .to_aml_bytes(body);
}

fn power_button(body: &mut Vec<u8>) {
    Device::new(
        "PWRB".into(),
        vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C"))],
    )
    .to_aml_bytes(body);
}

/// Where the guest finds the machine's generation ID ("Virtual Machine Generation ID", Microsoft, 2012). The first
/// of its compatible IDs is the document's, the second one that ACPI's grammar allows, and which Linux knows.
fn generation_counter(body: &mut Vec<u8>) {
    let address = Package::new(vec![&layout::GENERATION_ID, &aml::ZERO]);
    Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"GDWT0001"),
            &Name::new("_CID".into(), &Package::new(vec![&"VM_Gen_Counter", &"VMGENCTR"])),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &address),
        ],
    )
    .to_aml_bytes(body);
}

/// Where the guest finds the page that announces disruptions (VMClock, UAPI.13).
fn vmclock(body: &mut Vec<u8>) {
    let page = Memory32Fixed::new(false, layout::VMCLOCK as u32, layout::PAGE_SIZE as u32);
    Device::new(
        "VCLK".into(),
        vec![
            &Name::new("_HID".into(), &"AMZNC10C"),
            &Name::new("_CID".into(), &"VMCLOCK"),
            &Name::new("_DDN".into(), &"VMCLOCK"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&page])),
        ],
    )
    .to_aml_bytes(body);
}

/// Where the guest's kernel reports that it has panicked (QEMU, docs/specs/pvpanic.rst).
fn panic_notifier(body: &mut Vec<u8>) {
    let port = IO::new(layout::PVPANIC_PORT, layout::PVPANIC_PORT, 1, PvPanic::LEN as u8);
    Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&port])),
        ],
    )
    .to_aml_bytes(body);
}

/// A generic event device (ACPI 6.5, 5.6.9): the machine raises one of its interrupts, and its method notifies the
/// device that the interrupt belongs to.
fn event_device(body: &mut Vec<u8>) {
    let power = interrupt(layout::POWER_GSI);
    let generation = interrupt(layout::GENERATION_GSI);
    let vmclock = interrupt(layout::VMCLOCK_GSI);
    let interrupts = ResourceTemplate::new(vec![&power, &generation, &vmclock]);
    Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_CRS".into(), &interrupts),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &If::new(
                        &Equal::new(&Arg(0), &layout::POWER_GSI),
                        vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &EVENT)],
                    ),
                    &If::new(
                        &Equal::new(&Arg(0), &layout::GENERATION_GSI),
                        vec![&Notify::new(&Path::new("\\_SB_.VGEN"), &EVENT)],
                    ),
                    &If::new(
                        &Equal::new(&Arg(0), &layout::VMCLOCK_GSI),
                        vec![&Notify::new(&Path::new("\\_SB_.VCLK"), &EVENT)],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(body);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte))
    }

    fn table(block: &[u8], address: u64) -> &[u8] {
        let start = (address - layout::ACPI) as usize;
        let length = u32::from_le_bytes(block[start + 4..start + 8].try_into().unwrap()) as usize;
        &block[start..start + length]
    }

    #[test]
    fn tables_are_linked_checksummed_and_fit() {
        let slots: Vec<_> = layout::VIRTIO_GSIS
            .iter()
            .enumerate()
            .map(|(i, gsi)| VirtioMmioSlot {
                base: layout::VIRTIO_MMIO + 0x1000 * i as u64,
                gsi: *gsi,
            })
            .collect();
        let block = build(32, &slots);
        assert!(block.len() <= layout::ACPI_MAX);
        assert_eq!(&block[..8], b"RSD PTR ");
        assert_eq!(sum(&block[..20]), 0);
        let xsdt = table(&block, u64::from_le_bytes(block[24..32].try_into().unwrap()));
        assert_eq!(&xsdt[..4], b"XSDT");
        assert_eq!(sum(xsdt), 0);
        let entries: Vec<u64> = xsdt[36..]
            .chunks(8)
            .map(|c| u64::from_le_bytes(c.try_into().unwrap()))
            .collect();
        let fadt = table(&block, entries[0]);
        assert_eq!(&fadt[..4], b"FACP");
        assert_eq!(sum(fadt), 0);
        let dsdt = table(&block, u64::from_le_bytes(fadt[140..148].try_into().unwrap()));
        assert_eq!(&dsdt[..4], b"DSDT");
        assert_eq!(sum(dsdt), 0);
        let madt = table(&block, entries[1]);
        assert_eq!(&madt[..4], b"APIC");
        assert_eq!(sum(madt), 0);
        assert_eq!(madt.len(), 44 + 32 * 8 + 12);
    }
}
