//! Asking the destination what became of a machine.

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

/// A migration of which the source knows that it sent "go", and no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Doubt {
    endpoint: Endpoint,
    token: Token,
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
    /// The conversation broke off, or was not one.
    #[error("no answer from {endpoint}: {reason}")]
    Conversation {
        /// Who was asked.
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

    /// Asks. Takes no longer than `timeout` for the connection and as long again for each part of the answer.
    /// Ask again after an error: it may have got through or not.
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

    /// Where the destination listened.
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

/// What has happened when a destination says that its operator was quicker.
pub(super) const RUNS_TWICE: &str = "an operator has the guest run at the destination, where it ran on while it was taken \
                          back here: this copy is paused";

/// Between two attempts.
const ASK_AGAIN: Duration = Duration::from_millis(200);

impl SourceJob<'_> {
    /// "go" was sent and its answer did not come: asks for as long as a peer may be silent. Whether the guest is ours again is the
    /// destination's to say.
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

    /// The guest runs here again, but the destination may be ready and could not be told: asking makes it give
    /// up. An operator there may have been quicker, and then the guest must not run on here.
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
