//! How writes get into the disk's file, and become durable.

use std::sync::atomic::Ordering;

use super::super::error::BlockBackendError;
use super::BlockBackend;

impl BlockBackend {
    /// Records a change of the disk. Every write, discard and zeroing by any engine passes here, after it was done or
    /// has failed half-way, and before the guest gets the answer.
    pub(in super::super) fn modified(&self, offset: u64, len: u64) {
        self.block_log.written(offset, len);
        self.modified.fetch_add(1, Ordering::SeqCst);
    }

    /// The generation to pass to [`BlockBackend::flushed`] when a flush that begins now is done; `None` if there is
    /// nothing to flush.
    pub(in super::super) fn unflushed_generation(&self) -> Option<u64> {
        let modified = self.modified.load(Ordering::SeqCst);
        (self.flushed.load(Ordering::SeqCst) < modified).then_some(modified)
    }

    /// Records that a flush is done.
    pub(in super::super) fn flushed(&self, generation: u64) {
        self.flushed.fetch_max(generation, Ordering::SeqCst);
    }

    /// Makes all writes durable.
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

    /// Records that a flush has failed, so that writes may be lost. The kernel reports that only once for each open file.
    pub(in super::super) fn record_flush_failure(&self) {
        self.flush_failed.store(true, Ordering::SeqCst);
    }

    /// Whether a flush has failed of which the guest does not know; the caller reports it to the guest now.
    pub(in super::super) fn take_flush_failure(&self) -> bool {
        self.flush_failed.swap(false, Ordering::SeqCst)
    }

    /// Whether all writes are durable.
    pub(in super::super) fn is_durable(&self) -> bool {
        self.unflushed_generation().is_none() && !self.flush_failed.load(Ordering::SeqCst)
    }

    /// Whether some changes are in this process's memory only, which are an image's metadata.
    pub(in super::super) fn needs_write_out(&self) -> bool {
        self.qcow2.is_some() && self.written_out.load(Ordering::SeqCst) < self.modified.load(Ordering::SeqCst)
    }

    /// Writes everything to the disk's file, where it survives this process, though not yet a crash of the host.
    pub fn write_out(&self) -> Result<(), BlockBackendError> {
        let modified = self.modified.load(Ordering::SeqCst);
        if let Some(image) = self.qcow2.as_ref().filter(|_| self.needs_write_out()) {
            image.write_out().map_err(self.failed("write to it"))?;
            self.written_out.fetch_max(modified, Ordering::SeqCst);
        }
        Ok(())
    }

    /// As [`BlockBackend::write_out`], for the last time: a thread that writes afterwards blocks until the process
    /// ends. For the end of a process that cannot wait for the disk's threads.
    pub fn close(&self) -> Result<(), BlockBackendError> {
        match &self.qcow2 {
            Some(image) if !self.read_only => image.close().map_err(self.failed("write to it")),
            _ => Ok(()),
        }
    }
}
