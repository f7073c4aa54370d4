use std::time::Duration;

use migration_io::MemoryIoError;

use crate::link::LinkError;
use crate::page_set::PageSetError;
use crate::ports::{Difference, MachineError};
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
        source: MachineError,
    },
    #[error("the machine's dirty log does not match its memory")]
    PageSet(#[from] PageSetError),
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
    #[error(
        "downtime would be {predicted:.1?} after {rounds} rounds, budget {budget:.1?}: {remaining} bytes are dirty, \
         the guest dirties {dirty_rate:.0} bytes/s, the connection carries {bandwidth:.0} bytes/s"
    )]
    BudgetMissed {
        predicted: Duration,
        budget: Duration,
        rounds: u32,
        remaining: u64,
        dirty_rate: f64,
        bandwidth: f64,
    },
    #[error("memory differs: the digest is {source_digest:032x} here and {destination_digest:032x} there")]
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
    #[error("the migration engine panicked: {0}")]
    Panic(String),
    #[error("no thread for keep-alives")]
    Thread(#[source] std::io::Error),
}
