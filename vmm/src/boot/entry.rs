//! The registers that the first vCPU starts with.

use devices::GuestMemory;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;

/// How the first vCPU enters the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryPoint {
    /// 32-bit protected mode, paging off, EBX at the start info.
    Pvh {
        /// Entry point.
        rip: u64,
    },
    /// 64-bit mode, identity-mapped, RSI at the zero page.
    Linux64 {
        /// Entry point.
        rip: u64,
    },
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 2;

impl EntryPoint {
    /// General registers at the first instruction.
    pub fn regs(&self) -> kvm_regs {
        match *self {
            EntryPoint::Pvh { rip } => kvm_regs {
                rip,
                rflags: RFLAGS_RESERVED,
                rbx: layout::PVH_START_INFO,
                ..Default::default()
            },
            EntryPoint::Linux64 { rip } => kvm_regs {
                rip,
                rflags: RFLAGS_RESERVED,
                rsi: layout::ZERO_PAGE,
                rsp: layout::BOOT_STACK,
                rbp: layout::BOOT_STACK,
                ..Default::default()
            },
        }
    }

    /// Turns the reset state into that of the first instruction.
    pub fn adjust_sregs(&self, sregs: &mut kvm_sregs) {
        let long_mode = matches!(self, EntryPoint::Linux64 { .. });
        let code = if long_mode {
            segment(1, 0xa09b, 0, 0xffff_ffff)
        } else {
            segment(1, 0xc09b, 0, 0xffff_ffff)
        };
        let data = segment(2, 0xc093, 0, 0xffff_ffff);
        sregs.cs = code;
        for register in [
            &mut sregs.ds,
            &mut sregs.es,
            &mut sregs.fs,
            &mut sregs.gs,
            &mut sregs.ss,
        ] {
            *register = data;
        }
        sregs.tr = segment(3, 0x008b, 0, 0x67);
        sregs.gdt.base = layout::GDT;
        sregs.gdt.limit = (GDT_ENTRIES * 8 - 1) as u16;
        sregs.idt.base = layout::IDT;
        sregs.idt.limit = 7;
        sregs.cr0 = CR0_PE | CR0_ET;
        sregs.cr4 = 0;
        if long_mode {
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = layout::PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
        }
    }

    /// Writes the descriptor tables that the segment registers refer to.
    pub fn write_descriptors(&self, memory: &GuestMemory) -> Result<(), GuestMemoryError> {
        let code: u64 = match self {
            EntryPoint::Pvh { .. } => 0x00cf_9b00_0000_ffff,
            EntryPoint::Linux64 { .. } => 0x00af_9b00_0000_ffff,
        };
        let gdt: [u64; GDT_ENTRIES] = [0, code, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];
        for (index, entry) in gdt.into_iter().enumerate() {
            memory.write_obj(entry, GuestAddress(layout::GDT + 8 * index as u64))?;
        }
        memory.write_obj(0u64, GuestAddress(layout::IDT))
    }
}

const GDT_ENTRIES: usize = 4;

/// `attributes` are the descriptor's access byte and, in bits 12 to 15, its flags G, D/B, L, AVL.
fn segment(index: u16, attributes: u16, base: u64, limit: u32) -> kvm_segment {
    let bit = |n: u16| ((attributes >> n) & 1) as u8;
    kvm_segment {
        base,
        limit,
        selector: index * 8,
        type_: (attributes & 0xf) as u8,
        s: bit(4),
        dpl: ((attributes >> 5) & 3) as u8,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: 0,
        padding: 0,
    }
}
