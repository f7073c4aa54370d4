//! The supervisor's worker threads: how they start, and how it waits for their ends, but never for ever.

use std::convert::Infallible;
use std::io;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use migration::Control;
use threads::{Role, Thread};

/// How long a worker may take to end: longer than all of its own waits, so that one that takes longer hangs in a call.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// A thread whose end is waited for, but not for ever.
pub(super) struct Worker {
    thread: Thread,
    /// Disconnected once the thread is about to end.
    ended: mpsc::Receiver<Infallible>,
}

impl Worker {
    /// Starts a thread with this role and name.
    pub(super) fn start(role: Role, name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let (at_work, ended) = mpsc::channel();
        let thread = threads::spawn(role, name, move || {
            let _at_work = at_work;
            work();
        })?;
        Ok(Self { thread, ended })
    }

    /// Waits for the thread's end: what it holds (a listening socket, the machine) is then gone.
    pub(super) fn join(self) {
        self.join_within(END_TIMEOUT);
    }

    /// Waits for the thread's end, but leaves a thread behind that hangs, for example in a write to a disk that is gone: it must not hold
    /// up the end of the process, and ends with it.
    pub(super) fn join_within(self, at_most: Duration) {
        if self.ended.recv_timeout(at_most) == Err(mpsc::RecvTimeoutError::Timeout) {
            let name = self.thread.thread().name().unwrap_or_default().to_owned();
            tracing::error!("the job {name:?} hangs; it is left alone");
            return;
        }
        // A panic in it has been reported by the panic hook.
        let _ = self.thread.join();
    }
}

/// A worker that can be cancelled.
pub(super) struct Job {
    pub(super) control: Arc<Control>,
    worker: Worker,
}

impl Job {
    pub(super) fn start(
        role: Role,
        name: &str,
        control: Arc<Control>,
        work: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let worker = Worker::start(role, name, work)?;
        Ok(Self { control, worker })
    }

    /// Cancels the job and waits for its end.
    pub(super) fn end(self) {
        self.control.cancel();
        self.worker.join();
    }
}
