//! The 64-bit Linux boot protocol (Documentation/arch/x86/boot.rst), for bzImage and for an ELF kernel
//! without a PVH note.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{Initrd, layout};
use devices::GuestMemory;

/// Offset of the 64-bit entry point from the begin of the protected-mode kernel.
pub(super) const BZIMAGE_64BIT_ENTRY: u64 = 0x200;
/// The flag of a bzImage that has this entry point.
pub(super) const XLF_KERNEL_64: u16 = 1;

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const LOADER_UNDEFINED: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x0100_0000;

/// Where the memory ends in which a bzImage at `load` unpacks itself (boot.rst, `init_size`). It does so at its
/// preferred address where that is above the one that it was loaded to.
pub(super) fn unpacked_end(header: &setup_header, load: u64) -> u64 {
    let (preferred, size) = (header.pref_address, u64::from(header.init_size));
    let start = if header.relocatable_kernel == 0 {
        preferred
    } else {
        let alignment = u64::from(header.kernel_alignment.max(1));
        let start = load.max(preferred);
        start.checked_next_multiple_of(alignment).unwrap_or(u64::MAX)
    };
    start.saturating_add(size)
}

/// Writes the zero page of a machine with `size` bytes of memory. `header` is a bzImage's setup header; an ELF kernel has
/// none.
pub(super) fn write_zero_page(
    memory: &GuestMemory,
    size: u64,
    header: Option<setup_header>,
    initrd: Option<Initrd>,
) -> Result<(), GuestMemoryError> {
    let hdr = header.unwrap_or(setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        kernel_alignment: KERNEL_ALIGNMENT,
        ..Default::default()
    });
    let mut params = boot_params {
        hdr,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = layout::CMDLINE_MAX as u32 - 1;
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = initrd.gpa as u32;
        params.hdr.ramdisk_size = initrd.len as u32;
    }
    params.acpi_rsdp_addr = layout::ACPI;

    for (entry, (addr, size, kind)) in params.e820_table.iter_mut().zip(layout::memory_map(size)) {
        *entry = boot_e820_entry {
            addr,
            size,
            r#type: kind as u32,
        };
        params.e820_entries += 1;
    }
    memory.write_obj(params, GuestAddress(layout::ZERO_PAGE))
}

/// Identity-maps the first 4 GiB with 2 MiB pages.
pub(super) fn write_page_tables(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let pdpt = layout::PAGE_TABLES + layout::PAGE_SIZE;
    let directories = pdpt + layout::PAGE_SIZE;
    memory.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(layout::PAGE_TABLES))?;
    for gib in 0..4 {
        let directory = directories + gib * layout::PAGE_SIZE;
        memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(pdpt + gib * 8))?;
        for entry in 0..512 {
            let frame = (gib << 30) | (entry << 21);
            memory.write_obj(
                frame | PRESENT_WRITABLE | LARGE,
                GuestAddress(directory + entry * 8),
            )?;
        }
    }
    Ok(())
}
