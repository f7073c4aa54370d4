//! Makes memory resident before its content arrives, because the first touch of a page costs more than receiving it.
//!
//! The source names its pages in the order in which it will send them, and a thread populates memory a little ahead of
//! what arrives. Further ahead it would take CPU time from the streams, and the pages that it cleared would have left
//! the caches before they are written; a migration would begin slowly and end fast, which makes its time hard to
//! predict.
//!
//! The thread only saves time: it never changes what a page holds, and nothing waits for it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, Thread};

use migration_io::{MemoryRange, populate};

use super::ReceiveError;
use super::memory::Incoming;
use crate::page_set::PageSet;
use crate::protocol::Span;

/// Memory that is populated by one call: a huge page. The thread can be stopped between two calls.
const PIECE: u64 = 2 << 20;

/// How far the thread may be ahead of what has arrived.
const LEAD: u64 = 64 << 20;

/// The pages that will come, and the thread that makes them resident.
pub(super) struct Populate {
    incoming: Arc<Incoming>,
    work: Mutex<PopulateWork>,
    /// Bytes of guest memory that have arrived, zero pages included.
    arrived: AtomicU64,
    thread: OnceLock<Thread>,
    stop: AtomicBool,
}

struct PopulateWork {
    /// Ranges that were named and not populated yet.
    todo: VecDeque<MemoryRange>,
    /// Every page that was named. Each may be named once, which bounds the number of ranges.
    named: PageSet,
    /// Bytes that were taken from `todo`.
    taken: u64,
}

impl Populate {
    pub(super) fn new(incoming: Arc<Incoming>) -> Result<Self, ReceiveError> {
        let named = PageSet::of(incoming.memory()).map_err(ReceiveError::MemoryMap)?;
        Ok(Self {
            incoming,
            work: Mutex::new(PopulateWork {
                todo: VecDeque::new(),
                named,
                taken: 0,
            }),
            arrived: AtomicU64::new(0),
            thread: OnceLock::new(),
            stop: AtomicBool::new(false),
        })
    }

    /// Sets the thread that will [`run`](Self::run), before the first wake-up. Without a thread nothing is populated.
    pub(super) fn set_thread(&self, thread: Thread) {
        self.thread.get_or_init(|| thread);
    }

    /// Adds a piece of the source's map of populated pages.
    pub(super) fn add(&self, spans: &[Span]) -> Result<(), ReceiveError> {
        if spans.is_empty() {
            return Err(ReceiveError::Populated { gpa: 0, len: 0 });
        }
        let mut work = self.lock();
        for span in spans {
            let range = MemoryRange::from(*span);
            if !span.is_pages() {
                return Err(ReceiveError::Populated {
                    gpa: range.gpa,
                    len: range.len,
                });
            }
            self.incoming.check_range(range).map_err(ReceiveError::Pages)?;
            if !work.named.insert_new(range).map_err(ReceiveError::Pages)? {
                return Err(ReceiveError::Populated {
                    gpa: range.gpa,
                    len: range.len,
                });
            }
            if self.thread.get().is_some() {
                work.push(range);
            }
        }
        drop(work);
        self.wake();
        Ok(())
    }

    /// Counts bytes of guest memory that have arrived.
    pub(super) fn count_arrived(&self, bytes: u64) {
        self.arrived.fetch_add(bytes, Ordering::Relaxed);
        self.wake();
    }

    /// Ends the thread after a round whose pages were named: all of them have arrived.
    pub(super) fn round_ended(&self) {
        if self.lock().is_begun() {
            self.stop();
        }
    }

    /// The thread's work, until [`Populate::stop`].
    pub(super) fn run(&self) {
        while !self.is_stopped() {
            let Some(piece) = self.next() else {
                // Every change is followed by a wake-up, also one between the call of `next` and this one.
                thread::park();
                continue;
            };
            // A stream writes here already: two threads that fault in the same memory are not faster than one.
            if self.incoming.is_written(piece) {
                continue;
            }
            if let Err(error) = populate(self.incoming.memory(), piece) {
                // If memory is really missing, the stream that writes the pages fails.
                tracing::debug!(%error, "guest memory is not made resident ahead");
                return;
            }
        }
    }

    /// Ends the thread: everything has arrived, or the migration has failed.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.wake();
    }

    /// The next piece to populate; `None` if there is none, or if the thread is far enough ahead.
    fn next(&self) -> Option<MemoryRange> {
        let mut work = self.lock();
        if work.taken >= self.arrived.load(Ordering::Relaxed).saturating_add(LEAD) {
            return None;
        }
        let front = work.todo.front_mut()?;
        let piece = MemoryRange {
            gpa: front.gpa,
            // Up to the next huge page.
            len: front.len.min(PIECE - front.gpa % PIECE),
        };
        front.gpa += piece.len;
        front.len -= piece.len;
        if front.len == 0 {
            work.todo.pop_front();
        }
        work.taken += piece.len;
        Some(piece)
    }

    fn wake(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, PopulateWork> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PopulateWork {
    /// Whether any page was named for the thread.
    fn is_begun(&self) -> bool {
        self.taken > 0 || !self.todo.is_empty()
    }

    /// Adds a range; extends the last one if the range begins at its end.
    fn push(&mut self, range: MemoryRange) {
        match self.todo.back_mut() {
            Some(last) if last.gpa + last.len == range.gpa => last.len += range.len,
            _ => self.todo.push_back(range),
        }
    }
}

#[cfg(test)]
mod tests {
    use migration_io::{GuestMemory, PAGE_SIZE};
    use vm_memory::GuestAddress;

    use super::super::disks::Disks;
    use super::*;

    #[test]
    fn the_thread_keeps_a_lead_and_no_more() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), (LEAD + 4 * PIECE) as usize)]).unwrap();
        let incoming = Incoming::new(memory, Disks::new(Vec::new(), &[]).unwrap());
        let populate = Populate::new(Arc::new(incoming)).unwrap();
        populate.set_thread(thread::current());
        let span = |gpa, len| Span { gpa, len };
        let last = LEAD + 4 * PIECE - PAGE_SIZE;
        populate
            .add(&[span(last, PAGE_SIZE), span(PAGE_SIZE, last - PAGE_SIZE)])
            .unwrap();
        let taken = || std::iter::from_fn(|| populate.next()).collect::<Vec<_>>();
        let pieces = taken();
        // In the order in which they were named, and cut where huge pages begin.
        assert_eq!(pieces[0].gpa, last);
        assert_eq!((pieces[1].gpa, pieces[1].len), (PAGE_SIZE, PIECE - PAGE_SIZE));
        assert_eq!((pieces[2].gpa, pieces[2].len), (PIECE, PIECE));
        let bytes: u64 = pieces.iter().map(|piece| piece.len).sum();
        assert!((LEAD..LEAD + PIECE).contains(&bytes), "{bytes}");
        populate.count_arrived(PIECE);
        assert_eq!(taken().len(), 1);
        populate.count_arrived(LEAD);
        assert_eq!(taken().last().map(|piece| piece.gpa + piece.len), Some(last));
        populate.add(&[span(0, PAGE_SIZE)]).unwrap();
        assert_eq!(taken().len(), 1);
        assert!(populate.add(&[span(last, PAGE_SIZE)]).is_err());
    }
}
