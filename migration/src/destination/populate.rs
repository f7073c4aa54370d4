//! Makes memory resident before its content arrives: the first touch of a page costs more than the rest of its way.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use migration_io::{MemoryRange, populate};

use super::ReceiveError;
use super::memory::Incoming;
use crate::page_set::PageSet;
use crate::protocol::Span;

/// Memory that is populated in one go: a huge page. Between two of them the thread can be stopped.
const PIECE: u64 = 2 << 20;

/// What may hold something, and the thread that prepares for it. Nothing depends on its work.
pub(super) struct Populate<'a> {
    incoming: &'a Incoming,
    work: Mutex<Work>,
    changed: Condvar,
    stop: AtomicBool,
}

struct Work {
    todo: PageSet,
    /// Where the next range may begin: they come in ascending order, so there are not more of them than pages.
    front: u64,
}

impl<'a> Populate<'a> {
    pub(super) fn new(incoming: &'a Incoming) -> Result<Self, ReceiveError> {
        let todo = PageSet::of(incoming.memory()).map_err(ReceiveError::MemoryMap)?;
        Ok(Self {
            incoming,
            work: Mutex::new(Work { todo, front: 0 }),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
        })
    }

    /// Takes in a piece of the source's map.
    pub(super) fn add(&self, spans: &[Span]) -> Result<(), ReceiveError> {
        if spans.is_empty() {
            return Err(ReceiveError::Populated { gpa: 0, len: 0 });
        }
        let mut work = self.lock();
        for span in spans {
            let (gpa, len) = (span.gpa, span.len);
            if !span.is_pages() || gpa < work.front {
                return Err(ReceiveError::Populated { gpa, len });
            }
            let range = MemoryRange::from(*span);
            self.incoming.check(range).map_err(ReceiveError::Pages)?;
            work.todo.insert_range(range).map_err(ReceiveError::Pages)?;
            work.front = gpa + len;
        }
        drop(work);
        self.changed.notify_all();
        Ok(())
    }

    /// The thread's work, until [`Populate::stop`].
    pub(super) fn run(&self) {
        while let Some(todo) = self.next() {
            for piece in todo.ranges(PIECE) {
                if self.is_stopped() {
                    return;
                }
                // Where pages arrive already a stream is at work: two threads that fault in the same memory are
                // no faster than one.
                if self.incoming.is_written(piece) {
                    continue;
                }
                if let Err(error) = populate(self.incoming.memory(), piece) {
                    // Whoever writes the pages will find out, if there is anything to find out.
                    tracing::debug!(%error, "guest memory is not made resident ahead");
                    return;
                }
            }
        }
    }

    /// Ends the thread: everything has arrived, or it is over.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        // Under the lock, so that the thread is not between its look and its wait.
        drop(self.lock());
        self.changed.notify_all();
    }

    fn next(&self) -> Option<PageSet> {
        let mut work = self.lock();
        loop {
            if self.is_stopped() {
                return None;
            }
            if !work.todo.is_empty() {
                return Some(work.todo.take());
            }
            work = self.changed.wait(work).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
