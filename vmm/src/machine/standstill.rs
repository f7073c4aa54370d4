//! Pauses a machine for a snapshot, and builds one from a snapshot.

use std::time::{Duration, Instant, SystemTime};

use ::devices::GuestMemory;
use migration::PageSet;

use super::baseline::Tracking;
use super::devices::DRAIN_TIME;
use super::vmclock::Disruption;
use super::{Machine, MachineError, MigrationDestination, PageSource};
use crate::clock::ClockStart;
use crate::memory::{FaultHandler, MemoryError};
use crate::snapshot::{
    LiveCopy, Manifest, Prefetch, SavedMachine, Snapshot, SnapshotContent, SnapshotDraft, SnapshotId,
    SnapshotWatch,
};
use crate::vcpu::{Holder, park_deadline};

/// A machine whose guest is paused, with nothing in flight. The guest runs on when this is dropped.
pub struct Standstill<'a> {
    machine: &'a Machine,
    since: Instant,
    for_good: bool,
}

impl Machine {
    /// Pauses the guest until the returned value is dropped. An error if a disk of it would be gone with this process:
    /// a snapshot does not have the content of disks.
    pub fn stand_still(&self) -> Result<Standstill<'_>, MachineError> {
        self.devices.check_disks_kept(&[])?;
        // While the guest runs, so that little is left to be written back when it does not.
        self.devices.flush()?;
        // Made before the pause, so that a pause that fails is undone as well.
        let mut standstill = Standstill {
            machine: self,
            since: Instant::now(),
            for_good: false,
        };
        standstill.since = self.pause(Holder::Snapshot, park_deadline())?;
        self.devices.drain(Instant::now() + DRAIN_TIME)?;
        Ok(standstill)
    }
}

impl Machine {
    /// Makes ready for a snapshot of a guest that runs on meanwhile. Fails where its memory cannot be protected.
    pub fn prepare_live(&self) -> Result<LiveCopy, MachineError> {
        // What a balloon gives up is gone, though the snapshot would need it.
        if self.balloon().is_some() {
            return Err(MachineError::LiveBalloon);
        }
        if self.may_miss_pages() {
            return Err(MachineError::LivePages);
        }
        Ok(LiveCopy::prepare(&self.memory)?)
    }
}

impl MigrationDestination {
    /// Builds the snapshot's machine with that memory and its disks locked. The guest runs if it is to `resume`,
    /// whatever it did when the snapshot was made.
    pub fn restore_snapshot(
        mut self,
        snapshot: &Snapshot,
        memory: SnapshotMemory,
        clocks: SnapshotClocks,
        resume: bool,
    ) -> Result<Machine, MachineError> {
        let machine = match memory {
            SnapshotMemory::Mapped(memory) => {
                let machine = self.build(snapshot.machine(), memory, None)?;
                machine.based_on(snapshot.id());
                machine
            }
            SnapshotMemory::Read(memory) => self.build(snapshot.machine(), memory, None)?,
            SnapshotMemory::Handled(memory, handler) => Machine {
                page_source: Some(PageSource::Handler { _handler: handler }),
                ..self.build(snapshot.machine(), memory, None)?
            },
            SnapshotMemory::Prefetched(memory, prefetch) => Machine {
                page_source: Some(PageSource::Prefetch(prefetch)),
                ..self.build(snapshot.machine(), memory, None)?
            },
        };
        let pending = machine.restore(snapshot.state())?;
        let gate = machine.vcpus.gate();
        if resume {
            gate.open(Holder::User);
        } else {
            gate.close(Holder::User);
        }
        machine.devices.take_locks()?;
        machine.devices.invalidate()?;
        let now = Instant::now();
        let start = match clocks {
            // There is an instant for every age that a snapshot can tell.
            SnapshotClocks::Advance => ClockStart::StoppedAt(now.checked_sub(snapshot.age()).unwrap_or(now)),
            SnapshotClocks::Keep => ClockStart::Kept,
        };
        machine.renew_generation()?;
        machine.announce_disruption(Disruption::Cloned)?;
        machine.run_restored(&pending, start)?;
        Ok(machine)
    }
}

/// What the clocks of a machine make of the time that it lay in files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotClocks {
    /// They go on from where they stood: nothing jumps, and the wall clock is behind.
    Keep,
    /// They are moved on by it: the wall clock is right, and timers that were due fire.
    Advance,
}

/// A snapshot's memory, for a machine.
pub enum SnapshotMemory {
    /// The private mapping of its file.
    Mapped(GuestMemory),
    /// Memory that was read.
    Read(GuestMemory),
    /// Memory whose pages come from a page-fault handler.
    Handled(GuestMemory, FaultHandler),
    /// Memory that is read while the machine runs.
    Prefetched(GuestMemory, Prefetch),
}

impl<'a> Standstill<'a> {
    /// What it is, for a snapshot named `id`: all of it, or the difference to the last one.
    pub fn write(
        &self,
        draft: &mut SnapshotDraft,
        id: SnapshotId,
        difference: bool,
        watch: &SnapshotWatch,
    ) -> Result<Manifest, MachineError> {
        let machine = self.machine;
        let (pages, base) = if difference {
            let (base, written) = machine.written()?;
            (written, Some(base))
        } else {
            let mut populated = PageSet::of(&machine.memory).map_err(MemoryError::from)?;
            machine.populated(&mut populated)?;
            (populated, None)
        };
        let content = SnapshotContent {
            id,
            machine: machine.describe(),
            state: &machine.save(self.since)?,
            memory: &machine.memory,
            pages: &pages,
            base,
            stopped: SystemTime::now() - self.elapsed(),
        };
        Ok(draft.write(content, watch)?)
    }

    /// Saves the state, and protects the memory: from here on `copy` holds what is in it now.
    pub fn protect(&self, copy: &LiveCopy) -> Result<SavedMachine, MachineError> {
        let saved = SavedMachine {
            description: self.machine.describe(),
            state: self.machine.save(self.since)?,
            stopped: SystemTime::now() - self.elapsed(),
        };
        copy.protect()?;
        Ok(saved)
    }

    /// Tracks from here on what is written after the snapshot `id`; see [`Machine::track`].
    pub fn track(&self, id: &SnapshotId) -> Result<Tracking<'a>, MachineError> {
        self.machine.track(id)
    }

    /// How long the guest has been paused.
    pub fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }

    /// Keeps the guest paused for good.
    pub fn keep(mut self) {
        self.for_good = true;
    }
}

impl Drop for Standstill<'_> {
    fn drop(&mut self) {
        if !self.for_good {
            self.machine.resume_devices();
            self.machine.resume(Holder::Snapshot);
        }
    }
}
