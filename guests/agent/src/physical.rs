//! Guest-physical memory that `mem=` keeps from the kernel, mapped with one call.
//!
//! A page fault is expensive where the host interprets kernel code (1–2 ms each); /dev/mem fills all page tables at
//! once.
#![allow(unsafe_code, reason = "maps memory and makes a slice of it")]

use std::fs::OpenOptions;
use std::io;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

const WORD: usize = size_of::<u64>();

/// A range of physical memory that only this process uses while this lives.
pub(crate) struct Physical {
    words: NonNull<u64>,
    bytes: usize,
}

impl Physical {
    /// Maps `bytes` at physical address `base`, both whole pages. A range in which the kernel has RAM is
    /// refused: the kernel would use the same pages.
    pub(crate) fn map(base: u64, bytes: usize) -> io::Result<Self> {
        let refuse = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        if bytes == 0 {
            return refuse("an empty range");
        }
        let map = std::fs::read_to_string("/proc/iomem")?;
        if is_kernels(&map, base, bytes as u64) {
            return refuse("the range is the kernel's, see mem=");
        }
        let memory = OpenOptions::new().read(true).write(true).open("/dev/mem")?;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that is mapped already. The
        // physical range is not RAM that the kernel allocates from, as was just checked.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &memory,
                base,
            )?
        };
        let Some(words) = NonNull::new(start.cast()) else {
            return refuse("mapped at address zero");
        };
        Ok(Self { words, bytes })
    }
}

impl AsMut<[u64]> for Physical {
    fn as_mut(&mut self) -> &mut [u64] {
        // SAFETY: the mapping is page-aligned, `bytes` long, readable and writable until `drop`, and borrowed with
        // `self`; nothing else has its address.
        unsafe { std::slice::from_raw_parts_mut(self.words.as_ptr(), self.bytes / WORD) }
    }
}

impl Drop for Physical {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `map` made, and no slice of it is left.
        // An error would mean that it was not mapped: nothing to undo.
        let _ = unsafe { munmap(self.words.as_ptr().cast(), self.bytes) };
    }
}

/// Whether a map of physical memory as /proc/iomem shows it (`start-end : what`, hexadecimal, the end included) has
/// RAM of the kernel's in the range.
fn is_kernels(map: &str, base: u64, bytes: u64) -> bool {
    let last = base.saturating_add(bytes - 1);
    map.lines().any(|line| {
        let Some((range, what)) = line.trim().split_once(" : ") else {
            return false;
        };
        let range = range.split_once('-').and_then(|(start, end)| {
            let number = |text| u64::from_str_radix(text, 16).ok();
            Some((number(start)?, number(end)?))
        });
        what == "System RAM" && range.is_none_or(|(start, end)| start <= last && base <= end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_of_the_kernel_is_known() {
        let map = "00000000-00000fff : Reserved\n00001000-0009fbff : System RAM\n00100000-03ffffff : System RAM\n  \
                   01000000-014fffff : Kernel code\nd0000000-d0000fff : LNRO0005:00\n";
        for (base, bytes, kernels) in [
            (0x400_0000, 0x400_0000, false),
            (0x3ff_f000, 0x1000, true),
            (0x3ff_f000, 0x10_0000, true),
            (0xa_0000, 0x1000, false),
            (0, u64::MAX, true),
            (u64::MAX, u64::MAX, false),
        ] {
            assert_eq!(is_kernels(map, base, bytes), kernels, "{base:#x} {bytes:#x}");
        }
    }
}
