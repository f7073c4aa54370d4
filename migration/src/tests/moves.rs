//! Migrations that succeed, or end because of what the caller asked for.

use std::thread;
use std::time::{Duration, Instant};

use super::fake::{FakeDestination, FakeSource, PortFault};
use super::guest::{HIGH, Load, TestGuest};
use super::rig::{assert_moved, assert_stayed, attempt, control, direct, options, receiver, receiver_at};
use crate::*;

#[test]
fn an_idle_guest_moves_in_one_round() {
    let mut guest = TestGuest::new(512, 256);
    guest.write(5 * PAGE_SIZE, false);
    guest.write(HIGH + 255 * PAGE_SIZE, false);
    guest.start(Load::default());
    let (mut source, mut destination) = (FakeSource::new(guest), FakeDestination::default());
    let (report, received) = direct(&mut source, &mut destination, &options());
    assert_moved(&source, &destination, &report);
    assert_eq!(received.unwrap().description, source.describe());
    assert_eq!(
        (report.pages_sent, report.pages_zero),
        (3, 766),
        "two pages, and one by the drain; the others were never touched"
    );
    // A round that has not begun when the policy is asked is ended at once: so little waits for the pause.
    assert!(
        report.rounds.len() == 1 && report.rounds[0].pages <= 2,
        "{report:?}"
    );
    assert!(
        report.bytes_sent < 32 << 10,
        "zero pages are next to nothing on the wire"
    );
    assert!(report.budget_kept && report.error.is_none());
    let order = [
        "start_dirty_log",
        "flush",
        "flush",
        "rehearse",
        "flush",
        "flush",
        "rehearse",
        "pause",
        "drain",
        "save",
        "release",
    ];
    assert_eq!(source.calls, order);
}

#[test]
fn a_guest_that_writes_arrives_whole_over_either_transport() {
    let dir = tempfile::tempdir().unwrap();
    for endpoint in [
        "tcp:127.0.0.1:0".into(),
        format!("unix:{}", dir.path().join("s").display()),
    ] {
        let mut guest = TestGuest::new(2048, 1024);
        guest.start(Load { pages: 3072 });
        guest.await_progress();
        let mut source = FakeSource::new(guest);
        source.written_by_save = Some(HIGH + 7 * PAGE_SIZE);
        let mut receiver = receiver_at(&endpoint, &options());
        let to = receiver.endpoint().clone();
        let mut destination = FakeDestination::default();
        let options = MigrateOptions {
            verify: true,
            ..options()
        };
        let (report, received) = attempt(&mut source, &to, &mut destination, &mut receiver, &options);
        received.unwrap();
        assert_moved(&source, &destination, &report);
        let digest = report.memory_digest.unwrap();
        assert_eq!(digest.source, digest.destination);
        assert!(report.verify_ms > 0.0);
        let stopped = destination.stopped_at.unwrap().elapsed().as_secs_f64() * 1e3;
        assert!(
            stopped >= report.downtime_ms.unwrap() - report.downtime.resume_ms,
            "the pause was before"
        );
    }
}

#[test]
fn a_guest_that_is_held_up_arrives_whole_though_one_stream_alone_sends() {
    let mut guest = TestGuest::new(2048, 2048);
    (0..1024).for_each(|page| guest.write(page * PAGE_SIZE, false));
    guest.start(Load { pages: 64 });
    let mut source = FakeSource::new(guest);
    source.held_up_since = Some(Instant::now());
    let options = MigrateOptions {
        max_downtime: Duration::from_millis(100),
        on_miss: OnMiss::Switch,
        streams: 4,
        verify: true,
        // Slow enough for streams to come to rest, one after the other.
        bandwidth: Some(20_000_000),
        final_bandwidth: Some(20_000_000),
        ..options()
    };
    let mut destination = FakeDestination::default();
    let (report, received) = direct(&mut source, &mut destination, &options);
    received.unwrap();
    assert_moved(&source, &destination, &report);
    assert!(report.rounds[0].ms > 100.0, "{report:?}");
}

#[test]
fn marks_of_a_large_guest_are_cleared_in_pieces() {
    // 156 MiB, of which little was ever touched.
    let mut guest = TestGuest::new(40_000, 16);
    guest.write(39_999 * PAGE_SIZE, false);
    guest.start(Load { pages: 8 });
    let (mut source, mut destination) = (FakeSource::new(guest), FakeDestination::default());
    let (report, received) = direct(&mut source, &mut destination, &options());
    received.unwrap();
    assert_moved(&source, &destination, &report);
}

#[test]
fn a_guest_moves_back_and_forth() {
    let mut guest = TestGuest::new(600, 64);
    guest.start(Load { pages: 300 });
    for _ in 0..5 {
        guest.await_progress();
        let (mut source, mut destination) = (FakeSource::new(guest), FakeDestination::default());
        let (report, received) = direct(&mut source, &mut destination, &options());
        received.unwrap();
        assert_moved(&source, &destination, &report);
        guest = destination.guest.take().unwrap();
        guest.start(Load { pages: 300 });
    }
}

#[test]
fn a_budget_that_cannot_be_kept_ends_as_the_caller_wants() {
    let mut guest = TestGuest::new(2048, 16);
    guest.start(Load { pages: 2048 });
    let mut source = FakeSource::new(guest);
    let tight = MigrateOptions {
        max_downtime: Duration::from_micros(10),
        ..options()
    };

    let (report, received) = direct(&mut source, &mut FakeDestination::default(), &tight);
    assert!(matches!(
        received,
        Err(ReceiveError::Link(LinkError::Aborted { cancelled: false, .. }))
    ));
    assert!(
        report.error.as_ref().unwrap().contains("cannot be kept"),
        "{report:?}"
    );
    assert!(!source.calls.contains(&"pause") && source.calls.contains(&"stop_dirty_log"));

    let switch = MigrateOptions {
        on_miss: OnMiss::Switch,
        ..tight
    };
    let mut destination = FakeDestination::default();
    let (report, received) = direct(&mut source, &mut destination, &switch);
    received.unwrap();
    assert_moved(&source, &destination, &report);
    assert!(!report.budget_kept);
}

#[test]
fn a_slow_flush_is_seen_before_the_pause() {
    let mut guest = TestGuest::new(64, 16);
    guest.start(Load { pages: 8 });
    let mut source = FakeSource::new(guest);
    source
        .faults
        .insert("flush", PortFault::Slow(Duration::from_millis(120)));
    let strict = MigrateOptions {
        max_downtime: Duration::from_millis(100),
        max_rounds: 3,
        ..options()
    };
    let (report, _) = direct(&mut source, &mut FakeDestination::default(), &strict);
    let error = report.error.as_ref().unwrap();
    assert!(error.contains("a downtime of 100 ms cannot be kept"), "{error}");
    assert!(!source.calls.contains(&"pause"));
    assert_stayed(&mut source, &report, Outcome::Failed);

    // What only the first flush costs is no part of the downtime.
    let mut guest = TestGuest::new(64, 16);
    guest.start(Load { pages: 8 });
    let (mut source, mut destination) = (FakeSource::new(guest), FakeDestination::default());
    source
        .faults
        .insert("flush", PortFault::SlowOnce(Duration::from_millis(120)));
    let (report, received) = direct(&mut source, &mut destination, &strict);
    received.unwrap();
    assert_moved(&source, &destination, &report);
    assert!(report.predicted_downtime_ms.unwrap() < 100.0, "{report:?}");
}

#[test]
fn a_refusal_names_each_difference() {
    let mut guest = TestGuest::new(64, 16);
    guest.start(Load { pages: 64 });
    let mut source = FakeSource::new(guest);
    let difference = |what: &str| Difference {
        what: what.into(),
        expected: "a".into(),
        got: "b\u{1b}[2J".into(),
    };
    let mut destination = FakeDestination {
        differences: vec![difference("cpuid 1.ecx avx"), difference("disk \"root\"")],
        ..FakeDestination::default()
    };
    let (report, received) = direct(&mut source, &mut destination, &options());
    assert!(matches!(received, Err(ReceiveError::Refused { differences }) if differences.len() == 2));
    let error = report.error.clone().unwrap();
    assert!(
        error.contains("cpuid 1.ecx avx: expected a, got b") && error.contains("disk \"root\""),
        "{error}"
    );
    assert!(!error.contains('\u{1b}'));
    assert!(destination.guest.is_none() && source.calls.is_empty());
    assert_stayed(&mut source, &report, Outcome::Failed);
}

#[test]
fn cancel_ends_a_migration_at_any_phase_before_go() {
    for phase in [Phase::Waiting, Phase::Precopy, Phase::StopAndCopy] {
        let mut guest = TestGuest::new(2048, 16);
        guest.start(Load { pages: 2048 });
        let mut source = FakeSource::new(guest);
        let (here, there) = (std::sync::Arc::new(control()), control());
        let mut destination = FakeDestination::default();
        // A destination that takes its time, so that the cancel falls into a wait.
        destination.faults.insert(
            "create",
            PortFault::Slow(Duration::from_millis(if phase == Phase::Waiting {
                200
            } else {
                0
            })),
        );
        destination
            .faults
            .insert("restore", PortFault::Slow(Duration::from_millis(200)));
        let options = MigrateOptions {
            max_downtime: if phase == Phase::Precopy {
                Duration::ZERO
            } else {
                Duration::from_secs(9)
            },
            // So that it is still there when the cancel comes.
            bandwidth: (phase == Phase::Precopy).then_some(1_000_000),
            max_rounds: u32::MAX,
            ..options()
        };
        if phase == Phase::StopAndCopy {
            let here = here.clone();
            source.on_pause = Some(Box::new(move || here.cancel()));
        }
        let mut receiver = receiver(&options);
        let to = receiver.endpoint().clone();
        let report = thread::scope(|scope| {
            let receiving = scope.spawn(|| receiver.receive(&mut destination, &there));
            if phase == Phase::Waiting {
                let (here, there) = (here.clone(), &there);
                scope.spawn(move || {
                    while there.progress().phase != Phase::Handshake {
                        thread::yield_now();
                    }
                    here.cancel();
                });
            }
            if phase == Phase::Precopy {
                scope.spawn(|| {
                    while here.progress().phase != Phase::Precopy {
                        thread::yield_now();
                    }
                    here.cancel();
                });
            }
            let report = migrate(&mut source, &to, &options, &here).report;
            let received = receiving.join().unwrap();
            let reported = matches!(
                received,
                Err(ReceiveError::Link(LinkError::Aborted { cancelled: true, .. }))
            );
            assert!(reported, "{phase:?}: {received:?}");
            report
        });
        assert!(destination.guest.is_none());
        assert_eq!(here.progress().phase, Phase::Done);
        assert_stayed(&mut source, &report, Outcome::Cancelled);
    }
}

#[test]
fn a_cancelled_destination_reports_it() {
    let mut guest = TestGuest::new(64, 16);
    guest.start(Load { pages: 64 });
    let mut source = FakeSource::new(guest);
    let (here, there) = (control(), control());
    let mut receiver = receiver(&options());
    let to = receiver.endpoint().clone();
    let mut destination = FakeDestination::default();
    // A destination that takes its time, so that the cancel falls into a step of its own.
    let slow = PortFault::Slow(Duration::from_millis(200));
    destination.faults.insert("create", slow);
    let report = thread::scope(|scope| {
        let receiving = scope.spawn(|| receiver.receive(&mut destination, &there));
        scope.spawn(|| {
            while there.progress().phase != Phase::Handshake {
                thread::yield_now();
            }
            there.cancel();
        });
        let report = migrate(&mut source, &to, &options(), &here).report;
        let received = receiving.join().unwrap();
        assert!(
            matches!(received, Err(ReceiveError::Link(LinkError::Cancelled))),
            "{received:?}"
        );
        report
    });
    assert!(
        report.error.as_ref().unwrap().contains("the peer was cancelled"),
        "{report:?}"
    );
    assert_stayed(&mut source, &report, Outcome::Failed);
}

#[test]
fn a_report_is_the_object_that_the_command_prints() {
    let mut guest = TestGuest::new(64, 16);
    guest.start(Load { pages: 8 });
    let (mut source, mut destination) = (FakeSource::new(guest), FakeDestination::default());
    let (report, _) = direct(&mut source, &mut destination, &options());
    let json = serde_json::to_value(&report).unwrap();
    for (key, value) in [("outcome", "moved"), ("mode", "precopy"), ("data_path", "gather")] {
        assert_eq!(json[key], value);
    }
    for key in [
        "pause_ms",
        "drain_ms",
        "final_log_ms",
        "final_copy_ms",
        "state_ms",
        "restore_ms",
        "commit_ms",
        "resume_ms",
    ] {
        assert!(json["downtime"][key].is_number(), "{key}");
    }
    assert_eq!(serde_json::from_value::<Report>(json).unwrap(), report);
}
