//! Connections that are cut after any byte, and cancels that come late.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::fake::{FakeDestination, FakeSource, PortFault};
use super::guest::{Load, TestGuest};
use super::rig::{assert_moved, assert_stayed, control, options, receiver};
use crate::*;

fn busy() -> FakeSource {
    let mut guest = TestGuest::new(64, 16);
    guest.start(Load { pages: 80 });
    FakeSource::new(guest)
}

/// Which way the bytes are counted.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    ToDestination,
    ToSource,
}

/// Forwards connections, and cuts all of them after so many bytes one way.
struct Cutter {
    endpoint: Endpoint,
    shared: Arc<CutState>,
}

struct CutState {
    way: Way,
    left: AtomicI64,
    cut: AtomicBool,
    sockets: Mutex<Vec<TcpStream>>,
}

impl Cutter {
    fn new(to: &Endpoint, way: Way, limit: i64) -> Self {
        let Endpoint::Tcp(addresses) = to.clone() else {
            panic!("TCP only")
        };
        let front = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = Endpoint::from(front.local_addr().unwrap());
        let shared = Arc::new(CutState {
            way,
            left: AtomicI64::new(limit),
            cut: AtomicBool::new(false),
            sockets: Mutex::default(),
        });
        let all = shared.clone();
        thread::spawn(move || {
            for a in front.incoming() {
                let (Ok(a), Ok(b)) = (a, TcpStream::connect(&addresses[..])) else {
                    return;
                };
                for (from, to, this) in [(&a, &b, Way::ToDestination), (&b, &a, Way::ToSource)] {
                    let (from, to, all) = (from.try_clone().unwrap(), to.try_clone().unwrap(), all.clone());
                    thread::spawn(move || all.pump(from, to, this));
                }
                all.sockets.lock().unwrap().extend([a, b]);
                if all.cut.load(Ordering::SeqCst) {
                    all.cut();
                }
            }
        });
        Self { endpoint, shared }
    }

    /// Bytes that may still pass.
    fn left(&self) -> i64 {
        self.shared.left.load(Ordering::SeqCst)
    }
}

impl CutState {
    fn pump(&self, mut from: TcpStream, mut to: TcpStream, this: Way) {
        let mut buffer = [0; 4096];
        while let Ok(got @ 1..) = from.read(&mut buffer) {
            let mut pass = got;
            if this == self.way {
                let left = self.left.fetch_sub(got as i64, Ordering::SeqCst);
                pass = got.min(left.max(0) as usize);
            }
            if to.write_all(&buffer[..pass]).is_err() {
                break;
            }
            if pass < got {
                self.cut();
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    }

    fn cut(&self) {
        self.cut.store(true, Ordering::SeqCst);
        for socket in self.sockets.lock().unwrap().iter() {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

/// How an attempt with a cut ended.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Cut {
    outcome: Outcome,
    /// Whether the destination kept the machine for an operator to decide.
    kept: bool,
    passed: i64,
}

/// One attempt through a cutter. The network does not come back, so an operator decides for a destination that
/// is ready. Asserts that the guest is in one place at most, and in one place for sure unless the report says
/// that it is in doubt.
fn cut(way: Way, limit: i64) -> Cut {
    let mut source = busy();
    let mut destination = FakeDestination::default();
    let options = MigrateOptions {
        io_timeout: Duration::from_millis(500),
        connect_timeout: Duration::from_millis(300),
        // The same messages each time.
        max_rounds: 1,
        on_miss: OnMiss::Switch,
        ..options()
    };
    let mut receiver = receiver(&options);
    let cutter = Cutter::new(receiver.endpoint(), way, limit);
    let (here, there) = (control(), control());
    let done = AtomicBool::new(false);
    let (migrated, received, kept) = thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let received = receiver.receive(&mut destination, &there);
            done.store(true, Ordering::SeqCst);
            received
        });
        let migrated = migrate(&mut source, &cutter.endpoint, &options, &here);
        if !done.load(Ordering::SeqCst) && there.progress().phase == Phase::Waiting {
            there.cancel();
        }
        // A destination that never learns of the end gets its operator's decision.
        let mut kept = false;
        let decision = match migrated.report.outcome {
            Outcome::InDoubt => Decision::Run,
            _ => Decision::Discard,
        };
        for _ in 0..40 {
            if done.load(Ordering::SeqCst) {
                break;
            }
            thread::sleep(Duration::from_millis(50));
        }
        while !done.load(Ordering::SeqCst) {
            kept = true;
            there.decide(decision);
            thread::sleep(Duration::from_millis(20));
        }
        (migrated, receiving.join().unwrap(), kept)
    });
    let report = migrated.report;
    let what = format!("{way:?} {limit}: {report:?} {received:?}");
    assert_eq!(
        migrated.doubt.is_some(),
        report.outcome == Outcome::InDoubt,
        "{what}"
    );
    match report.outcome {
        Outcome::Moved => {
            received.unwrap();
            assert_moved(&source, &destination, &report);
        }
        Outcome::InDoubt => {
            assert!(source.guest.is_held() && !source.locked, "{what}");
            assert_eq!(destination.running, received.is_ok(), "{what}");
        }
        outcome => {
            assert!(
                received.is_err() && !destination.running && destination.guest.is_none(),
                "{what}"
            );
            assert_stayed(&mut source, &report, outcome);
        }
    }
    Cut {
        outcome: report.outcome,
        kept,
        passed: limit - cutter.left(),
    }
}

#[test]
fn connections_may_be_cut_after_any_byte() {
    let whole = cut(Way::ToSource, i64::MAX);
    assert_eq!((whole.outcome, whole.kept), (Outcome::Moved, false));
    let handshake = (0..whole.passed).step_by(11);
    let commit = (whole.passed - 40..whole.passed + 4).step_by(2);
    let back: Vec<Cut> = handshake
        .chain(commit)
        .map(|limit| cut(Way::ToSource, limit))
        .collect();
    for expected in [Outcome::Failed, Outcome::InDoubt] {
        let found = back.iter().any(|cut| cut.outcome == expected);
        assert!(found, "{expected:?} in {back:?}");
    }
    assert!(back.iter().any(|cut| cut.kept), "{back:?}");
    // The handshake's bytes, then points all over the pages and the end.
    let whole = cut(Way::ToDestination, i64::MAX).passed;
    let starts = (0..400).step_by(29);
    let pages = (1..20).map(|step| step * step * 800);
    let ends = (0..200).step_by(23).map(|step| whole - step);
    for limit in starts.chain(pages).chain(ends) {
        cut(Way::ToDestination, limit);
    }
}

#[test]
fn after_ready_only_the_source_decides() {
    let mut source = busy();
    let (here, there) = (control(), Arc::new(control()));
    let cancel = there.clone();
    let mut destination = FakeDestination::default();
    source.on_release = Some(Box::new(move || cancel.cancel()));
    let mut receiver = receiver(&options());
    let to = receiver.endpoint().clone();
    let report = thread::scope(|scope| {
        scope.spawn(|| receiver.receive(&mut destination, &there).unwrap());
        migrate(&mut source, &to, &options(), &here).report
    });
    assert_moved(&source, &destination, &report);
}

#[test]
fn a_cancel_after_go_comes_too_late() {
    let mut source = busy();
    let (here, there) = (Arc::new(control()), control());
    let mut destination = FakeDestination::default();
    let slow = PortFault::Slow(Duration::from_millis(200));
    destination.faults.insert("resume", slow);
    let mut receiver = receiver(&options());
    let to = receiver.endpoint().clone();
    let report = thread::scope(|scope| {
        scope.spawn(|| receiver.receive(&mut destination, &there).unwrap());
        scope.spawn(|| {
            while there.progress().phase != Phase::Commit {
                thread::yield_now();
            }
            here.cancel();
        });
        migrate(&mut source, &to, &options(), &here).report
    });
    assert_moved(&source, &destination, &report);
}
