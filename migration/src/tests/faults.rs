//! Ports that fail, panic or take long, one at a time.

use std::time::Duration;

use super::fake::{FakeDestination, FakeSource, PortFault};
use super::guest::{Load, TestGuest};
use super::rig::{assert_moved, assert_stayed, direct, hasty, options};
use crate::*;

fn busy() -> FakeSource {
    let mut guest = TestGuest::new(256, 64);
    guest.start(Load { pages: 300 });
    let mut source = FakeSource::new(guest);
    source.unused = Some((0..16).map(|page| page * PAGE_SIZE).collect());
    source
}

#[test]
fn every_call_at_the_source_may_fail_or_panic() {
    for call in [
        "start_dirty_log",
        "populated",
        "has_unused",
        "unused",
        "clear",
        "peek",
        "flush",
        "rehearse",
        "pause",
        "drain",
        "save",
        "release",
    ] {
        for fault in [PortFault::Error, PortFault::Panic] {
            let mut source = busy();
            source.faults.insert(call, fault);
            let mut destination = FakeDestination::default();
            let (report, received) = direct(&mut source, &mut destination, &options());
            let error = report.error.clone().unwrap();
            assert!(error.contains(&format!("injected into {call}")), "{error}");
            let received = received.unwrap_err();
            assert!(
                received.to_string().contains(&format!("injected into {call}")),
                "the peer is told: {received}"
            );
            assert!(destination.guest.is_none() && destination.discarded == 1);
            assert_stayed(&mut source, &report, Outcome::Failed);
        }
    }
}

#[test]
fn every_call_at_the_destination_may_fail_or_panic() {
    for call in ["check", "create", "rehearse", "restore"] {
        for fault in [PortFault::Error, PortFault::Panic] {
            let mut source = busy();
            let mut destination = FakeDestination::default();
            destination.faults.insert(call, fault);
            let (report, received) = direct(&mut source, &mut destination, &options());
            assert!(!received.unwrap_err().is_committed());
            let error = report.error.clone().unwrap();
            assert!(error.contains(&format!("injected into {call}")), "{error}");
            assert!(destination.guest.is_none());
            assert_stayed(&mut source, &report, Outcome::Failed);

            destination.faults.clear();
            let mut source = busy();
            let (report, _) = direct(&mut source, &mut destination, &options());
            assert_eq!(
                report.outcome,
                Outcome::Moved,
                "the destination is ready for another attempt"
            );
        }
    }
}

#[test]
fn a_destination_that_cannot_resume_keeps_the_machine_and_the_source_is_in_doubt() {
    for fault in [PortFault::Error, PortFault::Panic] {
        let mut source = busy();
        let mut destination = FakeDestination::default();
        destination.faults.insert("resume", fault);
        let (report, received) = direct(&mut source, &mut destination, &options());
        assert!(received.unwrap_err().is_committed());
        assert_eq!(report.outcome, Outcome::InDoubt, "{report:?}");
        assert!(
            report.error.as_ref().unwrap().contains("injected into resume"),
            "{report:?}"
        );
        assert!(
            source.guest.is_held() && !source.locked,
            "the source never resumes by itself"
        );
        assert!(destination.guest.is_some() && destination.discarded == 0 && !destination.running);
    }
}

#[test]
fn a_clean_up_that_fails_is_reported_after_the_cause() {
    let mut source = busy();
    source.faults.insert("drain", PortFault::Error);
    source.faults.insert("stop_dirty_log", PortFault::Panic);
    let (report, _) = direct(&mut source, &mut FakeDestination::default(), &options());
    let error = report.error.unwrap();
    let (cause, after) = error.split_once("; ").unwrap();
    assert!(
        cause.contains("injected into drain") && after.contains("injected into stop_dirty_log"),
        "{error}"
    );
    assert!(!source.guest.is_held());
}

#[test]
fn a_step_longer_than_the_time_out_is_bridged_by_keep_alives() {
    let slow = PortFault::Slow(Duration::from_millis(1300));
    let mut source = busy();
    source.faults.insert("drain", slow);
    let mut destination = FakeDestination::default();
    for call in ["create", "restore", "resume"] {
        destination.faults.insert(call, slow);
    }
    let (report, received) = direct(&mut source, &mut destination, &hasty());
    received.unwrap();
    assert_moved(&source, &destination, &report);
    let Downtime {
        drain_ms,
        restore_ms,
        resume_ms,
        ..
    } = report.downtime;
    assert!(
        [drain_ms, restore_ms, resume_ms]
            .iter()
            .all(|term| *term >= 1300.0),
        "{report:?}"
    );
}

#[test]
fn a_log_that_takes_long_to_count_is_bridged_by_keep_alives() {
    let mut guest = TestGuest::new(1024, 256);
    for page in 0..1024 {
        guest.write(page * PAGE_SIZE, false);
    }
    guest.start(Load::default());
    let mut source = FakeSource::new(guest);
    // Between two looks of 100 ms the job does nothing else but wait for 10 ms.
    source
        .faults
        .insert("peek", PortFault::Slow(Duration::from_millis(100)));
    let options = MigrateOptions {
        // So that a round takes several times as long as a destination waits for a sign of life.
        bandwidth: Some(1 << 20),
        throttle: false,
        max_downtime: Duration::from_millis(700),
        ..hasty()
    };
    let mut destination = FakeDestination::default();
    let (report, received) = direct(&mut source, &mut destination, &options);
    received.unwrap();
    assert_eq!(report.outcome, Outcome::Moved, "{report:?}");
    assert!(report.rounds[0].ms > 3000.0, "{report:?}");
}

#[test]
fn a_step_longer_than_a_step_may_be_is_given_up() {
    let mut source = busy();
    let mut destination = FakeDestination::default();
    destination
        .faults
        .insert("restore", PortFault::Slow(Duration::from_millis(3000)));
    let options = MigrateOptions {
        step_timeout: Duration::from_millis(1500),
        ..hasty()
    };
    let (report, received) = direct(&mut source, &mut destination, &options);
    assert!(
        report.error.as_ref().unwrap().contains("waiting for ready"),
        "{report:?}"
    );
    assert!(received.is_err());
    assert_stayed(&mut source, &report, Outcome::Failed);
}

#[test]
fn a_destination_with_other_memory_is_found_out() {
    let mut source = busy();
    let mut destination = FakeDestination {
        missing_pages: 1,
        ..FakeDestination::default()
    };
    let (report, received) = direct(&mut source, &mut destination, &options());
    assert!(matches!(received, Err(ReceiveError::OtherMemory)), "{received:?}");
    assert_stayed(&mut source, &report, Outcome::Failed);
}
