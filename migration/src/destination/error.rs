//! Why a machine was not received.

use migration_io::{CompressionError, MemoryIoError};

use crate::link::LinkError;
use crate::page_set::PageSetError;
use crate::ports::{Difference, PortError};

/// Why no machine was received, or does not run.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The exchange with the source ended: a fault of either side, or a cancel.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A data stream failed.
    #[error("data stream {index}")]
    Stream {
        /// Its number, from 0.
        index: usize,
        /// What happened.
        #[source]
        source: LinkError,
    },
    /// The machine cannot run here.
    #[error("the machine cannot run here: {}", crate::text::list(differences))]
    Refused {
        /// Why; never empty.
        differences: Vec<Difference>,
    },
    /// The machine failed at something, before "go".
    #[error("the machine's {call} failed")]
    Machine {
        /// The call of [`crate::Destination`].
        call: &'static str,
        /// The machine's error.
        #[source]
        source: PortError,
    },
    /// The description's memory is not made of ordered whole pages.
    #[error("the source's memory map is not allowed")]
    MemoryMap(#[source] PageSetError),
    /// The machine that was built has other memory than was described.
    #[error("the machine that was built has another memory map than was asked for")]
    OtherMemory,
    /// Pages that are not within guest memory.
    #[error("the source sent pages that are not in guest memory")]
    Pages(#[source] PageSetError),
    /// A piece of the map of populated pages that is empty, or names a page again.
    #[error(
        "expected ranges of whole pages, each page once, in the map of populated pages, got {gpa:#x}+{len:#x}"
    )]
    Populated {
        /// First guest-physical address.
        gpa: u64,
        /// Bytes.
        len: u64,
    },
    /// A block of compressed pages is not what was announced.
    #[error("a block of compressed pages cannot be unpacked")]
    Compressed(#[from] CompressionError),
    /// The source ended a round on a stream out of order.
    #[error("the source ended round {got} on a stream, expected round {expected}")]
    Round {
        /// The round that was to end.
        expected: u32,
        /// The one that the source named.
        got: u32,
    },
    /// More or fewer streams than a migration may have.
    #[error("the source wants {got} data streams, expected 1 to {most}")]
    StreamCount {
        /// The most.
        most: u32,
        /// How many the source wants.
        got: u32,
    },
    /// Memory cannot be handed over on this connection, or not with what came.
    #[error("memory cannot be handed over: expected {expected}, got {got}")]
    Handover {
        /// What a handover needs.
        expected: String,
        /// What there was.
        got: String,
    },
    /// The source asked for the outcome before it sent "go": the machine was given up.
    #[error("the source asked for the machine without having said \"go\"; it was given up")]
    GivenUp,
    /// An operator discarded the machine while it waited for "go".
    #[error("discarded by an operator")]
    Discarded,
    /// Guest memory cannot be read or written.
    #[error("guest memory cannot be reached")]
    Memory(#[from] MemoryIoError),
    /// The engine or the machine panicked before "go".
    #[error("panicked: {0}")]
    Panic(String),
    /// The receiver cannot wait for a source, or was cancelled meanwhile.
    #[error(transparent)]
    Transport(#[from] crate::transport::TransportError),
    /// Threads of a failed attempt hang in writes. They keep the memory and the disks that they were to fill, so
    /// another attempt could leave more of them.
    #[error("{streams} data streams hang in a write to a disk or to memory; nothing more is received here")]
    Hang {
        /// How many.
        streams: usize,
    },
    /// The kernel cannot start a thread.
    #[error("no thread")]
    Thread(#[source] std::io::Error),
    /// After "go" the machine could not be let run; it is kept, paused.
    #[error("\"go\" came, but the guest does not run; it is kept here, paused")]
    NotResumed(#[source] PortError),
}

impl ReceiveError {
    /// Whether this receiver can make no other attempt.
    pub fn is_final(&self) -> bool {
        matches!(self, ReceiveError::Transport(_) | ReceiveError::Hang { .. })
    }

    /// Whether "go" had come: the machine is kept here, paused, and the source will not run it.
    pub fn is_committed(&self) -> bool {
        matches!(self, ReceiveError::NotResumed(_))
    }
}

/// Adds the name of the machine's call to its error.
pub(super) fn call<T>(call: &'static str, result: Result<T, PortError>) -> Result<T, ReceiveError> {
    result.map_err(|source| ReceiveError::Machine { call, source })
}
