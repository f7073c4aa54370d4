//! Pages without content.
#![allow(unsafe_code)] // Reads and writes guest memory 16 bytes at a time through a raw pointer.

use std::arch::x86_64::{__m128i, _mm_cmpeq_epi8, _mm_movemask_epi8, _mm_or_si128, _mm_setzero_si128};

use crate::memory::slice_of;
use crate::{GuestMemory, MemoryIoError, MemoryRange, PAGE_SIZE};

/// Whether the page at `gpa` holds nothing but zeroes. The guest may write it meanwhile: the answer then is
/// that of some moment for each 16 bytes, and the page is dirty.
pub fn is_zero_page(memory: &GuestMemory, gpa: u64) -> Result<bool, MemoryIoError> {
    if !gpa.is_multiple_of(PAGE_SIZE) {
        return Err(MemoryIoError::Unaligned { gpa });
    }
    let slice = slice_of(memory, MemoryRange { gpa, len: PAGE_SIZE })?;
    let guard = slice.ptr_guard();
    let base = guard.as_ptr().cast::<__m128i>();
    if !base.is_aligned() {
        // A region that does not start at a page.
        return Err(MemoryIoError::Unaligned { gpa });
    }
    // 64 bytes a time: small enough that a page with content is left soon, large enough for the pipeline.
    for at in (0..PAGE_SIZE as usize / size_of::<__m128i>()).step_by(4) {
        // SAFETY: `at` to `at + 3` lie within the page that `slice` covers, and `base` is aligned. Volatile
        // reads through a raw pointer are how memory is read that somebody else may write.
        let parts: [__m128i; 4] = std::array::from_fn(|part| unsafe { base.add(at + part).read_volatile() });
        if !all_zero(parts) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Clears a range without marking it in the dirty bitmap.
pub fn zero_range(memory: &GuestMemory, range: MemoryRange) -> Result<(), MemoryIoError> {
    let slice = slice_of(memory, range)?;
    // SAFETY: the slice covers `len` bytes of mapped guest memory, to which no Rust reference exists.
    unsafe { slice.ptr_guard_mut().as_ptr().write_bytes(0, slice.len()) };
    Ok(())
}

fn all_zero([a, b, c, d]: [__m128i; 4]) -> bool {
    // SAFETY: SSE2 is part of every x86-64 processor.
    unsafe {
        let any = _mm_or_si128(_mm_or_si128(a, b), _mm_or_si128(c, d));
        _mm_movemask_epi8(_mm_cmpeq_epi8(any, _mm_setzero_si128())) == 0xffff
    }
}
