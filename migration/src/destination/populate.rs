//! Makes memory resident before its content arrives: the first touch of a page costs more than the rest of its way.
//!
//! The source names its pages in the order in which it is about to send them, and the thread keeps a little ahead
//! of what arrives. Further ahead it would take time from the streams that now need it, what it has cleared would
//! have left the caches before it is written, and a migration would be slow at first and fast at last, which
//! nobody could predict.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, Thread};

use migration_io::{MemoryRange, populate};

use super::ReceiveError;
use super::memory::Incoming;
use crate::page_set::PageSet;
use crate::protocol::Span;

/// Memory that is populated in one go: a huge page. Between two of them the thread can be stopped.
const PIECE: u64 = 2 << 20;
/// How far the thread may be ahead of what has arrived.
const LEAD: u64 = 64 << 20;

/// What may hold something, and the thread that prepares for it. Nothing depends on its work.
pub(super) struct Populate {
    incoming: Arc<Incoming>,
    work: Mutex<PopulateWork>,
    /// Bytes of guest memory that have arrived, zero pages included.
    arrived: AtomicU64,
    thread: OnceLock<Thread>,
    stop: AtomicBool,
}

struct PopulateWork {
    todo: VecDeque<MemoryRange>,
    /// Everything that was ever named: once each, so that there are not more ranges than pages.
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

    /// Who will [`run`](Self::run): named before anybody may wake it. Without a thread nothing is prepared.
    pub(super) fn set_thread(&self, thread: Thread) {
        self.thread.get_or_init(|| thread);
    }

    /// Takes in a piece of the source's map.
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
            self.incoming.check(range).map_err(ReceiveError::Pages)?;
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

    /// So many bytes of guest memory have arrived.
    pub(super) fn arrived(&self, bytes: u64) {
        self.arrived.fetch_add(bytes, Ordering::Relaxed);
        self.wake();
    }

    /// All pages of a round have arrived: those that were named, if any were, among them.
    pub(super) fn round_ended(&self) {
        if self.lock().is_begun() {
            self.stop();
        }
    }

    /// The thread's work, until [`Populate::stop`].
    pub(super) fn run(&self) {
        while !self.is_stopped() {
            let Some(piece) = self.next() else {
                // Whoever changes something wakes the thread afterwards, or has done so already.
                thread::park();
                continue;
            };
            // Where pages arrive already a stream is at work: two threads that fault in the same memory are no
            // faster than one.
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

    /// Ends the thread: everything has arrived, or it is over.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.wake();
    }

    /// What to prepare now; nothing if there is nothing, or if the thread is far enough ahead.
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
    /// Whether anything was ever to be done.
    fn is_begun(&self) -> bool {
        self.taken > 0 || !self.todo.is_empty()
    }

    /// Adds a range, to the last one if it goes on where that ends.
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
        populate.arrived(PIECE);
        assert_eq!(taken().len(), 1);
        populate.arrived(LEAD);
        assert_eq!(taken().last().map(|piece| piece.gpa + piece.len), Some(last));
        populate.add(&[span(0, PAGE_SIZE)]).unwrap();
        assert_eq!(taken().len(), 1);
        assert!(populate.add(&[span(last, PAGE_SIZE)]).is_err());
    }
}
