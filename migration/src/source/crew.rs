//! The threads that send pages, one for each data stream, and what they share.
//!
//! The job hands them one pass over pages after another ([`Crew::send`]) and waits for its end. A stream's thread only
//! reads the machine's memory and disks and clears marks of the dirty log; it never calls the machine otherwise, and
//! never uses the control connection.

use std::net::Shutdown;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use migration_io::PAGE_SIZE;
use threads::{Role, spawn_scoped};

use super::MigrateError;
use super::pacer::Pacer;
use super::pass::{Chunk, Order, Pass};
use super::space::Space;
use super::stream::PageStream;
use crate::link::Link;
use crate::options::Compression;
use crate::page_set::PageSet;
use crate::protocol::Message;
use crate::text::panic_message;
use crate::transport::Connection;

/// What the streams share. Their threads wait for a pass, send it together, and wait for the next one.
pub(super) struct Crew<'a> {
    pub(super) space: Space<'a>,
    pub(super) pacer: Pacer,
    pub(super) compression: Option<Compression>,
    pub(super) counts: Counts,
    connections: &'a [Connection],
    state: Mutex<CrewState>,
    changed: Condvar,
}

/// What all streams have sent so far.
#[derive(Debug, Default)]
pub(super) struct Counts {
    /// Pages with content.
    pub(super) data: AtomicU64,
    /// Pages that were zero.
    pub(super) zero: AtomicU64,
    /// Those of them that are of disks.
    pub(super) disk_data: AtomicU64,
    pub(super) disk_zero: AtomicU64,
    /// Bytes put on the wire.
    pub(super) wire: AtomicU64,
    /// Whether any stream sent without a copy.
    pub(super) zerocopy: AtomicBool,
}

struct CrewState {
    pass: Option<Arc<Pass>>,
    /// Number of the pass that is under way, or of the last one.
    number: u32,
    /// Streams that have not finished the pass.
    busy: usize,
    /// So many streams, from the first on, send pages of it; the others wait until it is over.
    sending: usize,
    ending: bool,
    failure: Option<MigrateError>,
}

impl<'a> Crew<'a> {
    pub(super) fn new(
        space: Space<'a>,
        connections: &'a [Connection],
        pacer: Pacer,
        compression: Option<Compression>,
    ) -> Self {
        let state = CrewState {
            pass: None,
            number: 0,
            busy: 0,
            sending: 0,
            ending: false,
            failure: None,
        };
        Self {
            space,
            pacer,
            compression,
            counts: Counts::default(),
            connections,
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    /// Starts a thread for each stream; they end after [`Crew::end`].
    pub(super) fn start<'scope>(
        &'scope self,
        scope: &'scope thread::Scope<'scope, '_>,
        mut new_link: impl FnMut(&'scope Connection) -> Link<'scope>,
    ) -> std::io::Result<()> {
        for (index, connection) in self.connections.iter().enumerate() {
            let mut link = new_link(connection);
            link.set_send_only();
            spawn_scoped(scope, Role::Stream, format!("stream {index}"), move || {
                let run = AssertUnwindSafe(|| self.run(index, PageStream::new(self, link)?));
                let result = catch_unwind(run)
                    .unwrap_or_else(|panic| Err(MigrateError::Panic(panic_message(&*panic))));
                if let Err(error) = result {
                    self.fail(error);
                }
            })?;
        }
        Ok(())
    }

    /// Has the first `sending` streams, or all, send `pages` as the pass with this number. The pass before must have been
    /// finished.
    pub(super) fn send(&self, number: u32, pages: PageSet, order: Order<'_>, sending: Option<usize>) {
        let pass = Arc::new(Pass::new(pages, self.connections.len(), order));
        let mut state = self.lock();
        state.pass = Some(pass);
        state.number = number;
        state.busy = self.connections.len();
        state.sending = sending.unwrap_or(self.connections.len()).max(1);
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until the pass is sent, for at most this long. Returns whether it is sent.
    pub(super) fn wait(&self, at_most: Duration) -> Result<bool, MigrateError> {
        let deadline = Instant::now() + at_most;
        let mut state = self.lock();
        loop {
            if let Some(error) = state.failure.take() {
                return Err(error);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.busy == 0 || left.is_zero() {
                return Ok(state.busy == 0);
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Ends the pass early: chunks that no stream has begun stay unsent.
    pub(super) fn stop(&self) {
        if let Some(pass) = &self.lock().pass {
            pass.stop();
        }
        self.changed.notify_all();
    }

    /// Lets only so many streams, at least one, go on with the pass that is under way.
    pub(super) fn set_sending(&self, streams: usize) {
        self.lock().sending = streams.max(1);
        self.changed.notify_all();
    }

    /// Whether none of the streams rests.
    pub(super) fn all_streams_send(&self) -> bool {
        self.lock().sending >= self.connections.len()
    }

    /// Bytes that the streams have sent and that the destination has not received yet.
    pub(super) fn in_flight(&self) -> u64 {
        let of = |connection: &Connection| migration_io::in_flight(connection.as_fd()).unwrap_or(0);
        self.connections.iter().map(of).sum()
    }

    /// Bytes of the pass's pages that no stream has begun to send, and of those of them that are put off to its end.
    pub(super) fn unsent_bytes(&self) -> (u64, u64) {
        let pass = self.lock().pass.clone();
        let (unsent, put_off) = pass.map_or((0, 0), |pass| pass.unsent());
        (unsent * PAGE_SIZE, put_off * PAGE_SIZE)
    }

    /// Adds the pass's pages that no stream has begun to send.
    pub(super) fn add_unsent(&self, to: &mut PageSet) {
        let pass = self.lock().pass.clone();
        if let Some(pass) = pass {
            pass.add_unsent(to);
        }
    }

    /// Keeps a stream's thread waiting for this long. An error if the streams are to end meanwhile.
    pub(super) fn wait_unless_ending(&self, time: Duration) -> Result<(), MigrateError> {
        if time.is_zero() {
            return Ok(());
        }
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), time, |state| !state.ending);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if state.ending {
            return Err(MigrateError::StreamsEnd);
        }
        Ok(())
    }

    /// Makes the threads end; does not wait for them.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        state.ending = true;
        if let Some(pass) = &state.pass {
            pass.stop();
        }
        drop(state);
        self.changed.notify_all();
        for connection in self.connections {
            // Wakes a thread that waits for room on its connection.
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// The work of stream number `index`.
    fn run(&self, index: usize, mut stream: PageStream<'_>) -> Result<(), MigrateError> {
        let mut done = 0;
        while let Some((number, pass)) = self.next_pass(done) {
            while let Some(chunk) = self.next_chunk(index, &pass) {
                stream.send(&chunk)?;
            }
            stream.finish(&Message::RoundEnd(number))?;
            done = number;
            self.lock().busy -= 1;
            self.changed.notify_all();
        }
        Ok(())
    }

    /// The next chunk for a stream, which waits as long as it is not to send.
    fn next_chunk(&self, index: usize, pass: &Pass) -> Option<Chunk> {
        let rests = |state: &mut CrewState| index >= state.sending && !state.ending && !pass.is_over();
        drop(self.changed.wait_while(self.lock(), rests));
        pass.next()
    }

    fn next_pass(&self, done: u32) -> Option<(u32, Arc<Pass>)> {
        let mut state = self.lock();
        loop {
            if state.ending {
                return None;
            }
            if let (Some(pass), true) = (&state.pass, state.number > done) {
                return Some((state.number, pass.clone()));
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn fail(&self, error: MigrateError) {
        let mut state = self.lock();
        if state.ending {
            return;
        }
        // The first error has caused the others.
        state.failure.get_or_insert(error);
        if let Some(pass) = &state.pass {
            pass.stop();
        }
        drop(state);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, CrewState> {
        // Nothing that holds it panics; if it did, the values would still be whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counts {
    /// Bytes put on the wire so far.
    pub(super) fn wire(&self) -> u64 {
        self.wire.load(Ordering::Relaxed)
    }

    /// Pages with content, and pages that were zero, of disks alone.
    pub(super) fn disk_pages(&self) -> (u64, u64) {
        (
            self.disk_data.load(Ordering::Relaxed),
            self.disk_zero.load(Ordering::Relaxed),
        )
    }

    /// Pages with content, and pages that were zero, of memory and disks.
    pub(super) fn pages(&self) -> (u64, u64) {
        (
            self.data.load(Ordering::Relaxed),
            self.zero.load(Ordering::Relaxed),
        )
    }
}
