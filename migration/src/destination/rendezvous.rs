//! Hands connections from the acceptor's threads to the job that they belong to, and holds the commit's ledger.
//!
//! Admits one source at a time, and only streams with the token of its migration. It decides nothing about the machine:
//! the ledger does.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use crate::commit::{Ledger, Stage};
use crate::control::Control;
use crate::protocol::{AttemptOutcome, Features, Token};
use crate::transport::{Connection, TransportError};

/// Shared by the acceptor's threads, which bring connections, and the job, which waits for them. The commit's ledger
/// lies here, so that the acceptor's threads can answer a source's question whatever the job is doing.
#[derive(Debug)]
pub(super) struct Rendezvous {
    state: Mutex<RendezvousState>,
    /// Notified when the state has changed, for the acceptor's threads.
    changed: Condvar,
    /// An eventfd, readable when the state has changed: the job waits for it together with sockets.
    event: OwnedFd,
}

/// How long a source's question waits for a "go" that came before it and that the job has not read yet.
const GO_GRACE: Duration = Duration::from_millis(500);

/// A source that begins a migration.
#[derive(Debug)]
pub(super) struct Caller {
    pub(super) connection: Arc<Connection>,
    pub(super) token: Token,
    /// The features that the source's build supports.
    pub(super) features: Features,
}

/// Why a connection is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ConnectionRefusal {
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
struct RendezvousState {
    ledger: Ledger,
    job: JobState,
    /// For each stream that the job waits for, whether it has joined.
    joined: Vec<bool>,
    /// Streams that have joined and that the job has not fetched yet.
    streams: Vec<(u32, Arc<Connection>)>,
    /// Threads of streams that hang and were left alone.
    abandoned: usize,
    /// Whether the receiver ends.
    closed: bool,
}

/// What the job is doing, and so whether a new source can begin.
#[derive(Debug, Default)]
enum JobState {
    /// There is no job.
    #[default]
    None,
    /// The job waits for a source.
    Waiting,
    /// A source has come; the job has not fetched it yet.
    Arrived(Caller),
    /// The job has a source.
    Busy,
}

impl Rendezvous {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Readable when something has changed since [`Rendezvous::clear_event`].
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Makes the event unreadable again. The caller checks afterwards what has changed.
    pub(super) fn clear_event(&self) {
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
    }

    /// Wakes the job.
    pub(super) fn wake_job(&self) {
        // Can only fail when the counter is at its limit, and then the descriptor is readable anyway.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// Brings a new source to the job that waits for one. Between two migrations no job waits for a moment: the call
    /// then waits for it until `until`.
    pub(super) fn begin(&self, caller: Caller, until: Instant) -> Result<(), ConnectionRefusal> {
        let mut state = self.lock();
        loop {
            if let Some(found) = state.occupant() {
                return Err(ConnectionRefusal::Busy { found });
            }
            let left = until.saturating_duration_since(Instant::now());
            if matches!(state.job, JobState::Waiting) {
                break;
            }
            if left.is_zero() || state.closed {
                return Err(ConnectionRefusal::Busy {
                    found: "one that is being cleared away",
                });
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        state.ledger.begin(caller.token);
        state.job = JobState::Arrived(caller);
        self.wake_job();
        Ok(())
    }

    /// Brings a data stream to its job.
    pub(super) fn join(
        &self,
        token: Token,
        index: u32,
        connection: Arc<Connection>,
    ) -> Result<(), ConnectionRefusal> {
        let mut state = self.lock();
        if *state.ledger.stage() != Stage::Filling(token) {
            return Err(ConnectionRefusal::Token);
        }
        let count = state.joined.len();
        match state.joined.get_mut(index as usize) {
            None => return Err(ConnectionRefusal::Index { count, got: index }),
            Some(true) => return Err(ConnectionRefusal::Twice { index }),
            Some(joined) => *joined = true,
        }
        state.streams.push((index, connection));
        self.wake_job();
        Ok(())
    }

    /// Answers a source that asks what became of its machine. While the machine is being resumed the answer is not
    /// known: the call waits for it until `until`, and returns `None` then.
    ///
    /// "go" may have arrived and not been read yet: the job gets [`GO_GRACE`] to read it before the machine is given up.
    pub(super) fn attempt_outcome(&self, token: Token, until: Instant) -> Option<AttemptOutcome> {
        let mut state = self.lock();
        let grace = GO_GRACE.min(until.saturating_duration_since(Instant::now()));
        let go_may_be_unread =
            |state: &mut RendezvousState| *state.ledger.stage() == Stage::Ready(token) && !state.closed;
        state = self
            .changed
            .wait_timeout_while(state, grace, go_may_be_unread)
            .unwrap_or_else(PoisonError::into_inner)
            .0;
        loop {
            let answer = state.ledger.answer(token);
            if answer.is_some() {
                self.wake_job();
                return answer;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || state.closed {
                return None;
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits for a source, or until `control` is cancelled.
    pub(super) fn wait_for_source(&self, control: &Control) -> Result<Caller, TransportError> {
        self.lock().job = JobState::Waiting;
        self.changed.notify_all();
        loop {
            self.clear_event();
            let mut state = self.lock();
            match std::mem::take(&mut state.job) {
                JobState::Arrived(caller) => {
                    state.job = JobState::Busy;
                    return Ok(caller);
                }
                _ if control.is_cancelled() => return Err(TransportError::Cancelled),
                job => state.job = job,
            }
            drop(state);
            let mut events =
                [self.event(), control.wake()].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
            match poll(&mut events, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    self.release();
                    return Err(TransportError::Wait(error.into()));
                }
            }
        }
    }

    /// Sets how many streams may join from here on.
    pub(super) fn expect_streams(&self, count: u32) {
        self.lock().joined = vec![false; count as usize];
    }

    /// The streams that have joined since the last call.
    pub(super) fn drain_streams(&self) -> Vec<(u32, Arc<Connection>)> {
        std::mem::take(&mut self.lock().streams)
    }

    /// Counts threads of streams that hang and are left alone.
    pub(super) fn abandon(&self, streams: usize) {
        self.lock().abandoned += streams;
    }

    /// How many threads were left alone so far.
    pub(super) fn abandoned(&self) -> usize {
        self.lock().abandoned
    }

    /// Reads or changes the ledger, and wakes the threads that wait for a change.
    pub(super) fn with_ledger<T>(&self, work: impl FnOnce(&mut Ledger) -> T) -> T {
        let result = work(&mut self.lock().ledger);
        self.changed.notify_all();
        result
    }

    /// Notes that the job has ended: another one may wait for a source.
    pub(super) fn release(&self) {
        let mut state = self.lock();
        state.job = JobState::None;
        state.joined.clear();
        state.streams.clear();
        drop(state);
        self.changed.notify_all();
    }

    /// Ends all waits of the acceptor's threads, as the receiver ends.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, RendezvousState> {
        // Nothing that holds it panics; if it did, the values would still be whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RendezvousState {
    /// The migration or machine that is here, for as long as which no other source is admitted.
    fn occupant(&self) -> Option<&'static str> {
        match self.ledger.stage() {
            Stage::Idle => None,
            Stage::Filling(_) => Some("a migration under way"),
            Stage::Ready(_) => Some("a machine that waits for its source's decision"),
            Stage::Committing(_) | Stage::Runs(_) | Stage::Kept { .. } => Some("a machine that has arrived"),
        }
    }
}
