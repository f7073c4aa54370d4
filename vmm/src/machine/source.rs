//! The machine as the migration engine's source.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

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
        into.insert_all();
        Ok(())
    }

    fn memory_files(&self) -> Option<Vec<OwnedFd>> {
        None
    }

    fn start_dirty_log(&mut self) -> Result<Arc<dyn DirtyLog>, PortError> {
        memory::forget_device_writes(&self.machine.memory);
        self.machine.set_dirty_log(true)?;
        Ok(Arc::new(Log {
            machine: self.machine.clone(),
            seen: Mutex::new(PageSet::of(&self.machine.memory)?),
        }))
    }

    fn stop_dirty_log(&mut self) -> Result<(), PortError> {
        Ok(self.machine.set_dirty_log(false)?)
    }

    fn throttle(&mut self, _shares: &[f64]) -> Result<(), PortError> {
        Err("throttle: not there yet".into())
    }

    fn rehearse(&mut self) -> Result<Rehearsal, PortError> {
        Ok(Rehearsal {
            pause: Duration::ZERO,
            save: Duration::ZERO,
            state: Vec::new(),
        })
    }

    fn flush(&mut self) -> Result<(), PortError> {
        Ok(self.machine.devices.flush()?)
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
        // The vCPUs are out, so this is the last word: the news of an end does not travel with the state, and
        // at the destination the guest would stand still for ever.
        if let Some(reason) = self.machine.devices.exit_reason() {
            return Err(format!("save: expected a guest that goes on, got its end: {reason:?}").into());
        }
        if self.machine.has_failed_vcpu() {
            return Err("save: expected vCPUs that go on, got one that failed".into());
        }
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

/// Temporary: KVM's log as a set of its own.
struct Log {
    machine: Arc<Machine>,
    seen: Mutex<PageSet>,
}

impl DirtyLog for Log {
    fn peek(&self, into: &mut PageSet) -> Result<(), PortError> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        self.machine.harvest(&mut seen)?;
        Ok(into.union(&seen)?)
    }

    fn clear(&self, region: usize, first: u64, words: &[u64]) -> Result<(), PortError> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut cleared = PageSet::of(&self.machine.memory)?;
        let mut bitmap = vec![0; first as usize / 64];
        bitmap.extend_from_slice(words);
        cleared.insert_bitmap(region, &bitmap)?;
        let before = seen.take();
        for range in before.ranges(4096) {
            if !cleared.contains(range.gpa) {
                seen.insert_range(range)?;
            }
        }
        Ok(())
    }

    fn by_vcpu(&self) -> Vec<u64> {
        Vec::new()
    }
}
