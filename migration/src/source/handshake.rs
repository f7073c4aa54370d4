use std::time::{Duration, Instant};

use super::{Job, MigrateError};

use crate::link::{Link, LinkError};
use crate::protocol::{Hello, Message};
use crate::text::clean;

/// The first exchange also wakes the peer's threads and fills caches; the least of a few is the round trip.
const PINGS: usize = 4;

impl Job<'_> {
    /// Agrees with the destination on version and machine. Returns the round trip.
    pub(super) fn handshake(&mut self, link: &mut Link<'_>) -> Result<Duration, MigrateError> {
        link.send(&Message::Hello(Hello::ours()))?;
        let theirs = match link.receive_message("hello")? {
            Message::Hello(hello) => hello,
            other => return Err(unexpected("hello", &other)),
        };
        if theirs.common_version().is_none() {
            let release = clean(&theirs.release);
            let (ours, theirs) = (Hello::ours().versions(), theirs.versions());
            return Err(MigrateError::Version {
                ours,
                theirs,
                release,
            });
        }
        let mut round_trip = Duration::MAX;
        for _ in 0..PINGS {
            let sent = Instant::now();
            link.send(&Message::Ping)?;
            match link.receive_message("pong")? {
                Message::Pong => round_trip = round_trip.min(sent.elapsed()),
                other => return Err(unexpected("pong", &other)),
            }
        }
        link.send(&Message::Describe(self.source.describe()))?;
        match link.receive_message("accept or refuse")? {
            Message::Accept => Ok(round_trip),
            Message::Refuse(differences) => Err(MigrateError::Refused { differences }),
            other => Err(unexpected("accept or refuse", &other)),
        }
    }
}

/// The error for a message that was not its turn.
pub(super) fn unexpected(expected: &'static str, got: &Message) -> MigrateError {
    LinkError::Unexpected {
        expected,
        got: got.name(),
    }
    .into()
}
