//! Where the blocks of guest memory lie in this process: a userfaultfd speaks of addresses.

use devices::GuestMemory;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::blocks::BLOCK;

/// The addresses of all blocks, which are numbered in the order of the file.
pub(super) struct BlockAddresses {
    regions: Vec<RegionAddresses>,
}

struct RegionAddresses {
    start: u64,
    len: u64,
    /// The number of its first block.
    first: usize,
}

impl BlockAddresses {
    /// Those of that memory.
    pub(super) fn of(memory: &GuestMemory) -> Self {
        let (mut regions, mut first) = (Vec::new(), 0);
        for region in memory.iter() {
            regions.push(RegionAddresses {
                start: region.as_ptr() as u64,
                len: region.len(),
                first,
            });
            first += region.len().div_ceil(BLOCK) as usize;
        }
        Self { regions }
    }

    /// The block that an address is in; nothing for one that is not in guest memory.
    pub(super) fn block_of(&self, address: u64) -> Option<usize> {
        self.regions.iter().find_map(|region| {
            let offset = address.checked_sub(region.start)?;
            (offset < region.len).then(|| region.first + (offset / BLOCK) as usize)
        })
    }

    /// Where a block begins.
    pub(super) fn address_of(&self, index: usize) -> u64 {
        let after = self.regions.partition_point(|region| region.first <= index);
        // The first region begins with block 0.
        let region = &self.regions[after.saturating_sub(1)];
        region.start + (index - region.first) as u64 * BLOCK
    }
}
