//! The host's control of a balloon.

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

/// What the host wants of a balloon, and what the guest has reported. Its functions may be called from any thread.
#[derive(Debug)]
pub struct BalloonControl {
    /// Raised when the host wants something new of the device.
    event: WakeEvent,
    status: Mutex<BalloonStatus>,
    pub(super) metrics: Arc<BalloonMetrics>,
    pub(super) replaced: Mutex<Replaced>,
    /// Notified when statistics or hints came, or the driver was reset.
    answered: Condvar,
}

/// Sizes in pages of [`PAGE_SIZE`].
#[derive(Debug, Default)]
pub(super) struct BalloonStatus {
    pub(super) target: u32,
    pub(super) actual: u32,
    /// The configuration space has changed and the guest must be interrupted.
    pub(super) changed: bool,
    /// The host has asked for new statistics.
    pub(super) statistics_wanted: bool,
    pub(super) statistics: Option<Statistics>,
    /// How often statistics came, on this host or before the move to it.
    pub(super) statistics_seen: u64,
    /// Whether the driver has negotiated FREE_PAGE_HINT.
    pub(super) can_hint: bool,
    /// Whether the driver has negotiated PAGE_POISON.
    pub(super) poisons: bool,
    /// The value that the guest writes to pages that it frees, if it does.
    pub(super) poison: u32,
    pub(super) hints: Hints,
}

impl BalloonControl {
    /// The control of a balloon with a target of `bytes`, rounded down to pages.
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

    /// Asks the guest to give up `bytes` of its memory in all, rounded down to pages, or to take back what it gave up
    /// beyond that. The guest does so in its own time, and as far as it can.
    pub fn set_target(&self, bytes: u64) {
        let mut status = self.status();
        status.target = pages(bytes);
        status.changed = true;
        drop(status);
        self.event.raise();
    }

    /// The target: bytes that the guest was asked to give up.
    pub fn target(&self) -> u64 {
        u64::from(self.status().target) * PAGE_SIZE
    }

    /// Bytes that the guest reports as given up for the target.
    pub fn actual(&self) -> u64 {
        u64::from(self.status().actual) * PAGE_SIZE
    }

    /// Bytes that were given back to the host so far, for the target or because the guest did not use them, including
    /// those that the guest has used again since.
    pub fn given_up(&self) -> u64 {
        self.metrics.discarded_bytes.get()
    }

    /// Pages given up in memory that is mapped privately from a file, as ascending addresses and lengths in bytes: they
    /// no longer show the file's content, but zeroes unless they were written since. Empty for other memory.
    pub fn replaced(&self) -> Vec<(u64, u64)> {
        self.replaced
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .ranges()
    }

    /// Asks the guest for new statistics, which come in its own time, or never.
    pub fn request_statistics(&self) {
        self.status().statistics_wanted = true;
        self.event.raise();
    }

    /// The last statistics that came on this host, and how often any came.
    pub fn statistics(&self) -> (Option<Statistics>, u64) {
        let status = self.status();
        (status.statistics, status.statistics_seen)
    }

    /// Asks for new statistics and waits for them at most so long; `None` if the guest has not sent any by then.
    pub fn new_statistics(&self, at_most: Duration) -> Option<Statistics> {
        let mut status = self.status();
        let seen = status.statistics_seen;
        status.statistics_wanted = true;
        self.event.raise();
        let status = self.wait(status, at_most, |status| status.statistics_seen == seen);
        status.statistics.filter(|_| status.statistics_seen != seen)
    }

    /// Whether [`BalloonControl::hints`] is useful: the driver reports hints, and expects freed pages to hold nothing
    /// but zeroes.
    pub fn can_hint(&self) -> bool {
        let status = self.status();
        status.can_hint && status.reads_zero()
    }

    /// Asks the guest for pages that it does not use, as addresses and lengths in bytes: whole pages, which may lie
    /// outside memory. Their content at some time between the call and its return does not matter to the guest, which
    /// may write to them again at any time without notice. Waits until the guest has reported all, or for `at_most`.
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

    /// Wakes the threads that wait for the guest's answer.
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
    /// Whether pages that the guest has freed may be zero when it uses them again.
    pub(super) fn reads_zero(&self) -> bool {
        !self.poisons || self.poison == 0
    }
}

/// The number of pages, at most as many as fit: 16 TiB.
fn pages(bytes: u64) -> u32 {
    u32::try_from(bytes / PAGE_SIZE).unwrap_or(u32::MAX)
}
