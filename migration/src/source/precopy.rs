use std::time::{Duration, Instant};

use migration_io::{GuestMemory, PAGE_SIZE};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::handshake::unexpected;
use super::pages::send_pages;
use super::{Job, MigrateError};
use crate::control::Phase;
use crate::converge::{Bandwidth, FixedCosts, Policy, Verdict, time_left};
use crate::link::{KeepAlive, Link};
use crate::options::MigrateOptions;
use crate::page_set::PageSet;
use crate::protocol::Message;
use crate::report::{Round, ms};

/// Where pre-copy left off.
pub(super) struct Copied {
    /// Pages that the destination does not have, or not as they are now.
    pub(super) dirty: PageSet,
    /// Rounds that were sent.
    pub(super) rounds: u32,
}

/// What the rounds teach about the machine and the connection.
struct Model {
    bandwidth: Bandwidth,
    costs: FixedCosts,
    round_trip: Duration,
    dirty_rate: f64,
    harvested_at: Instant,
}

impl Job<'_> {
    /// Copies memory, round after round, until a pause is worth it.
    pub(super) fn precopy(
        &mut self,
        link: &mut Link<'_>,
        alive: &KeepAlive,
        memory: &GuestMemory,
        round_trip: Duration,
    ) -> Result<Copied, MigrateError> {
        let total_bytes = memory.iter().map(|region| region.len()).sum();
        self.control.update(|progress| {
            progress.phase = Phase::Precopy;
            progress.total_bytes = total_bytes;
        });
        let mut dirty = PageSet::of(memory)?;
        self.standing.logging = true;
        let log = self.call(alive, "start_dirty_log", |source| source.start_dirty_log())?;
        self.log = Some(log);
        // Every attempt starts with all pages and a new log, so an attempt that fails has nothing to put back
        // of what it harvested.
        dirty.insert_all();
        let mut model = Model {
            bandwidth: Bandwidth::new(),
            costs: FixedCosts::default(),
            round_trip,
            dirty_rate: 0.0,
            harvested_at: Instant::now(),
        };
        let MigrateOptions {
            max_downtime,
            on_miss,
            max_rounds,
            ..
        } = *self.options;
        let mut policy = Policy::new(max_downtime, on_miss, max_rounds);
        let mut n = 0;
        loop {
            n += 1;
            self.round(link, alive, memory, n, &mut dirty, &mut model)?;
            let mut predicted = self.predict(&dirty, &model);
            if n == 1 {
                self.predict_total(&dirty, &model, predicted);
            }
            let mut verdict = policy.judge(n, predicted);
            if verdict == Verdict::Switch {
                self.flush(alive, &mut model)?;
                self.harvest(alive, &mut dirty, &mut model)?;
                predicted = self.predict(&dirty, &model);
                // What a slow flush costs, or what was written meanwhile, may ask for one more round.
                verdict = policy.judge(n, predicted);
            }
            match verdict {
                Verdict::Continue => {}
                Verdict::Switch => return Ok(Copied { dirty, rounds: n }),
                Verdict::GiveUp => return Err(self.missed(n, predicted, &dirty, &model)),
            }
        }
    }

    /// Flushes disks while that costs the guest nothing, and learns what the drain will cost: a flush that
    /// follows another one has only the last moment's writes left, as the drain has.
    fn flush(&mut self, alive: &KeepAlive, model: &mut Model) -> Result<(), MigrateError> {
        self.call(alive, "flush", |source| source.flush())?;
        let began = Instant::now();
        self.call(alive, "flush", |source| source.flush())?;
        model.costs.drain = FixedCosts::default().drain.max(began.elapsed());
        Ok(())
    }

    /// Sends the dirty pages and harvests those that were written meanwhile.
    fn round(
        &mut self,
        link: &mut Link<'_>,
        alive: &KeepAlive,
        memory: &GuestMemory,
        n: u32,
        dirty: &mut PageSet,
        model: &mut Model,
    ) -> Result<(), MigrateError> {
        let (began, sent_before) = (Instant::now(), link.bytes_sent());
        self.control.update(|progress| progress.round = n);
        let sent = self.send_set(link, memory, &dirty.take())?;
        finish_round(link, n)?;
        let elapsed = began.elapsed();
        let bytes = link.bytes_sent() - sent_before;
        model.bandwidth.sample(bytes, elapsed);
        let harvested_at = Instant::now();
        self.harvest(alive, dirty, model)?;
        let span = harvested_at
            .duration_since(model.harvested_at)
            .as_secs_f64()
            .max(1e-6);
        model.dirty_rate = (dirty.len() * PAGE_SIZE) as f64 / span;
        model.harvested_at = harvested_at;
        let round = Round {
            n,
            pages: sent,
            bytes,
            ms: ms(elapsed),
            dirty_bytes_per_s: model.dirty_rate,
            bandwidth_bytes_per_s: bytes as f64 / elapsed.as_secs_f64(),
            throttle_percent: 0.0,
        };
        tracing::debug!(?round, "round");
        self.report.rounds.push(round);
        Ok(())
    }

    /// Sends pages and counts them in the report. Returns how many.
    pub(super) fn send_set(
        &mut self,
        link: &mut Link<'_>,
        memory: &GuestMemory,
        pages: &PageSet,
    ) -> Result<u64, MigrateError> {
        let sent = send_pages(link, memory, pages, self.control)?;
        self.report.pages_sent += sent.data;
        self.report.pages_zero += sent.zero;
        Ok(sent.data + sent.zero)
    }

    fn harvest(
        &mut self,
        alive: &KeepAlive,
        dirty: &mut PageSet,
        model: &mut Model,
    ) -> Result<(), MigrateError> {
        let began = Instant::now();
        self.harvest_log(alive, dirty)?;
        model.costs.final_log = began.elapsed();
        Ok(())
    }

    /// The downtime if the guest were paused now.
    fn predict(&mut self, dirty: &PageSet, model: &Model) -> Duration {
        let bytes = dirty.len() * PAGE_SIZE;
        let predicted = model
            .costs
            .total(model.round_trip)
            .saturating_add(model.bandwidth.time_for(bytes));
        self.report.predicted_downtime_ms = Some(ms(predicted));

        self.control.update(|progress| {
            progress.remaining_bytes = bytes;
            progress.dirty_bytes_per_s = model.dirty_rate;
            progress.bandwidth_bytes_per_s = model.bandwidth.bytes_per_s();
            progress.predicted_downtime_ms = Some(ms(predicted));
        });
        predicted
    }

    fn predict_total(&mut self, dirty: &PageSet, model: &Model, downtime: Duration) {
        let left = time_left(dirty.len() * PAGE_SIZE, model.dirty_rate, &model.bandwidth);
        self.report.predicted_total_ms = left.map(|left| ms(self.started.elapsed() + left + downtime));
    }

    fn missed(&self, rounds: u32, predicted: Duration, dirty: &PageSet, model: &Model) -> MigrateError {
        MigrateError::BudgetMissed {
            predicted,
            budget: self.options.max_downtime,
            rounds,
            remaining: dirty.len() * PAGE_SIZE,
            dirty_rate: model.dirty_rate,
            bandwidth: model.bandwidth.bytes_per_s(),
        }
    }
}

/// Waits until everything that was sent is in the destination's memory.
pub(super) fn finish_round(link: &mut Link<'_>, n: u32) -> Result<(), MigrateError> {
    link.send(&Message::RoundEnd(n))?;
    match link.receive_message("round ack")? {
        Message::RoundAck(acknowledged) if acknowledged == n => Ok(()),
        other => Err(unexpected("the ack of this round", &other)),
    }
}
