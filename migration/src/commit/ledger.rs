//! The destination's half of the commit's rules: what it knows of the machine that is there. No I/O.

use std::collections::VecDeque;

use crate::control::Decision;
use crate::protocol::{AttemptOutcome, Token};

/// What a destination knows about machines: the one that is there, and those that it gave up. The first decision about
/// a machine counts; later ones have no effect.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Ledger {
    stage: Stage,
    /// The latest at the back.
    given_up: VecDeque<Token>,
}

/// How far the machine that is there has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) enum Stage {
    /// There is none.
    #[default]
    Idle,
    /// It is being built and filled: it can be thrown away at any time.
    Filling(Token),
    /// It is complete, and waits for what decides: "go", an abort, a question or an operator.
    Ready(Token),
    /// It is committed to this side, and about to run.
    Committing(Token),
    /// It runs.
    Runs(Token),
    /// It is committed to this side, and does not run.
    Kept {
        /// Its migration.
        token: Token,
        /// Why.
        reason: String,
    },
}

/// How many migrations that were given up are remembered.
const MAX_GIVEN_UP: usize = 64;

impl Ledger {
    pub(crate) fn stage(&self) -> &Stage {
        &self.stage
    }

    /// A migration begins. Returns whether there was room for it.
    pub(crate) fn begin(&mut self, token: Token) -> bool {
        let idle = self.stage == Stage::Idle;
        if idle {
            self.stage = Stage::Filling(token);
        }
        idle
    }

    /// The state is restored; comes before "ready" is sent. Returns whether the machine was not given up meanwhile.
    pub(crate) fn ready(&mut self) -> bool {
        let Stage::Filling(token) = self.stage else {
            return false;
        };
        self.stage = Stage::Ready(token);
        true
    }

    /// "go" came. Returns whether it counts: then the machine is to run.
    pub(crate) fn go(&mut self) -> bool {
        let Stage::Ready(token) = self.stage else {
            return false;
        };
        self.stage = Stage::Committing(token);
        true
    }

    /// An operator decides. Returns whether that counts.
    pub(crate) fn decide(&mut self, decision: Decision) -> bool {
        match (decision, &self.stage) {
            (Decision::Run, _) => self.go(),
            (Decision::Discard, Stage::Ready(_)) => self.discard(),
            (Decision::Discard, _) => false,
        }
    }

    /// The machine is given up: a failure before "ready", or an abort. Returns whether that counts.
    pub(crate) fn discard(&mut self) -> bool {
        let (Stage::Filling(token) | Stage::Ready(token)) = self.stage else {
            return false;
        };
        self.stage = Stage::Idle;
        if self.given_up.len() == MAX_GIVEN_UP {
            self.given_up.pop_front();
        }
        self.given_up.push_back(token);
        true
    }

    /// The guest runs.
    pub(crate) fn resumed(&mut self) {
        if let Stage::Committing(token) = self.stage {
            self.stage = Stage::Runs(token);
        }
    }

    /// The guest could not be let run.
    pub(crate) fn kept(&mut self, reason: String) {
        if let Stage::Committing(token) = self.stage {
            self.stage = Stage::Kept { token, reason };
        }
    }

    /// Answers a source that asks what became of its machine. A machine that is not committed yet is given up by that.
    /// `None` while it is being resumed: there is an answer after [`Ledger::resumed`] or [`Ledger::kept`].
    pub(crate) fn answer(&mut self, token: Token) -> Option<AttemptOutcome> {
        match &self.stage {
            Stage::Filling(ours) | Stage::Ready(ours) if *ours == token => {
                self.discard();
                Some(AttemptOutcome::GaveUp)
            }
            Stage::Committing(ours) if *ours == token => None,
            Stage::Runs(ours) if *ours == token => Some(AttemptOutcome::Runs),
            Stage::Kept { token: ours, reason } if *ours == token => Some(AttemptOutcome::Kept {
                reason: reason.clone(),
            }),
            _ if self.given_up.contains(&token) => Some(AttemptOutcome::GaveUp),
            _ => Some(AttemptOutcome::Unknown),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Token = [1; 16];
    const B: Token = [2; 16];

    fn ready() -> Ledger {
        let mut ledger = Ledger::default();
        assert!(ledger.begin(A) && !ledger.begin(B) && ledger.ready());
        ledger
    }

    #[test]
    fn the_first_decision_after_ready_counts() {
        let mut gone = ready();
        assert!(gone.go() && !gone.go() && !gone.discard() && !gone.decide(Decision::Discard));
        assert_eq!(gone.answer(A), None);
        gone.resumed();
        assert_eq!(gone.answer(A), Some(AttemptOutcome::Runs));
        assert_eq!(gone.answer(B), Some(AttemptOutcome::Unknown));
        assert!(!gone.begin(B), "there is a machine");

        let mut asked = ready();
        assert_eq!(asked.answer(B), Some(AttemptOutcome::Unknown));
        assert_eq!(asked.answer(A), Some(AttemptOutcome::GaveUp));
        assert!(!asked.go() && !asked.decide(Decision::Run));
        assert_eq!(asked.answer(A), Some(AttemptOutcome::GaveUp));
        assert!(asked.begin(B));

        let mut decided = ready();
        assert!(decided.decide(Decision::Run) && !decided.go());
        decided.kept("no disk".into());
        assert_eq!(
            decided.answer(A),
            Some(AttemptOutcome::Kept {
                reason: "no disk".into()
            })
        );
    }

    #[test]
    fn before_ready_there_is_nothing_to_decide() {
        let mut filling = Ledger::default();
        assert!(!filling.ready() && !filling.discard() && filling.begin(A));
        assert!(!filling.go() && !filling.decide(Decision::Run) && !filling.decide(Decision::Discard));
        assert_eq!(filling.answer(A), Some(AttemptOutcome::GaveUp));
        assert!(!filling.ready(), "given up meanwhile");
    }

    #[test]
    fn the_last_64_are_remembered() {
        let mut ledger = Ledger::default();
        for n in 0..=64u8 {
            assert!(ledger.begin([n; 16]) && ledger.discard());
        }
        assert_eq!(ledger.answer([0; 16]), Some(AttemptOutcome::Unknown));
        assert_eq!(ledger.answer([1; 16]), Some(AttemptOutcome::GaveUp));
        assert_eq!(ledger.answer([64; 16]), Some(AttemptOutcome::GaveUp));
    }
}
