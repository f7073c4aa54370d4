//! A balloon as a guest and the host use it.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use guest_memory::PageMarks;
use proptest::prelude::*;
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestRegionMmap};

use super::discard::discard;
use super::discarder::MAX_PAGES;
use super::hints::{Hints, MAX_RANGES};
use super::replaced::Replaced;
use super::*;
use crate::virtio::testing::{
    AVAILABLE, DATA, DESCRIPTORS, Driver, END, USED, VERSION_1, memory, reads, writes,
};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;
const HINTING: usize = 3;
const REPORTING: usize = 4;

/// Features and where the configuration space has what belongs to them.
const F_HINTS: u64 = 1 << 3;
const F_POISON: u64 = 1 << 4;
const COMMAND: u64 = 0x108;
const POISON: u64 = 0x10c;

/// The id that ends a command.
const DONE: u32 = 1;

/// Pages that tests give up.
const PAGES: u64 = DATA + 0x4_0000;

fn balloon() -> (Driver, Arc<BalloonControl>) {
    let control = Arc::new(BalloonControl::new(0).unwrap());
    let driver = Driver::ready(VirtioBalloon::new(control.clone(), true).unwrap());
    (driver, control)
}

/// Puts the numbers of pages where a chain can point to them; how many bytes they take.
fn list(driver: &Driver, pages: &[u32]) -> u32 {
    let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    driver.fill(DATA, &bytes);
    bytes.len() as u32
}

/// Whether the page still holds what [`dirty`] put there.
fn is_kept(driver: &Driver, page: u64) -> bool {
    driver.bytes(page, 4096) == [7; 4096]
}

fn dirty(driver: &Driver, pages: std::ops::Range<u64>) {
    for page in pages.step_by(4096) {
        driver.fill(page, &[7; 4096]);
    }
}

#[test]
fn inflated_pages_go_back_to_the_host() {
    let (mut driver, control) = balloon();
    assert_eq!(driver.get(0x008), 5);
    dirty(&driver, PAGES..PAGES + 0x5000);
    driver.take_dirty(PAGES);
    let first = (PAGES / 4096) as u32;
    // Out of order, one of them twice.
    let len = list(&driver, &[first + 3, first, first + 1, first]);
    driver.select(INFLATE);
    assert_eq!(driver.submit(&[reads(DATA, len)]), 0);
    let kept: Vec<bool> = (0..5).map(|page| is_kept(&driver, PAGES + page * 4096)).collect();
    assert_eq!(kept, [false, false, true, false, true]);
    assert_eq!(control.given_up(), 3 * PAGE_SIZE);
    // What they hold has changed, and a migration must know.
    assert!(driver.take_dirty(PAGES + 0x3000));
    // The guest may use them again at any time.
    driver.select(DEFLATE);
    assert_eq!(driver.submit(&[reads(DATA, len)]), 0);
    dirty(&driver, PAGES..PAGES + 0x1000);
    assert!(is_kept(&driver, PAGES));
    let counted = ["inflated_bytes", "deflated_bytes", "discarded_bytes"].map(|name| driver.count(name));
    assert_eq!(counted, [3, 4, 3].map(|pages| pages * PAGE_SIZE));
}

#[test]
fn reported_pages_go_back_to_the_host() {
    let (mut driver, control) = balloon();
    dirty(&driver, PAGES..PAGES + 0x8000);
    driver.select(REPORTING);
    // Parts of pages stay.
    let chain = [writes(PAGES, 0x2000), writes(PAGES + 0x3800, 0x2000)];
    assert_eq!(driver.submit(&chain), 0);
    let kept: Vec<bool> = (0..8).map(|page| is_kept(&driver, PAGES + page * 4096)).collect();
    assert_eq!(kept, [false, false, true, true, false, true, true, true]);
    assert_eq!(control.given_up(), 3 * PAGE_SIZE);
    assert_eq!(driver.count("reported_bytes"), 0x4000);
}

#[test]
fn queues_that_are_not_negotiated_leave_no_gap() {
    let control = Arc::new(BalloonControl::new(0).unwrap());
    let mut driver = Driver::new(VirtioBalloon::new(control.clone(), false).unwrap());
    let offered = driver.offered();
    assert_eq!(offered & 0b10_0110, 0b10_0010, "no deflation on OOM");
    driver.bring_up_with(VERSION_1 | 1 << 5);
    dirty(&driver, PAGES..PAGES + 0x1000);
    driver.select(2);
    assert_eq!(driver.submit(&[writes(PAGES, 0x1000)]), 0);
    assert_eq!(control.given_up(), PAGE_SIZE);
}

#[test]
fn targets_reach_the_guest_and_its_progress_the_host() {
    let (mut driver, control) = balloon();
    let generation = driver.get(0x0fc);
    control.set_target(10 * PAGE_SIZE + 1);
    driver.run();
    assert_eq!((driver.interrupts(), driver.get(0x060)), (1, 2));
    assert_ne!(driver.get(0x0fc), generation);
    assert_eq!(driver.get(0x100), 10);
    driver.set(0x104, 9);
    assert_eq!((driver.get(0x104), control.actual()), (9, 9 * PAGE_SIZE));
    assert_eq!(control.target(), 10 * PAGE_SIZE);
    // Nothing else can be written, and nothing is there beyond.
    driver.set(0x100, 77);
    driver.set(COMMAND, 77);
    driver.set(0x110, 77);
    assert_eq!([0x100, COMMAND, 0x110].map(|at| driver.get(at)), [10, 0, 0]);
    control.set_target(u64::MAX);
    assert_eq!(control.target(), u64::from(u32::MAX) * PAGE_SIZE);
}

/// Statistics that a guest would send: tags and values.
fn entries(entries: &[(u16, u64)]) -> Vec<u8> {
    let entry = |(tag, value): &(u16, u64)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    entries.iter().flat_map(entry).collect()
}

#[test]
fn statistics_come_when_they_are_asked_for() {
    let (mut driver, control) = balloon();
    control.request_statistics();
    driver.run();
    let bytes = entries(&[(4, 1 << 20), (5, 1 << 30), (99, 1), (0, 3)]);
    driver.fill(DATA, &bytes);
    driver.select(STATISTICS);
    // They were asked for before there were any: answered at once.
    driver.add(&[reads(DATA, bytes.len() as u32)]);
    driver.kick();
    let (first, seen) = control.statistics();
    let expected = Statistics {
        free_memory: Some(1 << 20),
        total_memory: Some(1 << 30),
        swap_in: Some(3),
        ..Default::default()
    };
    assert_eq!((first, seen), (Some(expected), 1));
    assert!(driver.used().is_empty(), "the chain is kept");
    control.request_statistics();
    driver.run();
    assert_eq!(driver.used().len(), 1);
    driver.fill(DATA, &entries(&[(4, 7)]));
    driver.add(&[reads(DATA, 10)]);
    driver.kick();
    assert_eq!(control.statistics().1, 2);
    assert_eq!(control.statistics().0.unwrap().free_memory, Some(7));
    // A second chain: the one before is not forgotten.
    driver.add(&[reads(DATA, 10)]);
    driver.kick();
    assert_eq!(driver.used().len(), 1);
}

#[test]
fn a_move_takes_target_and_kept_chain_along() {
    let (mut driver, control) = balloon();
    control.set_target(3 * PAGE_SIZE);
    driver.run();
    driver.set(0x104, 2);
    driver.select(STATISTICS);
    driver.add(&[reads(DATA, 10)]);
    driver.kick();
    let there = Arc::new(BalloonControl::new(0).unwrap());
    let saved = driver.save();
    let mut moved = driver
        .move_to(VirtioBalloon::new(there.clone(), true).unwrap(), saved)
        .unwrap();
    moved.transport.resume();
    moved.run();
    assert_eq!((there.target(), there.actual()), (3 * PAGE_SIZE, 2 * PAGE_SIZE));
    assert_eq!((moved.get(0x100), moved.get(0x104)), (3, 2));
    there.request_statistics();
    moved.run();
    moved.select(STATISTICS);
    assert_eq!(moved.used().len(), 1, "the chain that was kept");
    // A reset empties it, and forgets the chain.
    moved.bring_up();
    assert_eq!((there.actual(), there.target()), (0, 3 * PAGE_SIZE));
    there.request_statistics();
    moved.run();
    moved.select(STATISTICS);
    assert!(moved.used().is_empty());
}

/// How long a guest has to answer: enough for one that does, and no loss of time where one does not.
const PATIENCE: Duration = Duration::from_secs(2);

/// Asks the guest for hints, and lets `act` answer; returns the hints. The guest then sees that it has its pages back.
fn hints(
    driver: &mut Driver,
    control: &Arc<BalloonControl>,
    act: impl FnOnce(&mut Driver, u32),
) -> Vec<(u64, u64)> {
    driver.run();
    driver.interrupts();
    let hints = thread::scope(|scope| {
        let asking = scope.spawn(|| control.hints(PATIENCE));
        driver.wait();
        assert_eq!((driver.interrupts(), driver.get(0x060) & 2), (1, 2));
        driver.set(0x064, 2);
        let command = driver.get(COMMAND);
        assert!(command >= 2);
        act(driver, command);
        asking.join().unwrap()
    });
    driver.run();
    hints
}

/// The guest names the command that it answers, or says that it has answered.
fn name(driver: &mut Driver, command: u32) {
    driver.fill(DATA, &command.to_le_bytes());
    assert_eq!(driver.submit(&[reads(DATA, 4)]), 0);
}

#[test]
fn free_pages_are_reported_on_request_and_not_given_up() {
    let (mut driver, control) = balloon();
    assert!(control.can_hint());
    dirty(&driver, PAGES..PAGES + 0x8000);
    driver.select(HINTING);
    // The host has not asked.
    driver.submit(&[writes(PAGES, 0x1000)]);
    let mut commands = Vec::new();
    for _ in 0..2 {
        driver.take_dirty(PAGES);
        let hinted = hints(&mut driver, &control, |driver, command| {
            commands.push(command);
            // The end of an earlier answer, and what belongs to that.
            name(driver, 0);
            driver.submit(&[writes(PAGES, 0x1000)]);
            name(driver, command);
            driver.submit(&[writes(PAGES + 0x1000, 0x2000)]);
            // Parts of pages, nothing, what is not there.
            driver.submit(&[writes(PAGES + 0x3800, 0x2000), writes(PAGES, 0)]);
            driver.submit(&[writes(u64::MAX - 0x1fff, 0x2000), writes(END, 0x1000)]);
            name(driver, 0);
            driver.submit(&[writes(PAGES + 0x6000, 0x1000)]);
        });
        let outside = [(u64::MAX - 0x1fff, 0x1000), (END, 0x1000)];
        assert_eq!(hinted[..2], [(PAGES + 0x1000, 0x2000), (PAGES + 0x4000, 0x1000)]);
        assert_eq!(hinted[2..], outside, "unchecked");
        assert_eq!((driver.get(COMMAND), driver.get(0x060) & 2), (DONE, 2));
        assert!((0..8).all(|page| is_kept(&driver, PAGES + page * 0x1000)));
        assert!(!driver.take_dirty(PAGES + 0x1000));
    }
    assert!(commands[0] != commands[1], "the same one is not answered twice");
    assert_eq!(control.given_up(), 0);
}

#[test]
fn a_guest_that_does_not_answer_is_left_alone() {
    let (mut driver, control) = balloon();
    driver.select(HINTING);
    assert_eq!(hints(&mut driver, &control, |_, _| {}), []);
    // Or begins, with what makes no sense in between, and does not end.
    let hinted = hints(&mut driver, &control, |driver, command| {
        name(driver, command.wrapping_add(1));
        driver.submit(&[writes(PAGES, 0x1000)]);
        name(driver, command);
        for chain in [
            vec![reads(DATA, 3)],
            vec![reads(END, 4)],
            vec![writes(DATA, 4), reads(DATA, 4)],
        ] {
            driver.submit(&chain);
        }
        driver.submit(&[reads(DATA, 4), writes(PAGES, 0x1000)]);
    });
    assert_eq!(hinted, [(PAGES, 0x1000)]);
    // Or never ends.
    let hinted = thread::scope(|scope| {
        let asking = scope.spawn(|| control.hints(Duration::from_millis(50)));
        driver.wait();
        let command = driver.get(COMMAND);
        name(&mut driver, command);
        while !asking.is_finished() {
            driver.submit(&[writes(PAGES, 0x1000)]);
        }
        asking.join().unwrap()
    });
    assert!(!hinted.is_empty());
    driver.run();
    assert_eq!((driver.get(COMMAND), driver.get(0x070)), (DONE, 15));
    assert!(control.new_statistics(PATIENCE).is_none());
}

#[test]
fn no_more_is_kept_than_a_guest_can_have_to_tell() {
    let mut hints = Hints::restored(u32::MAX);
    hints.request();
    assert_eq!(
        (hints.id(), hints.command()),
        (2, 2),
        "after the last number comes the first"
    );
    hints.handle_command_id(2);
    for _ in 0..=MAX_RANGES {
        hints.add(PAGES, 0x1000);
    }
    assert!(hints.is_open());
    assert_eq!(hints.finish().len(), MAX_RANGES);
}

#[test]
fn a_guest_that_poisons_what_it_frees_keeps_it() {
    let (mut driver, control) = balloon();
    dirty(&driver, PAGES..PAGES + 0x1000);
    for (poison, gone) in [(0xaaaa_aaaa, false), (0, true)] {
        driver.set(POISON, poison);
        assert_eq!((driver.get(POISON), control.can_hint()), (poison, gone));
        driver.select(REPORTING);
        driver.submit(&[writes(PAGES, 0x1000)]);
        assert_eq!(is_kept(&driver, PAGES), !gone);
    }
    // The value counts only if the driver has negotiated it, and ends with a reset.
    driver.set(POISON, 1);
    driver.bring_up();
    assert_eq!(driver.get(POISON), 0);
    driver.bring_up_with(VERSION_1 | F_HINTS);
    driver.set(POISON, 1);
    assert!(control.can_hint());
    driver.bring_up_with(VERSION_1 | F_POISON);
    assert!(!control.can_hint());
}

#[test]
fn whatever_comes_in_between_the_guest_gets_its_pages_back() {
    let (mut driver, control) = balloon();
    driver.select(HINTING);
    let mut open = None;
    hints(&mut driver, &control, |driver, command| {
        name(driver, command);
        open = Some((command, driver.save()));
        driver.transport.resume();
    });
    // It moves in the middle.
    let (command, saved) = open.unwrap();
    let there = Arc::new(BalloonControl::new(0).unwrap());
    let mut moved = driver
        .move_to(VirtioBalloon::new(there.clone(), true).unwrap(), saved)
        .unwrap();
    moved.transport.resume();
    moved.run();
    assert_eq!((moved.get(COMMAND), moved.get(0x060) & 2), (DONE, 2));
    assert!(moved.interrupts() > 0 && there.can_hint());
    let hinted = hints(&mut moved, &there, |moved, next| {
        assert_ne!(next, command, "it has answered that one");
        name(moved, next);
        moved.submit(&[writes(PAGES, 0x1000)]);
        name(moved, 0);
    });
    assert_eq!(hinted, [(PAGES, 0x1000)]);
    // The driver is reset in the middle: the host waits no longer for an answer, and the driver finds no command that
    // is over.
    let hinted = hints(&mut moved, &there, |moved, command| {
        name(moved, command);
        moved.submit(&[writes(PAGES, 0x1000)]);
        moved.bring_up();
        // The host's thread may have seen by now that there is no answer.
        assert!([0, DONE].contains(&moved.get(COMMAND)));
    });
    assert_eq!(hinted, []);
    assert_eq!(moved.get(COMMAND), DONE);
}

#[test]
fn statistics_that_were_there_before_the_driver_was_ready_count() {
    let control = Arc::new(BalloonControl::new(0).unwrap());
    let mut driver = Driver::new(VirtioBalloon::new(control.clone(), true).unwrap());
    let features = driver.offered();
    assert!(driver.negotiate(features));
    let above = 0x4000 * STATISTICS as u64;
    driver.select(STATISTICS);
    driver.set_up_queue(DESCRIPTORS + above, AVAILABLE + above, USED + above);
    driver.fill(DATA, &entries(&[(4, 1)]));
    driver.add(&[reads(DATA, 10)]);
    driver.kick();
    driver.set(0x070, 15);
    driver.run();
    assert_eq!(control.statistics().1, 1);
}

#[test]
fn new_statistics_are_waited_for() {
    let (mut driver, control) = balloon();
    driver.fill(DATA, &entries(&[(4, 1)]));
    driver.select(STATISTICS);
    driver.add(&[reads(DATA, 10)]);
    driver.kick();
    let statistics = thread::scope(|scope| {
        let asking = scope.spawn(|| control.new_statistics(Duration::from_secs(10)));
        driver.wait();
        driver.fill(DATA, &entries(&[(4, 2)]));
        driver.add(&[reads(DATA, 10)]);
        driver.kick();
        asking.join().unwrap()
    });
    assert_eq!(statistics.unwrap().free_memory, Some(2));
}

#[test]
fn hostile_requests_come_back() {
    let (mut driver, control) = balloon();
    let before = control.given_up();
    driver.select(INFLATE);
    // Pages that there are not, half a number, nothing, a list outside memory, a list that is to be written.
    let len = list(&driver, &[u32::MAX, (END / 4096) as u32]);
    for chain in [
        vec![reads(DATA, len)],
        vec![reads(DATA, 3)],
        vec![reads(DATA, 0)],
        vec![reads(END, 8)],
        vec![writes(DATA, 8)],
        vec![writes(DATA, 8), reads(DATA, 8)],
    ] {
        assert_eq!(driver.submit(&chain), 0);
    }
    driver.select(REPORTING);
    for chain in [
        vec![reads(PAGES, 4096)],
        vec![writes(END, 4096)],
        vec![writes(END - 4096, 8192)],
        vec![writes(u64::MAX - 4096, 8192)],
        vec![writes(PAGES, 0)],
        vec![writes(PAGES + 1, 4096)],
        vec![writes(0, u32::MAX)],
    ] {
        assert_eq!(driver.submit(&chain), 0);
    }
    assert_eq!(control.given_up(), before);
    // More than one request may list: the rest stays.
    dirty(&driver, PAGES..PAGES + 0x2000);
    let mut pages = vec![(PAGES / 4096) as u32; MAX_PAGES];
    pages.push((PAGES / 4096) as u32 + 1);
    let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    driver.fill(DATA, &bytes);
    driver.select(INFLATE);
    assert_eq!(driver.submit(&[reads(DATA, bytes.len() as u32)]), 0);
    assert!(!is_kept(&driver, PAGES) && is_kept(&driver, PAGES + 4096));
    assert_eq!(driver.get(0x070), 15);
}

#[test]
fn a_saved_chain_that_cannot_be_is_refused() {
    let (driver, _) = balloon();
    let mut saved = driver.save();
    let mut state: BalloonState = saved.take("dev0").unwrap();
    state.statistics = Some(256);
    saved.put("dev0", &state).unwrap();
    let control = Arc::new(BalloonControl::new(0).unwrap());
    let refused = driver
        .move_to(VirtioBalloon::new(control, true).unwrap(), saved)
        .err()
        .unwrap();
    assert!(
        refused.to_string().contains("expected a descriptor below 256"),
        "{refused}"
    );
}

#[test]
fn shared_memory_is_given_up_in_its_file() {
    let memory = memory_in_a_file();
    for page in [0u64, 1, 2] {
        memory.write_slice(&[7; 4096], GuestAddress(page * 4096)).unwrap();
    }
    assert_eq!(discard(&memory, 4096, 4096, &Mutex::default()).unwrap(), 4096);
    let file = memory.iter().next().unwrap().file_offset().unwrap();
    let blocks = std::os::unix::fs::MetadataExt::blocks(&file.file().metadata().unwrap());
    assert_eq!(blocks * 512, 2 * 4096);
    let byte = |page: u64| memory.read_obj::<u8>(GuestAddress(page * 4096)).unwrap();
    assert_eq!([byte(0), byte(1), byte(2)], [7, 0, 7]);
}

#[test]
fn what_is_given_up_of_a_private_file_is_zero() {
    let file = tempfile::tempfile().unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 8 * 4096], 0).unwrap();
    let region = MmapRegionBuilder::new_with_bitmap(8 * 4096, PageMarks::with_len(8 * 4096))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::new(file, 0))
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(1 << 20)).unwrap();
    let memory = crate::GuestMemory::from_regions(vec![region]).unwrap();
    let at = |page: u64| (1 << 20) + page * 4096;
    let bytes = || (0..8).map(|page| memory.read_obj::<u8>(GuestAddress(at(page))).unwrap());
    memory.write_obj(8u8, GuestAddress(at(4))).unwrap();
    let replaced = Mutex::new(Replaced::default());
    for (page, pages) in [(1, 2), (4, 1), (2, 4)] {
        assert_eq!(
            discard(&memory, at(page), pages * 4096, &replaced).unwrap(),
            pages * 4096
        );
    }
    assert_eq!(bytes().collect::<Vec<_>>(), [7, 0, 0, 0, 0, 0, 7, 7]);
    let ranges = replaced.lock().unwrap().ranges();
    assert_eq!(ranges, [(at(1), 5 * 4096)]);
    // It is used again, and given up again.
    memory.write_obj(9u8, GuestAddress(at(3))).unwrap();
    assert_eq!(discard(&memory, at(3), 4096, &replaced).unwrap(), 4096);
    assert_eq!(bytes().collect::<Vec<_>>(), [7, 0, 0, 0, 0, 0, 7, 7]);
    assert_eq!(replaced.lock().unwrap().ranges(), ranges);
}

fn memory_in_a_file() -> crate::GuestMemory {
    let file = rustix::fs::memfd_create("balloon", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, 1 << 20).unwrap();
    let file = FileOffset::new(file.into(), 0);
    crate::GuestMemory::from_ranges_with_files([(GuestAddress(0), 1 << 20, Some(file))]).unwrap()
}

#[test]
fn golden_record() {
    let state = BalloonState {
        target: 1,
        actual: 2,
        statistics: Some(3),
        command: 4,
        poison: 5,
    };
    migration_state::assert_golden(2, "010201030405", &state);
}

proptest! {
    #[test]
    fn nothing_outside_the_range_is_given_up(gpa in 0u64..END + 0x2000, len in 0u64..0x9000) {
        let memory = memory();
        memory.write_slice(&vec![7; END as usize], GuestAddress(0)).unwrap();
        let given = discard(&memory, gpa, len, &Mutex::default());
        let mut all = vec![0; END as usize];
        memory.read_slice(&mut all, GuestAddress(0)).unwrap();
        let gone = all.chunks(4096).enumerate().filter(|(_, page)| page.iter().any(|byte| *byte != 7));
        let mut count = 0;
        for (page, bytes) in gone {
            let start = page as u64 * 4096;
            prop_assert!(gpa <= start && start + 4096 <= gpa + len, "page {page}");
            prop_assert!(bytes.iter().all(|byte| *byte == 0));
            count += 4096;
        }
        prop_assert_eq!(given.unwrap_or(0), count);
    }
}
