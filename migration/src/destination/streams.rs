//! The data streams' threads, and the barrier between rounds: no stream begins a round before all have ended the one
//! before, so that no older page overwrites a newer one.
//!
//! The threads only write memory and disks. They never use the control connection, and what fails in one is reported by
//! the job.

use std::net::Shutdown;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use threads::Role;

use super::ReceiveError;
use super::memory::{Incoming, StreamBuffers};
use super::populate::Populate;
use super::rendezvous::Rendezvous;
use crate::control::Control;
use crate::link::{Admitted, Link, LinkError};
use crate::options::ReceiveOptions;
use crate::protocol::{Frame, Message};
use crate::text::panic_message;
use crate::transport::Connection;

/// How long the job waits for the source's abort after streams have ended early: the abort has the reason.
const ABORT_GRACE: Duration = Duration::from_secs(1);

/// All data streams of one migration. The threads own what they use, so that one that hangs in a write to a disk can be
/// left behind.
pub(super) struct Streams {
    incoming: Arc<Incoming>,
    populate: Arc<Populate>,
    rendezvous: Arc<Rendezvous>,
    options: ReceiveOptions,
    /// Never cancelled: the job ends a stream by closing its connection.
    control: Control,
    state: Mutex<StreamsState>,
    changed: Condvar,
}

struct StreamsState {
    connections: Vec<Arc<Connection>>,
    /// The last round that each stream has ended.
    rounds: Vec<u32>,
    /// Threads that may still use memory or disks.
    running: usize,
    /// Whether the job has ended the streams.
    ending: bool,
    /// The first failure of a stream, and when it happened. Later ones follow from it.
    failure: Option<(Instant, ReceiveError)>,
}

impl Streams {
    pub(super) fn new(
        incoming: Arc<Incoming>,
        populate: Arc<Populate>,
        rendezvous: Arc<Rendezvous>,
        options: ReceiveOptions,
        count: u32,
    ) -> Result<Arc<Self>, ReceiveError> {
        let state = StreamsState {
            connections: Vec::new(),
            rounds: vec![0; count as usize],
            running: 0,
            ending: false,
            failure: None,
        };
        Ok(Arc::new(Self {
            incoming,
            populate,
            rendezvous,
            options,
            control: Control::new().map_err(ReceiveError::Thread)?,
            state: Mutex::new(state),
            changed: Condvar::new(),
        }))
    }

    /// Starts the threads of streams that have joined.
    pub(super) fn start_joined(self: &Arc<Self>) -> Result<(), ReceiveError> {
        for (index, connection) in self.rendezvous.drain_streams() {
            let mut state = self.lock();
            state.connections.push(connection.clone());
            state.running += 1;
            drop(state);
            let streams = self.clone();
            let run = move || streams.run(index as usize, &connection);
            let spawned = threads::spawn(Role::Stream, format!("stream {index}"), run);
            if let Err(error) = spawned {
                self.lock().running -= 1;
                return Err(ReceiveError::Thread(error));
            }
        }
        Ok(())
    }

    /// Whether the migration has no streams because memory is handed over.
    pub(super) fn is_handover(&self) -> bool {
        self.lock().rounds.is_empty()
    }

    /// How many streams have not joined yet.
    pub(super) fn missing(&self) -> usize {
        let state = self.lock();
        state.rounds.len() - state.connections.len()
    }

    /// How many streams the migration has, whether they have joined or not.
    pub(super) fn count(&self) -> usize {
        self.lock().rounds.len()
    }

    /// Whether all streams have ended a round.
    pub(super) fn is_complete(&self, round: u32) -> bool {
        self.lock().is_complete(round)
    }

    /// The first error of a stream, if one has failed. If a connection has only ended, the source's abort may follow, so
    /// that error is held back for [`ABORT_GRACE`]: then returns when to call again.
    pub(super) fn check_failure(&self) -> Result<Option<Instant>, ReceiveError> {
        let mut state = self.lock();
        match &state.failure {
            Some((since, ReceiveError::Stream { source, .. }))
                if matches!(source, LinkError::Closed { .. } | LinkError::Io { .. })
                    && since.elapsed() < ABORT_GRACE =>
            {
                Ok(Some(*since + ABORT_GRACE))
            }
            _ => state.failure.take().map_or(Ok(None), |(_, error)| Err(error)),
        }
    }

    /// Closes the connections of all streams; no more pages are received.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        state.ending = true;
        for connection in &state.connections {
            let _ = connection.shutdown(Shutdown::Both);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until no thread uses guest memory or the disks any more; comes after [`Streams::end`]. An error if that
    /// takes longer than `at_most`: as the connections are closed, a thread must hang in a write.
    pub(super) fn join(&self, at_most: Duration) -> Result<(), ReceiveError> {
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), at_most, |state| state.running > 0);
        match waited.unwrap_or_else(PoisonError::into_inner).0.running {
            0 => Ok(()),
            streams => {
                self.rendezvous.abandon(streams);
                Err(ReceiveError::Hang { streams })
            }
        }
    }

    /// The work of one stream's thread.
    fn run(&self, index: usize, connection: &Connection) {
        let work = AssertUnwindSafe(|| self.receive(index, connection));
        let result =
            catch_unwind(work).unwrap_or_else(|panic| Err(ReceiveError::Panic(panic_message(&*panic))));
        let result = result.map_err(|error| match error {
            ReceiveError::Link(source) => ReceiveError::Stream { index, source },
            error => error,
        });
        let mut state = self.lock();
        state.running -= 1;
        if let (Err(error), false) = (result, state.ending) {
            state.failure.get_or_insert((Instant::now(), error));
        }
        drop(state);
        self.changed.notify_all();
        self.rendezvous.wake_job();
    }

    /// Receives pages until the connection is closed or the job ends the streams.
    fn receive(&self, index: usize, connection: &Connection) -> Result<(), ReceiveError> {
        let options = &self.options;
        let mut link = Link::new(
            connection,
            &self.control,
            options.io_timeout,
            options.step_timeout,
        );
        link.admit(Admitted::Pages);
        link.count_arrivals(self.incoming.under_way());
        link.send(&Message::Joined)?;
        let what = "pages or round end";
        let mut buffers = StreamBuffers::default();
        let mut counted = 0;
        loop {
            // What lies in the socket's buffer can still be read after the connection was closed.
            if self.lock().ending {
                return Ok(());
            }
            match link.receive_on_stream(what)? {
                Frame::Pages(table) => {
                    let bytes = self.incoming.receive_batch(&mut link, table, &mut buffers)?;
                    self.populate.count_arrived(bytes);
                }
                Frame::Compressed(table) => {
                    let bytes = table.page_bytes();
                    self.incoming.receive_compressed(&mut link, table, &mut buffers)?;
                    self.populate.count_arrived(bytes);
                }
                Frame::Message(Message::RoundEnd(round)) => {
                    if !self.end_round(index, round)? {
                        return Ok(());
                    }
                }
                frame => {
                    return Err(LinkError::Unexpected {
                        expected: what,
                        got: frame.name(),
                    }
                    .into());
                }
            }
            self.incoming.count_received(link.bytes_received() - counted);
            counted = link.bytes_received();
        }
    }

    /// Ends a round on one stream and waits until the other streams have ended it, so that no page of this round
    /// overwrites one of the next. Returns whether there may be a next round.
    fn end_round(&self, index: usize, round: u32) -> Result<bool, ReceiveError> {
        let mut state = self.lock();
        let expected = state.rounds[index].saturating_add(1);
        if round != expected {
            return Err(ReceiveError::Round { expected, got: round });
        }
        state.rounds[index] = round;
        if state.is_complete(round) {
            self.changed.notify_all();
            self.rendezvous.wake_job();
        }
        while !state.is_complete(round) && !state.ending {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(!state.ending)
    }

    fn lock(&self) -> MutexGuard<'_, StreamsState> {
        // Nothing that holds it panics; if it did, the values would still be whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StreamsState {
    fn is_complete(&self, round: u32) -> bool {
        self.rounds.iter().all(|ended| *ended >= round)
    }
}
