//! The source's half of the commit's rules: what the source may still do with its guest, step by step. No I/O.

use crate::protocol::AttemptOutcome;

/// What a source may still do with its guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) enum Claim {
    /// The guest runs here, or is paused by its user and may be let run.
    #[default]
    Running,
    /// The migration has paused it.
    Paused,
    /// The state may have been sent: the destination may be ready, and then waits for "go" or an abort.
    Offered,
    /// "go" may have been sent: only the destination or an operator knows who may run the guest.
    InDoubt,
    /// The guest is the destination's.
    Moved,
}

/// What is to be done after a failure before "go".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Failed {
    /// The migration had paused the guest: let it run.
    pub(crate) resume: bool,
    /// The destination may be ready: if the abort does not reach it, ask it, so that it gives up.
    pub(crate) withdraw: bool,
}

/// What an answer of the destination means for a guest that is in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Ruling {
    /// The guest is the destination's: free everything.
    Moved,
    /// The guest is the source's again: let it run.
    Resume,
    /// The answer does not say: keep the guest paused.
    StillInDoubt,
}

/// What an answer means for a guest that was taken back from a destination that may have been ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Withdrawn {
    /// The destination does not wait for "go" any more.
    Done,
    /// The destination may still wait for "go": ask again.
    StillWaits,
    /// Its operator has decided that it runs there, and the guest has run in both places.
    RunsTwice,
}

impl Claim {
    /// The migration pauses the guest; comes before the call.
    pub(crate) fn pause(&mut self) {
        self.step(Claim::Running, Claim::Paused);
    }

    /// The state is sent; comes before its first byte.
    pub(crate) fn offer(&mut self) {
        self.step(Claim::Paused, Claim::Offered);
    }

    /// "go" is sent; comes before its first byte.
    pub(crate) fn go(&mut self) {
        self.step(Claim::Offered, Claim::InDoubt);
    }

    /// The kernel accepted no byte of "go".
    pub(crate) fn go_not_sent(&mut self) {
        self.step(Claim::InDoubt, Claim::Offered);
    }

    /// "resumed" came.
    pub(crate) fn moved(&mut self) {
        self.step(Claim::InDoubt, Claim::Moved);
    }

    /// Whether only the destination or an operator can say whose the guest is.
    pub(crate) fn in_doubt(self) -> bool {
        self == Claim::InDoubt
    }

    /// The migration failed or was cancelled. `None` once "go" may have been sent: then the source cannot end it alone.
    pub(crate) fn fail(&mut self) -> Option<Failed> {
        let failed = match self {
            Claim::Running => Failed {
                resume: false,
                withdraw: false,
            },
            Claim::Paused => Failed {
                resume: true,
                withdraw: false,
            },
            Claim::Offered => Failed {
                resume: true,
                withdraw: true,
            },
            Claim::InDoubt | Claim::Moved => return None,
        };
        *self = Claim::Running;
        Some(failed)
    }

    /// The destination answered while the guest was in doubt.
    pub(crate) fn answer(&mut self, outcome: &AttemptOutcome) -> Ruling {
        match (*self, outcome) {
            (Claim::InDoubt, AttemptOutcome::Runs) => {
                *self = Claim::Moved;
                Ruling::Moved
            }
            (Claim::InDoubt, AttemptOutcome::GaveUp) => {
                *self = Claim::Running;
                Ruling::Resume
            }
            // "kept": the machine is there, and an operator has to decide. "unknown": the receiver that knew may have
            // crashed after it ran the guest.
            _ => Ruling::StillInDoubt,
        }
    }

    /// The destination answered after a failure before "go", when the guest ran here again.
    pub(crate) fn withdrawn(&mut self, outcome: &AttemptOutcome) -> Withdrawn {
        match (*self, outcome) {
            // Without "go" only an operator can have decided so.
            (Claim::Running, AttemptOutcome::Runs | AttemptOutcome::Kept { .. }) => {
                *self = Claim::InDoubt;
                Withdrawn::RunsTwice
            }
            (_, AttemptOutcome::GaveUp) => Withdrawn::Done,
            // "unknown": another receiver than the one that waits may have answered.
            _ => Withdrawn::StillWaits,
        }
    }

    fn step(&mut self, from: Claim, to: Claim) {
        if *self == from {
            *self = to;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offered() -> Claim {
        let mut claim = Claim::default();
        claim.go();
        assert_eq!(claim, Claim::Running, "out of turn");
        claim.pause();
        claim.offer();
        claim
    }

    #[test]
    fn after_go_only_an_answer_gives_the_guest_back() {
        let mut claim = offered();
        claim.go();
        assert!(claim.in_doubt() && claim.fail().is_none());
        assert_eq!(claim.answer(&AttemptOutcome::Unknown), Ruling::StillInDoubt);
        let kept = AttemptOutcome::Kept { reason: "x".into() };
        assert_eq!(claim.answer(&kept), Ruling::StillInDoubt);
        assert_eq!(claim.answer(&AttemptOutcome::GaveUp), Ruling::Resume);
        assert_eq!((claim, claim.in_doubt()), (Claim::Running, false));

        let mut claim = offered();
        claim.go();
        claim.moved();
        assert_eq!(claim.answer(&AttemptOutcome::GaveUp), Ruling::StillInDoubt);
        assert_eq!((claim, claim.fail()), (Claim::Moved, None));
    }

    #[test]
    fn a_guest_that_its_operator_runs_there_does_not_run_on_here() {
        let kept = AttemptOutcome::Kept { reason: "x".into() };
        for (outcome, expected) in [
            (AttemptOutcome::GaveUp, Withdrawn::Done),
            (AttemptOutcome::Unknown, Withdrawn::StillWaits),
            (AttemptOutcome::Runs, Withdrawn::RunsTwice),
            (kept, Withdrawn::RunsTwice),
        ] {
            let mut claim = offered();
            claim.fail();
            assert_eq!(claim.withdrawn(&outcome), expected);
            assert_eq!(claim.in_doubt(), expected == Withdrawn::RunsTwice);
        }
    }

    #[test]
    fn a_failure_before_go_undoes_what_was_done() {
        let failed = |mut claim: Claim| claim.fail().map(|failed| (failed.resume, failed.withdraw));
        assert_eq!(failed(Claim::default()), Some((false, false)));
        assert_eq!(failed(Claim::Paused), Some((true, false)));
        assert_eq!(failed(offered()), Some((true, true)));
        let mut unsent = offered();
        unsent.go();
        unsent.go_not_sent();
        assert_eq!(failed(unsent), Some((true, true)));
    }
}
