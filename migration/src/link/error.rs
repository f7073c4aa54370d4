//! What can go wrong between the two sides.

use std::io;
use std::time::Duration;

use migration_io::MemoryIoError;

use crate::control::Interruption;
use crate::protocol::ProtocolError;

/// Why a conversation with the peer ended.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// This side was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The guest was paused for too long on this side.
    #[error(
        "the guest stood still for {} ms, the longest that it may: it was let run on here",
        limit.as_millis()
    )]
    PausedTooLong {
        /// How long it may stand still.
        limit: Duration,
    },
    /// The peer was silent, or took no data, for too long.
    #[error("timed out after {} ms waiting for {what}", after.as_millis())]
    TimedOut {
        /// What was waited for, or being sent.
        what: &'static str,
        /// How long.
        after: Duration,
    },
    /// The peer closed the connection.
    #[error("the peer closed the connection (expected {what})")]
    Closed {
        /// What was waited for, or being sent.
        what: &'static str,
    },
    /// The connection broke, or guest memory could not be moved.
    #[error("connection lost, or memory not reachable, at {what}")]
    Io {
        /// What was waited for, or being sent.
        what: &'static str,
        /// Why.
        #[source]
        source: MemoryIoError,
    },
    /// The system refused to wait.
    #[error("cannot wait for the connection")]
    Wait(#[source] io::Error),
    /// The peer sent bytes that mean nothing.
    #[error("the peer does not speak the protocol (expected {expected})")]
    Protocol {
        /// What was waited for.
        expected: &'static str,
        /// What is wrong with the bytes.
        #[source]
        source: ProtocolError,
    },
    /// The peer sent a frame out of turn.
    #[error("the peer said {got:?}, expected {expected}")]
    Unexpected {
        /// What was waited for.
        expected: &'static str,
        /// What came.
        got: &'static str,
    },
    /// The peer gave up.
    #[error("the peer {}: {reason}", if *cancelled { "was cancelled" } else { "gave up" })]
    Aborted {
        /// Whether the peer was cancelled.
        cancelled: bool,
        /// Why.
        reason: String,
    },
    /// Half a frame was sent before, so that the peer would take whatever follows for the rest of it.
    #[error("{what} cannot be sent: an earlier frame was sent in part only")]
    Torn {
        /// What.
        what: &'static str,
    },
    /// Something of ours is too long for the protocol.
    #[error("{what} cannot be sent")]
    TooLong {
        /// What.
        what: &'static str,
        /// The limit.
        #[source]
        source: ProtocolError,
    },
    /// Something of ours cannot be written as bytes.
    #[error("{what} cannot be sent")]
    Encode {
        /// What.
        what: &'static str,
        /// What the encoder says.
        #[source]
        source: postcard::Error,
    },
}

impl LinkError {
    /// Whether the peer sent an abort.
    pub(crate) fn is_abort(&self) -> bool {
        matches!(self, LinkError::Aborted { .. })
    }

    /// Whether this side ended the migration: a cancel, or the limit of the pause.
    pub(super) fn is_interruption(&self) -> bool {
        matches!(self, LinkError::Cancelled | LinkError::PausedTooLong { .. })
    }

    pub(super) fn moving(what: &'static str, error: MemoryIoError) -> Self {
        match error {
            MemoryIoError::Closed => LinkError::Closed { what },
            source => LinkError::Io { what, source },
        }
    }
}

impl From<Interruption> for LinkError {
    fn from(interruption: Interruption) -> Self {
        match interruption {
            Interruption::Cancelled => LinkError::Cancelled,
            Interruption::PausedTooLong(limit) => LinkError::PausedTooLong { limit },
        }
    }
}
