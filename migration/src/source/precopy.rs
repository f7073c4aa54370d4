//! Rounds of copying while the guest runs, until the policy says that the pause fits the budget, or that it never will.
//!
//! Nothing here pauses the guest, except that a rehearsal stops it for some milliseconds to measure the pause.

use std::num::NonZero;
use std::thread;
use std::time::{Duration, Instant};

use migration_io::PAGE_SIZE;

use super::crew::Crew;
use super::handshake::unexpected;
use super::hot::hot_pages;
use super::observe::{Observer, SWITCH_ROUND_TRIPS};
use super::pass::{Order, spans_in_order};
use super::spare::SpareStreams;
use super::{MigrateError, SourceJob};
use crate::control::Phase;
use crate::converge::{Advice, Course};
use crate::link::Link;
use crate::page_set::PageSet;
use crate::protocol::{MAX_SPANS, Message};

/// How often the connection is checked while a pass is sent without observing the guest.
const TICK: Duration = Duration::from_millis(10);

/// The fewest pages that are sent without the cap in order to measure the bandwidth.
const MIN_BURST_PAGES: u64 = 1024;
/// The most pages of a burst. Between the two limits a burst has what the cap lets through in [`BURST_TIME`]: in a
/// large one the time to wake the threads counts less.
const MAX_BURST_PAGES: u64 = 4096;
/// The time of pre-copy that a burst may cost, in seconds.
const BURST_TIME: f64 = 0.08;
/// The most bursts in a row: the first pages of memory may be zero, which says nothing about the bandwidth.
const BURSTS: u32 = 4;
/// Below this cap, in bytes per second, a burst would take the round too long to pay for.
const MIN_BURST_CAP: u64 = 20_000_000;
/// A burst that sent fewer bytes is repeated: it says more about latency than about bandwidth.
const MIN_BURST_BYTES: u64 = 2 << 20;

/// What is left to be sent once the guest is paused, besides what the log has.
pub(super) struct Left {
    /// Pages of a round that was ended early; all others are marked in the log.
    pub(super) pages: PageSet,
    /// Pages that the guest does not use. Those that are not in `pages` or in the log either were never sent.
    pub(super) unused: PageSet,
}

impl SourceJob<'_> {
    /// Copies memory, round after round, until a pause is worth it.
    pub(super) fn precopy(
        &mut self,
        link: &mut Link<'_>,
        crew: &Crew<'_>,
        watch: &mut Observer,
    ) -> Result<Left, MigrateError> {
        let (mut pages, mut unused) = self.first_pages(crew)?;
        let hot = hot_pages(&crew.space, &pages)?;
        watch.hot = hot.bytes;
        let mut n = 0;
        loop {
            n += 1;
            let order = if n == 1 {
                Order::Scattered(&hot.put_off)
            } else {
                Order::Ascending
            };
            let advice = self.round(link, crew, watch, n, pages, order)?;
            // Later rounds are short, and the shorter the less is dirtied meanwhile.
            watch.spare = None;
            pages = crew.space.none()?;
            crew.add_unsent(&mut pages);
            if self.confirm_switch(link, crew, watch, n, advice)? {
                return Ok(Left { pages, unused });
            }
            crew.space.peek(&mut pages)?;
            unused.subtract(&pages);
        }
    }

    /// Looks at the vCPUs for the first time. `None` where a deadline wants all streams to send.
    pub(super) fn spare_streams(&self) -> Option<SpareStreams> {
        if self.options.deadline.is_some() {
            return None;
        }
        let mut spare = SpareStreams::new(self.report.streams as usize);
        spare.observe(self.started.elapsed(), self.source.vcpu_times());
        Some(spare)
    }

    /// The pages of the first round: all of memory that may hold something. A page that was never touched is zero on
    /// both sides and is not sent. Also returns the pages that the guest does not use.
    fn first_pages(&mut self, crew: &Crew<'_>) -> Result<(PageSet, PageSet), MigrateError> {
        let mut populated = PageSet::of(crew.space.memory)?;
        self.call("populated", |source| source.populated(&mut populated))?;
        let mut untouched = populated.clone();
        untouched.invert();
        // A log may start with all pages marked, so the marks of untouched pages are cleared. A page that is touched
        // before that is found by the second call of `populated`; a page that is touched later is marked again.
        crew.space.clear_all(&untouched)?;
        self.call("populated", |source| source.populated(&mut populated))?;
        self.report.pages_zero = populated.pages_in_all() - populated.len();
        let unused = self.exclude_unused(crew, &mut populated)?;
        let mut pages = crew.space.none()?;
        let total_bytes = pages.pages_in_all() * PAGE_SIZE;
        pages.union(&populated)?;
        self.control.update(|progress| {
            progress.phase = Phase::Precopy;
            progress.total_bytes = total_bytes;
        });
        Ok((pages, unused))
    }

    /// Sends pages as round `n`, watching what the guest does meanwhile. Ends early if the policy says so.
    fn round(
        &mut self,
        link: &mut Link<'_>,
        crew: &Crew<'_>,
        watch: &mut Observer,
        n: u32,
        pages: PageSet,
        order: Order<'_>,
    ) -> Result<Advice, MigrateError> {
        self.begin_round(crew, watch, n);
        let pages = self.burst(link, crew, watch, pages)?;
        if n == 1 {
            // In the order in which they will be sent, so that the destination can make memory resident just ahead.
            let streams = self.report.streams as usize;
            for spans in spans_in_order(&pages, streams, order).chunks(MAX_SPANS) {
                link.send(&Message::Populated(spans.to_vec()))?;
            }
        }
        let pass = self.next_pass();
        let cpus = thread::available_parallelism().map_or(1, NonZero::get);
        let (at, spare) = (self.started.elapsed(), watch.spare.as_mut());
        let sending = spare.map(|spare| spare.begin(at, self.source.vcpu_times(), cpus));
        crew.send(pass, pages, order, sending);
        loop {
            let (asked, tick) = (Instant::now(), watch.tick());
            if crew.wait(tick)? {
                break;
            }
            watch.set_wake_delay(asked.elapsed().saturating_sub(tick));
            // A destination that gave up is noticed at once.
            link.check("nothing while pages are sent")?;
            let advice = self.observe(crew, watch, n, false)?;
            check_promise(&advice)?;
            if let Some(spare) = &mut watch.spare {
                crew.set_sending(spare.observe(self.started.elapsed(), self.source.vcpu_times()));
            }
            if matches!(advice.course, Course::Switch) {
                crew.stop();
            }
        }
        finish_round(link, crew, pass)?;
        let advice = self.observe(crew, watch, n, true)?;
        self.end_round(crew, watch, n, &advice);
        check_promise(&advice)?;
        Ok(advice)
    }

    /// Measures how fast the final copy will be where pre-copy has a cap and the final copy has none: sends the first
    /// few MiB of a round without the cap. The rest of the round is sent so much slower. Returns that rest.
    fn burst(
        &mut self,
        link: &mut Link<'_>,
        crew: &Crew<'_>,
        watch: &mut Observer,
        mut pages: PageSet,
    ) -> Result<PageSet, MigrateError> {
        let (Some(cap), None) = (self.options.bandwidth, self.options.final_bandwidth) else {
            return Ok(pages);
        };
        let payable = (cap as f64 * BURST_TIME) as u64 / PAGE_SIZE;
        let burst = payable.clamp(MIN_BURST_PAGES, MAX_BURST_PAGES).min(pages.len());
        if burst < MIN_BURST_PAGES || cap < MIN_BURST_CAP {
            return Ok(pages);
        }
        let before = crew.counts.wire();
        let began = Instant::now();
        crew.pacer.set(None, began);
        for _ in 0..BURSTS {
            let (first, from, at) = (pages.split_off(burst), crew.counts.wire(), Instant::now());
            let pass = self.send_unobserved(link, crew, first)?;
            finish_round(link, crew, pass)?;
            let bytes = crew.counts.wire() - from;
            // Pages that were zero say nothing about the network; the next ones may.
            if bytes >= MIN_BURST_BYTES {
                // The round trip to the ack is among the costs of the switch already.
                let round_trip = watch.costs.round_trip.div_f64(SWITCH_ROUND_TRIPS);
                watch.burst(bytes, at.elapsed().saturating_sub(round_trip));
            }
            if bytes >= MIN_BURST_BYTES || pages.is_empty() {
                break;
            }
        }
        let bytes = crew.counts.wire() - before;
        crew.pacer.set(self.options.bandwidth, began);
        crew.pacer.book(bytes, began);
        Ok(pages)
    }

    /// Sends pages in a pass of their own, without observing the guest. Returns the pass's number.
    pub(super) fn send_unobserved(
        &mut self,
        link: &mut Link<'_>,
        crew: &Crew<'_>,
        pages: PageSet,
    ) -> Result<u32, MigrateError> {
        self.send_watched(link, crew, pages, |_| Ok(()))
    }

    /// The same, but calls `check` every [`TICK`]; its error ends the pass.
    pub(super) fn send_watched(
        &mut self,
        link: &mut Link<'_>,
        crew: &Crew<'_>,
        pages: PageSet,
        check: impl Fn(&Self) -> Result<(), MigrateError>,
    ) -> Result<u32, MigrateError> {
        let pass = self.next_pass();
        crew.send(pass, pages, Order::Ascending, None);
        while !crew.wait(TICK)? {
            // A destination that gave up is noticed at once.
            link.check("nothing while pages are sent")?;
            check(self)?;
        }
        Ok(pass)
    }

    /// The number of the next pass over pages; the wire calls it a round.
    fn next_pass(&mut self) -> u32 {
        self.passes += 1;
        self.passes
    }

    /// Returns whether the guest is to be paused now. Measures first what the pause costs besides the copy; the result,
    /// or what was dirtied meanwhile, may call for one more round.
    fn confirm_switch(
        &mut self,
        link: &mut Link<'_>,
        crew: &Crew<'_>,
        watch: &mut Observer,
        n: u32,
        advice: Advice,
    ) -> Result<bool, MigrateError> {
        let switch = matches!(advice.course, Course::Switch);
        if switch || n == 1 || watch.doubts_costs(&advice) {
            watch.set_costs(&self.rehearse_several(link, watch.costs)?);
        }
        if !switch {
            return Ok(false);
        }
        let advice = self.observe(crew, watch, n, true)?;
        check_promise(&advice)?;
        Ok(matches!(advice.course, Course::Switch))
    }
}

/// An error if the policy says that the promise cannot be kept, which it does only if the caller does not want the
/// move then.
fn check_promise(advice: &Advice) -> Result<(), MigrateError> {
    match &advice.course {
        Course::Miss(miss) => Err(MigrateError::Missed(miss.clone())),
        Course::Continue | Course::Switch => Ok(()),
    }
}

/// Waits until everything that was sent is in the destination's memory.
pub(super) fn finish_round(link: &mut Link<'_>, crew: &Crew<'_>, n: u32) -> Result<(), MigrateError> {
    link.send(&Message::RoundEnd(n))?;
    await_ack(link, crew, n)
}

/// Waits for the acknowledgement of a round whose end was sent.
pub(super) fn await_ack(link: &mut Link<'_>, crew: &Crew<'_>, n: u32) -> Result<(), MigrateError> {
    match link.receive_message_after("round ack", || crew.in_flight())? {
        Message::RoundAck(round) if round == n => Ok(()),
        other => Err(unexpected("the ack of this round", &other)),
    }
}
