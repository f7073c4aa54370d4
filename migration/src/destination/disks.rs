//! Writes the pages of disks that come along to the new disks. Does not flush or name them: the machine does, when it
//! is restored.

use std::fmt;
use std::sync::Arc;

use migration_io::PAGE_SIZE;

use super::ReceiveError;
use super::error::call;
use crate::link::Link;
use crate::page_set::{PageSet, PageSetError};
use crate::ports::{BlankDisk, MemoryRegion};
use crate::protocol::{PageTable, Span};
use crate::space::disk_regions;

/// The new disks, and where their pages lie behind guest memory.
pub(super) struct Disks {
    disks: Vec<(Arc<dyn BlankDisk>, MemoryRegion)>,
}

impl Disks {
    /// Lays the disks out behind memory. An error if they overlap with it.
    pub(super) fn new(disks: Vec<Arc<dyn BlankDisk>>, memory: &[MemoryRegion]) -> Result<Self, ReceiveError> {
        let regions = disk_regions(disks.iter().map(|disk| disk.size())).map_err(ReceiveError::MemoryMap)?;
        let all = [memory, &regions].concat();
        PageSet::check_regions(&all).map_err(ReceiveError::MemoryMap)?;
        Ok(Self {
            disks: disks.into_iter().zip(regions).collect(),
        })
    }

    /// The numbers of the disks' devices.
    pub(super) fn devices(&self) -> Vec<u32> {
        self.disks.iter().map(|(disk, _)| disk.device()).collect()
    }

    /// Bytes of all of them.
    pub(super) fn bytes(&self) -> u64 {
        self.disks.iter().map(|(_, region)| region.len).sum()
    }

    /// The size of each disk in bytes, and how to read it.
    pub(super) fn readers(
        &self,
    ) -> impl Iterator<Item = (u64, impl Fn(u64, &mut [u8]) -> Result<(), ReceiveError>)> {
        self.disks.iter().map(|(disk, _)| {
            let read = |offset, into: &mut [u8]| call("read of a disk", disk.read(offset, into));
            (disk.size(), read)
        })
    }

    /// Receives and writes one batch of pages, whose content is next on the stream.
    pub(super) fn receive_batch(
        &self,
        link: &mut Link<'_>,
        table: &PageTable,
        buffer: &mut Vec<u8>,
    ) -> Result<(), ReceiveError> {
        // The whole table is checked before anything is written.
        for span in table.data.iter().chain(&table.zero) {
            self.locate(*span)?;
        }
        // At most 1 MiB: the protocol bounds every table.
        buffer.resize(table.data_bytes() as usize, 0);
        link.receive_bytes(buffer, "the content of a disk's pages")?;
        let mut content = buffer.as_slice();
        for span in &table.data {
            let (disk, offset, len) = self.locate(*span)?;
            let (pages, rest) = content.split_at(span.len as usize);
            content = rest;
            call("write to a disk", disk.write(offset, &pages[..len as usize]))?;
        }
        for span in &table.zero {
            let (disk, offset, len) = self.locate(*span)?;
            call("zeroing of a disk", disk.zero(offset, len))?;
        }
        Ok(())
    }

    /// The disk of a range of whole pages, the range's offset in it, and how many bytes of the range belong to it: the
    /// last page may reach beyond the disk's end.
    fn locate(&self, span: Span) -> Result<(&dyn BlankDisk, u64, u64), ReceiveError> {
        let Span { gpa, len } = span;
        let below = self.disks.partition_point(|(_, region)| region.gpa <= gpa);
        let located = below.checked_sub(1).and_then(|at| {
            let (disk, region) = self.disks.get(at)?;
            let offset = gpa - region.gpa;
            let end = offset.checked_add(len)?;
            (end <= region.len).then(|| (&**disk, offset, end.min(disk.size()) - offset))
        });
        let whole = gpa.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE);
        located
            .filter(|_| whole && len > 0)
            .ok_or(ReceiveError::Pages(PageSetError::OutOfRange { gpa, len }))
    }
}

impl fmt::Debug for Disks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.disks.iter().map(|(_, region)| region))
            .finish()
    }
}
