//! Another thread's hold on a migration: cancel it, watch it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};
use serde::{Deserialize, Serialize};

use crate::report::ms;

/// Where a migration is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Not started, or waiting for a connection.
    #[default]
    Waiting,
    /// The two sides find out whether the move can be made.
    Handshake,
    /// Memory is copied while the guest runs.
    Precopy,
    /// The guest is paused; the last pages and the state are copied.
    StopAndCopy,
    /// "go" was sent or received.
    Commit,
    /// It ended, one way or another.
    Done,
}

/// A live picture of a migration. Times in milliseconds, rates in bytes per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Where it is.
    pub phase: Phase,
    /// The round under way, counted from 1.
    pub round: u32,
    /// Bytes of guest memory left to send in this round.
    pub remaining_bytes: u64,
    /// Bytes of guest RAM.
    pub total_bytes: u64,
    /// Bytes put on the wire so far.
    pub bytes_sent: u64,
    /// What the guest dirtied per second in the last round.
    pub dirty_bytes_per_s: f64,
    /// What was sent per second, as far as it was measured.
    pub bandwidth_bytes_per_s: f64,
    /// Share of time that the vCPUs are held out of the guest, in percent.
    pub throttle_percent: f64,
    /// The downtime if the guest were paused now.
    pub predicted_downtime_ms: Option<f64>,
    /// Since the start of the migration.
    pub elapsed_ms: f64,
}

/// Cancels a migration from any thread, and shows how far it is. Once cancelled it stays so; a destination that
/// was not cancelled may use one value for all of its attempts.
#[derive(Debug)]
pub struct Control {
    cancelled: AtomicBool,
    /// Readable for ever once cancelled, so that whoever waits for a socket waits for this as well.
    wake: OwnedFd,
    live: Mutex<Live>,
}

#[derive(Debug, Default)]
struct Live {
    progress: Progress,
    /// Set while a migration is under way.
    started: Option<Instant>,
}

impl Control {
    /// A control for one migration. Fails when the process is out of file descriptors.
    pub fn new() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            cancelled: AtomicBool::new(false),
            wake,
            live: Mutex::default(),
        })
    }

    /// Asks the migration to end. It does so before the commit, at once; after it, not at all.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
        // Can only fail when the counter is at its limit, and then the descriptor is readable anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Whether somebody asked the migration to end.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    /// How far the migration is.
    pub fn progress(&self) -> Progress {
        let live = self.lock();
        let elapsed_ms = live
            .started
            .map_or(live.progress.elapsed_ms, |started| ms(started.elapsed()));
        Progress {
            elapsed_ms,
            ..live.progress
        }
    }

    /// What becomes readable when the migration is cancelled.
    pub(crate) fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// A migration begins.
    pub(crate) fn begin(&self) {
        let progress = Progress {
            phase: Phase::Handshake,
            ..Progress::default()
        };
        *self.lock() = Live {
            progress,
            started: Some(Instant::now()),
        };
    }

    /// It ended.
    pub(crate) fn end(&self) {
        let mut live = self.lock();
        live.progress.phase = Phase::Done;
        if let Some(started) = live.started.take() {
            live.progress.elapsed_ms = ms(started.elapsed());
        }
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.lock().progress);
    }

    fn lock(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
