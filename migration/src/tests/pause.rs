//! Whatever happens while the guest is paused, it stands still for a limited time.

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use fault_proxy::{
    Direction, FaultPlan, FaultPoint, NetworkPace, Proxy, ProxyConnection, ProxyFault as Harm,
};

use super::disk::FakeDisk;
use super::fake::{FakeDestination, FakeSource, PortFault};
use super::guest::{Load, TestGuest};
use super::rig::{assert_moved, assert_stayed, control, direct, options, receiver};
use crate::*;

/// Pages that the guest turns out to have written when it is paused.
const SURPRISE: u64 = 6144;
/// What the test allows a loaded machine on top of the limit.
const LATE: Duration = Duration::from_millis(250);

fn strict(max_downtime: Duration) -> MigrateOptions {
    MigrateOptions {
        max_downtime,
        ..options()
    }
}

/// What is to happen to the network.
type Change = Box<dyn FnMut() + Send>;

/// A guest that has written much when it is paused; `change` is called right then.
fn surprising(mut change: Change) -> FakeSource {
    let mut guest = TestGuest::new(SURPRISE, 16);
    // Idle until then, or a narrow link would never come to the pause.
    guest.start(Load { pages: 0 });
    guest.await_progress();
    let memory = guest.writer();
    let mut source = FakeSource::new(guest);
    source.on_pause = Some(Box::new(move || {
        change();
        memory.write_all(SURPRISE);
    }));
    source
}

/// One attempt through a proxy whose pace changes to `pace` when the guest is paused.
fn paced(pace: NetworkPace, options: &MigrateOptions) -> (FakeSource, FakeDestination, Report) {
    let mut receiver = receiver(options);
    let to = receiver.endpoint().to_string().parse().unwrap();
    let proxy = Proxy::start(&"tcp:127.0.0.1:0".parse().unwrap(), &to, Vec::new()).unwrap();
    let proxy = Arc::new(proxy);
    let through = proxy.address().to_string().parse().unwrap();
    let at_pause = proxy.clone();
    let mut source = surprising(Box::new(move || at_pause.pace(pace)));
    let mut destination = FakeDestination::default();
    let (here, there) = (control(), control());
    let report = thread::scope(|scope| {
        scope.spawn(|| receiver.receive(&mut destination, &there));
        let report = migrate(&mut source, &through, options, &here).report;
        proxy.cut_all();
        if report.outcome != Outcome::Moved {
            there.cancel();
        }
        report
    });
    (source, destination, report)
}

/// Asserts that the guest runs here again, and was let run in time.
fn assert_in_time(source: &mut FakeSource, report: &Report, limit: Duration) {
    let error = report.error.as_ref().unwrap();
    let expected = format!("the guest stood still for {} ms", limit.as_millis());
    assert!(error.contains(&expected), "{error}");
    let stood_still = source.stood_still.unwrap();
    assert!(
        stood_still >= limit && stood_still < limit + LATE,
        "limit {limit:?}: it stood still for {stood_still:?}"
    );
    assert_stayed(source, report, Outcome::Failed);
}

#[test]
fn the_limit_is_a_little_more_than_the_budget() {
    let ms = Duration::from_millis;
    let limit = |budget, on_miss| {
        MigrateOptions {
            max_downtime: budget,
            on_miss,
            ..options()
        }
        .pause_limit()
    };
    assert_eq!(limit(ms(20), OnMiss::Fail), ms(120));
    assert_eq!(limit(ms(300), OnMiss::Fail), ms(900));
    assert_eq!(limit(ms(300), OnMiss::Switch), MAX_PAUSE);
    assert_eq!(limit(MAX_PAUSE, OnMiss::Switch), MAX_PAUSE * 3);
    assert_eq!(limit(Duration::MAX, OnMiss::Fail), Duration::MAX);
}

#[test]
fn a_network_that_dies_or_slows_down_at_the_pause_does_not_keep_the_guest() {
    for (budget, limit) in [(100, 300), (20, 120)] {
        let options = strict(Duration::from_millis(budget));
        for pace in [
            NetworkPace::Bytes(0),
            NetworkPace::Bytes(200),
            NetworkPace::Bytes(1_250_000),
        ] {
            let (mut source, _, report) = paced(pace, &options);
            assert_in_time(&mut source, &report, Duration::from_millis(limit));
        }
    }
}

#[test]
fn a_caller_that_accepts_a_miss_gets_the_move_over_a_slow_network() {
    let options = MigrateOptions {
        on_miss: OnMiss::Switch,
        ..strict(Duration::from_millis(20))
    };
    let (source, destination, report) = paced(NetworkPace::Bytes(20_000_000), &options);
    assert_moved(&source, &destination, &report);
    assert!(
        report.downtime_ms.unwrap() > 200.0 && !report.budget_kept,
        "{report:?}"
    );
}

#[test]
fn a_destination_that_is_not_ready_in_time_does_not_get_the_guest() {
    let mut source = surprising(Box::new(|| {}));
    let mut destination = FakeDestination::default();
    destination
        .faults
        .insert("restore", PortFault::Slow(Duration::from_millis(900)));
    let budget = Duration::from_millis(150);
    let (report, received) = direct(&mut source, &mut destination, &strict(budget));
    assert!(!received.unwrap_err().is_committed());
    assert!(destination.guest.is_none() && !destination.running);
    assert_in_time(&mut source, &report, budget * 3);
}

#[test]
fn a_step_of_the_machine_that_takes_too_long_is_the_last() {
    for call in ["pause", "drain", "save", "release"] {
        let mut source = surprising(Box::new(|| {}));
        let slow = PortFault::Slow(Duration::from_millis(500));
        source.faults.insert(call, slow);
        let budget = Duration::from_millis(100);
        let (report, _) = direct(&mut source, &mut FakeDestination::default(), &strict(budget));
        let error = report.error.as_ref().unwrap();
        assert!(error.contains("stood still for 300 ms"), "{call}: {error}");
        assert_eq!(source.calls.last(), Some(&"stop_dirty_log"), "{call}");
        assert_stayed(&mut source, &report, Outcome::Failed);
    }
}

#[test]
fn a_cap_on_the_last_copy_that_takes_too_long_is_woken() {
    let budget = Duration::from_secs(1);
    let options = MigrateOptions {
        final_bandwidth: Some(10_000),
        streams: 32,
        ..strict(budget)
    };
    let mut source = surprising(Box::new(|| {}));
    let (report, _) = direct(&mut source, &mut FakeDestination::default(), &options);
    // The pacer lets the last of the streams wait for 13 s.
    assert!(report.total_ms < 6000.0, "{report:?}");
    assert_in_time(&mut source, &report, budget * 3);
}

#[test]
fn a_disk_that_hangs_does_not_keep_the_guest() {
    let disk = Arc::new(FakeDisk::new());
    disk.write_and_mark(0, &[7; 4096]);
    let at_pause = disk.clone();
    let (paused, is_paused) = mpsc::channel();
    let mut source = surprising(Box::new(move || {
        at_pause.hang_reads(true);
        at_pause.write_and_mark(8192, &[9; 4096]);
        // At the next attempt the channel's receiver is gone.
        let _ = paused.send(());
    }));
    source.disk = Some(disk.clone());
    let watched = source.guest.writer();
    let budget = Duration::from_millis(100);
    let options = MigrateOptions {
        with_disks: true,
        ..strict(budget)
    };
    let (report, _) = thread::scope(|scope| {
        scope.spawn(move || {
            // Not at a rehearsal's.
            is_paused.recv().unwrap();
            // The disk answers only when the guest runs again.
            watched.await_progress();
            disk.hang_reads(false);
        });
        direct(&mut source, &mut FakeDestination::default(), &options)
    });
    assert_in_time(&mut source, &report, budget * 3);
}

#[test]
fn devices_that_do_not_finish_do_not_keep_the_guest() {
    let mut source = surprising(Box::new(|| {}));
    source.drain_hangs = true;
    let budget = Duration::from_millis(100);
    let (report, _) = direct(&mut source, &mut FakeDestination::default(), &strict(budget));
    assert_in_time(&mut source, &report, budget * 3);
}

#[test]
fn a_cancel_in_the_pause_lets_the_guest_run_at_once_over_a_dead_network() {
    let mut receiver = receiver(&options());
    let to = receiver.endpoint().to_string().parse().unwrap();
    let proxy = Arc::new(Proxy::start(&"tcp:127.0.0.1:0".parse().unwrap(), &to, Vec::new()).unwrap());
    let through = proxy.address().to_string().parse().unwrap();
    let (here, there) = (Arc::new(control()), control());
    let (at_pause, cancel) = (proxy.clone(), here.clone());
    let mut source = surprising(Box::new(move || {
        at_pause.pace(NetworkPace::Bytes(0));
        let cancel = cancel.clone();
        thread::spawn(move || {
            // Not a wait for something: into the middle of what follows.
            thread::sleep(Duration::from_millis(150));
            cancel.cancel();
        });
    }));
    let mut destination = FakeDestination::default();
    let report = thread::scope(|scope| {
        scope.spawn(|| receiver.receive(&mut destination, &there));
        let report = migrate(&mut source, &through, &strict(Duration::from_secs(9)), &here).report;
        proxy.cut_all();
        there.cancel();
        report
    });
    let stood_still = source.stood_still.unwrap();
    assert!(stood_still < Duration::from_millis(150) + LATE, "{stood_still:?}");
    assert_stayed(&mut source, &report, Outcome::Cancelled);
}

/// A proxy that cuts all connections at "ready".
fn cut_at_ready(to: &Endpoint) -> Arc<Proxy> {
    let point = FaultPoint {
        connection: ProxyConnection::Control,
        direction: Direction::ToSource,
        message: "ready".into(),
        occurrence: 0,
    };
    let plan = FaultPlan {
        point,
        fault: Harm::CutAll,
    };
    let to = to.to_string().parse().unwrap();
    Arc::new(Proxy::start(&"tcp:127.0.0.1:0".parse().unwrap(), &to, vec![plan]).unwrap())
}

#[test]
fn an_operator_who_decided_before_the_source_is_noticed() {
    for (fault, runs) in [(None, true), (Some(PortFault::Error), false)] {
        let mut receiver = receiver(&options());
        let proxy = cut_at_ready(receiver.endpoint());
        let through = proxy.address().to_string().parse().unwrap();
        let (here, there) = (control(), Arc::new(control()));
        let mut source = surprising(Box::new(|| {}));
        let operator = there.clone();
        source.on_resume = Some(Box::new(move || {
            while !operator.decide(Decision::Run) {
                thread::yield_now();
            }
            while operator.progress().phase != Phase::Commit && operator.progress().phase != Phase::Done {
                thread::yield_now();
            }
            proxy.heal();
        }));
        let mut destination = FakeDestination::default();
        destination.faults.extend(fault.map(|fault| ("resume", fault)));
        let migrated = thread::scope(|scope| {
            scope.spawn(|| receiver.receive(&mut destination, &there));
            migrate(&mut source, &through, &strict(Duration::from_secs(2)), &here)
        });
        assert_eq!(migrated.report.outcome, Outcome::InDoubt, "{:?}", migrated.report);
        let error = migrated.report.error.unwrap();
        assert!(error.contains("this copy is paused"), "{error}");
        assert!(source.guest.is_held() && destination.running == runs);
        let answer = migrated.doubt.unwrap().ask(Duration::from_secs(5)).unwrap();
        assert_eq!(answer == Answer::Runs, runs, "{answer:?}");
    }
}

#[test]
fn a_destination_without_the_abort_is_asked_until_it_answers() {
    let mut receiver = receiver(&options());
    let proxy = cut_at_ready(receiver.endpoint());
    let through = proxy.address().to_string().parse().unwrap();
    let (here, there) = (control(), control());
    let mut source = surprising(Box::new(|| {}));
    let mut destination = FakeDestination::default();
    let (migrated, received) = thread::scope(|scope| {
        let receiving = scope.spawn(|| receiver.receive(&mut destination, &there));
        let migrated = migrate(&mut source, &through, &strict(Duration::from_secs(2)), &here);
        proxy.heal();
        let unanswered = migrated.unanswered.clone().unwrap();
        assert_eq!(unanswered.ask(Duration::from_secs(5)).unwrap(), Answer::GaveUp);
        (migrated, receiving.join().unwrap())
    });
    assert!(matches!(received, Err(ReceiveError::GivenUp)), "{received:?}");
    assert!(migrated.doubt.is_none());
    assert_stayed(&mut source, &migrated.report, Outcome::Failed);
}

#[test]
fn what_it_takes_to_let_the_guest_run_is_in_the_prediction() {
    let mut source = surprising(Box::new(|| {}));
    let mut destination = FakeDestination::default();
    let slow = PortFault::Slow(Duration::from_millis(40));
    destination.faults.insert("resume", slow);
    destination.faults.insert("rehearse_resume", slow);
    let (report, received) = direct(&mut source, &mut destination, &strict(Duration::from_secs(2)));
    received.unwrap();
    assert!(report.predicted_downtime_ms.unwrap() >= 40.0, "{report:?}");
    let rehearsals = source.calls.iter().filter(|call| **call == "rehearse").count();
    let pauses = report.rehearsal_pause_ms;
    assert_eq!(pauses.count as usize, rehearsals);
    assert!(
        pauses.max >= 0.1 && pauses.sum >= pauses.max,
        "each is 0.05 ms to pause and as much to save: {pauses:?}"
    );
}
