//! Asks the destination what became of a machine: after "go" without an answer, and after a failure of which the
//! destination may not know.
//!
//! Only the destination's answer changes who may run the guest: a question that fails, or an answer that does not say,
//! leaves everything as it is.

use std::time::{Duration, Instant};

use super::handshake::{exchange_hello, unexpected};
use super::remains::undo_step;
use super::{MigrateError, SourceJob};
use crate::commit::{Ruling, Withdrawn};
use crate::control::Control;
use crate::link::Link;
use crate::options::MAX_PAUSE;
use crate::protocol::{AttemptOutcome, Message, Token};
use crate::text::{chain, clean};
use crate::transport::{Connection, Endpoint, TransportError};

/// A migration whose outcome only the destination knows: where to ask for it, and by which name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Doubt {
    endpoint: Endpoint,
    token: Token,
}

/// The destination's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The guest runs there: it was moved.
    Runs,
    /// "go" came, but the guest does not run; the destination keeps it, paused.
    Kept {
        /// Why.
        reason: String,
    },
    /// "go" did not come, and will not count if it still does: the destination threw the machine away, which may run at
    /// the source.
    GaveUp,
    /// The destination knows nothing of this migration.
    Unknown,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// No receiver answers at the endpoint.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The conversation broke off, or was not one.
    #[error("no answer from {endpoint}: {reason}")]
    Conversation {
        /// Where the question went.
        endpoint: Endpoint,
        /// What happened.
        reason: String,
    },
    /// This process is out of file descriptors.
    #[error("cannot ask")]
    Control(#[source] std::io::Error),
}

impl Doubt {
    pub(super) fn new(endpoint: Endpoint, token: Token) -> Self {
        Self { endpoint, token }
    }

    /// Asks the destination. Takes at most `timeout` for the connection, and as long again for each part of the answer.
    /// After an error the question may or may not have arrived: ask again.
    pub fn ask(&self, timeout: Duration) -> Result<Answer, AskError> {
        Ok(match self.outcome(timeout)? {
            AttemptOutcome::Runs => Answer::Runs,
            AttemptOutcome::Kept { reason } => Answer::Kept {
                reason: clean(&reason),
            },
            AttemptOutcome::GaveUp => Answer::GaveUp,
            AttemptOutcome::Unknown => Answer::Unknown,
        })
    }

    /// The destination's endpoint.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn outcome(&self, timeout: Duration) -> Result<AttemptOutcome, AskError> {
        let control = Control::new().map_err(AskError::Control)?;
        let connection = Connection::connect(&self.endpoint, timeout, &control)?;
        let mut link = Link::new(&connection, &control, timeout, timeout);
        self.exchange(&mut link).map_err(|error| AskError::Conversation {
            endpoint: self.endpoint.clone(),
            reason: chain(&error),
        })
    }

    fn exchange(&self, link: &mut Link<'_>) -> Result<AttemptOutcome, MigrateError> {
        exchange_hello(link)?;
        link.send(&Message::Ask(self.token))?;
        match link.receive_message("outcome")? {
            Message::AttemptOutcome(outcome) => Ok(outcome),
            other => Err(unexpected("outcome", &other)),
        }
    }
}

/// The error where an operator let the guest run at the destination before the source could withdraw it.
pub(super) const RUNS_TWICE: &str = "an operator has the guest run at the destination, where it ran on while it was taken \
                          back here: this copy is paused";

/// The pause between two questions.
const ASK_AGAIN: Duration = Duration::from_millis(200);

impl SourceJob<'_> {
    /// "go" was sent and its answer did not come: asks the destination for as long as a peer may be silent. Only its
    /// answer can give the guest back to the source.
    pub(super) fn settle_doubt(&mut self, error: MigrateError) -> Result<(), MigrateError> {
        if matches!(error, MigrateError::NotResumed { .. }) {
            return Err(error);
        }
        let until = Instant::now() + self.options.io_timeout;
        let outcome = loop {
            match self.ask() {
                Some(outcome) => break outcome,
                None if Instant::now() + ASK_AGAIN >= until => return Err(error),
                None => std::thread::sleep(ASK_AGAIN),
            }
        };
        match (self.standing.claim.answer(&outcome), outcome) {
            (Ruling::Moved, _) => {
                tracing::warn!(
                    error = chain(&error),
                    "the guest runs at the destination all the same"
                );
                self.report.add_error(&format!(
                    "moved, but how long the guest stood still is not known: {}",
                    chain(&error)
                ));
                Ok(())
            }
            (Ruling::Resume, _) => {
                self.undo(true);
                Err(MigrateError::GivenUp(Box::new(error)))
            }
            (Ruling::StillInDoubt, AttemptOutcome::Kept { reason }) => Err(MigrateError::NotResumed {
                reason: clean(&reason),
            }),
            (Ruling::StillInDoubt, _) => Err(error),
        }
    }

    /// The guest runs at the source again, but the destination may be ready and may not have received the abort: a
    /// question makes it give the machine up. If an operator had the guest run there before that, it is paused here.
    pub(super) fn withdraw(&mut self) {
        let withdrawn = self.ask().map_or(Withdrawn::StillWaits, |outcome| {
            self.standing.claim.withdrawn(&outcome)
        });
        let error = match withdrawn {
            Withdrawn::Done => return,
            Withdrawn::RunsTwice => {
                self.pause_again();
                RUNS_TWICE
            }
            Withdrawn::StillWaits => {
                self.unanswered = true;
                "the destination may wait for \"go\", and could not be told that none will come"
            }
        };
        tracing::warn!(to = %self.to, "{error}");
        self.report.add_error(error);
    }

    fn pause_again(&mut self) {
        if let Some(error) = undo_step(self.source, "pause", |source| {
            source.pause(Instant::now() + MAX_PAUSE).map(|_| ())
        }) {
            tracing::error!(%error, "the guest runs on here although it runs at the destination");
            self.report.add_error(&error);
        }
    }

    fn ask(&self) -> Option<AttemptOutcome> {
        let doubt = Doubt::new(self.to.clone(), self.token?);
        let asked = doubt.outcome(self.options.connect_timeout.min(self.options.io_timeout));
        asked
            .inspect_err(|error| tracing::debug!(error = chain(error), "asked in vain"))
            .ok()
    }
}
