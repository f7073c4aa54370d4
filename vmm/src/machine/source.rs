//! The machine as the migration engine's source.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use devices::GuestMemory;
use migration::{DirtyLog, MachineDescription, MachineError as PortError, PageSet, Rehearsal, Source};

use super::Machine;
use crate::memory;
use crate::vcpu::Holder;

/// A machine that is lent to a migration job.
pub struct MigrationSource {
    machine: Arc<Machine>,
    paused_at: Option<Instant>,
}

impl MigrationSource {
    /// The supervisor keeps its own handle and refuses what conflicts meanwhile.
    pub fn new(machine: Arc<Machine>) -> Self {
        Self {
            machine,
            paused_at: None,
        }
    }
}

impl Source for MigrationSource {
    fn describe(&self) -> MachineDescription {
        self.machine.describe()
    }

    fn memory(&self) -> GuestMemory {
        self.machine.memory.clone()
    }

    fn populated(&self, into: &mut PageSet) -> Result<(), PortError> {
        Ok(memory::populated(&self.machine.memory, into)?)
    }

    fn memory_files(&self) -> Option<Vec<OwnedFd>> {
        memory::files(&self.machine.memory).unwrap_or_else(|error| {
            // Without them its pages are copied.
            tracing::warn!(%error, "the files behind guest memory cannot be handed over");
            None
        })
    }

    fn start_dirty_log(&mut self) -> Result<Arc<dyn DirtyLog>, PortError> {
        self.machine.release_log()?;
        Ok(self.machine.turn_dirty_log_on()?)
    }

    fn stop_dirty_log(&mut self) -> Result<(), PortError> {
        Ok(self.machine.turn_dirty_log_off()?)
    }

    fn throttle(&mut self, shares: &[f64]) -> Result<(), PortError> {
        Ok(self.machine.throttle(shares)?)
    }

    fn flush(&mut self) -> Result<(), PortError> {
        Ok(self.machine.devices.flush()?)
    }

    fn rehearse(&mut self) -> Result<Rehearsal, PortError> {
        Ok(self.machine.rehearse_save()?)
    }

    fn pause(&mut self) -> Result<Instant, PortError> {
        let paused_at = self.machine.pause(Holder::Migration)?;
        self.paused_at = Some(paused_at);
        Ok(paused_at)
    }

    fn drain(&mut self) -> Result<(), PortError> {
        Ok(self.machine.devices.drain()?)
    }

    fn save(&mut self) -> Result<Vec<u8>, PortError> {
        let paused_at = self
            .paused_at
            .ok_or("save: expected a paused machine, got a running one")?;
        Ok(self.machine.save(paused_at)?)
    }

    fn release(&mut self) -> Result<(), PortError> {
        Ok(self.machine.devices.release_locks()?)
    }

    fn resume(&mut self) -> Result<(), PortError> {
        self.paused_at = None;
        Ok(self.machine.take_back()?)
    }
}
