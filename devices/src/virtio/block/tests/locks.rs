//! Locks, as other processes of this program, QEMU and a destination see them.

use std::fs::File;
use std::path::Path;

use super::super::sys::{ByteRange, FileLock, find_lock, set_lock};
use super::*;

#[test]
fn locks_belong_to_the_open_disk() {
    let disk = TestDisk::new();
    let open = |read_only| {
        let access = Access {
            read_only,
            ..Default::default()
        };
        BlockBackend::open(&disk.path(), access).unwrap()
    };
    let (first, second, reader) = (open(false), open(false), open(true));
    first.lock().unwrap();
    first.lock().unwrap();
    let error = second.lock().unwrap_err();
    assert!(
        matches!(error, BlockBackendError::Locked { read_only: false, .. }),
        "{error}"
    );
    assert!(reader.lock().is_err());
    first.unlock().unwrap();
    reader.lock().unwrap();
    open(true).lock().unwrap();
    assert!(second.lock().is_err());
    drop(reader);
    second.lock().unwrap();
}

fn open(path: &Path, read_only: bool) -> BlockBackend {
    let access = Access {
        read_only,
        ..Default::default()
    };
    BlockBackend::open(path, access).unwrap()
}

#[test]
fn qemu_may_read_and_not_write() {
    let disk = TestDisk::new();
    let other = File::options().read(true).write(true).open(disk.path()).unwrap();
    let is_locked = |byte| find_lock(&other, ByteRange::byte(byte)).unwrap().is_some();
    // The bytes that QEMU checks before it writes, before it resizes, and before it forbids others to write.
    for (read_only, locked) in [(false, [true, true, true]), (true, [true, true, false])] {
        let backend = open(&disk.path(), read_only);
        backend.lock().unwrap();
        assert_eq!([201, 203, 101].map(is_locked), locked);
        assert!(!is_locked(200), "others may read");
        // QEMU takes its shared locks before it checks.
        for byte in [100, 101, 103, 201, 203] {
            assert!(set_lock(&other, ByteRange::byte(byte), FileLock::Shared).unwrap());
        }
        set_lock(&other, ByteRange::ALL, FileLock::Unlocked).unwrap();
    }
}

#[test]
fn a_lock_of_another_process_conflicts() {
    let disk = TestDisk::new();
    let other = File::options().read(true).write(true).open(disk.path()).unwrap();
    // Another process writes; resizes; reads and forbids writing; forbids reading; has locked all of the file.
    for (range, lock, to_write, to_read) in [
        (ByteRange::byte(101), FileLock::Shared, false, false),
        (ByteRange::byte(103), FileLock::Shared, false, false),
        (ByteRange::byte(201), FileLock::Shared, false, true),
        (ByteRange::byte(200), FileLock::Shared, false, false),
        (ByteRange::ALL, FileLock::Exclusive, false, false),
        (ByteRange::ALL, FileLock::Shared, false, false),
    ] {
        assert!(set_lock(&other, range, lock).unwrap());
        for (read_only, free) in [(false, to_write), (true, to_read)] {
            let backend = open(&disk.path(), read_only);
            assert_eq!(backend.lock().is_ok(), free, "{range:?} {lock:?}, {read_only}");
            if !free {
                assert_eq!(
                    find_lock(&other, ByteRange::ALL).unwrap(),
                    None,
                    "some of it is kept"
                );
            }
        }
        set_lock(&other, ByteRange::ALL, FileLock::Unlocked).unwrap();
    }
    // A reader that the last owner has admitted does not keep the next owner from its lock.
    set_lock(&other, ByteRange::byte(201), FileLock::Shared).unwrap();
    open(&disk.path(), false).taken_over().lock().unwrap();
}

#[test]
fn a_lock_that_is_held_is_not_asked_for_again() {
    let disk = TestDisk::new();
    let backend = open(&disk.path(), false);
    backend.lock().unwrap();
    let other = File::open(disk.path()).unwrap();
    set_lock(&other, ByteRange::byte(201), FileLock::Shared).unwrap();
    backend.lock().unwrap();
}

#[test]
fn a_mark_shows_that_a_file_is_the_same() {
    let disk = TestDisk::new();
    let copy = disk.dir.path().join("copy");
    fs::copy(disk.path(), &copy).unwrap();
    let link = disk.dir.path().join("link");
    fs::hard_link(disk.path(), &link).unwrap();
    for read_only in [false, true] {
        let source = open(&disk.path(), read_only);
        source.lock().unwrap();
        let mark = source.mark().unwrap();
        open(&link, read_only).check_mark(mark).unwrap();
        for (path, mark) in [(&copy, mark), (&link, mark - 1), (&link, mark + 1), (&link, 50)] {
            let error = open(path, read_only).check_mark(mark).unwrap_err();
            assert!(
                matches!(&error, BlockBackendError::NotTheSame { path: named } if named == path),
                "{error}"
            );
        }
        // A lock on the whole copy is not a mark.
        let other = File::options().read(true).write(true).open(&copy).unwrap();
        set_lock(&other, ByteRange::ALL, FileLock::Exclusive).unwrap();
        assert!(open(&copy, read_only).check_mark(mark).is_err());
        let next = source.mark().unwrap();
        assert!(
            open(&link, read_only).check_mark(mark).is_err(),
            "an old one counts"
        );
        open(&link, read_only).check_mark(next).unwrap();
        source.unlock().unwrap();
        assert!(open(&link, read_only).check_mark(next).is_err());
    }
}
