use migration_io::{GuestMemory, MemoryRange, PAGE_SIZE, zero_range};

use super::ReceiveError;
use crate::link::Link;
use crate::page_set::PageSet;
use crate::protocol::PageTable;

/// Guest memory that fills up.
pub(super) struct Incoming {
    memory: GuestMemory,
    /// Pages that were written: all others are zero, and touching them would cost their allocation.
    written: PageSet,
}

impl Incoming {
    pub(super) fn new(memory: GuestMemory) -> Result<Self, ReceiveError> {
        let written = PageSet::of(&memory).map_err(ReceiveError::MemoryMap)?;
        Ok(Self { memory, written })
    }

    pub(super) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Takes in one batch of pages.
    pub(super) fn take(&mut self, link: &mut Link<'_>, table: PageTable) -> Result<(), ReceiveError> {
        let data: Vec<MemoryRange> = table.data.into_iter().map(MemoryRange::from).collect();
        for range in &data {
            self.written.insert_range(*range).map_err(ReceiveError::Pages)?;
        }
        link.receive_pages(&self.memory, &data)?;
        for span in table.zero {
            self.zero(span.into())?;
        }
        Ok(())
    }

    fn zero(&mut self, range: MemoryRange) -> Result<(), ReceiveError> {
        self.written.check_range(range).map_err(ReceiveError::Pages)?;
        for gpa in (range.gpa..range.gpa + range.len).step_by(PAGE_SIZE as usize) {
            if self.written.contains(gpa) {
                zero_range(&self.memory, MemoryRange { gpa, len: PAGE_SIZE })?;
            }
        }
        Ok(())
    }
}
