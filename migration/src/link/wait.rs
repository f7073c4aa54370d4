//! Waiting for a socket, with an end.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::LinkError;
use crate::transport::Connection;

/// What the socket is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Data to read.
    Data,
    /// Room to write, or data to read, which then is an interruption.
    Room,
    /// Room to write, whatever the peer says.
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

/// How long to wait for a peer. A peer gains time by moving a quantum of bytes, not by moving one.
#[derive(Clone, Debug)]
pub(super) struct Patience {
    span: Duration,
    deadline: Instant,
    moved: usize,
    /// However much it moves.
    limit: Option<Instant>,
}

impl Patience {
    /// Bytes that the peer has to move within the time to get it anew.
    pub(super) const QUANTUM: usize = 64 << 10;

    pub(super) fn new(span: Duration) -> Self {
        Self {
            span,
            deadline: Instant::now() + span,
            moved: 0,
            limit: None,
        }
    }

    /// The same, but not beyond a moment.
    pub(super) fn by(self, limit: Instant) -> Self {
        Self {
            limit: Some(limit),
            ..self
        }
    }

    /// Bytes were moved.
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
        // They are reported as an error, which needs no asking.
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
/// moment. Answers whether it is the connection.
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
