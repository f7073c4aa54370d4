//! Memory that the host below us has at hand.

use std::hint::black_box;

/// So many MiB that were just touched. A host that lends its memory takes back what lies idle, within seconds of
/// its being freed, and getting it again costs ten times what a page fault costs otherwise. So this is held until
/// right before somebody else needs the memory, and dropped then.
pub(crate) struct Warm {
    _memory: Vec<u8>,
}

impl Warm {
    /// Touches so many MiB and holds them.
    pub(crate) fn hold(mib: u64) -> Self {
        Self {
            _memory: black_box(vec![1; (mib as usize) << 20]),
        }
    }
}
