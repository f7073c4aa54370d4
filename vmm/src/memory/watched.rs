//! Where guest memory lies in this process, for a signal handler. So nothing here may take a lock or allocate when it
//! is asked for an address.

use std::sync::atomic::{AtomicUsize, Ordering};

use devices::GuestMemory;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// The most ranges that can be watched: more than twice as many as a machine has.
const SLOTS: usize = 8;

/// First byte and length of each range; a slot of first byte 0 is free.
static RANGES: [(AtomicUsize, AtomicUsize); SLOTS] =
    [const { (AtomicUsize::new(0), AtomicUsize::new(0)) }; SLOTS];

/// As long as it lives, addresses in a machine's memory are known as such.
#[derive(Debug)]
pub struct WatchedMemory(Vec<usize>);

impl WatchedMemory {
    /// Watches that memory. What finds no free slot goes unwatched.
    pub fn new(memory: &GuestMemory) -> Self {
        let mut taken = Vec::new();
        for region in memory.iter() {
            let first = region.as_ptr() as usize;
            let free = |slot: &usize| {
                let claim = RANGES[*slot]
                    .0
                    .compare_exchange(0, first, Ordering::Relaxed, Ordering::Relaxed);
                claim.is_ok()
            };
            if let Some(slot) = (0..SLOTS).find(free) {
                RANGES[slot].1.store(region.len() as usize, Ordering::Release);
                taken.push(slot);
            }
        }
        Self(taken)
    }
}

impl Drop for WatchedMemory {
    fn drop(&mut self) {
        for slot in &self.0 {
            RANGES[*slot].1.store(0, Ordering::Relaxed);
            RANGES[*slot].0.store(0, Ordering::Release);
        }
    }
}

/// Whether the address is in a machine's memory. Can be called in a signal handler.
pub fn is_guest_memory(address: usize) -> bool {
    RANGES.iter().any(|(first, len)| {
        let offset = address.wrapping_sub(first.load(Ordering::Acquire));
        offset < len.load(Ordering::Acquire)
    })
}

#[cfg(test)]
mod tests {
    use migration::MemoryKind;

    use super::*;

    #[test]
    fn addresses_are_known_as_long_as_the_memory_is_watched() {
        let memory = crate::memory::create(&[(0, 8192), (1 << 32, 4096)], MemoryKind::Anonymous).unwrap();
        let ends = |memory: &GuestMemory| -> Vec<_> {
            let ends = |region: &_| {
                let region: &vm_memory::GuestRegionMmap<_> = region;
                let first = region.as_ptr() as usize;
                [first, first + GuestMemoryRegion::len(region) as usize - 1]
            };
            memory.iter().flat_map(ends).collect()
        };
        let watched = WatchedMemory::new(&memory);
        assert!(ends(&memory).into_iter().all(is_guest_memory));
        assert!(!is_guest_memory(0) && !is_guest_memory(&raw const watched as usize));
        drop(watched);
        assert!(!ends(&memory).into_iter().any(is_guest_memory));
    }
}
