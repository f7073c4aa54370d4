//! A thread that runs a device's blocking calls one by one, while the device thread goes on.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::time::Timespec;

use crate::wake_event::WakeEvent;

/// How long dropping a helper waits for the current job. A job that takes longer keeps what it owns until it ends.
const END_TIME: Duration = Duration::from_secs(2);

/// Whether a job was cancelled. Long jobs check it from time to time.
pub(crate) struct CancelFlag(Arc<AtomicBool>);

impl CancelFlag {
    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A job, which returns its outcome.
pub(crate) type HelperJob<R> = Box<dyn FnOnce(&CancelFlag) -> R + Send>;

/// A thread and its jobs. Each job has a tag, which comes back with its outcome. The thread is started with the first
/// job.
pub(crate) struct Helper<T, R> {
    name: &'static str,
    has_thread: bool,
    /// Set to cancel the jobs that were pushed since the last [`Helper::cancel`].
    cancelled: Arc<AtomicBool>,
    /// Jobs whose outcome [`Helper::next`] has not returned yet.
    unfinished: usize,
    shared: Arc<HelperShared<T, R>>,
}

struct HelperShared<T, R> {
    state: Mutex<HelperJobs<T, R>>,
    changed: Condvar,
    /// Raised when a job is done.
    event: WakeEvent,
}

struct HelperJobs<T, R> {
    jobs: VecDeque<(T, CancelFlag, HelperJob<R>)>,
    done: VecDeque<(T, Option<R>)>,
    is_busy: bool,
    is_over: bool,
}

impl<T: Send + 'static, R: Send + 'static> Helper<T, R> {
    /// A helper whose thread will have that name.
    pub(crate) fn new(name: &'static str) -> io::Result<Self> {
        let state = HelperJobs {
            jobs: VecDeque::new(),
            done: VecDeque::new(),
            is_busy: false,
            is_over: false,
        };
        Ok(Self {
            name,
            has_thread: false,
            cancelled: Arc::default(),
            unfinished: 0,
            shared: Arc::new(HelperShared {
                state: Mutex::new(state),
                changed: Condvar::new(),
                event: WakeEvent::new()?,
            }),
        })
    }

    /// Queues a job behind those pushed before. Fails if the thread cannot be started.
    pub(crate) fn push(&mut self, tag: T, job: HelperJob<R>) -> io::Result<()> {
        if !self.has_thread {
            let shared = self.shared.clone();
            std::thread::Builder::new()
                .name(self.name.into())
                .spawn(move || shared.work())?;
            self.has_thread = true;
        }
        let cancelled = CancelFlag(self.cancelled.clone());
        self.shared.state().jobs.push_back((tag, cancelled, job));
        self.unfinished += 1;
        self.shared.changed.notify_all();
        Ok(())
    }

    /// The next outcome with its tag; the outcome is `None` if the job panicked.
    pub(crate) fn next(&mut self) -> Option<(T, Option<R>)> {
        self.shared.event.clear();
        let next = self.shared.state().done.pop_front()?;
        self.unfinished -= 1;
        Some(next)
    }

    /// Jobs whose outcome [`Helper::next`] has not returned yet.
    pub(crate) fn len(&self) -> usize {
        self.unfinished
    }

    /// Whether there are no such jobs.
    pub(crate) fn is_empty(&self) -> bool {
        self.unfinished == 0
    }

    /// Drops the jobs that have not begun, and cancels the one that has. Returns the tags of the dropped jobs.
    pub(crate) fn cancel(&mut self) -> Vec<T> {
        std::mem::take(&mut self.cancelled).store(true, Ordering::Relaxed);
        let forgotten = std::mem::take(&mut self.shared.state().jobs);
        self.unfinished -= forgotten.len();
        forgotten.into_iter().map(|(tag, ..)| tag).collect()
    }
}

/// Waits until one of `events` is readable, `until` has come, or a signal is delivered.
pub(crate) fn wait_readable<'a>(
    events: impl IntoIterator<Item = BorrowedFd<'a>>,
    until: Instant,
) -> io::Result<()> {
    let left = until.saturating_duration_since(Instant::now());
    let left = Timespec::try_from(left).map_err(io::Error::other)?;
    let mut events: Vec<_> = events
        .into_iter()
        .map(|event| PollFd::from_borrowed_fd(event, PollFlags::IN))
        .collect();
    match poll(&mut events, Some(&left)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

impl<T, R> AsFd for Helper<T, R> {
    /// Readable when a job is done, until [`Helper::next`] is called.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }
}

impl<T, R> Drop for Helper<T, R> {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
        let mut state = self.shared.state();
        state.jobs.clear();
        state.is_over = true;
        self.shared.changed.notify_all();
        let busy = |state: &mut HelperJobs<T, R>| state.is_busy;
        let waited = self.shared.changed.wait_timeout_while(state, END_TIME, busy);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if state.is_busy {
            tracing::warn!(
                thread = self.name,
                "its last call has not come back after {END_TIME:?}"
            );
        }
    }
}

impl<T, R> HelperShared<T, R> {
    fn state(&self) -> MutexGuard<'_, HelperJobs<T, R>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut state = self.state();
        loop {
            if state.is_over {
                return;
            }
            let Some((tag, cancelled, job)) = state.jobs.pop_front() else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state.is_busy = true;
            drop(state);
            // The panic hook has logged the panic; the device gets `None` as the outcome.
            let outcome = catch_unwind(AssertUnwindSafe(|| job(&cancelled))).ok();
            state = self.state();
            state.is_busy = false;
            state.done.push_back((tag, outcome));
            self.changed.notify_all();
            self.event.raise();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn wait(helper: &Helper<u32, u32>) {
        wait_readable([helper.as_fd()], Instant::now() + Duration::from_secs(10)).unwrap();
    }

    #[test]
    fn jobs_are_done_in_order_and_a_panic_is_an_outcome() {
        let mut helper = Helper::new("helper").unwrap();
        helper.push(1, Box::new(|_| 10)).unwrap();
        helper.push(2, Box::new(|_| panic!("as a job may"))).unwrap();
        helper.push(3, Box::new(|_| 30)).unwrap();
        let mut done = Vec::new();
        while !helper.is_empty() {
            wait(&helper);
            done.extend(std::iter::from_fn(|| helper.next()));
        }
        assert_eq!(done, [(1, Some(10)), (2, None), (3, Some(30))]);
    }

    #[test]
    fn what_was_cancelled_ends_soon_and_the_rest_never_begins() {
        let mut helper = Helper::new("helper").unwrap();
        let (begun, has_begun) = mpsc::channel();
        let long = move |cancelled: &CancelFlag| {
            begun.send(()).unwrap();
            while !cancelled.is_set() {
                std::thread::yield_now();
            }
            1
        };
        helper.push(1, Box::new(long)).unwrap();
        helper.push(2, Box::new(|_| panic!("it was cancelled"))).unwrap();
        has_begun.recv().unwrap();
        assert_eq!(helper.cancel(), [2]);
        // A job that is pushed later is not cancelled.
        helper
            .push(3, Box::new(|cancelled| cancelled.is_set().into()))
            .unwrap();
        let mut done = Vec::new();
        while !helper.is_empty() {
            wait(&helper);
            done.extend(std::iter::from_fn(|| helper.next()));
        }
        assert_eq!(done, [(1, Some(1)), (3, Some(0))]);
    }
}
