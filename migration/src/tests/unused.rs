//! Guests that tell what they do not use.

use std::sync::Arc;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::disk::FakeDisk;
use super::fake::{FakeDestination, FakeSource, PortFault};
use super::guest::{HIGH, Load, TestGuest};
use super::rig::{assert_moved, direct, options};
use crate::*;

fn verified() -> MigrateOptions {
    MigrateOptions {
        verify: true,
        ..options()
    }
}

fn pages(gpa: u64, count: u64) -> Vec<u64> {
    (0..count).map(|page| gpa + page * PAGE_SIZE).collect()
}

fn first_word(guest: &TestGuest, gpa: u64) -> u64 {
    guest.memory.read_obj(GuestAddress(gpa)).unwrap()
}

#[test]
fn what_the_guest_does_not_use_is_not_sent() {
    let mut guest = TestGuest::new(1024, 64);
    let used = [pages(0, 100), pages(HIGH, 1)].concat();
    let unused = [pages(100 * PAGE_SIZE, 700), pages(HIGH + PAGE_SIZE, 63)].concat();
    for gpa in used.iter().chain(&unused) {
        guest.write(*gpa, false);
    }
    guest.start(Load::default());
    let mut source = FakeSource::new(guest);
    // Pages that were never touched do not count, whether the guest reports them or not.
    source.unused = Some([pages(900 * PAGE_SIZE, 100), unused.clone()].concat());
    let mut destination = FakeDestination::default();
    let (report, received) = direct(&mut source, &mut destination, &verified());
    received.unwrap();
    assert_moved(&source, &destination, &report);
    assert_eq!(report.pages_unused, 762, "all but the one that is taken back");
    assert!(report.pages_sent <= 103, "and one by the drain: {report:?}");
    let there = destination.guest.as_ref().unwrap();
    for gpa in unused.into_iter().take(762) {
        // The migration did not change it at the source, where the guest might have stayed.
        assert!(first_word(&source.guest, gpa) != 0 && first_word(there, gpa) == 0);
    }
    assert_eq!(source.report_limit, Some(Duration::from_secs(2)));
}

#[test]
fn what_is_used_again_arrives_whole() {
    let mut used_again = 0;
    for (with_disks, attempt) in (0..8).map(|attempt| (attempt % 4 == 3, attempt)) {
        let mut guest = TestGuest::new(2048, 1024);
        let disk = Arc::new(FakeDisk::new());
        if with_disks {
            guest.writes_to(disk.clone());
        }
        for gpa in pages(0, 2048) {
            guest.write(gpa, false);
        }
        guest.start(Load { pages: 1500 });
        guest.await_progress();
        let mut source = FakeSource::new(guest);
        source.disk = with_disks.then_some(disk);
        source.unused = Some(pages(0, 2048));
        // The guest goes on writing after its report.
        source
            .faults
            .insert("unused", PortFault::Slow(Duration::from_millis(2 * attempt)));
        let options = MigrateOptions {
            with_disks,
            ..verified()
        };
        let mut destination = FakeDestination::default();
        let (report, received) = direct(&mut source, &mut destination, &options);
        received.unwrap();
        assert_moved(&source, &destination, &report);
        assert!(report.pages_unused >= 500, "{report:?}");
        used_again += source.guest.used();
    }
    assert!(used_again > 1000, "{used_again}");
}

#[test]
fn the_report_of_unused_pages_ends_before_the_deadline() {
    let mut guest = TestGuest::new(64, 16);
    guest.start(Load { pages: 8 });
    let mut source = FakeSource::new(guest);
    source.unused = Some(Vec::new());
    let urgent = MigrateOptions {
        deadline: Some(Duration::from_secs(4)),
        ..options()
    };
    let mut destination = FakeDestination::default();
    let (report, received) = direct(&mut source, &mut destination, &urgent);
    received.unwrap();
    assert_moved(&source, &destination, &report);
    assert_eq!(report.pages_unused, 0);
    let report_limit = source.report_limit.unwrap();
    assert!(
        report_limit <= Duration::from_millis(200) && !report_limit.is_zero(),
        "{report_limit:?}"
    );
}
