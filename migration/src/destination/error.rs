use migration_io::MemoryIoError;

use crate::link::LinkError;
use crate::page_set::PageSetError;
use crate::ports::{Difference, MachineError};

/// Why no machine was received, or does not run.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The conversation with the source ended, by its fault, by ours or by somebody's wish.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// No version of the protocol is known to both.
    #[error("the source speaks protocol versions {theirs} (godwit {release}), expected one of {ours}")]
    Version {
        /// Versions of this program.
        ours: String,
        /// Versions of the source.
        theirs: String,
        /// The source's release.
        release: String,
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
        /// What it says.
        #[source]
        source: MachineError,
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
    /// Guest memory cannot be read or written.
    #[error("guest memory cannot be reached")]
    Memory(#[from] MemoryIoError),
    /// The engine or the machine panicked before "go".
    #[error("panicked: {0}")]
    Panic(String),
    /// Nobody could be waited for, or somebody asked not to.
    #[error(transparent)]
    Transport(#[from] crate::transport::TransportError),
    /// The system gave no thread.
    #[error("no thread for keep-alives")]
    Thread(#[source] std::io::Error),
    /// After "go" the machine could not be let run; it is kept, paused.
    #[error("\"go\" came, but the guest does not run; it is kept here, paused")]
    NotResumed(#[source] MachineError),
}

impl ReceiveError {
    /// Whether "go" had come: the machine is kept here, paused, and the source will not run it.
    pub fn is_committed(&self) -> bool {
        matches!(self, ReceiveError::NotResumed(_))
    }
}
