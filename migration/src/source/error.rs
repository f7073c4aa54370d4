//! Why a machine was not moved.

use std::time::Duration;

use migration_io::MemoryIoError;

use crate::converge::Miss;
use crate::link::LinkError;
use crate::page_set::PageSetError;
use crate::ports::{Difference, PortError};
use crate::transport::TransportError;

/// Why a machine was not moved. Ends up as text in [`crate::Report::error`].
#[derive(Debug, thiserror::Error)]
pub(crate) enum MigrateError {
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("the machine's {call} failed")]
    Machine {
        call: &'static str,
        #[source]
        source: PortError,
    },
    #[error("the machine's dirty log does not match its memory")]
    PageSet(#[from] PageSetError),
    #[error("pages cannot be compressed")]
    Compression(#[from] migration_io::CompressionError),
    #[error("guest memory cannot be read")]
    Memory(#[from] MemoryIoError),
    #[error("the destination speaks protocol versions {theirs} (godwit {release}), expected one of {ours}")]
    Version {
        ours: String,
        theirs: String,
        release: String,
    },
    #[error("the destination cannot run this machine: {}", crate::text::list(differences))]
    Refused { differences: Vec<Difference> },
    #[error("{0}")]
    Missed(Miss),
    #[error("the disks cannot be copied before the deadline of {deadline:?}")]
    DisksMissDeadline { deadline: Duration },
    #[error("disks that come along: expected {expected}, got {got}")]
    Disks { expected: String, got: String },
    #[error("downtime would be up to {predicted:.1?}, expected at most {budget:.1?}")]
    OverBudget { predicted: Duration, budget: Duration },
    #[error(
        "\"go\" was sent but did not arrive, and the destination gave the machine up: it runs here again"
    )]
    GivenUp(#[source] Box<MigrateError>),
    #[error(
        "memory or disks differ: the digest is {source_digest:032x} here and {destination_digest:032x} there"
    )]
    DigestDiffers {
        source_digest: u128,
        destination_digest: u128,
    },
    #[error("{pages} pages were written after the last copy, expected none")]
    DirtyAtCommit { pages: u64 },
    #[error("\"go\" was sent, and the destination says that it cannot run the guest: {reason}")]
    NotResumed { reason: String },
    #[error("\"go\" was sent, and no answer came")]
    NoAnswer(#[source] LinkError),
    /// Seen by a stream's thread alone.
    #[error("the streams are to end")]
    StreamsEnd,
    #[error("the migration engine panicked: {0}")]
    Panic(String),
    #[error("no thread for keep-alives or for a stream")]
    Thread(#[source] std::io::Error),
}
