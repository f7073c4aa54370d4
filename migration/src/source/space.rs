//! Everything that the source sends as pages (guest RAM, and disks that come along behind it), and the logs that say
//! which pages were written. Sends nothing itself.

use std::sync::{Arc, OnceLock};

use migration_io::{GuestMemory, MemoryRange};

use super::MigrateError;
use super::pass::Chunk;
use crate::digest::digest;
use crate::page_set::PageSet;
use crate::ports::{DirtyLog, MemoryRegion, PortError, SourceDisk};
use crate::space::disk_regions;

/// Words of the log that are cleared in one call, for 64 MiB: the guest's writes wait for each call.
const CLEARED: usize = 256;

/// Guest RAM and the disks that come along: the regions of a pass over pages, RAM's first.
pub(super) struct Space<'a> {
    pub(super) memory: &'a GuestMemory,
    /// RAM's log; unset while the disks are copied.
    log: OnceLock<Arc<dyn DirtyLog>>,
    disks: Vec<DiskRegion>,
    ram: Vec<MemoryRegion>,
}

/// A disk that comes along, and where its pages are.
pub(super) struct DiskRegion {
    pub(super) port: Arc<dyn SourceDisk>,
    pub(super) region: MemoryRegion,
}

impl<'a> Space<'a> {
    pub(super) fn new(
        ram: Vec<MemoryRegion>,
        memory: &'a GuestMemory,
        disks: Vec<Arc<dyn SourceDisk>>,
    ) -> Result<Self, MigrateError> {
        let regions = disk_regions(disks.iter().map(|disk| disk.size()))?;
        let disk = |(port, region)| DiskRegion { port, region };
        Ok(Self {
            memory,
            log: OnceLock::new(),
            disks: disks.into_iter().zip(regions).map(disk).collect(),
            ram,
        })
    }

    /// Sets the log in which writes to RAM are marked from here on.
    pub(super) fn set_log(&self, log: Arc<dyn DirtyLog>) {
        self.log.get_or_init(|| log);
    }

    /// Pages marked by each vCPU, see [`DirtyLog::by_vcpu`].
    pub(super) fn by_vcpu(&self) -> Vec<u64> {
        self.log.get().map(|log| log.by_vcpu()).unwrap_or_default()
    }

    /// An empty set over RAM and disks.
    pub(super) fn none(&self) -> Result<PageSet, MigrateError> {
        let disks = self.disks.iter().map(|disk| disk.region);
        let regions: Vec<_> = self.ram.iter().copied().chain(disks).collect();
        Ok(PageSet::new(&regions)?)
    }

    /// The disk whose region has this number.
    pub(super) fn disk(&self, region: usize) -> Option<&DiskRegion> {
        self.disks.get(region.checked_sub(self.ram.len())?)
    }

    /// Whether any disk comes along.
    pub(super) fn has_disks(&self) -> bool {
        !self.disks.is_empty()
    }

    /// Adds every marked page of RAM and disks.
    pub(super) fn peek(&self, into: &mut PageSet) -> Result<(), MigrateError> {
        if !self.has_disks() {
            return self.peek_ram(into);
        }
        let mut ram = PageSet::new(&self.ram)?;
        self.peek_ram(&mut ram)?;
        into.union(&ram)?;
        self.peek_disks(into)
    }

    /// Adds every marked page of the disks.
    pub(super) fn peek_disks(&self, into: &mut PageSet) -> Result<(), MigrateError> {
        for (region, disk) in (self.ram.len()..).zip(&self.disks) {
            into.insert_bitmap(region, &disk.port.marked())?;
        }
        Ok(())
    }

    /// Every page of the disks that may hold data; all others are zero.
    pub(super) fn disk_pages(&self) -> Result<PageSet, MigrateError> {
        let mut pages = self.none()?;
        for disk in &self.disks {
            let ranges = disk.port.allocated().map_err(|source| MigrateError::Machine {
                call: "allocated",
                source,
            })?;
            for (offset, len) in ranges {
                pages.insert_range(MemoryRange {
                    gpa: disk.region.gpa.saturating_add(offset),
                    len,
                })?;
            }
        }
        Ok(pages)
    }

    /// Clears the marks of a chunk's pages. Comes before any of them is read, so that a later write marks its page
    /// again.
    pub(super) fn clear(&self, chunk: &Chunk) -> Result<(), MigrateError> {
        match self.disk(chunk.region) {
            Some(disk) => {
                disk.port.clear(chunk.first, &chunk.words);
                Ok(())
            }
            None => self.clear_ram(chunk.region, chunk.first, &chunk.words),
        }
    }

    /// Clears the marks of all these pages of RAM, in pieces.
    pub(super) fn clear_all(&self, pages: &PageSet) -> Result<(), MigrateError> {
        for (region, from, words) in pages.filled() {
            for (first, words) in (from as u64 * 64..)
                .step_by(CLEARED * 64)
                .zip(words.chunks(CLEARED))
            {
                if words.iter().any(|word| *word != 0) {
                    self.clear_ram(region, first, words)?;
                }
            }
        }
        Ok(())
    }

    /// Clears marks of RAM, see [`DirtyLog::clear`].
    fn clear_ram(&self, region: usize, first: u64, words: &[u64]) -> Result<(), MigrateError> {
        let cleared = self
            .log
            .get()
            .map_or(Ok(()), |log| log.clear(region, first, words));
        cleared.map_err(|source| MigrateError::Machine {
            call: "clear",
            source,
        })
    }

    /// A digest of RAM and disks, made by this many threads. Pages in `unused` were never sent and count as zero. An
    /// error of `check` ends it.
    pub(super) fn digest(
        &self,
        unused: &PageSet,
        threads: usize,
        check: impl Fn() -> Result<(), MigrateError> + Sync,
    ) -> Result<u128, MigrateError> {
        let read = |disk: &'_ DiskRegion| {
            let port = disk.port.clone();
            move |offset, into: &mut [u8]| port.read(offset, into).map_err(read_failed)
        };
        digest(
            self.memory,
            threads,
            |gpa| unused.contains(gpa),
            self.disks.iter().map(|disk| (disk.port.size(), read(disk))),
            check,
        )
    }

    /// Adds every marked page of RAM, to a set over RAM alone.
    pub(super) fn peek_ram(&self, into: &mut PageSet) -> Result<(), MigrateError> {
        let added = self.log.get().map_or(Ok(()), |log| log.peek(into));
        added.map_err(|source| MigrateError::Machine { call: "peek", source })
    }
}

/// The error for a disk of the machine that cannot be read.
pub(super) fn read_failed(source: PortError) -> MigrateError {
    MigrateError::Machine {
        call: "read of a disk",
        source,
    }
}
