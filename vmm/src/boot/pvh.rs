//! The PVH boot protocol (Xen's `docs/misc/pvh.pandoc`): 32-bit entry with a start-info block.

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError};

use super::{Initrd, layout};
use devices::GuestMemory;

const START_INFO_MAGIC: u32 = 0x336e_c578;

/// Writes the start info of a machine with `size` bytes of memory, its memory map and its list of modules.
pub(super) fn write_start_info(
    memory: &GuestMemory,
    size: u64,
    initrd: Option<Initrd>,
) -> Result<(), GuestMemoryError> {
    let mut entries = 0;
    for (addr, size, kind) in layout::memory_map(size) {
        let entry = hvm_memmap_table_entry {
            addr,
            size,
            type_: kind as u32,
            reserved: 0,
        };
        let offset = u64::from(entries) * size_of::<hvm_memmap_table_entry>() as u64;
        memory.write_slice(entry.as_slice(), GuestAddress(layout::PVH_MEMORY_MAP + offset))?;
        entries += 1;
    }
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry {
            paddr: initrd.gpa,
            size: initrd.len,
            ..Default::default()
        };
        memory.write_slice(module.as_slice(), GuestAddress(layout::PVH_MODULES))?;
    }
    let start_info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: 1,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: layout::PVH_MODULES,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: layout::ACPI,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: entries,
        ..Default::default()
    };
    memory.write_slice(start_info.as_slice(), GuestAddress(layout::PVH_START_INFO))
}
