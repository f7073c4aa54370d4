//! Every interleaving of a source, a destination, an operator and a network that loses things.
//!
//! The explorer drives the real [`Ledger`] and [`Claim`] breadth first over all that can happen: a word on the
//! control connection or on one that asks arrives, is late, is lost, or arrives after its sender has gone; either
//! side crashes at any point, runs out of time or is cancelled; a new receiver listens where one has crashed; the
//! operator decides. In every state it checks:
//!
//! - the guest does not run in two places, and not at the source once it has run at the destination;
//! - the source lets go of its copy only after the destination has taken the guest;
//! - while both live, some way of deliveries, questions and `resolve` leads to a state in which the guest runs in
//!   one place and neither side waits for anything.
//!
//! Excepted is what no protocol can give: a guest whose only complete copy was in a process that crashed (the
//! source's before "ready", the destination's after the commit) is gone. The operator here decides only what is
//! sure: "run" at the destination when the source is dead, "run" at the source when the destination that had
//! the machine is dead or has it paused, and never ran it.
//!
//! An operator who errs runs the guest at the destination while the source lives. Then it may run twice, and no
//! protocol can help that; but it is noticed: the source goes on asking until it knows, and pauses its copy.

use std::collections::{HashMap, VecDeque};

use super::{Claim, Ledger, Stage, Withdrawn};
use crate::control::Decision;
use crate::protocol::{AttemptOutcome, Token};

/// The messages on the control connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum ControlWord {
    State,
    Ready,
    Go,
    Resumed,
    ResumeFailed,
    Farewell,
    Abort,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    source: ModelSource,
    destination: ModelDestination,
    up: VecDeque<ControlWord>,
    down: VecDeque<ControlWord>,
    /// The control connection is broken: what is under way may still arrive, nothing new does.
    cut: bool,
    /// Questions under way, also of askers that have gone.
    asks: Vec<u8>,
    /// The answer under way to the asker that waits.
    answer: Option<(u8, AttemptOutcome)>,
    /// Whether the operator may still err, and has.
    may_err: bool,
    erred: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct ModelSource {
    alive: bool,
    claim: Claim,
    /// Number of the last attempt, 0 before the first; also its token.
    attempt: u8,
    /// It uses the control connection.
    open: bool,
    heard_ready: bool,
    /// The guest runs here again, but the destination of this attempt may not know.
    withdraws: Option<u8>,
    asks_for: Option<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct ModelDestination {
    alive: bool,
    /// The number of the last attempt when it crashed; another process may listen since.
    crashed: Option<u8>,
    ledger: Ledger,
    open: bool,
    /// A guest was let run here, in this process or in one that crashed.
    ran: bool,
    /// "go" counted here.
    took: bool,
}

/// Rules broken on purpose, to see that the model notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    None,
    /// The destination throws a ready machine away with its connection, and forgets it.
    ForgetsWhenLost,
    /// The source takes a lost connection after "go" for a failure before it.
    ResumesAfterGo,
    /// A destination that knows nothing answers "gave up".
    UnknownIsGaveUp,
    /// The destination answers "gave up" and goes on waiting for "go".
    AnswersAndWaits,
    /// The destination answers "gave up" while it lets the guest run.
    AnswersTooEarly,
    /// The source frees its copy once "go" is sent.
    FreesAtGo,
    /// "go" counts also after the machine was given up.
    GoAlwaysCounts,
    /// The source takes an answer about an earlier attempt for one about this one.
    HeedsOldAnswers,
    /// The source ignores the answer when it has resumed the guest after a failure.
    WithdrawsUnheard,
    /// It asks once.
    WithdrawsOnce,
}

/// More questions under way at a time add states, not cases.
const MAX_ASKS: usize = 2;
const ATTEMPTS: u8 = 2;

fn token(attempt: u8) -> Token {
    [attempt; 16]
}

/// What can happen next, and whether it needs no crash and no loss.
type Successors = Vec<(&'static str, World, bool)>;

impl World {
    fn start(may_err: bool) -> Self {
        Self {
            may_err,
            erred: false,
            source: ModelSource {
                alive: true,
                claim: Claim::default(),
                attempt: 0,
                open: false,
                heard_ready: false,
                withdraws: None,
                asks_for: None,
            },
            destination: ModelDestination {
                alive: true,
                crashed: None,
                ledger: Ledger::default(),
                open: false,
                ran: false,
                took: false,
            },
            up: VecDeque::new(),
            down: VecDeque::new(),
            cut: false,
            asks: Vec::new(),
            answer: None,
        }
    }

    fn next(&self, flaw: Flaw) -> Successors {
        let mut next = Successors::new();
        if self.source.alive {
            self.source_acts(flaw, &mut next);
            self.source_receives(&mut next);
            self.source_asks(flaw, &mut next);
        }
        if self.destination.alive {
            self.destination_acts(flaw, &mut next);
            self.destination_receives(flaw, &mut next);
            self.destination_answers(flaw, &mut next);
        }
        self.operator_decides(&mut next);
        self.trouble(&mut next);
        next
    }

    /// A changed copy joins what can happen.
    fn add(&self, next: &mut Successors, what: &'static str, change: impl FnOnce(&mut World)) {
        let mut world = self.clone();
        change(&mut world);
        next.push((what, world, true));
    }

    fn source_acts(&self, flaw: Flaw, next: &mut Successors) {
        let source = &self.source;
        let idle = self.destination.alive && *self.destination.ledger.stage() == Stage::Idle;
        if !source.open && source.claim == Claim::Running && source.attempt < ATTEMPTS && idle {
            self.add(next, "begin", World::begin);
        }
        if source.open && source.claim == Claim::Running {
            self.add(next, "pause", |world| world.source.claim.pause());
        }
        if source.open && source.claim == Claim::Paused {
            self.add(next, "send the state", |world| {
                world.source.claim.offer();
                world.send_up(ControlWord::State);
            });
        }
        if source.open && source.claim == Claim::Offered && source.heard_ready {
            self.add(next, "send go", |world| {
                world.source.claim.go();
                world.send_up(ControlWord::Go);
                if flaw == Flaw::FreesAtGo {
                    world.source.claim.moved();
                }
            });
            self.add(next, "go is not taken", |world| {
                world.source.claim.go();
                world.source.claim.go_not_sent();
                world.source_fails();
            });
        }
        if source.open && matches!(source.claim, Claim::Running | Claim::Paused | Claim::Offered) {
            self.add(next, "the source fails or is cancelled", World::source_fails);
        }
        if source.open && source.claim.in_doubt() {
            self.add(next, "the source loses the connection", |world| {
                world.source.open = false;
                if flaw == Flaw::ResumesAfterGo {
                    world.source.claim = Claim::Running;
                }
            });
        }
    }

    fn begin(&mut self) {
        self.source.attempt += 1;
        assert!(self.destination.ledger.begin(token(self.source.attempt)));
        (self.source.open, self.destination.open, self.cut) = (true, true, false);
        self.source.heard_ready = false;
        self.up.clear();
        self.down.clear();
    }

    fn source_fails(&mut self) {
        let Some(failed) = self.source.claim.fail() else {
            return;
        };
        if failed.withdraw {
            self.source.withdraws = Some(self.source.attempt);
        }
        self.send_up(ControlWord::Abort);
        self.source.open = false;
    }

    fn source_receives(&self, next: &mut Successors) {
        let Some(&word) = self.down.front().filter(|_| self.source.open) else {
            return;
        };
        self.add(next, "the source receives", |world| {
            world.down.pop_front();
            match word {
                ControlWord::Ready => world.source.heard_ready = true,
                ControlWord::Resumed | ControlWord::ResumeFailed if !world.source.claim.in_doubt() => {
                    world.source_fails()
                }
                ControlWord::Resumed => {
                    world.source.claim.moved();
                    world.send_up(ControlWord::Farewell);
                    world.source.open = false;
                }
                ControlWord::ResumeFailed => {
                    world.send_up(ControlWord::Farewell);
                    world.source.open = false;
                }
                _ => world.source_fails(),
            }
        });
    }

    fn source_asks(&self, flaw: Flaw, next: &mut Successors) {
        let source = &self.source;
        let doubt = (source.claim.in_doubt() && !source.open).then_some(source.attempt);
        if let Some(about) = doubt.or(source.withdraws)
            && source.asks_for.is_none()
            && self.asks.len() < MAX_ASKS
        {
            self.add(next, "ask", |world| {
                world.source.asks_for = Some(about);
                world.asks.push(about);
                world.asks.sort_unstable();
            });
        }
        if source.asks_for.is_some() {
            self.add(next, "the asker gives up", |world| {
                world.source.asks_for = None;
                world.answer = None;
                if flaw == Flaw::WithdrawsOnce {
                    world.source.withdraws = None;
                }
            });
        }
        let Some((about, outcome)) = self.answer.clone() else {
            return;
        };
        self.add(next, "the source is answered", |world| {
            world.answer = None;
            world.source.asks_for = None;
            if world.source.withdraws == Some(about) {
                let withdrawn = if flaw == Flaw::WithdrawsUnheard {
                    Withdrawn::Done
                } else {
                    world.source.claim.withdrawn(&outcome)
                };
                // A receiver that is another process by now is not the one that waited.
                let gone = world.destination.crashed >= Some(about);
                if withdrawn != Withdrawn::StillWaits || gone {
                    world.source.withdraws = None;
                }
            } else if flaw == Flaw::HeedsOldAnswers || about == world.source.attempt {
                world.source.claim.answer(&outcome);
            }
        });
    }

    fn destination_acts(&self, flaw: Flaw, next: &mut Successors) {
        let destination = &self.destination;
        match destination.ledger.stage() {
            Stage::Filling(_) if destination.open => {
                self.add(
                    next,
                    "the destination fails or is cancelled",
                    World::destination_fails,
                );
            }
            Stage::Ready(_) if destination.open && self.up_has_ended() => {
                self.add(next, "the destination loses the connection", |world| {
                    world.destination.open = false;
                    if flaw == Flaw::ForgetsWhenLost {
                        world.destination.ledger = Ledger::default();
                    }
                });
            }
            Stage::Committing(_) => {
                self.add(next, "the guest runs", |world| {
                    world.destination.ran = true;
                    world.destination.ledger.resumed();
                    world.send_down(ControlWord::Resumed);
                });
                self.add(next, "the guest does not run", |world| {
                    world.destination.ledger.kept(String::new());
                    world.send_down(ControlWord::ResumeFailed);
                });
            }
            Stage::Runs(_) | Stage::Kept { .. } if destination.open && self.up_has_ended() => {
                self.add(next, "the connection has ended", |world| {
                    world.destination.open = false;
                });
            }
            _ => {}
        }
    }

    fn destination_fails(&mut self) {
        assert!(self.destination.ledger.discard());
        self.send_down(ControlWord::Abort);
        self.destination.open = false;
    }

    fn up_has_ended(&self) -> bool {
        self.up.is_empty() && (self.cut || !self.source.open)
    }

    fn destination_receives(&self, flaw: Flaw, next: &mut Successors) {
        let Some(&word) = self.up.front().filter(|_| self.destination.open) else {
            return;
        };
        let received = |what, next: &mut Successors, change: fn(&mut World)| {
            self.add(next, what, |world| {
                world.up.pop_front();
                change(world);
            });
        };
        match word {
            ControlWord::State => {
                received("ready", next, |world| {
                    if world.destination.ledger.ready() {
                        world.send_down(ControlWord::Ready);
                    } else {
                        world.destination.open = false;
                    }
                });
                received("the restore fails", next, |world| {
                    if world.destination.ledger.discard() {
                        world.send_down(ControlWord::Abort);
                    }
                    world.destination.open = false;
                });
            }
            ControlWord::Go if flaw == Flaw::GoAlwaysCounts => received("go counts", next, |world| {
                let about = token(world.source.attempt);
                world.destination.ledger = Ledger::default();
                assert!(world.destination.ledger.begin(about) && world.destination.ledger.ready());
                world.destination.took = world.destination.ledger.go();
            }),
            ControlWord::Go => received("go", next, |world| {
                world.destination.took |= world.destination.ledger.go();
            }),
            ControlWord::Abort => received("abort", next, |world| {
                world.destination.ledger.discard();
                world.destination.open = false;
            }),
            _ => received("farewell", next, |world| world.destination.open = false),
        }
    }

    fn destination_answers(&self, flaw: Flaw, next: &mut Successors) {
        for (at, &about) in self.asks.iter().enumerate() {
            let mut ledger = self.destination.ledger.clone();
            let mut outcome = ledger.answer(token(about));
            match flaw {
                Flaw::UnknownIsGaveUp if outcome == Some(AttemptOutcome::Unknown) => {
                    outcome = Some(AttemptOutcome::GaveUp)
                }
                Flaw::AnswersTooEarly if outcome.is_none() => outcome = Some(AttemptOutcome::GaveUp),
                Flaw::AnswersAndWaits => ledger = self.destination.ledger.clone(),
                _ => {}
            }
            // While the commit is about to be known, the question waits.
            let Some(outcome) = outcome else { continue };
            self.add(next, "the destination answers", |world| {
                world.asks.remove(at);
                world.destination.ledger = ledger;
                if world.source.alive && world.source.asks_for == Some(about) {
                    world.answer = Some((about, outcome));
                }
            });
        }
    }

    fn operator_decides(&self, next: &mut Successors) {
        let (source, destination) = (&self.source, &self.destination);
        if destination.alive && matches!(destination.ledger.stage(), Stage::Ready(_)) {
            let decision = if source.alive {
                Decision::Discard
            } else {
                Decision::Run
            };
            self.add(next, "the operator decides at the destination", |world| {
                assert!(world.destination.ledger.decide(decision));
                world.destination.took |= decision == Decision::Run;
            });
        }
        let ready = destination.alive && matches!(destination.ledger.stage(), Stage::Ready(_));
        if ready && source.alive && self.may_err {
            self.add(next, "the operator errs", |world| {
                assert!(world.destination.ledger.decide(Decision::Run));
                world.destination.took = true;
                (world.may_err, world.erred) = (false, true);
            });
        }
        if !source.alive || !source.claim.in_doubt() || source.open {
            return;
        }
        let kept = matches!(destination.ledger.stage(), Stage::Kept { .. });
        let gone = destination.crashed == Some(source.attempt);
        // One who has erred knows that an older copy ran there once.
        if (gone || kept) && (!destination.ran || self.erred) {
            self.add(next, "the operator runs it at the source", |world| {
                world.source.claim = Claim::Running;
                // A machine that was kept is ended first; then the destination no longer waits.
                if kept {
                    world.destination.ledger = Ledger::default();
                    world.destination.open = false;
                    world.source.withdraws = None;
                }
            });
        } else if gone {
            self.add(next, "the operator ends the source", |world| {
                world.source.alive = false;
            });
        }
    }

    /// Losses and crashes.
    fn trouble(&self, next: &mut Successors) {
        let from = next.len();
        if !self.cut && (self.source.open || self.destination.open) {
            self.add(next, "the connection breaks", |world| world.cut = true);
        }
        if self.cut && !self.up.is_empty() {
            self.add(next, "a word is lost", |world| {
                world.up.pop_back();
            });
        }
        if self.cut && !self.down.is_empty() {
            self.add(next, "a word is lost", |world| {
                world.down.pop_back();
            });
        }
        for at in 0..self.asks.len() {
            self.add(next, "a question is lost", |world| {
                world.asks.remove(at);
            });
        }
        if self.answer.is_some() {
            self.add(next, "an answer is lost", |world| world.answer = None);
        }
        if self.source.alive {
            self.add(next, "the source crashes", |world| {
                world.source.alive = false;
                world.source.open = false;
                world.answer = None;
            });
        }
        if self.destination.alive && self.destination.crashed.is_none() {
            self.add(next, "the destination crashes", |world| {
                world.destination.alive = false;
                world.destination.crashed = Some(world.source.attempt);
                world.destination.open = false;
                world.destination.ledger = Ledger::default();
            });
        }
        if !self.destination.alive {
            self.add(next, "a new receiver listens", |world| {
                world.destination.alive = true
            });
        }
        next[from..].iter_mut().for_each(|(_, _, calm)| *calm = false);
    }

    /// Sends a message, unless the connection is broken or the other side has closed it.
    fn send_up(&mut self, word: ControlWord) {
        if !self.cut && self.source.open && self.destination.open {
            self.up.push_back(word);
        }
    }

    fn send_down(&mut self, word: ControlWord) {
        if !self.cut && self.source.open && self.destination.open {
            self.down.push_back(word);
        }
    }

    fn runs_at_source(&self) -> bool {
        self.source.alive && self.source.claim == Claim::Running
    }

    /// What is wrong with this state, if anything.
    fn wrong(&self) -> Option<&'static str> {
        let stage = self.destination.ledger.stage();
        let runs_there = self.destination.alive && matches!(stage, Stage::Committing(_) | Stage::Runs(_));
        if self.erred {
            // It may run twice as long as the source can still find out.
            let finds_out = self.source.open || self.source.withdraws.is_some();
            return (self.runs_at_source() && runs_there && !finds_out)
                .then_some("the guest runs twice, and nobody notices");
        }
        if self.runs_at_source() && runs_there {
            return Some("the guest runs twice");
        }
        if self.runs_at_source() && self.destination.ran {
            return Some("a guest that ran on elsewhere runs again from an old state");
        }
        if self.source.claim == Claim::Moved && !self.destination.took {
            return Some("the source let go of a guest that nobody took");
        }
        None
    }

    /// Whether the guest runs in one place and neither side waits, or the source has crashed.
    fn is_settled(&self) -> bool {
        let stage = self.destination.ledger.stage();
        let free = !self.destination.alive || *stage == Stage::Idle;
        match self.source.claim {
            _ if !self.source.alive => true,
            Claim::Running => free && !self.source.open && self.source.withdraws.is_none(),
            // It may have run there and crashed.
            Claim::Moved => {
                matches!(stage, Stage::Runs(_)) || self.destination.crashed == Some(self.source.attempt)
            }
            _ => false,
        }
    }
}

/// What an exploration found.
#[derive(Debug)]
struct Found {
    states: usize,
    /// What is wrong, with the steps that lead there.
    wrong: Option<(&'static str, Vec<&'static str>)>,
}

/// All states, with the first way to each.
#[derive(Default)]
struct Explored {
    worlds: Vec<World>,
    index: HashMap<World, usize>,
    from: Vec<Option<(usize, &'static str)>>,
    /// Steps without trouble, backwards.
    calm: Vec<Vec<usize>>,
}

impl Explored {
    fn insert(&mut self, world: World, from: Option<(usize, &'static str)>) -> usize {
        if let Some(&at) = self.index.get(&world) {
            return at;
        }
        let at = self.worlds.len();
        self.index.insert(world.clone(), at);
        self.worlds.push(world);
        self.from.push(from);
        self.calm.push(Vec::new());
        at
    }

    fn way_to(&self, mut at: usize) -> Vec<&'static str> {
        let mut way = Vec::new();
        while let Some((before, what)) = self.from[at] {
            way.push(what);
            at = before;
        }
        way.reverse();
        way
    }

    /// A state in which both live, and from which no calm way leads to a settled one.
    fn stuck(&self) -> Option<usize> {
        let mut reaches: Vec<bool> = self.worlds.iter().map(World::is_settled).collect();
        let mut todo: Vec<usize> = (0..reaches.len()).filter(|at| reaches[*at]).collect();
        while let Some(at) = todo.pop() {
            for &before in &self.calm[at] {
                if !std::mem::replace(&mut reaches[before], true) {
                    todo.push(before);
                }
            }
        }
        let live = |world: &World| world.source.alive && world.destination.alive;
        (0..reaches.len()).find(|at| !reaches[*at] && live(&self.worlds[*at]))
    }
}

fn explore(flaw: Flaw, operator_errs: bool) -> Found {
    let mut explored = Explored::default();
    explored.insert(World::start(operator_errs), None);
    let mut at = 0;
    while at < explored.worlds.len() {
        let world = explored.worlds[at].clone();
        if let Some(wrong) = world.wrong() {
            return Found {
                states: explored.worlds.len(),
                wrong: Some((wrong, explored.way_to(at))),
            };
        }
        for (what, next, calm) in world.next(flaw) {
            let to = explored.insert(next, Some((at, what)));
            if calm {
                explored.calm[to].push(at);
            }
        }
        at += 1;
    }
    let stuck = explored.stuck();
    Found {
        states: explored.worlds.len(),
        wrong: stuck.map(|at| ("nothing leads out of here", explored.way_to(at))),
    }
}

#[test]
fn no_loss_and_no_crash_makes_two_guests_or_hides_the_last() {
    let found = explore(Flaw::None, false);
    println!("the commit has {} states", found.states);
    assert_eq!(found.wrong, None);
    assert!(
        found.states > 2_000,
        "{} states are not the whole picture",
        found.states
    );
}

#[test]
fn an_operator_who_errs_is_noticed() {
    let found = explore(Flaw::None, true);
    println!("with an operator who errs the commit has {} states", found.states);
    assert_eq!(found.wrong, None);
}

#[test]
fn broken_rules_are_noticed() {
    let twice = "the guest runs twice";
    let unnoticed = "the guest runs twice, and nobody notices";
    for (flaw, expected) in [
        (Flaw::ForgetsWhenLost, "nothing leads out of here"),
        (Flaw::ResumesAfterGo, twice),
        (
            Flaw::UnknownIsGaveUp,
            "a guest that ran on elsewhere runs again from an old state",
        ),
        (Flaw::AnswersAndWaits, twice),
        (Flaw::AnswersTooEarly, twice),
        (Flaw::FreesAtGo, "the source let go of a guest that nobody took"),
        (Flaw::GoAlwaysCounts, twice),
        (Flaw::HeedsOldAnswers, twice),
        (Flaw::WithdrawsUnheard, unnoticed),
        (Flaw::WithdrawsOnce, unnoticed),
    ] {
        let (wrong, way) = explore(flaw, expected == unnoticed)
            .wrong
            .unwrap_or_else(|| panic!("{flaw:?} is not noticed"));
        println!("{flaw:?}: {wrong} after {way:?}");
        assert_eq!(wrong, expected, "{flaw:?}: {way:?}");
    }
}
