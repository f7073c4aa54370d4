//! Where connections meet the job that they belong to.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use crate::commit::{Ledger, Stage};
use crate::control::Control;
use crate::protocol::{Features, Outcome, Token};
use crate::transport::{Connection, TransportError};

/// Shared by the door, which brings connections, and the job, which waits for them. The ledger lies here, so
/// that a question is answered whatever the job is at.
#[derive(Debug)]
pub(super) struct Desk {
    room: Mutex<Room>,
    /// For the door's threads: the room has changed.
    changed: Condvar,
    /// For the job, which waits for sockets as well: readable when the room has changed.
    bell: OwnedFd,
}

/// How long a question waits for a word that came before it.
const MOMENT: Duration = Duration::from_millis(500);

/// A source that begins.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) connection: Arc<Connection>,
    pub(super) token: Token,
    /// What it can do.
    pub(super) features: Features,
}

/// Why a connection is of no use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("the receiver is busy: expected no migration under way and no machine, found {found}")]
    Busy { found: &'static str },
    #[error("expected the token of the migration under way, got another")]
    Token,
    #[error("expected a stream number below {count}, got {got}")]
    Index { count: usize, got: u32 },
    #[error("expected each stream once, got number {index} again")]
    Twice { index: u32 },
}

#[derive(Debug, Default)]
struct Room {
    ledger: Ledger,
    seat: Seat,
    /// Which of the streams that the job waits for have joined.
    joined: Vec<bool>,
    /// Those that the job has not taken yet.
    streams: Vec<(u32, Arc<Connection>)>,
    /// Threads of streams that were left alone.
    abandoned: usize,
    closed: bool,
}

/// Whether somebody would take a new source.
#[derive(Debug, Default)]
enum Seat {
    /// Nobody waits.
    #[default]
    Empty,
    /// A job waits for a source.
    Waiting,
    /// Here it is.
    Arrived(Arrival),
    /// A job is at work.
    Taken,
}

impl Desk {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            room: Mutex::default(),
            changed: Condvar::new(),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Readable when something has changed since [`Desk::hush`].
    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Silences the bell. Comes before the look at what has changed.
    pub(super) fn hush(&self) {
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
    }

    /// Rings for the job.
    pub(super) fn ring(&self) {
        // Can only fail when the counter is at its limit, and then it is readable anyway.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    /// Brings a new source to the job that waits for one. Where none does just now, but no migration is under
    /// way either, one may be about to: waits for it until `until`.
    pub(super) fn begin(&self, arrival: Arrival, until: Instant) -> Result<(), Refusal> {
        let mut room = self.lock();
        loop {
            if let Some(found) = room.occupant() {
                return Err(Refusal::Busy { found });
            }
            let left = until.saturating_duration_since(Instant::now());
            if matches!(room.seat, Seat::Waiting) {
                break;
            }
            if left.is_zero() || room.closed {
                return Err(Refusal::Busy {
                    found: "one that is being cleared away",
                });
            }
            room = self
                .changed
                .wait_timeout(room, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        room.ledger.begin(arrival.token);
        room.seat = Seat::Arrived(arrival);
        self.ring();
        Ok(())
    }

    /// Brings a data stream to its job.
    pub(super) fn join(&self, token: Token, index: u32, connection: Arc<Connection>) -> Result<(), Refusal> {
        let mut room = self.lock();
        if *room.ledger.stage() != Stage::Filling(token) {
            return Err(Refusal::Token);
        }
        let count = room.joined.len();
        match room.joined.get_mut(index as usize) {
            None => return Err(Refusal::Index { count, got: index }),
            Some(true) => return Err(Refusal::Twice { index }),
            Some(joined) => *joined = true,
        }
        room.streams.push((index, connection));
        self.ring();
        Ok(())
    }

    /// Answers a source that asks what became of its machine; waits until `until` for a commit that is about to
    /// be known, and then has no answer.
    ///
    /// "go" may lie unread in this side's own buffers: the job gets a moment to find it before the machine is
    /// given up.
    pub(super) fn ask(&self, token: Token, until: Instant) -> Option<Outcome> {
        let mut room = self.lock();
        let moment = until.min(Instant::now() + MOMENT);
        while *room.ledger.stage() == Stage::Ready(token) && !room.closed {
            let left = moment.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            room = self
                .changed
                .wait_timeout(room, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        loop {
            let answer = room.ledger.ask(token);
            if answer.is_some() {
                self.ring();
                return answer;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || room.closed {
                return None;
            }
            room = self
                .changed
                .wait_timeout(room, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits for a source, or until `control` is cancelled.
    pub(super) fn wait_for_source(&self, control: &Control) -> Result<Arrival, TransportError> {
        self.lock().seat = Seat::Waiting;
        self.changed.notify_all();
        loop {
            self.hush();
            let mut room = self.lock();
            match std::mem::take(&mut room.seat) {
                Seat::Arrived(arrival) => {
                    room.seat = Seat::Taken;
                    return Ok(arrival);
                }
                _ if control.is_cancelled() => return Err(TransportError::Cancelled),
                seat => room.seat = seat,
            }
            drop(room);
            let mut events =
                [self.bell(), control.wake()].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
            match poll(&mut events, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    self.leave();
                    return Err(TransportError::Wait(error.into()));
                }
            }
        }
    }

    /// From here on so many streams may join.
    pub(super) fn expect_streams(&self, count: u32) {
        self.lock().joined = vec![false; count as usize];
    }

    /// The streams that have joined since the last call.
    pub(super) fn take_streams(&self) -> Vec<(u32, Arc<Connection>)> {
        std::mem::take(&mut self.lock().streams)
    }

    /// So many threads of streams are left alone.
    pub(super) fn abandon(&self, streams: usize) {
        self.lock().abandoned += streams;
    }

    /// How many threads were left alone so far.
    pub(super) fn abandoned(&self) -> usize {
        self.lock().abandoned
    }

    /// Looks into the ledger, or writes in it.
    pub(super) fn with_ledger<T>(&self, work: impl FnOnce(&mut Ledger) -> T) -> T {
        let result = work(&mut self.lock().ledger);
        self.changed.notify_all();
        result
    }

    /// The job has ended.
    pub(super) fn leave(&self) {
        let mut room = self.lock();
        room.seat = Seat::Empty;
        room.joined.clear();
        room.streams.clear();
        drop(room);
        self.changed.notify_all();
    }

    /// Nobody waits for anything any more.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Room> {
        // Nothing that holds it panics; if it did, the values would still be whole.
        self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Room {
    /// What keeps a new migration out, and will for a while.
    fn occupant(&self) -> Option<&'static str> {
        match self.ledger.stage() {
            Stage::Idle => None,
            Stage::Filling(_) => Some("a migration under way"),
            Stage::Ready(_) => Some("a machine that waits for its source's word"),
            Stage::Committing(_) | Stage::Runs(_) | Stage::Kept { .. } => Some("a machine that has arrived"),
        }
    }
}
