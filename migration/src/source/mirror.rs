//! Copies disks that come along before memory, because memory is dirtied faster.
//!
//! The guest runs meanwhile and is not slowed down; the convergence policy is not asked.

use std::sync::Arc;

use migration_io::PAGE_SIZE;

use super::crew::Crew;
use super::precopy::finish_round;
use super::{MigrateError, SourceJob};
use crate::control::Phase;
use crate::link::Link;
use crate::options::OnMiss;
use crate::ports::SourceDisk;
use crate::report::ms;

/// At this many bytes or fewer, the rest of the disks is left to the rounds that copy memory.
const LITTLE: u64 = 16 << 20;

impl SourceJob<'_> {
    /// Makes the machine mark what is written to the disks of these devices from here on.
    pub(super) fn start_mirror(&mut self, devices: &[u32]) -> Result<Vec<Arc<dyn SourceDisk>>, MigrateError> {
        if devices.is_empty() {
            return Ok(Vec::new());
        }
        self.standing.remains.mirroring = true;
        let disks = self.call("mirror", |source| source.mirror(devices))?;
        // A disk's size decides where the next disk's pages begin, so both sides must agree on it.
        let described = self.source.describe().devices;
        let expected: Vec<u64> = devices
            .iter()
            .filter_map(|device| described.get(*device as usize))
            .map(|device| device.backend_size)
            .collect();
        let got: Vec<u64> = disks.iter().map(|disk| disk.size()).collect();
        if got != expected {
            return Err(MigrateError::Disks {
                expected: format!("{expected:?} bytes"),
                got: format!("{got:?} bytes"),
            });
        }
        self.report.disks = u32::try_from(disks.len()).unwrap_or(u32::MAX);
        Ok(disks)
    }

    /// Copies the disks, pass after pass, until little is left or a pass no longer halves it. What the guest writes to
    /// them from then on is sent with the dirty pages of memory.
    pub(super) fn mirror(&mut self, link: &mut Link<'_>, crew: &Crew<'_>) -> Result<(), MigrateError> {
        if !crew.space.has_disks() {
            return Ok(());
        }
        let began = self.started.elapsed();
        let mut pages = crew.space.disk_pages()?;
        let total_bytes = pages.pages_in_all() * PAGE_SIZE;
        self.control.update(|progress| {
            progress.phase = Phase::Mirror;
            progress.total_bytes = total_bytes;
        });
        loop {
            let before = pages.len();
            let pass = self.send_watched(link, crew, pages, |job| {
                job.check_deadline()?;
                job.control.sample(|progress| {
                    progress.remaining_bytes = crew.unsent_bytes().0;
                    progress.bytes_sent = crew.counts.wire();
                });
                Ok(())
            })?;
            finish_round(link, crew, pass)?;
            pages = crew.space.none()?;
            crew.space.peek_disks(&mut pages)?;
            let left = pages.len();
            if left * PAGE_SIZE <= LITTLE || left > before / 2 {
                break;
            }
        }
        self.report.mirror_ms = ms(self.started.elapsed() - began);
        Ok(())
    }

    /// The deadline is missed if it passes during the copy of the disks. A caller that wants the move all the same
    /// (`OnMiss::Switch`) gets it once the disks are copied.
    fn check_deadline(&self) -> Result<(), MigrateError> {
        match self.options.deadline {
            Some(deadline) if self.options.on_miss == OnMiss::Fail && self.started.elapsed() > deadline => {
                Err(MigrateError::DisksMissDeadline { deadline })
            }
            _ => Ok(()),
        }
    }
}
