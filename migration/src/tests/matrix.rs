//! Every message of a migration, and every fault at it.
//!
//! A migration without faults shows which messages there are; then it runs again for each of them with each
//! fault. Whatever happens, the guest is in one place, or the side that does not know says so and can find out when
//! the network is back.

mod attempt;
mod harm;
mod setup;
mod there;

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use fault_proxy::{FaultPoint, FramePart};

use crate::text::panic_message;
use attempt::{AttemptEnded, attempt};
use harm::{HARMS, Harm};
use setup::{SETUPS, Setup};

/// Attempts at a time: nearly all of their time is waiting.
const WORKERS: usize = 24;

/// Everything that a migration can say. Whatever else is seen is new, and some setup has to bring it about.
const MESSAGES: [&str; 30] = [
    "abort",
    "accept",
    "ask",
    "begin",
    "compressed pages",
    "describe",
    "digest",
    "digest request",
    "farewell",
    "go",
    "hello",
    "join",
    "joined",
    "keep-alive",
    "memory files",
    "outcome",
    "pages",
    "ping",
    "pong",
    "populated",
    "ready",
    "refuse",
    "rehearsal",
    "rehearsed",
    "resume failed",
    "resumed",
    "round ack",
    "round end",
    "session",
    "state",
];

/// One square of the matrix.
struct Case {
    setup: &'static Setup,
    point: FaultPoint,
    harm: Harm,
}

#[test]
fn every_message_with_every_fault() {
    let (cases, messages) = cases();
    let expected: BTreeSet<String> = MESSAGES.iter().map(|name| (*name).into()).collect();
    assert_eq!(messages, expected);
    let done = run_all(&cases);

    let mut count = BTreeMap::<_, usize>::new();
    let (mut wrong, mut differs) = (Vec::new(), 0);
    for (case, ended) in &done {
        match ended {
            Ok(ended) => {
                let outcome = (ended.struck, ended.report.outcome, &ended.answer);
                *count.entry(format!("{outcome:?}")).or_default() += 1;
                differs += usize::from(case.is_found_by_digest(ended));
            }
            Err(panic) => wrong.push(format!("{case}: {panic}")),
        }
    }
    println!("{} cases: {count:#?}", done.len());
    assert!(
        wrong.is_empty(),
        "{} are wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    assert!(differs > 0, "no changed page was found out");
}

/// All squares, and the messages that a fault can strike.
fn cases() -> (Vec<Case>, BTreeSet<String>) {
    let (mut cases, mut messages) = (Vec::new(), BTreeSet::new());
    for setup in &SETUPS {
        let seen = attempt(setup, None).seen;
        let points: Vec<_> = seen.iter().filter(|point| (setup.looks_at)(point)).collect();
        assert!(
            !points.is_empty(),
            "{} brings nothing about: {seen:?}",
            setup.name
        );
        for point in points {
            messages.insert(point.message.clone());
            // The first of its name and the last: what is between them is like one of them.
            let last = seen.iter().rfind(|other| is_like(other, point));
            if point.occurrence > 0 && Some(point) != last {
                continue;
            }
            let harms = HARMS.into_iter().filter(|harm| fits(*harm, point));
            cases.extend(harms.map(|harm| Case {
                setup,
                point: point.clone(),
                harm,
            }));
        }
    }
    (cases, messages)
}

fn run_all(cases: &[Case]) -> Vec<(&Case, Result<AttemptEnded, String>)> {
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let ended = catch_unwind(AssertUnwindSafe(|| run(case)));
                    let ended = ended.map_err(|panic| panic_message(&*panic));
                    done.lock().unwrap().push((case, ended));
                }
            });
        }
    });
    done.into_inner().unwrap()
}

fn run(case: &Case) -> AttemptEnded {
    let try_it = || attempt(case.setup, Some((&case.point, case.harm)));
    let ended = try_it();
    // On a machine that is busy with other things, a time-out may have come before the message.
    if ended.struck { ended } else { try_it() }
}

impl Case {
    /// Nothing in the protocol protects the content of pages but the digest.
    fn is_found_by_digest(&self, ended: &AttemptEnded) -> bool {
        let error = ended.report.error.as_deref().unwrap_or_default();
        self.harm == Harm::Corrupt(FramePart::Data) && error.contains("memory or disks differ")
    }
}

fn is_like(a: &FaultPoint, b: &FaultPoint) -> bool {
    (a.connection, a.direction, &a.message) == (b.connection, b.direction, &b.message)
}

/// Whether the fault is another one than its neighbours at this message.
fn fits(harm: Harm, point: &FaultPoint) -> bool {
    harm != Harm::Corrupt(FramePart::Data) || point.message.ends_with("pages")
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { setup, point, harm } = self;
        write!(f, "{}, {point}, {harm:?}", setup.name)
    }
}
