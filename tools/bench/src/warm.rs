//! Memory that the host below us has at hand.

use std::hint::black_box;

/// Touches and frees so many MiB. A host that lends its memory takes back what lies idle, and getting it again costs
/// ten times what a page fault costs otherwise; what has just been used and freed is still there.
pub(crate) fn memory(mib: u64) {
    drop(black_box(vec![1u8; (mib as usize) << 20]));
}
