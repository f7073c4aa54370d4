//! Both ends of a migration in one process.

use std::thread;
use std::time::Duration;

use super::fake::{FakeDestination, FakeSource};
use crate::*;

/// Patient enough for a loaded machine.
pub(super) fn options() -> MigrateOptions {
    MigrateOptions {
        max_downtime: Duration::from_secs(2),
        ..MigrateOptions::default()
    }
}

/// Options of a test that waits for a time-out.
pub(super) fn hasty() -> MigrateOptions {
    let io_timeout = Duration::from_secs(1);
    MigrateOptions {
        io_timeout,
        step_timeout: Duration::from_secs(4),
        ..options()
    }
}

/// A receiver with the patience of `options`.
pub(super) fn receiver(options: &MigrateOptions) -> Receiver {
    receiver_at("tcp:127.0.0.1:0", options)
}

pub(super) fn receiver_at(endpoint: &str, options: &MigrateOptions) -> Receiver {
    let options = ReceiveOptions {
        io_timeout: options.io_timeout,
        step_timeout: options.step_timeout,
    };
    Receiver::listen(&endpoint.parse().unwrap(), options).unwrap()
}

pub(super) fn control() -> Control {
    Control::new().unwrap()
}

/// One attempt; the source connects to `to`.
pub(super) fn attempt(
    source: &mut FakeSource,
    to: &Endpoint,
    destination: &mut FakeDestination,
    receiver: &mut Receiver,
    options: &MigrateOptions,
) -> (Report, Result<Received, ReceiveError>) {
    let (here, there) = (control(), control());
    thread::scope(|scope| {
        let receiving = scope.spawn(|| receiver.receive(destination, &there));
        let migrated = migrate(source, to, options, &here);
        (migrated.report, receiving.join().unwrap())
    })
}

/// One attempt without anything in between.
pub(super) fn direct(
    source: &mut FakeSource,
    destination: &mut FakeDestination,
    options: &MigrateOptions,
) -> (Report, Result<Received, ReceiveError>) {
    let mut receiver = receiver(options);
    let to = receiver.endpoint().clone();
    attempt(source, &to, destination, &mut receiver, options)
}

/// Asserts that the guest is at the destination, whole, and nowhere else.
pub(super) fn assert_moved(source: &FakeSource, destination: &FakeDestination, report: &Report) {
    assert_eq!(report.outcome, Outcome::Moved, "{report:?}");
    assert!(source.guest.is_held() && !source.locked);
    assert!(destination.running && destination.discarded == 0);
    let guest = destination.guest.as_ref().unwrap();
    assert_eq!(guest.registers(), source.guest.registers());
    guest.check_stamps();
    if let (Some(ours), Some(theirs)) = (&source.disk, &destination.blank) {
        assert!(ours.content() == theirs.content(), "disks differ");
    }
    assert_downtime(report);
}

/// Asserts that the guest is at the source, as it was, and that it can be moved from there.
pub(super) fn assert_stayed(source: &mut FakeSource, report: &Report, outcome: Outcome) {
    assert_eq!(report.outcome, outcome, "{report:?}");
    assert!(report.error.is_some() && report.downtime_ms.is_none() && !report.budget_kept);
    source.assert_runs();
    source.faults.clear();
    source.on_pause = None;
    source.drain_hangs = false;
    source.on_resume = None;
    source.on_release = None;
    let mut destination = FakeDestination::default();
    let (report, received) = direct(
        source,
        &mut destination,
        &MigrateOptions {
            verify: true,
            ..options()
        },
    );
    received.unwrap();
    assert_moved(source, &destination, &report);
}

fn assert_downtime(report: &Report) {
    let Downtime {
        pause_ms,
        drain_ms,
        final_log_ms,
        final_copy_ms,
        state_ms,
        restore_ms,
        commit_ms,
        resume_ms,
    } = report.downtime;
    let terms = [
        pause_ms,
        drain_ms,
        final_log_ms,
        final_copy_ms,
        state_ms,
        restore_ms,
        commit_ms,
        resume_ms,
    ];
    assert!(terms.iter().all(|term| *term >= 0.0), "{terms:?}");
    let total = report.downtime_ms.unwrap();
    assert!(
        (terms.iter().sum::<f64>() - total).abs() < 1e-6,
        "{terms:?} {total}"
    );
    assert!(total + report.verify_ms <= report.total_ms, "{report:?}");
    assert!(report.predicted_downtime_ms.is_some());
}
