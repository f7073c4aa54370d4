use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use crate::ports::{Difference, MachineDescription};

/// Versions of the protocol that this program speaks.
const VERSIONS: RangeInclusive<u16> = 1..=1;
const MAGIC: [u8; 8] = *b"GODWITMG";

/// A control message. The order of the variants is the wire format: new ones go to the end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Message {
    /// Either side's first message. Its layout is the same in all versions.
    Hello(Hello),
    /// Source: measure the round trip.
    Ping,
    /// Destination: the answer.
    Pong,
    /// Source: this is the machine.
    Describe(MachineDescription),
    /// Destination: the machine is built and waits for its memory.
    Accept,
    /// Destination: the machine cannot run here.
    Refuse(Vec<Difference>),
    /// Source: all pages of a round were sent.
    RoundEnd(u32),
    /// Destination: they are all in memory.
    RoundAck(u32),
    /// Source: nothing writes my memory now; what is yours?
    DigestRequest,
    /// Destination: xxh3-128 of all regions in order.
    Digest(u128),
    /// Destination: the state is restored; "go" is all that is missing.
    Ready {
        /// How long the restore took, in nanoseconds.
        restore_ns: u64,
    },
    /// Source: the machine is yours. The point of no return.
    Go {
        /// Time since the pause, in nanoseconds.
        stopped_for_ns: u64,
        /// The round trip, in nanoseconds.
        round_trip_ns: u64,
    },
    /// Destination: the guest runs.
    Resumed {
        /// How long that took after "go", in nanoseconds.
        resume_ns: u64,
    },
    /// Destination, after "go": the guest does not run; the machine is kept, paused.
    ResumeFailed {
        /// Why.
        reason: String,
    },
    /// Either side, before "go": this migration is over.
    Abort {
        /// Whether somebody asked for it.
        cancelled: bool,
        /// Why.
        reason: String,
    },
    /// Either side: still at it.
    KeepAlive,
}

/// The first message of either side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Hello {
    magic: [u8; 8],
    oldest: u16,
    newest: u16,
    /// Version of the program, for messages.
    pub(crate) release: String,
}

impl Hello {
    /// What this program says.
    pub(crate) fn ours() -> Self {
        Self {
            magic: MAGIC,
            oldest: *VERSIONS.start(),
            newest: *VERSIONS.end(),
            release: env!("CARGO_PKG_VERSION").into(),
        }
    }

    /// The version to speak with a peer that said this: the newest that both know.
    pub(crate) fn common_version(&self) -> Option<u16> {
        let version = self.newest.min(*VERSIONS.end());
        (self.magic == MAGIC && version >= self.oldest && VERSIONS.contains(&version)).then_some(version)
    }

    /// The peer's versions, for messages.
    pub(crate) fn versions(&self) -> String {
        if self.magic == MAGIC {
            format!("{} to {}", self.oldest, self.newest)
        } else {
            format!("none (magic {:02x?})", self.magic)
        }
    }
}

impl Message {
    /// The message's name, for messages about messages.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Message::Hello(_) => "hello",
            Message::Ping => "ping",
            Message::Pong => "pong",
            Message::Describe(_) => "describe",
            Message::Accept => "accept",
            Message::Refuse(_) => "refuse",
            Message::RoundEnd(_) => "round end",
            Message::RoundAck(_) => "round ack",
            Message::DigestRequest => "digest request",
            Message::Digest(_) => "digest",
            Message::Ready { .. } => "ready",
            Message::Go { .. } => "go",
            Message::Resumed { .. } => "resumed",
            Message::ResumeFailed { .. } => "resume failed",
            Message::Abort { .. } => "abort",
            Message::KeepAlive => "keep-alive",
        }
    }
}
