//! Disks that come along.

use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::disk::{FakeDisk, SIZE};
use super::fake::{FakeDestination, FakeSource, PortFault};
use super::guest::{Load, TestGuest};
use super::rig::{assert_moved, assert_stayed, direct, hasty, options};
use crate::*;

/// Makes something fail at either side.
type Break = fn(&mut FakeSource, &mut FakeDestination);

fn with_disks() -> MigrateOptions {
    MigrateOptions {
        with_disks: true,
        ..options()
    }
}

/// A guest that writes memory and a disk all the time.
fn busy() -> FakeSource {
    let disk = Arc::new(FakeDisk::new());
    for block in (0..SIZE / PAGE_SIZE).step_by(3) {
        disk.write_and_mark(block * PAGE_SIZE, &[block as u8 | 1; 600]);
    }
    disk.write_and_mark(SIZE - 512, &[0xaa; 512]);
    let mut guest = TestGuest::new(512, 64);
    guest.writes_to(disk.clone());
    guest.start(Load { pages: 500 });
    guest.await_progress();
    let mut source = FakeSource::new(guest);
    source.disk = Some(disk);
    source
}

#[test]
fn a_disk_comes_along_while_it_is_written() {
    for compression in [None, Some(Compression::Lz4)] {
        let (mut source, mut destination) = (busy(), FakeDestination::default());
        let options = MigrateOptions {
            verify: true,
            compression,
            ..with_disks()
        };
        let (report, received) = direct(&mut source, &mut destination, &options);
        received.unwrap();
        assert_moved(&source, &destination, &report);
        assert_eq!(report.disks, 1);
        assert!(
            report.disk_bytes >= SIZE / 3 && report.mirror_ms > 0.0,
            "{report:?}"
        );
        assert!(report.bytes_sent > report.disk_bytes, "{report:?}");
        let order: Vec<_> = source.calls.iter().take(2).collect();
        assert_eq!(order, [&"mirror", &"start_dirty_log"]);
        // A log costs the guest something, and disks may take hours.
        assert!(source.reads_before_log > 0);
    }
}

#[test]
fn a_disk_that_is_there_stays_where_it_is() {
    let mut source = busy();
    let mut destination = FakeDestination {
        has_disk: true,
        ..FakeDestination::default()
    };
    let (report, received) = direct(&mut source, &mut destination, &with_disks());
    received.unwrap();
    assert_eq!(report.outcome, Outcome::Moved, "{report:?}");
    assert_eq!((report.disks, report.disk_bytes), (0, 0));
    assert!(!source.calls.contains(&"mirror"));
}

#[test]
fn a_disk_that_was_not_offered_is_not_sent() {
    let mut source = busy();
    let mut destination = FakeDestination {
        greedy: true,
        ..FakeDestination::default()
    };
    let (report, received) = direct(&mut source, &mut destination, &options());
    received.unwrap_err();
    let error = report.error.as_ref().unwrap();
    assert!(
        error.contains("expected none, got those of devices [0]"),
        "{error}"
    );
    assert_stayed(&mut source, &report, Outcome::Failed);
}

#[test]
fn whatever_fails_leaves_the_sources_disk_as_the_only_one() {
    let faults: [(&str, Break); 6] = [
        ("injected into mirror", |source, _| {
            source.faults.insert("mirror", PortFault::Error);
        }),
        ("injected into read", |source, _| {
            let disk = source.disk.as_ref().unwrap();
            disk.broken.store(true, Ordering::SeqCst);
        }),
        ("injected into write", |_, destination| {
            destination.disk_breaks = true
        }),
        ("injected into pause", |source, _| {
            source.faults.insert("pause", PortFault::Error);
        }),
        ("panicked", |source, _| {
            source.faults.insert("save", PortFault::Panic);
        }),
        ("injected into restore", |_, destination| {
            destination.faults.insert("restore", PortFault::Error);
        }),
    ];
    for (expected, break_it) in faults {
        let (mut source, mut destination) = (busy(), FakeDestination::default());
        break_it(&mut source, &mut destination);
        let (report, received) = direct(&mut source, &mut destination, &with_disks());
        received.unwrap_err();
        let error = report.error.as_ref().unwrap();
        assert!(error.contains(expected), "{error}");
        assert!(destination.blank.is_none(), "{expected}: a disk is left behind");
        source
            .disk
            .as_ref()
            .unwrap()
            .broken
            .store(false, Ordering::SeqCst);
        assert_stayed(&mut source, &report, Outcome::Failed);
    }
}

#[test]
fn a_deadline_counts_for_disks_too() {
    let mut source = busy();
    let slow = MigrateOptions {
        deadline: Some(Duration::from_millis(300)),
        bandwidth: Some(256 << 10),
        ..with_disks()
    };
    let mut destination = FakeDestination::default();
    let (report, received) = direct(&mut source, &mut destination, &slow);
    received.unwrap_err();
    let error = report.error.as_ref().unwrap();
    assert!(
        error.contains("disks cannot be copied before the deadline"),
        "{error}"
    );
    assert_stayed(&mut source, &report, Outcome::Failed);
}

#[test]
fn a_disk_that_hangs_holds_up_no_more_than_the_threads_that_write_to_it() {
    let (mut source, mut destination) = (busy(), FakeDestination::default());
    let (back, hangs) = mpsc::channel();
    destination.disk_hangs = Some(hangs);
    let options = MigrateOptions {
        with_disks: true,
        step_timeout: Duration::from_secs(2),
        ..hasty()
    };
    let began = Instant::now();
    let (report, received) = direct(&mut source, &mut destination, &options);
    assert!(began.elapsed() < Duration::from_secs(30));
    let error = received.unwrap_err();
    assert!(
        matches!(error, ReceiveError::Hang { streams: 1.. }) && error.is_final(),
        "{error:?}"
    );
    assert_eq!(destination.discarded, 1);
    drop(back);
    assert_stayed(&mut source, &report, Outcome::Failed);
}
