//! The machine as the migration engine's source: implements the engine's port on top of `Machine`.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::GuestMemory;
use devices::virtio::block::{BlockBackend, BlockLog};
use migration::{
    DirtyLog, DiskMark, MachineDescription, MemoryRange, PAGE_SIZE, PageSet, PortError, Rehearsal, Source,
    SourceDisk, VcpuTime,
};

use super::Machine;
use super::devices::DRAIN_TIME;
use crate::memory;
use crate::vcpu::Holder;

/// A machine that is lent to a migration job.
pub struct MigrationSource {
    machine: Arc<Machine>,
    /// Devices whose disks come along; the destination opens all others where they are.
    mirrored: Vec<u32>,
    paused_at: Option<Instant>,
}

impl MigrationSource {
    /// The supervisor keeps its own handle and refuses what conflicts meanwhile.
    pub fn new(machine: Arc<Machine>) -> Self {
        Self {
            machine,
            mirrored: Vec::new(),
            paused_at: None,
        }
    }
}

/// The guest is not asked for its unused pages if there can be only fewer bytes of them than this: its report takes
/// time.
const FEW_UNUSED: u64 = 32 << 20;
/// Nor if they can be only less than this part (one in so many) of all populated pages.
const FEW_UNUSED_PART: u64 = 8;

/// A disk whose content comes along.
struct MirroredDisk {
    backend: Arc<BlockBackend>,
    /// The size that was described to the destination. A disk that is resized later does not fit what it has made.
    size: u64,
    log: Arc<BlockLog>,
}

impl SourceDisk for MirroredDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn allocated(&self) -> Result<Vec<(u64, u64)>, PortError> {
        Ok(self.backend.allocated()?)
    }

    fn marked(&self) -> Vec<u64> {
        self.log.marked()
    }

    fn clear(&self, first: u64, words: &[u64]) {
        self.log.clear(first, words);
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), PortError> {
        Ok(self.backend.read_at(offset, into)?)
    }
}

impl Source for MigrationSource {
    fn describe(&self) -> MachineDescription {
        self.machine.describe()
    }

    fn mark_disks(&mut self, come: bool) -> Result<Vec<DiskMark>, PortError> {
        if !come {
            self.machine.devices.check_disks_kept(&[])?;
        }
        let disks = (0..).zip(&self.machine.devices.virtio);
        let disks = disks.filter_map(|(device, slot)| Some((device, slot.disk.as_ref()?.backend())));
        disks
            .map(|(device, backend)| {
                let offset = backend.mark()?;
                Ok(DiskMark { device, offset })
            })
            .collect()
    }

    fn memory(&self) -> GuestMemory {
        self.machine.memory.clone()
    }

    fn populated(&self, into: &mut PageSet) -> Result<(), PortError> {
        Ok(self.machine.populated(into)?)
    }

    fn has_unused(&mut self, populated: u64, at_most: Duration) -> Result<bool, PortError> {
        let Some(balloon) = self.machine.balloon().filter(|balloon| balloon.can_hint()) else {
            return Ok(false);
        };
        if self.machine.is_held_by(Holder::User) {
            return Ok(false);
        }
        // A guest that fills free pages with zeroes when it takes them populates what it reports. So it is asked only
        // where most of what is free is populated anyway.
        let free = balloon
            .new_statistics(at_most)
            .and_then(|statistics| statistics.free_memory);
        let populated = populated * PAGE_SIZE;
        let used = self.machine.memory_size().saturating_sub(free.unwrap_or(0));
        Ok(populated.saturating_sub(used) >= FEW_UNUSED.max(populated / FEW_UNUSED_PART))
    }

    fn unused(&mut self, at_most: Duration, into: &mut PageSet) -> Result<(), PortError> {
        let balloon = self
            .machine
            .balloon()
            .ok_or("unused: expected a balloon, got none")?;
        for (gpa, len) in balloon.hints(at_most) {
            // The guest's report is untrusted: what lies outside memory is ignored.
            let _ = into.insert_range(MemoryRange { gpa, len });
        }
        Ok(())
    }

    fn memory_files(&self) -> Option<Vec<OwnedFd>> {
        memory::files(&self.machine.memory).unwrap_or_else(|error| {
            // Without them its pages are copied.
            tracing::warn!(%error, "the files behind guest memory cannot be handed over");
            None
        })
    }

    fn mirror(&mut self, devices: &[u32]) -> Result<Vec<Arc<dyn SourceDisk>>, PortError> {
        let disk = |device: &u32| -> Result<Arc<dyn SourceDisk>, PortError> {
            let slot = self.machine.devices.virtio.get(*device as usize);
            let disk = slot.and_then(|slot| slot.disk.as_ref());
            let disk = disk.ok_or_else(|| format!("device {device}: expected a disk, got something else"))?;
            let backend = disk.backend().clone();
            Ok(Arc::new(MirroredDisk {
                size: backend.size(),
                log: backend.start_log(),
                backend,
            }))
        };
        self.mirrored = devices.to_vec();
        // Before anything is sent.
        self.machine.devices.check_disks_kept(devices)?;
        devices.iter().map(disk).collect()
    }

    fn stop_mirror(&mut self) -> Result<(), PortError> {
        let disks = self
            .machine
            .devices
            .virtio
            .iter()
            .filter_map(|slot| slot.disk.as_ref());
        disks.for_each(|disk| disk.backend().stop_log());
        Ok(())
    }

    fn start_dirty_log(&mut self) -> Result<Arc<dyn DirtyLog>, PortError> {
        // Before anything is sent.
        self.machine.devices.check_disks_kept(&self.mirrored)?;
        self.machine.release_log()?;
        Ok(self.machine.turn_dirty_log_on()?)
    }

    fn stop_dirty_log(&mut self) -> Result<(), PortError> {
        Ok(self.machine.turn_dirty_log_off()?)
    }

    fn vcpu_times(&self) -> Vec<VcpuTime> {
        self.machine.vcpus.times()
    }

    fn throttle(&mut self, shares: &[f64]) -> Result<(), PortError> {
        Ok(self.machine.throttle(shares)?)
    }

    fn flush(&mut self) -> Result<(), PortError> {
        Ok(self.machine.devices.flush()?)
    }

    fn rehearse(&mut self) -> Result<Rehearsal, PortError> {
        // A handover has no dirty log.
        self.machine.devices.check_disks_kept(&self.mirrored)?;
        Ok(self.machine.rehearse_save()?)
    }

    fn pause(&mut self, until: Instant) -> Result<Instant, PortError> {
        let paused_at = self.machine.pause(Holder::Migration, until)?;
        self.paused_at = Some(paused_at);
        Ok(paused_at)
    }

    fn drain(&mut self, until: Instant) -> Result<(), PortError> {
        Ok(self
            .machine
            .devices
            .drain(until.min(Instant::now() + DRAIN_TIME))?)
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
        Ok(self.machine.resume_after_migration()?)
    }
}
