//! Finds pages that hold nothing but zeroes, and makes ranges zero.
#![allow(unsafe_code)] // Reads and writes guest memory through raw pointers, 16 or 32 bytes at a time.

use std::arch::x86_64::{
    __m128i, __m256i, _MM_HINT_T0, _mm_cmpeq_epi8, _mm_movemask_epi8, _mm_or_si128, _mm_prefetch,
    _mm_setzero_si128, _mm256_or_si256, _mm256_testz_si256,
};

use crate::memory::slice_of;
use crate::{GuestMemory, MemoryIoError, MemoryRange, PAGE_SIZE};

/// Bytes of a page.
const PAGE: usize = PAGE_SIZE as usize;

/// How many pages ahead of the one that is scanned a page's first line is prefetched: enough for the line to come from
/// memory while the pages in between are scanned.
const AHEAD: usize = 4;

/// Which of up to 64 pages hold nothing but zeroes: bit n of `candidates`, and of the answer, is the page
/// `first_gpa + n * 4096`. Pages that are no candidates are not read and need not exist; all others
/// must lie within one region.
///
/// The guest may write a page meanwhile: the answer then is that of some moment for each of its words, and
/// the page is dirty.
pub fn zero_pages(memory: &GuestMemory, first_gpa: u64, candidates: u64) -> Result<u64, MemoryIoError> {
    if !first_gpa.is_multiple_of(PAGE_SIZE) {
        return Err(MemoryIoError::Unaligned { gpa: first_gpa });
    }
    if candidates == 0 {
        return Ok(0);
    }
    let first = candidates.trailing_zeros();
    let count = u64::BITS - candidates.leading_zeros() - first;
    let range = MemoryRange {
        // An address that does not exist stays one when it saturates.
        gpa: first_gpa.saturating_add(u64::from(first) * PAGE_SIZE),
        len: u64::from(count) * PAGE_SIZE,
    };
    let slice = slice_of(memory, range)?;
    let guard = slice.ptr_guard();
    if !guard.as_ptr().cast::<__m256i>().is_aligned() {
        // A region that does not start at a page.
        return Err(MemoryIoError::Unaligned { gpa: range.gpa });
    }
    let bits = candidates >> first;
    let zero = if is_x86_feature_detected!("avx2") {
        // SAFETY: the slice covers all pages from the first to the last candidate, the pointer is aligned
        // to 32 bytes, and the processor has AVX2.
        unsafe { scan_avx2(guard.as_ptr(), bits) }
    } else {
        // SAFETY: as for AVX2; 32 bytes are more than enough alignment for SSE2.
        unsafe { scan_sse2(guard.as_ptr(), bits) }
    };
    Ok(zero << first)
}

/// Clears a range without marking it in the dirty bitmap.
pub fn zero_range(memory: &GuestMemory, range: MemoryRange) -> Result<(), MemoryIoError> {
    let slice = slice_of(memory, range)?;
    // SAFETY: the slice covers `len` bytes of mapped guest memory, to which no Rust reference exists.
    unsafe { slice.ptr_guard_mut().as_ptr().write_bytes(0, slice.len()) };
    Ok(())
}

/// # Safety
/// Every page of `bits`, counted from `base`, must be mapped; `base` must be aligned to 32 bytes; the
/// processor must have AVX2.
#[target_feature(enable = "avx2")]
unsafe fn scan_avx2(base: *const u8, bits: u64) -> u64 {
    scan(base, bits, |page| {
        // SAFETY: the page is mapped, and `at` + 32 * N stays within it. Volatile reads through a raw
        // pointer are how memory is read that the guest may write meanwhile.
        let read = |at: usize| unsafe { page.add(at).cast::<__m256i>().read_volatile() };
        let line = _mm256_or_si256(read(0), read(32));
        if _mm256_testz_si256(line, line) == 0 {
            return false;
        }
        (0..PAGE).step_by(256).all(|at| {
            let [a, b, c, d, e, f, g, h] = std::array::from_fn(|part| read(at + 32 * part));
            let low = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
            let high = _mm256_or_si256(_mm256_or_si256(e, f), _mm256_or_si256(g, h));
            let any = _mm256_or_si256(low, high);
            _mm256_testz_si256(any, any) == 1
        })
    })
}

/// # Safety
/// Every page of `bits`, counted from `base`, must be mapped; `base` must be aligned to 16 bytes.
unsafe fn scan_sse2(base: *const u8, bits: u64) -> u64 {
    scan(base, bits, |page| {
        (0..PAGE).step_by(64).all(|at| {
            // SAFETY: the page is mapped, and the four parts of a line stay within it; volatile as above.
            let [a, b, c, d] = std::array::from_fn(|part| unsafe {
                page.add(at + 16 * part).cast::<__m128i>().read_volatile()
            });
            // SAFETY: SSE2 is part of every x86-64 processor.
            unsafe {
                let any = _mm_or_si128(_mm_or_si128(a, b), _mm_or_si128(c, d));
                _mm_movemask_epi8(_mm_cmpeq_epi8(any, _mm_setzero_si128())) == 0xffff
            }
        })
    })
}

/// The pages of `bits` for which `is_zero` holds.
#[inline(always)]
fn scan(base: *const u8, mut bits: u64, is_zero: impl Fn(*const u8) -> bool) -> u64 {
    let mut zero = 0;
    while bits != 0 {
        let page = bits.trailing_zeros() as usize;
        let ahead = base.wrapping_add((page + AHEAD) * PAGE);
        // SAFETY: a prefetch never faults, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ahead.cast()) };
        if is_zero(base.wrapping_add(page * PAGE)) {
            zero |= 1 << page;
        }
        bits &= bits - 1;
    }
    zero
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(64))]
    struct Pages([u8; 4 * PAGE]);

    #[test]
    fn both_scans_see_a_single_byte_anywhere() {
        let mut pages = Box::new(Pages([0; 4 * PAGE]));
        for at in (0..PAGE).chain([4 * PAGE - 1]) {
            pages.0[at] = 0x80;
            let (page, base) = (at / PAGE, pages.0.as_ptr());
            // SAFETY: four pages exist and are aligned.
            assert_eq!(unsafe { scan_sse2(base, 0b1111) }, 0b1111 & !(1 << page));
            if is_x86_feature_detected!("avx2") {
                // SAFETY: the same, and AVX2 is there.
                assert_eq!(unsafe { scan_avx2(base, 0b1111) }, 0b1111 & !(1 << page));
            }
            pages.0[at] = 0;
        }
    }
}
