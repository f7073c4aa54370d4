//! The host's end of a balloon.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::PAGE_SIZE;
use super::discard::whole_pages;
use super::hints::Hints;
use super::metrics::BalloonMetrics;
use super::replaced::Replaced;
use super::statistics::Statistics;
use crate::wake_event::WakeEvent;

/// What the host wants of a balloon, and what is known of it. Its calls may come from any thread.
#[derive(Debug)]
pub struct BalloonControl {
    /// Raised when there is something that the device does not know of yet.
    event: WakeEvent,
    status: Mutex<BalloonStatus>,
    pub(super) metrics: Arc<BalloonMetrics>,
    pub(super) replaced: Mutex<Replaced>,
    /// Statistics came, or hints.
    answered: Condvar,
}

/// Sizes in pages of [`PAGE_SIZE`].
#[derive(Debug, Default)]
pub(super) struct BalloonStatus {
    pub(super) target: u32,
    pub(super) actual: u32,
    /// The guest has not been told of the target, or of what is asked, yet.
    pub(super) changed: bool,
    /// Somebody waits for new statistics.
    pub(super) statistics_wanted: bool,
    pub(super) statistics: Option<Statistics>,
    /// How often statistics came, here or before the machine came here.
    pub(super) statistics_seen: u64,
    /// What the driver made of FREE_PAGE_HINT and PAGE_POISON.
    pub(super) can_hint: bool,
    pub(super) poisons: bool,
    /// What the guest puts into pages that it frees, if it does.
    pub(super) poison: u32,
    pub(super) hints: Hints,
}

impl BalloonControl {
    /// Of a balloon that is to have `bytes`, rounded down to pages.
    pub fn new(bytes: u64) -> io::Result<Self> {
        let status = BalloonStatus {
            target: pages(bytes),
            ..Default::default()
        };
        Ok(Self {
            event: WakeEvent::new()?,
            status: Mutex::new(status),
            metrics: Arc::default(),
            replaced: Mutex::default(),
            answered: Condvar::new(),
        })
    }

    /// Asks the guest to give up `bytes` of its memory, rounded down to pages, or to take back what it gave up beyond
    /// that. It does so in its own time, and as far as it can.
    pub fn set_target(&self, bytes: u64) {
        let mut status = self.status();
        status.target = pages(bytes);
        status.changed = true;
        drop(status);
        self.event.raise();
    }

    /// What the guest was asked to give up, in bytes.
    pub fn target(&self) -> u64 {
        u64::from(self.status().target) * PAGE_SIZE
    }

    /// What the guest says that it has given up for the target, in bytes.
    pub fn actual(&self) -> u64 {
        u64::from(self.status().actual) * PAGE_SIZE
    }

    /// Bytes that went back to the host so far, for the target or because the guest did not use them; those included
    /// that it took again.
    pub fn given_up(&self) -> u64 {
        self.metrics.discarded_bytes.get()
    }

    /// What was given up of memory that was mapped privately from a file, as addresses and lengths in bytes, ascending: it is
    /// the file's no more, but zero unless it was written to since. Of other memory nothing.
    pub fn replaced(&self) -> Vec<(u64, u64)> {
        self.replaced
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .ranges()
    }

    /// Asks the guest for new statistics; they come in its own time, or never.
    pub fn request_statistics(&self) {
        self.status().statistics_wanted = true;
        self.event.raise();
    }

    /// The last statistics that came here, and how often some came at all: never from a guest that sends none.
    pub fn statistics(&self) -> (Option<Statistics>, u64) {
        let status = self.status();
        (status.statistics, status.statistics_seen)
    }

    /// The same, new ones, which are waited for so long; none of a guest that does not send them by then.
    pub fn new_statistics(&self, at_most: Duration) -> Option<Statistics> {
        let mut status = self.status();
        let seen = status.statistics_seen;
        status.statistics_wanted = true;
        self.event.raise();
        let status = self.wait(status, at_most, |status| status.statistics_seen == seen);
        status.statistics.filter(|_| status.statistics_seen != seen)
    }

    /// Whether [`BalloonControl::hints`] is of use: the driver tells, and counts on no content of pages that it frees but zero.
    pub fn can_hint(&self) -> bool {
        let status = self.status();
        status.can_hint && status.reads_zero()
    }

    /// Asks the guest for pages that it does not use, as addresses and lengths in bytes: whole pages, which may lie
    /// outside memory. What they hold at some time between call and answer is of no use to the guest; it may write to
    /// them again at any time, without a word. Waits until it has told all, or for so long.
    pub fn hints(&self, at_most: Duration) -> Vec<(u64, u64)> {
        let mut status = self.status();
        status.hints.request();
        status.changed = true;
        self.event.raise();
        let mut status = self.wait(status, at_most, |status| status.hints.is_open());
        let hints = status.hints.finish();
        status.changed = true;
        drop(status);
        self.event.raise();
        let whole = |(address, len)| whole_pages(address, len);
        hints.into_iter().filter_map(whole).collect()
    }

    fn wait<'a>(
        &self,
        status: MutexGuard<'a, BalloonStatus>,
        at_most: Duration,
        mut wanting: impl FnMut(&BalloonStatus) -> bool,
    ) -> MutexGuard<'a, BalloonStatus> {
        let waited = self
            .answered
            .wait_timeout_while(status, at_most, |status| wanting(status));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Whoever waits for the guest looks.
    pub(super) fn notify_waiters(&self) {
        self.answered.notify_all();
    }

    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Clears the event, before the device reads what has changed.
    pub(super) fn clear_event(&self) {
        self.event.clear();
    }

    pub(super) fn status(&self) -> MutexGuard<'_, BalloonStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BalloonStatus {
    /// Whether the guest has no objection if pages that it freed are zero when it takes them again.
    pub(super) fn reads_zero(&self) -> bool {
        !self.poisons || self.poison == 0
    }
}

/// As many as there are numbers for: 16 TiB.
fn pages(bytes: u64) -> u32 {
    u32::try_from(bytes / PAGE_SIZE).unwrap_or(u32::MAX)
}
