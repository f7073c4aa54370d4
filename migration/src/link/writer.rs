//! The sending side of a connection: one frame at a time, from the job or from the keep-alive's thread.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use migration_io::{CallProgress, MemoryIoError};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use super::{LinkError, encode_frame};
use crate::protocol::Message;
use crate::transport::Connection;

/// What the senders on a connection share about the frames sent before. Locked for the time of a frame.
#[derive(Debug)]
pub(super) struct FrameWriter {
    state: Mutex<SendState>,
}

#[derive(Debug)]
pub(super) struct SendState {
    /// Whether a frame was sent in part only, so that nothing can follow it. Also set while one is being sent, so
    /// that a panic leaves the truth behind.
    pub(super) torn: bool,
    /// What the system did not take of a keep-alive: goes before the next frame.
    pub(super) rest: Vec<u8>,
    /// When the last frame was sent.
    pub(super) last: Instant,
}

impl FrameWriter {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::new(SendState {
                torn: false,
                rest: Vec::new(),
                last: Instant::now(),
            }),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, SendState> {
        // What a panic left is in `torn`.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends keep-alives on a connection that belongs to a [`super::Link`].
pub(crate) struct Pulse<'a> {
    pub(super) connection: &'a Connection,
    pub(super) writer: Arc<FrameWriter>,
}

impl Pulse<'_> {
    /// Sends a keep-alive if nothing was sent for `interval`. Returns when to call it again. Never waits: if the kernel
    /// accepts nothing, the peer still has earlier bytes to read.
    pub(crate) fn send_if_idle(&self, interval: Duration) -> Duration {
        let mut state = match self.writer.state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(state)) => state.into_inner(),
            // A frame is being sent, which shows as much.
            Err(TryLockError::WouldBlock) => return interval / 2,
        };
        let idle = state.last.elapsed();
        if idle < interval {
            return interval - idle;
        }
        if state.torn {
            return interval;
        }
        let mut whole = 0;
        if state.rest.is_empty()
            && let Ok(frame) = encode_frame(&Message::KeepAlive)
        {
            whole = frame.len();
            state.rest = frame;
        }
        // An error is left to the job, which waits for the peer on the same connection.
        if matches!(state.send_rest(self.connection.as_fd()), Ok(CallProgress::Done)) {
            state.last = Instant::now();
            return interval;
        }
        if state.rest.len() == whole {
            // The kernel accepted nothing, so there is no rest to send.
            state.rest.clear();
        }
        interval / 2
    }

    /// Acts as if the kernel had accepted the beginning of a keep-alive, and not this rest.
    #[cfg(test)]
    pub(crate) fn set_unsent(&self, rest: &[u8]) {
        self.writer.lock().rest = rest.to_vec();
    }
}

impl SendState {
    /// Sends what is left of a keep-alive.
    pub(super) fn send_rest(&mut self, socket: BorrowedFd<'_>) -> Result<CallProgress, MemoryIoError> {
        while !self.rest.is_empty() {
            match send(socket, &self.rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(taken) => drop(self.rest.drain(..taken)),
                Err(Errno::AGAIN) => return Ok(CallProgress::WouldBlock),
                Err(Errno::INTR) => {}
                Err(error) => return Err(MemoryIoError::Socket(error.into())),
            }
        }
        Ok(CallProgress::Done)
    }

    /// Refuses whatever would follow half a frame.
    pub(super) fn check(&self, what: &'static str) -> Result<(), LinkError> {
        if self.torn {
            Err(LinkError::Torn { what })
        } else {
            Ok(())
        }
    }
}
