use migration_io::{GuestMemory, MemoryRange, PAGE_SIZE, is_zero_page};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::MigrateError;
use crate::control::Control;
use crate::link::Link;
use crate::page_set::PageSet;
use crate::protocol::{MAX_BATCH_BYTES, MAX_BATCH_RANGES, PageTable, Span};

/// What sending a set of pages came to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sent {
    /// Pages with content.
    pub(super) data: u64,
    /// Pages that were zero.
    pub(super) zero: u64,
}

/// Sends all pages of a set, in batches: many scattered pages take one system call, and zero pages a few
/// bytes.
pub(super) fn send_pages(
    link: &mut Link<'_>,
    memory: &GuestMemory,
    pages: &PageSet,
    control: &Control,
) -> Result<Sent, MigrateError> {
    let mut sent = Sent::default();
    let mut batch = Batch::new(memory);
    let mut remaining = pages.len() * PAGE_SIZE;
    for range in pages.ranges(MAX_BATCH_BYTES) {
        for gpa in (range.gpa..range.gpa + range.len).step_by(PAGE_SIZE as usize) {
            if batch.is_full() {
                remaining -= batch.send(link, memory, &mut sent)?;
                control.update(|progress| {
                    progress.remaining_bytes = remaining;
                    progress.bytes_sent = link.bytes_sent();
                });
            }
            batch.push(memory, gpa)?;
        }
    }
    if !batch.is_empty() {
        batch.send(link, memory, &mut sent)?;
    }
    control.update(|progress| {
        progress.remaining_bytes = 0;
        progress.bytes_sent = link.bytes_sent();
    });
    Ok(sent)
}

struct Batch {
    /// First addresses of the regions: a span does not reach from one region into the next.
    starts: Vec<u64>,
    table: PageTable,
    data_bytes: u64,
    zero_bytes: u64,
}

impl Batch {
    fn new(memory: &GuestMemory) -> Self {
        let starts = memory.iter().map(|region| region.start_addr().0).collect();
        Self {
            starts,
            table: PageTable::default(),
            data_bytes: 0,
            zero_bytes: 0,
        }
    }

    fn is_empty(&self) -> bool {
        self.data_bytes + self.zero_bytes == 0
    }

    fn is_full(&self) -> bool {
        self.data_bytes == MAX_BATCH_BYTES
            || self.zero_bytes == MAX_BATCH_BYTES * MAX_BATCH_RANGES as u64
            || self.table.data.len().max(self.table.zero.len()) == MAX_BATCH_RANGES
    }

    fn push(&mut self, memory: &GuestMemory, gpa: u64) -> Result<(), MigrateError> {
        let (spans, bytes) = if is_zero_page(memory, gpa)? {
            (&mut self.table.zero, &mut self.zero_bytes)
        } else {
            (&mut self.table.data, &mut self.data_bytes)
        };
        *bytes += PAGE_SIZE;
        match spans.last_mut() {
            Some(last) if last.gpa + last.len == gpa && !self.starts.contains(&gpa) => last.len += PAGE_SIZE,
            _ => spans.push(Span::from(MemoryRange { gpa, len: PAGE_SIZE })),
        }
        Ok(())
    }

    /// Sends what is in the batch and empties it. Returns the bytes of guest memory that it stood for.
    fn send(
        &mut self,
        link: &mut Link<'_>,
        memory: &GuestMemory,
        sent: &mut Sent,
    ) -> Result<u64, MigrateError> {
        // A destination that gave up is heard at once, not when its buffer is full.
        link.check("nothing while pages are sent")?;
        link.send_pages(memory, &self.table)?;
        sent.data += self.data_bytes / PAGE_SIZE;
        sent.zero += self.zero_bytes / PAGE_SIZE;
        let bytes = self.data_bytes + self.zero_bytes;
        self.table.data.clear();
        self.table.zero.clear();
        (self.data_bytes, self.zero_bytes) = (0, 0);
        Ok(bytes)
    }
}
