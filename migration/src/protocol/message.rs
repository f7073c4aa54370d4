//! The messages of the control connection and the greetings of all connections; the order of the variants is the
//! wire's.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use super::Span;
use crate::ports::{Difference, MachineDescription, OfferedDisks};

/// Versions of the protocol that this program supports.
const VERSIONS: RangeInclusive<u16> = 6..=6;
const MAGIC: [u8; 8] = *b"GODWITMG";

/// Most ranges in one piece of [`Message::Populated`]; fits its frame.
pub(crate) const MAX_SPANS: usize = 32 << 10;

/// Names one migration, so that only its own connections join it. Chosen at random by the destination.
pub(crate) type Token = [u8; 16];

/// A control message. The order of the variants is the wire format: new ones go to the end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Message {
    /// Either side's first message on every connection. Its layout is the same in all versions.
    Hello(Hello),
    /// Source: this is the control connection of a new migration.
    Begin(Features),
    /// Destination: the migration begins; these are the features to be used.
    Session {
        /// The migration's name.
        token: Token,
        /// The features that both sides have.
        features: Features,
    },
    /// Source, on a connection of its own: this is data stream `index` of a migration under way.
    Join {
        /// The migration's name.
        token: Token,
        /// Counted from 0.
        index: u32,
    },
    /// Destination: the stream is expected.
    Joined,
    /// Source, on a connection of its own, after "ready": what became of the machine? A destination that had no
    /// "go" by then gives it up.
    Ask(Token),
    /// Destination: the answer.
    AttemptOutcome(AttemptOutcome),
    /// Source: measure the round trip.
    Ping,
    /// Destination: the answer.
    Pong,
    /// Source: this is the machine, and this is how it will come.
    Describe {
        /// The machine.
        machine: MachineDescription,
        /// How its memory comes.
        transfer: MemoryTransfer,
        /// What becomes of its disks.
        disks: OfferedDisks,
    },
    /// Source, in a handover: this frame carries a file descriptor for each region of memory.
    MemoryFiles,
    /// Destination: the machine is built and waits for its memory.
    Accept {
        /// The devices whose disks are to come along, ascending.
        disks: Vec<u32>,
    },
    /// Destination: the machine cannot run here.
    Refuse(Vec<Difference>),
    /// Source: these ranges of memory may hold something, all others are zero or were sent. Each once, in
    /// pieces, in the order in which the next round will send them.
    Populated(Vec<Span>),
    /// Source, on every stream and on the control connection: all pages of a round were sent.
    RoundEnd(u32),
    /// Destination: all pages of this round are in memory.
    RoundAck(u32),
    /// Destination: what was sent as a rehearsal was restored.
    Rehearsed {
        /// How long that took, in nanoseconds.
        restore_ns: u64,
        /// How long it will take to let the guest run, as far as that could be tried, in nanoseconds.
        resume_ns: u64,
    },
    /// Source: nothing writes memory now on its side; asks for the digest of the destination's.
    DigestRequest,
    /// Destination: the digest of memory, and of disks that come along.
    Digest(u128),
    /// Destination: the state is restored; "go" is all that is missing.
    Ready {
        /// How long the restore took, in nanoseconds.
        restore_ns: u64,
    },
    /// Source: the machine is the destination's. The point of no return.
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
    /// Source: it knows that the guest runs at the destination, and will not ask.
    Farewell,
    /// Either side, before "go": this migration is over.
    Abort {
        /// Whether the sender was cancelled.
        cancelled: bool,
        /// Why.
        reason: String,
    },
    /// Either side: the sender is still at work.
    KeepAlive,
}

/// What a side can do beyond the least that its version demands; unknown bits are ignored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Features(pub(crate) u64);

impl Features {
    /// Pages compressed with lz4.
    pub(crate) const LZ4: Self = Self(1);
    /// Pages compressed with zstd.
    pub(crate) const ZSTD: Self = Self(2);
    /// Memory handed over as files.
    pub(crate) const HANDOVER: Self = Self(4);
    /// Everything that this program can do.
    pub(crate) const OURS: Self = Self(Self::LZ4.0 | Self::ZSTD.0 | Self::HANDOVER.0);

    /// The features that both have.
    pub(crate) fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether all of these features are among them.
    pub(crate) fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// How a machine's memory comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum MemoryTransfer {
    /// As pages over so many data streams, 1 to [`crate::MAX_STREAMS`].
    Streams(u32),
    /// As files, right after the description.
    Handover,
}

/// What the destination knows about a migration.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) enum AttemptOutcome {
    /// The guest runs there.
    Runs,
    /// "go" came, but the guest does not run; the machine is kept there.
    Kept {
        /// Why.
        reason: String,
    },
    /// The machine was given up there, and "go" does not count any more.
    GaveUp,
    /// There is no such migration.
    Unknown,
}

/// The first message of either side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Hello {
    magic: [u8; 8],
    /// The oldest version of the protocol that the sender supports.
    oldest: u16,
    /// The newest one.
    newest: u16,
    /// Version of the program, for errors.
    pub(crate) release: String,
}

impl Hello {
    /// The hello of this program.
    pub(crate) fn ours() -> Self {
        Self {
            magic: MAGIC,
            oldest: *VERSIONS.start(),
            newest: *VERSIONS.end(),
            release: env!("CARGO_PKG_VERSION").into(),
        }
    }

    /// The version to use with a peer that sent this: the newest that both support.
    pub(crate) fn common_version(&self) -> Option<u16> {
        let version = self.newest.min(*VERSIONS.end());
        (self.magic == MAGIC && version >= self.oldest && VERSIONS.contains(&version)).then_some(version)
    }

    /// The peer's versions, for errors.
    pub(crate) fn versions(&self) -> String {
        if self.magic == MAGIC {
            format!("{} to {}", self.oldest, self.newest)
        } else {
            format!("none (magic {:02x?})", self.magic)
        }
    }
}

impl Message {
    /// The message's name, for errors.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Message::Hello(_) => "hello",
            Message::Begin(_) => "begin",
            Message::Session { .. } => "session",
            Message::Join { .. } => "join",
            Message::Joined => "joined",
            Message::Ask(_) => "ask",
            Message::AttemptOutcome(_) => "outcome",
            Message::Ping => "ping",
            Message::Pong => "pong",
            Message::Describe { .. } => "describe",
            Message::MemoryFiles => "memory files",
            Message::Accept { .. } => "accept",
            Message::Refuse(_) => "refuse",
            Message::Populated(_) => "populated",
            Message::RoundEnd(_) => "round end",
            Message::RoundAck(_) => "round ack",
            Message::Rehearsed { .. } => "rehearsed",
            Message::DigestRequest => "digest request",
            Message::Digest(_) => "digest",
            Message::Ready { .. } => "ready",
            Message::Go { .. } => "go",
            Message::Resumed { .. } => "resumed",
            Message::ResumeFailed { .. } => "resume failed",
            Message::Farewell => "farewell",
            Message::Abort { .. } => "abort",
            Message::KeepAlive => "keep-alive",
        }
    }
}
