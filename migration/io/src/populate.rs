//! Makes guest memory resident ahead of its use, without changing what it holds.
#![allow(unsafe_code)] // madvise takes a pointer to guest memory.

use rustix::io::Errno;
use rustix::mm::{Advice, madvise};

use crate::memory::slice_of;
use crate::{GuestMemory, MemoryIoError, MemoryRange, PAGE_SIZE};

/// Makes a range resident and writable without changing its content, so that the first write causes no page fault.
/// Other threads may write it meanwhile. Takes as long as the kernel needs for the whole range, which can be seconds
/// for a GiB: a caller that may have to stop passes it in pieces.
///
/// On a kernel that cannot do it (before 5.14) nothing happens, and the pages come when they are touched.
pub fn populate(memory: &GuestMemory, range: MemoryRange) -> Result<(), MemoryIoError> {
    if !range.gpa.is_multiple_of(PAGE_SIZE) {
        return Err(MemoryIoError::Unaligned { gpa: range.gpa });
    }
    let slice = slice_of(memory, range)?;
    loop {
        // SAFETY: the slice covers `len` bytes of a mapping that lives as long as `memory`, and this advice
        // changes nothing that a program can see: pages come in as a write would bring them, without one.
        let done = unsafe {
            madvise(
                slice.ptr_guard_mut().as_ptr().cast(),
                slice.len(),
                Advice::LinuxPopulateWrite,
            )
        };
        return match done {
            Ok(()) | Err(Errno::INVAL) => Ok(()),
            Err(Errno::INTR) => continue,
            Err(error) => Err(MemoryIoError::Populate {
                gpa: range.gpa,
                len: range.len,
                source: error.into(),
            }),
        };
    }
}
