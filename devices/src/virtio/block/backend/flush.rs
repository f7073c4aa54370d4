//! How what was written gets into the disk's file, and onto its disk.

use std::sync::atomic::Ordering;

use super::super::error::BlockBackendError;
use super::BlockBackend;

impl BlockBackend {
    /// The one place where every change of the disk passes: each write, discard and zeroing by whichever engine, in
    /// bytes of the disk, after it was done or failed half-way, and before the guest hears of it.
    pub(in super::super) fn modified(&self, offset: u64, len: u64) {
        self.logging.written(offset, len);
        self.modified.fetch_add(1, Ordering::SeqCst);
    }

    /// What is to be told to [`BlockBackend::flushed`] when a flush that begins now is done; `None` if there is nothing to
    /// flush.
    pub(in super::super) fn unflushed_generation(&self) -> Option<u64> {
        let modified = self.modified.load(Ordering::SeqCst);
        (self.flushed.load(Ordering::SeqCst) < modified).then_some(modified)
    }

    /// A flush is done.
    pub(in super::super) fn flushed(&self, generation: u64) {
        self.flushed.fetch_max(generation, Ordering::SeqCst);
    }

    /// Makes what was written durable.
    pub fn flush(&self) -> Result<(), BlockBackendError> {
        if let Some(generation) = self.unflushed_generation() {
            self.write_out()?;
            let done = match &self.qcow2 {
                Some(image) => image.sync(),
                None => self.file.sync_data(),
            };
            done.map_err(self.failed("write it back"))
                .inspect_err(|_| self.record_flush_failure())?;
            self.flushed(generation);
        }
        Ok(())
    }

    /// A flush has failed: some of what was written may be lost. The kernel says that once for each open file.
    pub(in super::super) fn record_flush_failure(&self) {
        self.lost.store(true, Ordering::SeqCst);
    }

    /// Whether there was such a flush, which the guest is told now.
    pub(in super::super) fn take_flush_failure(&self) -> bool {
        self.lost.swap(false, Ordering::SeqCst)
    }

    /// Whether everything that was written is durable.
    pub(in super::super) fn is_durable(&self) -> bool {
        self.unflushed_generation().is_none() && !self.lost.load(Ordering::SeqCst)
    }

    /// Whether some of what was written is in this process alone: where an image has its data, say.
    pub(in super::super) fn needs_write_out(&self) -> bool {
        self.qcow2.is_some() && self.written_out.load(Ordering::SeqCst) < self.modified.load(Ordering::SeqCst)
    }

    /// Puts everything that was written into the disk's file, where it outlives this process, though not yet the host.
    pub fn write_out(&self) -> Result<(), BlockBackendError> {
        let modified = self.modified.load(Ordering::SeqCst);
        if let Some(image) = self.qcow2.as_ref().filter(|_| self.needs_write_out()) {
            image.write_out().map_err(self.failed("write to it"))?;
            self.written_out.fetch_max(modified, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Does that for the last time: whoever writes after it waits for the process to end. For a disk whose threads
    /// nobody may wait for.
    pub fn close(&self) -> Result<(), BlockBackendError> {
        match &self.qcow2 {
            Some(image) if !self.read_only => image.close().map_err(self.failed("write to it")),
            _ => Ok(()),
        }
    }
}
