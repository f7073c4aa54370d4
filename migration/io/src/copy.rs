//! Copies guest memory to and from buffers of the monitor's own, for what cannot be done in place.
#![allow(unsafe_code)] // Writes guest memory through a raw pointer, so that nothing is marked dirty.

use crate::memory::slice_of;
use crate::{GuestMemory, MemoryIoError, MemoryRange};

/// Copies ranges into a buffer, which holds nothing else afterwards.
pub(crate) fn copy_out(
    memory: &GuestMemory,
    ranges: &[MemoryRange],
    buffer: &mut Vec<u8>,
) -> Result<(), MemoryIoError> {
    let mut at = 0;
    for range in ranges {
        let slice = slice_of(memory, *range)?;
        // Grown only after the check, and no further than the memory has bytes.
        if buffer.len() < at + slice.len() {
            buffer.resize(at + slice.len(), 0);
        }
        at += slice.copy_to(&mut buffer[at..]);
    }
    buffer.truncate(at);
    Ok(())
}

/// Copies the beginning of a buffer into ranges, as far as it goes; none is written if one is outside memory.
pub(crate) fn copy_in(
    memory: &GuestMemory,
    ranges: &[MemoryRange],
    mut buffer: &[u8],
) -> Result<(), MemoryIoError> {
    for range in ranges {
        slice_of(memory, *range)?;
    }
    for range in ranges {
        let slice = slice_of(memory, *range)?;
        let (now, later) = buffer.split_at(slice.len().min(buffer.len()));
        // SAFETY: the slice covers at least as many bytes of mapped guest memory, to which no Rust reference
        // exists, so that the buffer cannot be part of it.
        unsafe {
            slice
                .ptr_guard_mut()
                .as_ptr()
                .copy_from_nonoverlapping(now.as_ptr(), now.len());
        }
        buffer = later;
    }
    Ok(())
}
