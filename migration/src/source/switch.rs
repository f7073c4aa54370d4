use std::time::{Duration, Instant};

use migration_io::{GuestMemory, digest};

use super::handshake::unexpected;
use super::precopy::{Copied, finish_round};
use super::{Job, MigrateError};
use crate::control::Phase;
use crate::link::{KeepAlive, Link};
use crate::page_set::PageSet;
use crate::ports::{MachineError, Source};
use crate::protocol::Message;
use crate::report::{MemoryDigest, ms};

/// A machine that is paused here and complete there.
pub(super) struct Stopped {
    /// When the first vCPU was asked to leave.
    pub(super) paused_at: Instant,
    /// When the last byte of state was handed to the system.
    pub(super) state_sent_at: Instant,
    /// Time spent on digests since the pause.
    pub(super) verifying: Duration,
    /// An empty set over the machine's memory.
    pub(super) dirty: PageSet,
}

impl Job<'_> {
    /// Pauses the guest and sends what is left: pages, then state.
    pub(super) fn stop_and_copy(
        &mut self,
        link: &mut Link<'_>,
        alive: &KeepAlive,
        memory: &GuestMemory,
        copied: Copied,
    ) -> Result<Stopped, MigrateError> {
        let Copied { mut dirty, rounds } = copied;
        link.check("nothing before the pause")?;
        self.control
            .update(|progress| progress.phase = Phase::StopAndCopy);
        self.standing.paused = true;
        let paused_at = self.call(alive, "pause", |source| source.pause())?;
        let mut lap = Lap(paused_at);
        self.report.downtime.pause_ms = lap.ms();
        self.call(alive, "drain", |source| source.drain())?;
        self.report.downtime.drain_ms = lap.ms();
        self.harvest_log(alive, &mut dirty)?;
        self.report.downtime.final_log_ms = lap.ms();
        self.send_set(link, memory, &dirty.take())?;
        finish_round(link, rounds + 1)?;
        self.report.downtime.final_copy_ms = lap.ms();

        let state = self.call(alive, "save", |source| source.save())?;
        // Saving may write guest memory of its own (a clock's page, a queue's index).
        self.harvest_log(alive, &mut dirty)?;
        if !dirty.is_empty() {
            self.send_set(link, memory, &dirty.take())?;
        }
        let verifying = if self.options.verify {
            self.verify(link, alive, memory)?
        } else {
            Duration::ZERO
        };
        link.send_state(&state)?;
        self.report.downtime.state_ms = lap.ms() - ms(verifying);
        Ok(Stopped {
            paused_at,
            state_sent_at: lap.0,
            verifying,
            dirty,
        })
    }

    /// Takes what is marked out of the log.
    pub(super) fn harvest_log(&mut self, alive: &KeepAlive, dirty: &mut PageSet) -> Result<(), MigrateError> {
        let failed = |source| MigrateError::Machine { call: "log", source };
        let Some(log) = self.log.clone() else { return Ok(()) };
        alive.during(|| log.peek(dirty)).map_err(failed)?;
        for (region, words) in dirty.words() {
            log.clear(region, 0, words).map_err(failed)?;
        }
        Ok(())
    }

    /// Compares digests of all memory. Returns how long that took.
    fn verify(
        &mut self,
        link: &mut Link<'_>,
        alive: &KeepAlive,
        memory: &GuestMemory,
    ) -> Result<Duration, MigrateError> {
        let began = Instant::now();
        link.send(&Message::DigestRequest)?;
        let ours = alive.during(|| digest(memory))?;
        let theirs = match link.receive_message("digest")? {
            Message::Digest(digest) => digest,
            other => return Err(unexpected("digest", &other)),
        };
        let elapsed = began.elapsed();
        self.report.verify_ms = ms(elapsed);
        self.report.memory_digest = Some(MemoryDigest {
            source: format!("{ours:032x}"),
            destination: format!("{theirs:032x}"),
        });
        if ours == theirs {
            Ok(elapsed)
        } else {
            Err(MigrateError::DigestDiffers {
                source_digest: ours,
                destination_digest: theirs,
            })
        }
    }

    /// Calls the machine, and keeps the connection alive while it is at work.
    pub(super) fn call<T>(
        &mut self,
        alive: &KeepAlive,
        call: &'static str,
        port: impl FnOnce(&mut dyn Source) -> Result<T, MachineError>,
    ) -> Result<T, MigrateError> {
        alive
            .during(|| port(self.source))
            .map_err(|source| MigrateError::Machine { call, source })
    }
}

/// Times one step after the other without a gap.
struct Lap(Instant);

impl Lap {
    fn ms(&mut self) -> f64 {
        let before = std::mem::replace(&mut self.0, Instant::now());
        ms(self.0.duration_since(before))
    }
}
