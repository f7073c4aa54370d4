//! Real userfaultfds over memory of this process, filled from real files.

use std::os::unix::fs::FileExt;
use std::sync::mpsc;
use std::time::Duration;

use migration::MemoryKind;
use rustix::mm::Advice;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::*;
use crate::memory::{self, PAGE_SIZE};
use crate::snapshot::SnapshotWatch;
use crate::snapshot::blocks;

const PATIENCE: Duration = Duration::from_secs(10);
/// Two regions, of which the second does not end with a whole block.
const RANGES: [(u64, u64); 2] = [(0, 8 << 20), (1 << 32, (5 << 20) + 3 * PAGE_SIZE)];

/// What page `page` of a region begins with; every third page is zero, and so is the whole of the second block.
fn stamp(gpa: u64) -> u64 {
    let page = gpa / PAGE_SIZE;
    if page.is_multiple_of(3) || gpa / BLOCK == 1 {
        0
    } else {
        gpa | 1
    }
}

fn pages() -> impl Iterator<Item = u64> {
    RANGES
        .into_iter()
        .flat_map(|(gpa, len)| (gpa..gpa + len).step_by(PAGE_SIZE as usize))
}

/// A snapshot's memory file with its checksums.
struct Stored {
    directory: tempfile::TempDir,
    checksums: Vec<u64>,
}

impl Stored {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let memory = memory::create(&RANGES, MemoryKind::Anonymous).unwrap();
        for gpa in pages() {
            memory.write_obj(stamp(gpa), GuestAddress(gpa)).unwrap();
        }
        let path = directory.path().join("memory");
        let file = File::create(&path).unwrap();
        file.set_len(RANGES.iter().map(|(_, len)| len).sum()).unwrap();
        let mut all = PageSet::of(&memory).unwrap();
        for (gpa, len) in RANGES {
            all.insert_range(migration::MemoryRange { gpa, len }).unwrap();
        }
        let stored = blocks::write(&memory, &all, &file, &path, &SnapshotWatch::default()).unwrap();
        Self {
            directory,
            checksums: stored.checksums,
        }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("memory")
    }

    /// Memory that is filled from it, and what is said if that fails.
    fn prefetch(&self) -> (GuestMemory, Prefetch, mpsc::Receiver<String>) {
        let memory = memory::create(&RANGES, MemoryKind::Anonymous).unwrap();
        let (failed, reasons) = mpsc::channel();
        let file = File::open(self.path()).unwrap();
        let on_failed = move |reason| failed.send(reason).unwrap();
        let prefetch =
            Prefetch::start(&memory, file, self.path(), self.checksums.clone(), on_failed).unwrap();
        (memory, prefetch, reasons)
    }
}

fn wait_complete(prefetch: &Prefetch) {
    let began = Instant::now();
    while prefetch.progress().is_some() {
        assert!(began.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn read(memory: &GuestMemory, gpa: u64) -> u64 {
    memory.read_obj(GuestAddress(gpa)).unwrap()
}

#[test]
fn what_is_touched_while_memory_comes_is_what_the_file_has() {
    let stored = Stored::new();
    for backwards in [false, true] {
        let (memory, prefetch, reasons) = stored.prefetch();
        let mut all: Vec<u64> = pages().collect();
        if backwards {
            all.reverse();
        }
        // Several threads, so that several wait for one page.
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    all.iter()
                        .for_each(|gpa| assert_eq!(read(&memory, *gpa), stamp(*gpa), "{gpa:#x}"))
                });
            }
        });
        wait_complete(&prefetch);
        assert!(reasons.try_recv().is_err());
        drop(prefetch);
        assert!(pages().all(|gpa| read(&memory, gpa) == stamp(gpa)));
    }
}

#[test]
fn memory_that_nobody_touches_comes_as_well() {
    let stored = Stored::new();
    let (memory, prefetch, _reasons) = stored.prefetch();
    wait_complete(&prefetch);
    let mut there = PageSet::of(&memory).unwrap();
    prefetch.unplaced(&mut there).unwrap();
    assert!(there.is_empty());
    memory::populated(&memory, &[], &mut there).unwrap();
    for gpa in pages() {
        assert_eq!(there.contains(gpa), stamp(gpa) != 0, "{gpa:#x}");
        assert_eq!(read(&memory, gpa), stamp(gpa));
    }
}

#[test]
fn what_is_there_and_what_comes_are_all_that_the_file_has() {
    let stored = Stored::new();
    let (memory, prefetch, _reasons) = stored.prefetch();
    // At whatever moment.
    while prefetch.progress().is_some() {
        let mut found = PageSet::of(&memory).unwrap();
        prefetch.unplaced(&mut found).unwrap();
        memory::populated(&memory, &[], &mut found).unwrap();
        assert!(pages().all(|gpa| stamp(gpa) == 0 || found.contains(gpa)));
    }
}

#[test]
fn what_the_guest_gives_up_does_not_come_back() {
    let stored = Stored::new();
    for round in 0..20u64 {
        let (memory, prefetch, _reasons) = stored.prefetch();
        // Pages of all blocks, given up while they come, before, or afterwards.
        let given_up: Vec<u64> = pages().filter(|gpa| gpa / PAGE_SIZE % 7 == round % 7).collect();
        for gpa in &given_up {
            let slice = memory.get_slice(GuestAddress(*gpa), PAGE_SIZE as usize).unwrap();
            let start = slice.ptr_guard_mut().as_ptr();
            // SAFETY: a page of memory that nothing but this test uses.
            #[allow(unsafe_code)]
            unsafe { rustix::mm::madvise(start.cast(), PAGE_SIZE as usize, Advice::LinuxDontNeed) }.unwrap();
        }
        wait_complete(&prefetch);
        for gpa in pages() {
            let expected = if given_up.contains(&gpa) { 0 } else { stamp(gpa) };
            assert_eq!(read(&memory, gpa), expected, "{gpa:#x}");
        }
    }
}

#[test]
fn a_damaged_block_never_gets_to_the_guest() {
    let stored = Stored::new();
    let damaged = 3 * BLOCK;
    let file = File::options().write(true).open(stored.path()).unwrap();
    file.write_all_at(b"x", damaged + 5 * PAGE_SIZE).unwrap();
    let (memory, prefetch, reasons) = stored.prefetch();
    let reason = reasons.recv_timeout(PATIENCE).unwrap();
    assert!(
        reason.contains("the file is damaged") && reason.contains(&damaged.to_string()),
        "{reason}"
    );
    assert!(!prefetch.is_complete() && prefetch.progress().is_some());
    // Who touches it waits. The thread is left behind: it ends with the process.
    let (found, finds) = mpsc::channel();
    let touched = memory.clone();
    std::thread::spawn(move || found.send(read(&touched, damaged + PAGE_SIZE)));
    assert!(finds.recv_timeout(Duration::from_millis(200)).is_err());
    // Were it dropped, the page would be zero.
    std::mem::forget(prefetch);
}

#[test]
fn a_file_that_is_cut_short_is_an_error() {
    let stored = Stored::new();
    let (_memory, prefetch, reasons) = {
        File::options()
            .write(true)
            .open(stored.path())
            .unwrap()
            .set_len(BLOCK)
            .unwrap();
        stored.prefetch()
    };
    let reason = reasons.recv_timeout(PATIENCE).unwrap();
    assert!(!reason.is_empty() && !prefetch.is_complete());
    std::mem::forget(prefetch);
}

#[test]
fn it_ends_when_it_is_not_needed_any_more() {
    let stored = Stored::new();
    for wait in 0..20 {
        let (memory, prefetch, _reasons) = stored.prefetch();
        std::thread::sleep(Duration::from_micros(50 * wait));
        drop(prefetch);
        drop(memory);
    }
}
