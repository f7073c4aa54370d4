//! What the VMM says about the machine (PVH's hvm_start_info), and memory as this guest uses it.

#![allow(
    unsafe_code,
    reason = "reads the VMM's tables, extends the page tables, reads and writes raw pages"
)]

use core::arch::global_asm;
use core::fmt;

use guest_core::{BareSettings, PAGE, STAMP_WORDS, UsableRanges, WORDS, virtio_devices};

global_asm!(include_str!("boot.s"));

unsafe extern "C" {
    static start_info_address: u32;
    static mut pdpt: [u64; 512];
    static image_end: u8;
}

const GIB: u64 = 1 << 30;
/// What one page-directory-pointer table maps.
const MAPPED_LIMIT: u64 = 512 * GIB;
/// What `boot.s` has mapped.
const MAPPED: u64 = 4 * GIB;
const START_INFO_MAGIC: u32 = 0x336e_c578;
const MEMMAP_RAM: u32 = 1;

/// PVH's `hvm_start_info`, version 1 (Xen, public/arch-x86/hvm/start_info.h).
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    command_line: u64,
    rsdp: u64,
    memmap: u64,
    memmap_entries: u32,
}

/// PVH's `hvm_memmap_table_entry`.
#[repr(C)]
struct MemmapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// The machine: its memory above the image, all mapped, and what its command line asks for.
pub(crate) struct BareMachine {
    pub(crate) settings: BareSettings,
    pub(crate) ranges: UsableRanges,
    command_line: &'static str,
}

impl BareMachine {
    /// Where the registers of the virtio-mmio devices are that the command line names.
    pub(crate) fn virtio_devices(&self) -> impl Iterator<Item = u64> {
        virtio_devices(self.command_line)
    }
}

/// Why the guest cannot start.
pub(crate) enum Problem {
    /// No start info of version 1 or later.
    StartInfo,
    /// More ranges of RAM than this guest keeps.
    TooManyRanges,
    /// No usable memory above the image.
    NoMemory,
    /// A word of the command line that makes no sense.
    CommandLine(&'static str),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StartInfo => f.write_str("start_info expected=version>=1"),
            Self::TooManyRanges => write!(f, "memmap expected<={} ranges", UsableRanges::MAX),
            Self::NoMemory => f.write_str("memmap expected=RAM above the image"),
            Self::CommandLine(word) => write!(f, "command line word={word}"),
        }
    }
}

/// Reads the VMM's tables and maps all memory.
pub(crate) fn discover() -> Result<BareMachine, Problem> {
    // SAFETY: written once by `boot.s`; the VMM put a start info there, below 4 GiB, which is mapped.
    let info = unsafe { &*(start_info_address as usize as *const StartInfo) };
    if info.magic != START_INFO_MAGIC || info.version < 1 {
        return Err(Problem::StartInfo);
    }
    let command_line = command_line(info.command_line);
    let settings = BareSettings::parse(command_line).map_err(Problem::CommandLine)?;
    // SAFETY: the table that the start info names, in mapped memory, which nothing writes.
    let entries = unsafe {
        core::slice::from_raw_parts(info.memmap as *const MemmapEntry, info.memmap_entries as usize)
    };
    let mut free = &raw const image_end as u64;
    let top = ram(entries).map(|(_, end)| end).max().unwrap_or(0);
    free = map_up_to(top, free);
    let mut ranges = UsableRanges::default();
    for (start, end) in ram(entries) {
        if !ranges.add(start.max(free), end) {
            return Err(Problem::TooManyRanges);
        }
    }
    if ranges.pages() == 0 {
        return Err(Problem::NoMemory);
    }
    Ok(BareMachine {
        settings,
        ranges,
        command_line,
    })
}

/// The whole of page number `page`, a number below `ranges.pages()`.
///
/// # Safety
/// Nothing else may use the page while the reference lives: each page belongs to one CPU.
pub(crate) unsafe fn page(ranges: &UsableRanges, page: u64) -> Option<&'static mut [u64; WORDS]> {
    let address = ranges.address(page)?;
    // SAFETY: RAM above the image, mapped by `discover`, aligned; the caller promises that it is not shared.
    Some(unsafe { &mut *(address as *mut [u64; WORDS]) })
}

/// The stamp and the body of a page.
pub(crate) fn split(page: &mut [u64; WORDS]) -> (&mut [u64; STAMP_WORDS], &mut [u64]) {
    let (head, body) = page.split_at_mut(STAMP_WORDS);
    match head.try_into() {
        Ok(head) => (head, body),
        Err(_) => unreachable!(),
    }
}

fn ram(entries: &[MemmapEntry]) -> impl Iterator<Item = (u64, u64)> + '_ {
    entries
        .iter()
        .filter(|entry| entry.kind == MEMMAP_RAM)
        .map(|entry| {
            (
                entry.address,
                entry.address.saturating_add(entry.size).min(MAPPED_LIMIT),
            )
        })
}

/// The command line, copied: what lies in memory there is overwritten later. Cut at 1023 bytes.
fn command_line(address: u64) -> &'static str {
    static mut COPY: [u8; 1024] = [0; 1024];
    if address == 0 {
        return "";
    }
    let copy = &raw mut COPY;
    let mut len = 0;
    // SAFETY: called once, by the first CPU alone; the VMM's text is in mapped memory and ends with a zero.
    unsafe {
        while len < 1023 {
            let byte = ((address + len as u64) as *const u8).read();
            if byte == 0 {
                break;
            }
            (*copy)[len] = byte;
            len += 1;
        }
        core::str::from_utf8(&(&*copy)[..len]).unwrap_or("")
    }
}

/// Maps what lies between 4 GiB and `top` with page directories put at `free`; returns the first free address
/// behind them.
fn map_up_to(top: u64, mut free: u64) -> u64 {
    let mut gib = MAPPED;
    while gib < top {
        let table = free as *mut u64;
        free += PAGE;
        for entry in 0..512 {
            // SAFETY: the page behind the image (a few hundred KiB at most, RAM on every machine with more
            // than 4 GiB) is used by nothing else.
            unsafe { table.add(entry as usize).write(gib + (entry << 21) + 0x87) };
        }
        // SAFETY: only the first CPU runs; an entry that was absent becomes present, which no TLB has cached.
        unsafe {
            (&raw mut pdpt)
                .cast::<u64>()
                .add((gib / GIB) as usize)
                .write_volatile(table as u64 + 7)
        };
        gib += GIB;
    }
    free
}
