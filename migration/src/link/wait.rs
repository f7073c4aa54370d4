//! Waits for a socket. Every wait has an end: a deadline, or a wake-up by the migration's `Control`.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::LinkError;
use crate::transport::Connection;

/// What is waited for on the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Data to read.
    Data,
    /// Room to write, or data to read, which then is an interruption.
    Room,
    /// Room to write, whatever the peer sends.
    RoomAlone,
    /// Completions of what was sent.
    Completions,
}

impl Wanted {
    /// The same without interruptions.
    pub(super) fn alone(self) -> Self {
        if self == Wanted::Room {
            Wanted::RoomAlone
        } else {
            self
        }
    }
}

/// How long to wait for a peer. The time begins anew when a quantum of bytes has moved, not with each byte.
#[derive(Clone, Debug)]
pub(super) struct Patience {
    span: Duration,
    deadline: Instant,
    moved: usize,
    /// The end of the wait, however many bytes move.
    limit: Option<Instant>,
}

impl Patience {
    /// Bytes that have to move within the time for it to begin anew.
    pub(super) const QUANTUM: usize = 64 << 10;

    pub(super) fn new(span: Duration) -> Self {
        Self {
            span,
            deadline: Instant::now() + span,
            moved: 0,
            limit: None,
        }
    }

    /// The same, but not beyond `limit`.
    pub(super) fn by(self, limit: Instant) -> Self {
        Self {
            limit: Some(limit),
            ..self
        }
    }

    /// Counts bytes that have moved.
    pub(super) fn reward(&mut self, bytes: usize) {
        self.moved += bytes;
        if self.moved >= Self::QUANTUM {
            *self = Self {
                limit: self.limit,
                ..Self::new(self.span)
            };
        }
    }
}

/// Waits until the connection has what is wanted, `wake` is readable (an error), or time is up (an error).
/// Returns whether there is data to read although room to write was wanted.
pub(super) fn wait(
    connection: &Connection,
    wanted: Wanted,
    wake: Option<BorrowedFd<'_>>,
    patience: &Patience,
    what: &'static str,
) -> Result<bool, LinkError> {
    let flags = match wanted {
        Wanted::Data => PollFlags::IN,
        Wanted::Room => PollFlags::IN | PollFlags::OUT,
        Wanted::RoomAlone => PollFlags::OUT,
        // The kernel reports them as an error, which `poll` always returns.
        Wanted::Completions => PollFlags::empty(),
    };
    let socket = connection.as_fd();
    let mut events = vec![PollFd::from_borrowed_fd(socket, flags)];
    events.extend(wake.map(|wake| PollFd::from_borrowed_fd(wake, PollFlags::IN)));
    loop {
        let end = patience
            .limit
            .map_or(patience.deadline, |limit| limit.min(patience.deadline));
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(LinkError::TimedOut {
                what,
                after: patience.span,
            });
        }
        match poll(&mut events, Some(&timespec(left))) {
            Ok(0) | Err(Errno::INTR) => continue,
            Ok(_) => {}
            Err(error) => return Err(LinkError::Wait(error.into())),
        }
        if events.get(1).is_some_and(|wake| !wake.revents().is_empty()) {
            return Err(LinkError::Cancelled);
        }
        let seen = events[0].revents();
        // Completions are announced as an error; without one, a connection that has ended would wake this for ever.
        if wanted == Wanted::Completions && seen.contains(PollFlags::HUP) && !seen.contains(PollFlags::ERR) {
            return Err(LinkError::Closed { what });
        }
        return Ok(wanted == Wanted::Room && seen.contains(PollFlags::IN));
    }
}

/// Waits until the connection has something to read (or has ended), one of `others` is readable, or until a
/// moment. Returns whether it is the connection.
pub(super) fn wait_with(
    connection: &Connection,
    others: &[BorrowedFd<'_>],
    until: Option<Instant>,
) -> Result<bool, LinkError> {
    let mut events = vec![PollFd::new(connection, PollFlags::IN)];
    events.extend(others.iter().map(|fd| PollFd::new(fd, PollFlags::IN)));
    let left = until.map(|until| timespec(until.saturating_duration_since(Instant::now())));
    match poll(&mut events, left.as_ref()) {
        Ok(_) => Ok(!events[0].revents().is_empty()),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(LinkError::Wait(error.into())),
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec::try_from(duration).unwrap_or(Timespec {
        tv_sec: i64::MAX,
        tv_nsec: 0,
    })
}
