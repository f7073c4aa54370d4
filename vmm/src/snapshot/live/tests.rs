//! Real protection of memory of this process, and real files.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::*;

/// Two regions, of which the second does not end with a whole block.
const RANGES: [(u64, u64); 2] = [(0, 16 << 20), (1 << 32, (9 << 20) + 3 * PAGE_SIZE)];

fn pages() -> impl Iterator<Item = u64> {
    RANGES
        .into_iter()
        .flat_map(|(gpa, len)| (gpa..gpa + len).step_by(PAGE_SIZE as usize))
}

/// What a page holds before; every fifth was never touched.
fn before(gpa: u64) -> Option<u64> {
    (!(gpa / PAGE_SIZE).is_multiple_of(5)).then_some(gpa | 1)
}

fn guest() -> GuestMemory {
    let memory = memory::create(&RANGES, MemoryKind::Anonymous).unwrap();
    for gpa in pages() {
        match before(gpa) {
            Some(stamp) => memory.write_obj(stamp, GuestAddress(gpa)).unwrap(),
            // The kernel's page of zeroes.
            None if gpa % 3 == 0 => assert_eq!(read(&memory, gpa), 0),
            None => {}
        }
    }
    memory
}

/// The memory that is in the file.
fn stored(file: &File, path: &Path, stored: &StoredBlocks) -> GuestMemory {
    let memory = memory::create(&RANGES, MemoryKind::Anonymous).unwrap();
    let watch = SnapshotWatch::default();
    crate::snapshot::blocks::read(&memory, file, path, None, &stored.checksums, &watch).unwrap();
    memory
}

fn read(memory: &GuestMemory, gpa: u64) -> u64 {
    memory.read_obj(GuestAddress(gpa)).unwrap()
}

fn file(directory: &tempfile::TempDir) -> (std::path::PathBuf, File) {
    let path = directory.path().join("memory");
    let file = File::options()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    file.set_len(RANGES.iter().map(|(_, len)| len).sum()).unwrap();
    (path, file)
}

#[test]
fn what_is_written_meanwhile_is_not_in_it_and_not_lost() {
    let directory = tempfile::tempdir().unwrap();
    for round in 0..5u64 {
        let ((path, file), memory) = (file(&directory), guest());
        let copy = LiveCopy::prepare(&memory).unwrap();
        copy.protect().unwrap();
        let (running, begun) = (AtomicBool::new(false), Instant::now());
        let found = thread::scope(|scope| {
            for writer in 0..3u64 {
                let (memory, running) = (&memory, &running);
                scope.spawn(move || {
                    while !running.load(Ordering::Acquire) {
                        assert!(begun.elapsed() < Duration::from_secs(10));
                        thread::yield_now();
                    }
                    // From the end and from the begin, over all pages, also those that were never there.
                    let mut all: Vec<u64> = pages().filter(|gpa| gpa / PAGE_SIZE % 3 == writer).collect();
                    if (round + writer) % 2 == 0 {
                        all.reverse();
                    }
                    all.iter()
                        .for_each(|gpa| memory.write_obj(gpa | 2, GuestAddress(*gpa)).unwrap());
                });
            }
            let resume = || running.store(true, Ordering::Release);
            copy.write(resume, &file, &path, &SnapshotWatch::default())
                .unwrap()
        });
        assert_eq!(found.pages, pages().filter_map(before).count() as u64);
        let stored = stored(&file, &path, &found);
        for gpa in pages() {
            assert_eq!(read(&stored, gpa), before(gpa).unwrap_or(0), "{gpa:#x}");
            assert_eq!(read(&memory, gpa), gpa | 2, "{gpa:#x}");
        }
    }
}

#[test]
fn a_disk_that_fails_or_a_cancel_lets_the_guest_go_on() {
    let directory = tempfile::tempdir().unwrap();
    for cancelled in [false, true] {
        let ((path, file), memory) = (file(&directory), guest());
        let copy = LiveCopy::prepare(&memory).unwrap();
        copy.protect().unwrap();
        let watch = SnapshotWatch::default();
        if cancelled {
            watch.cancel();
        }
        let full = File::options().read(true).write(true).open("/dev/full").unwrap();
        let file = if cancelled { &file } else { &full };
        let failed = copy.write(|| {}, file, &path, &watch).unwrap_err();
        assert_eq!(matches!(failed, SnapshotError::Cancelled), cancelled, "{failed}");
        // Nothing is protected any more.
        pages().for_each(|gpa| memory.write_obj(gpa | 2, GuestAddress(gpa)).unwrap());
    }
}

#[test]
fn a_disk_that_hangs_lets_the_guest_write_once_the_snapshot_is_cancelled() {
    let (memory, watch) = (guest(), SnapshotWatch::default());
    let mut copy = LiveCopy::prepare(&memory).unwrap();
    copy.protect().unwrap();
    copy.buffers.truncate(2);
    let copies = Copies::new(std::mem::take(&mut copy.buffers));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        // There are no writers: no buffer ever comes back.
        let copying = scope.spawn(|| {
            let _ended = EndOnDrop(&copy, &copies);
            copy.copy(&blocks(&memory), &copies, &watch)
        });
        scope.spawn(|| {
            pages().for_each(|gpa| memory.write_obj(gpa | 2, GuestAddress(gpa)).unwrap());
            done.store(true, Ordering::Release);
        });
        thread::sleep(Duration::from_millis(100));
        assert!(
            !done.load(Ordering::Acquire),
            "there were buffers for two blocks alone"
        );
        watch.cancel();
        assert!(matches!(copying.join().unwrap(), Err(SnapshotError::Cancelled)));
    });
    assert!(done.load(Ordering::Acquire));
}

#[test]
fn memory_that_cannot_be_protected_is_refused() {
    let shared = memory::create(&RANGES, MemoryKind::Shared).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let (_, file) = file(&directory);
    let mapped = memory::map_private(&RANGES, &file).unwrap();
    for memory in [shared, mapped] {
        assert!(matches!(LiveCopy::prepare(&memory), Err(SnapshotError::NotLive)));
    }
}
