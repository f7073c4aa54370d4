//! The switch: pauses the guest and sends what is left, first pages, then the state. Does not send "go": everything
//! here can still be undone.

use std::time::{Duration, Instant};

use migration_io::GuestMemory;

use super::crew::Crew;
use super::handshake::{Agreed, unexpected};
use super::observe::SWITCH_ROUND_TRIPS;
use super::precopy::{Left, await_ack, finish_round};
use super::space::Space;
use super::{MigrateError, SourceJob, check_interruption};
use crate::control::Phase;
use crate::converge::{Costs, Interval};
use crate::digest::digest;
use crate::link::Link;
use crate::options::{MAX_PAUSE, OnMiss};
use crate::protocol::Message;
use crate::report::{MemoryDigest, ms};

/// Called now and then in a long step, by all threads that share it; its error ends the step.
type StepCheck<'a> = dyn Fn() -> Result<(), MigrateError> + Sync + 'a;

/// The slowest digest that is waited for, in bytes per second.
const SLOWEST_DIGEST: f64 = 100e6;

/// A machine that is paused at the source and was sent completely.
pub(super) struct Stopped {
    /// When the first vCPU was asked to leave.
    pub(super) paused_at: Instant,
    /// When the kernel had accepted everything.
    pub(super) sent_at: Instant,
    /// Time spent on digests since the pause.
    pub(super) verifying: Duration,
}

impl SourceJob<'_> {
    /// Pauses the guest and sends what is left: pages, then state.
    pub(super) fn stop_and_copy(
        &mut self,
        link: &mut Link<'_>,
        crew: &Crew<'_>,
        left: Left,
    ) -> Result<Stopped, MigrateError> {
        link.check("nothing before the pause")?;
        crew.pacer.set(self.options.final_bandwidth, Instant::now());
        let (paused_at, mut lap, state) = self.stop()?;
        let Left {
            mut pages,
            mut unused,
        } = left;
        crew.space.peek(&mut pages)?;
        unused.subtract(&pages);
        self.report.downtime.final_log_ms = lap.ms();
        let last = if pages.is_empty() {
            None
        } else {
            Some(self.send_unobserved(link, crew, pages)?)
        };
        let mut verifying = Duration::ZERO;
        if self.options.verify {
            if let Some(last) = last {
                finish_round(link, crew, last)?;
            }
            self.report.downtime.final_copy_ms = lap.ms();
            let threads = self.report.streams as usize;
            verifying = self.verify(link, paused_at, |check| {
                crew.space.digest(&unused, threads, check)
            })?;
            lap = Lap(Instant::now());
            self.offer(link, &state)?;
        } else if let Some(last) = last {
            // The state is sent before the ack has come: the destination keeps it until the round is complete.
            link.send(&Message::RoundEnd(last))?;
            let copied = lap.ms();
            self.offer(link, &state)?;
            self.report.downtime.state_ms += lap.ms();
            await_ack(link, crew, last)?;
            self.report.downtime.final_copy_ms = copied + lap.ms();
        } else {
            self.offer(link, &state)?;
        }
        self.report.downtime.state_ms += lap.ms();
        // Done while the destination restores, so it costs no downtime. Nothing writes memory since the state was
        // saved, so a check right before "go" would not find more.
        check_nothing_dirty(&crew.space)?;
        Ok(Stopped {
            paused_at,
            sent_at: lap.0,
            verifying,
        })
    }

    /// Hands the machine over to a destination that has mapped its memory.
    pub(super) fn hand_over(
        &mut self,
        link: &mut Link<'_>,
        memory: &GuestMemory,
        agreed: &Agreed,
    ) -> Result<(), MigrateError> {
        // There is no log to look at.
        let assumed = Costs {
            final_log: Duration::ZERO,
            round_trip: agreed.round_trip.mul_f64(SWITCH_ROUND_TRIPS),
            ..Costs::default()
        };
        let rehearsed = self.rehearse_several(link, assumed)?;
        let predicted = rehearsed.iter().map(Costs::total).min().unwrap_or_default();
        let interval = Interval::of_costs(predicted);
        let elapsed = self.started.elapsed();
        self.report.predicted_downtime_ms = Some(ms(predicted));
        self.report.predicted_downtime_interval_ms = Some(interval.into());
        self.report.predicted_total_ms = Some(ms(elapsed + predicted));
        self.report.predicted_total_interval_ms = Some(interval.after(elapsed).into());
        let budget = self.options.max_downtime;
        if interval.high > budget && self.options.on_miss == OnMiss::Fail {
            let predicted = interval.high;
            return Err(MigrateError::OverBudget { predicted, budget });
        }
        link.check("nothing before the pause")?;
        let (paused_at, mut lap, state) = self.stop()?;
        let mut verifying = Duration::ZERO;
        if self.options.verify {
            verifying = self.verify(link, paused_at, |check| digest_of_ram(memory, check))?;
            lap = Lap(Instant::now());
        }
        self.offer(link, &state)?;
        self.report.downtime.state_ms += lap.ms();
        let stopped = Stopped {
            paused_at,
            sent_at: lap.0,
            verifying,
        };
        self.commit(link, stopped, agreed.round_trip)
    }

    /// Pauses the vCPUs, drains the devices and saves the state. Afterwards nothing writes guest memory any more.
    fn stop(&mut self) -> Result<(Instant, Lap, Vec<u8>), MigrateError> {
        self.control
            .sample(|progress| progress.phase = Phase::StopAndCopy);
        let (now, limit) = (Instant::now(), self.options.pause_limit());
        self.control.limit_pause(now, limit);
        // A limit beyond the clock's end is as good as the longest pause.
        let until = now.checked_add(limit).unwrap_or(now + MAX_PAUSE);
        self.standing.claim.pause();
        let paused = self.call("pause", |source| source.pause(until));
        // If the migration was cancelled or ran out of time, that is the cause of the step's own error.
        check_interruption(self.control)?;
        let paused_at = paused?;
        let mut lap = Lap(paused_at);
        self.report.downtime.pause_ms = lap.ms();
        let drained = self.call("drain", |source| source.drain(until));
        check_interruption(self.control)?;
        drained?;
        self.report.downtime.drain_ms = lap.ms();
        let state = self.call("save", |source| source.save())?;
        self.report.downtime.state_ms = lap.ms();
        check_interruption(self.control)?;
        Ok((paused_at, lap, state))
    }

    /// Sends the state. From here on the destination may be ready.
    fn offer(&mut self, link: &mut Link<'_>, state: &[u8]) -> Result<(), MigrateError> {
        self.standing.claim.offer();
        Ok(link.send_state(state)?)
    }

    /// Compares digests of all memory, and of disks that come along. Returns how long that took, which does not count
    /// against the pause that began at `paused_at`: it has a limit of its own.
    fn verify(
        &mut self,
        link: &mut Link<'_>,
        paused_at: Instant,
        digest: impl FnOnce(&StepCheck<'_>) -> Result<u128, MigrateError>,
    ) -> Result<Duration, MigrateError> {
        let began = Instant::now();
        self.control.limit_pause(began, self.verify_limit());
        link.send(&Message::DigestRequest)?;
        let control = self.control;
        let ours = digest(&|| check_interruption(control))?;
        let theirs = match link.receive_message("digest")? {
            Message::Digest(digest) => digest,
            other => return Err(unexpected("digest", &other)),
        };
        let elapsed = began.elapsed();
        self.control
            .limit_pause(paused_at + elapsed, self.options.pause_limit());
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
}

impl SourceJob<'_> {
    /// How long `--verify` may take: a step, and time to read everything on both sides.
    fn verify_limit(&self) -> Duration {
        let machine = self.source.describe();
        let memory: u64 = machine.memory.iter().map(|region| region.len).sum();
        let disks: u64 = machine.devices.iter().map(|device| device.backend_size).sum();
        let read = Duration::from_secs_f64(memory.saturating_add(disks) as f64 / SLOWEST_DIGEST);
        self.options.step_timeout.saturating_add(read)
    }
}

/// The type of a function that reads a disk, for a list of disks that is empty.
type NoDisk = fn(u64, &mut [u8]) -> Result<(), MigrateError>;

/// A digest of memory that both sides have mapped. This thread makes it alone, as there are no streams.
fn digest_of_ram(memory: &GuestMemory, check: &StepCheck<'_>) -> Result<u128, MigrateError> {
    let no_disks: [(u64, NoDisk); 0] = [];
    digest(memory, 1, |_| false, no_disks, check)
}

/// An error if a page is still marked: everything that was written must have been sent.
fn check_nothing_dirty(space: &Space<'_>) -> Result<(), MigrateError> {
    let mut dirty = space.none()?;
    space.peek(&mut dirty)?;
    if dirty.is_empty() {
        Ok(())
    } else {
        Err(MigrateError::DirtyAtCommit { pages: dirty.len() })
    }
}

/// Times one step after another without a gap.
pub(super) struct Lap(Instant);

impl Lap {
    fn ms(&mut self) -> f64 {
        let before = std::mem::replace(&mut self.0, Instant::now());
        ms(self.0.duration_since(before))
    }
}
