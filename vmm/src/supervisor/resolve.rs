//! Resolves migrations in doubt: asks the destination, and carries out what an operator may decide.
//!
//! At the source, "go" was sent and no answer came. Only the destination knows the outcome, so it is always asked
//! first; its answer counts more than the operator's decision. At the destination, "go" came and the guest could not be
//! resumed, or the source fell silent after "ready": there only the operator can decide.
//!
//! Nothing here may run a guest that runs at the other side, so far as the other side answers.
//!
//! | the destination says | nothing decided | `run` | `discard` |
//! |---|---|---|---|
//! | it runs there | moved | moved | moved |
//! | it was given up there | runs here | runs here | runs here |
//! | it is kept there, paused | in doubt | runs here | in doubt |
//! | no answer, or it does not know | in doubt | runs here | discarded |

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::{Resolution, Resolved};
use migration::{Answer, AskError, Control, Decision, Doubt, Remains, Source};
use threads::Role;

use super::request::Reply;
use super::{Ending, Event, Job, Life, Refusal, Supervisor, SupervisorHandle, answer, failed};
use crate::machine::MigrationSource;

/// How long the connection to the destination may take, and as long again its answer.
pub(super) const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a receiving job may take to act on a decision.
const DECIDE_TIMEOUT: Duration = Duration::from_secs(5);

/// Which end of a migration in doubt this is.
pub(super) enum DoubtSide {
    /// The source: "go" was sent.
    Source {
        /// The machine as the migration left it; `None` while it is being resumed.
        source: Option<Box<MigrationSource>>,
        /// The question to the destination.
        doubt: Option<Doubt>,
        /// What the migration did to the machine, to be undone once it is resumed.
        remains: Remains,
    },
    /// The destination: "go" came, but the guest could not be resumed.
    Destination {
        /// Why.
        reason: String,
    },
}

impl DoubtSide {
    /// One line for `status`.
    pub(super) fn describe(&self) -> String {
        match self {
            DoubtSide::Source {
                doubt: Some(doubt), ..
            } => {
                format!("it may run at {}; `godwit resolve` asks there", doubt.endpoint())
            }
            DoubtSide::Source { doubt: None, .. } => {
                "it may run at the destination, which cannot be asked".into()
            }
            DoubtSide::Destination { reason } => reason.clone(),
        }
    }
}

/// An attempt to resolve the doubt that is under way.
pub(super) enum Resolving {
    /// The destination is being asked.
    Asking {
        decision: Option<Decision>,
        reply: Reply<Resolution>,
    },
    /// The guest is being resumed here.
    TakingBack {
        decision: Option<Decision>,
        reply: Reply<Resolution>,
        /// The destination's answer, as a sentence.
        known: String,
        job: Job,
    },
    /// The receiving job has the operator's decision, which had no effect yet.
    Deciding {
        decision: Decision,
        reply: Reply<Resolution>,
        until: Instant,
    },
}

/// What follows from an answer and a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ResolveStep {
    /// The guest runs there.
    LetGo,
    /// The guest runs here.
    TakeBack,
    /// The copy here is discarded: the operator decided so.
    Discard,
    /// Nothing.
    Stay,
}

/// Looks up the step in the table at the top.
fn judge(response: &Result<Answer, AskError>, decision: Option<Decision>) -> ResolveStep {
    match (response, decision) {
        (Ok(Answer::Runs), _) => ResolveStep::LetGo,
        (Ok(Answer::GaveUp), _) | (_, Some(Decision::Run)) => ResolveStep::TakeBack,
        (Ok(Answer::Kept { .. }), _) | (_, None) => ResolveStep::Stay,
        (Ok(Answer::Unknown) | Err(_), Some(Decision::Discard)) => ResolveStep::Discard,
    }
}

impl Supervisor {
    /// Starts to resolve the doubt; `reply` is answered when that has ended.
    pub(super) fn resolve(&mut self, decision: Option<Decision>, reply: Reply<Resolution>) -> Option<Ending> {
        if self.resolving.is_some() {
            answer(reply, Err(Refusal::Resolving));
            return None;
        }
        match &self.life {
            Some(Life::InDoubt(_, DoubtSide::Source { doubt, .. })) => match doubt {
                Some(doubt) => match start_question(doubt.clone(), self.handle.clone()) {
                    Ok(()) => self.resolving = Some(Resolving::Asking { decision, reply }),
                    Err(error) => answer(reply, Err(failed(error))),
                },
                // There is no destination to ask: only the operator knows.
                None => {
                    self.resolving = Some(Resolving::Asking { decision, reply });
                    return self.answered(Ok(Answer::Unknown));
                }
            },
            Some(Life::InDoubt(machine, DoubtSide::Destination { reason })) => {
                let (resolution, ending) = at_destination(reason, decision);
                if ending.is_some() {
                    machine.remove_made_disks();
                }
                answer(reply, Ok(resolution));
                return ending;
            }
            Some(Life::Receiving(job)) => match decision {
                Some(decision) if job.control.decide(decision) => {
                    let until = Instant::now() + DECIDE_TIMEOUT;
                    self.resolving = Some(Resolving::Deciding {
                        decision,
                        reply,
                        until,
                    });
                }
                _ => answer(reply, Err(Refusal::NothingToDecide)),
            },
            Some(Life::Here(_)) if self.migration.is_some() => answer(reply, Err(Refusal::Migrating)),
            Some(Life::Here(_)) | None => answer(reply, Err(Refusal::NoDoubt)),
        }
        None
    }

    /// Handles the destination's answer.
    pub(super) fn answered(&mut self, response: Result<Answer, AskError>) -> Option<Ending> {
        let Some(Resolving::Asking { decision, reply }) = self.resolving.take() else {
            return None;
        };
        let known = describe(&response);
        let step = judge(&response, decision);
        tracing::info!("in doubt, and asked: {known}");
        let (verdict, message, ending) = match step {
            ResolveStep::LetGo => (
                Resolved::Moved,
                format!("{known}; this copy is gone"),
                Some(Ending::Moved),
            ),
            ResolveStep::Discard => {
                let message = format!("{known}; this copy is thrown away, as you decided");
                (Resolved::Discarded, message, Some(Ending::Stopped))
            }
            ResolveStep::Stay => {
                let message = format!("still in doubt, and paused here: {known}. {}", advice(&response));
                (Resolved::InDoubt, message, None)
            }
            ResolveStep::TakeBack => {
                self.resume_here(decision, reply, known);
                return None;
            }
        };
        answer_resolved(decision, reply, verdict, message);
        ending
    }

    /// Resumes the guest here. That may take its time (locks, a vCPU that does not enter the guest), so it is done on a
    /// thread of its own.
    fn resume_here(&mut self, decision: Option<Decision>, reply: Reply<Resolution>, known: String) {
        let taken = match &mut self.life {
            Some(Life::InDoubt(_, DoubtSide::Source { source, remains, .. })) => {
                source.take().zip(Some(*remains))
            }
            _ => None,
        };
        let Some((mut source, mut remains)) = taken else {
            return answer(reply, Err(Refusal::NoDoubt));
        };
        let supervisor = self.handle.clone();
        let resume_here = move || {
            let resume = AssertUnwindSafe(|| source.resume());
            let resumed = catch_unwind(resume).unwrap_or_else(|_| Err("it panicked, see the log".into()));
            let resumed = resumed.map_err(|error| migration::chain(&*error));
            if resumed.is_ok() {
                for error in remains.undo(&mut *source) {
                    tracing::warn!(error, "the machine is not quite as it was before the migration");
                }
            }
            supervisor.send(Event::TakenBack(source, resumed));
        };
        let job = Control::new()
            .and_then(|control| Job::start(Role::Resolve, "resolve", Arc::new(control), resume_here));
        match job {
            Ok(job) => {
                self.resolving = Some(Resolving::TakingBack {
                    decision,
                    reply,
                    known,
                    job,
                });
            }
            Err(error) => answer(reply, Err(failed(error))),
        }
    }

    /// Handles the end of [`Self::resume_here`]'s thread.
    pub(super) fn resumed_here(&mut self, source: Box<MigrationSource>, resumed: Result<(), String>) {
        let Some(Resolving::TakingBack {
            decision,
            reply,
            known,
            ..
        }) = self.resolving.take()
        else {
            return;
        };
        match (self.life.take(), resumed) {
            (Some(Life::InDoubt(machine, DoubtSide::Source { .. })), Ok(())) => {
                drop(source);
                self.life = Some(Life::Here(machine));
                answer_resolved(
                    decision,
                    reply,
                    Resolved::Here,
                    format!("{known}; it goes on here"),
                );
                self.stop_second_copy();
            }
            (Some(Life::InDoubt(machine, DoubtSide::Source { doubt, remains, .. })), Err(error)) => {
                // Another process may hold its disks' locks: the doubt stays.
                let side = DoubtSide::Source {
                    source: Some(source),
                    doubt,
                    remains,
                };
                self.life = Some(Life::InDoubt(machine, side));
                let message =
                    format!("{known}; it cannot go on here yet: {error}; `godwit resolve` tries again");
                tracing::error!("{message}");
                answer(reply, Err(Refusal::Failed(message)));
            }
            (life, _) => self.life = life,
        }
    }

    /// Waits until an attempt to resume the guest here has ended, if there is one: its thread has the machine.
    pub(super) fn settle_resolving(&mut self) {
        if let Some(Resolving::TakingBack { job, .. }) = self.resolving.take() {
            job.end();
        }
    }

    /// Handles the end of an attempt to receive a machine: none came.
    pub(super) fn attempt_ended(&mut self, reason: &str) {
        if let Some(Resolving::Deciding { decision, reply, .. }) = self.resolving.take() {
            let resolution = Resolution {
                verdict: Resolved::Discarded,
                as_asked: decision == Decision::Discard,
                message: format!("the machine that had arrived is thrown away: {reason}"),
            };
            answer(reply, Ok(resolution));
        }
    }

    /// Handles a machine that was received; `problem` says why it does not run.
    pub(super) fn machine_arrived(&mut self, problem: Option<&str>) {
        if let Some(Resolving::Deciding { decision, reply, .. }) = self.resolving.take() {
            let (verdict, message) = match problem {
                None => (
                    Resolved::Here,
                    "the guest runs here; make sure that it never runs at its source".into(),
                ),
                Some(problem) => (
                    Resolved::InDoubt,
                    format!("the guest does not run here: {problem}"),
                ),
            };
            let as_asked = decision == Decision::Run && verdict == Resolved::Here;
            let resolution = Resolution {
                verdict,
                as_asked,
                message,
            };
            answer(reply, Ok(resolution));
        }
    }

    /// Until when to wait for a decision to have an effect.
    pub(super) fn deciding_until(&self) -> Option<Instant> {
        match &self.resolving {
            Some(Resolving::Deciding { until, .. }) => Some(*until),
            _ => None,
        }
    }

    /// Refuses a decision that had no effect: the source is alive again, and decides itself.
    pub(super) fn refuse_decision(&mut self) {
        if let Some(Resolving::Deciding { reply, .. }) = self.resolving.take() {
            answer(reply, Err(Refusal::NothingToDecide));
        }
    }
}

/// Answers the request to resolve the doubt, and logs the result.
fn answer_resolved(decision: Option<Decision>, reply: Reply<Resolution>, verdict: Resolved, message: String) {
    let as_asked = match decision {
        None => true,
        Some(Decision::Run) => verdict == Resolved::Here,
        Some(Decision::Discard) => matches!(verdict, Resolved::Moved | Resolved::Discarded),
    };
    tracing::info!("{message}");
    let resolution = Resolution {
        verdict,
        as_asked,
        message,
    };
    answer(reply, Ok(resolution));
}

/// Asks the destination on a thread of its own, which sends the answer as an event.
fn start_question(doubt: Doubt, supervisor: SupervisorHandle) -> std::io::Result<()> {
    let ask = move || supervisor.send(Event::Answered(doubt.ask(ASK_TIMEOUT)));
    threads::spawn(Role::Resolve, "resolve", ask)?;
    Ok(())
}

/// What a decision of the operator's at a destination leads to: the answer, and how the VM ends, if it does.
fn at_destination(reason: &str, decision: Option<Decision>) -> (Resolution, Option<Ending>) {
    let (verdict, as_asked, message, ending) = match decision {
        Some(Decision::Discard) => {
            let message =
                "this copy is thrown away; `godwit resolve --run` at the source runs the guest there";
            (Resolved::Discarded, true, message.into(), Some(Ending::Stopped))
        }
        _ => {
            let message = format!(
                "paused here: {reason}. `--discard` throws this copy away; then `godwit resolve --run` at the source runs the guest there"
            );
            (Resolved::InDoubt, decision.is_none(), message, None)
        }
    };
    let resolution = Resolution {
        verdict,
        as_asked,
        message,
    };
    (resolution, ending)
}

/// The answer as a sentence.
fn describe(response: &Result<Answer, AskError>) -> String {
    match response {
        Ok(Answer::Runs) => "the guest runs at the destination".into(),
        Ok(Answer::GaveUp) => "the destination gave the guest up".into(),
        Ok(Answer::Kept { reason }) => format!("the destination keeps the guest paused: {reason}"),
        Ok(Answer::Unknown) => "the destination knows nothing of this migration".into(),
        Err(error) => format!("no answer from the destination: {}", migration::chain(error)),
    }
}

/// What an operator can do after this answer.
fn advice(response: &Result<Answer, AskError>) -> &'static str {
    match response {
        Ok(Answer::Kept { .. }) => {
            "Discard it there (`godwit resolve --discard`), then run it here (`godwit resolve --run`)"
        }
        _ => {
            "Ask again later; or, if you know better: `--discard` if the guest runs there, `--run` if it never will"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_destinations_answer_counts_more_than_a_decision() {
        let (run, discard) = (Some(Decision::Run), Some(Decision::Discard));
        let kept = || Answer::Kept {
            reason: "no locks".into(),
        };
        let cases = [
            (
                Answer::Runs,
                [ResolveStep::LetGo, ResolveStep::LetGo, ResolveStep::LetGo],
            ),
            (
                Answer::GaveUp,
                [
                    ResolveStep::TakeBack,
                    ResolveStep::TakeBack,
                    ResolveStep::TakeBack,
                ],
            ),
            (
                kept(),
                [ResolveStep::Stay, ResolveStep::TakeBack, ResolveStep::Stay],
            ),
            (
                Answer::Unknown,
                [ResolveStep::Stay, ResolveStep::TakeBack, ResolveStep::Discard],
            ),
        ];
        for (response, expected) in cases {
            let response = Ok(response);
            let steps = [None, run, discard].map(|decision| judge(&response, decision));
            assert_eq!(steps, expected, "{response:?}");
        }
    }

    #[test]
    fn a_destination_that_cannot_run_it_can_only_throw_it_away() {
        for (decision, verdict, as_asked) in [
            (None, Resolved::InDoubt, true),
            (Some(Decision::Run), Resolved::InDoubt, false),
            (Some(Decision::Discard), Resolved::Discarded, true),
        ] {
            let (resolution, ending) = at_destination("no locks", decision);
            assert_eq!((resolution.verdict, resolution.as_asked), (verdict, as_asked));
            assert_eq!(ending.is_some(), verdict == Resolved::Discarded);
        }
    }
}
