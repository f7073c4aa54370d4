//! Files of the host that shrink, are removed or are not disks.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use super::*;

const READ_ONLY: Access = Access {
    read_only: true,
    direct: false,
    format: ImageFormat::Raw,
};

/// Leaves nothing but its first sector.
fn shrink(disk: &TestDisk) {
    let file = File::options().write(true).open(disk.path()).unwrap();
    file.set_len(512).unwrap();
}

#[test]
fn a_disk_that_shrinks_is_an_error_for_the_guest() {
    with_both(|disk| {
        let mut driver = disk.driver();
        shrink(disk);
        assert_eq!(request(&mut driver, IN, 10, &[writes(BUFFER, 512)]), (IOERR, 1));
    });
}

#[test]
fn what_is_no_disk_is_refused_by_name() {
    let disk = TestDisk::new();
    let dir = disk.dir.path();
    let open = |path: &Path| BlockBackend::open(path, Access::default()).unwrap_err();
    assert!(matches!(
        open(&dir.join("none")),
        BlockBackendError::Missing { .. }
    ));
    assert!(matches!(
        open(dir),
        BlockBackendError::NotADisk {
            got: "a directory",
            ..
        }
    ));
    let read_only = BlockBackend::open(dir, READ_ONLY).unwrap_err();
    assert!(matches!(
        read_only,
        BlockBackendError::NotADisk {
            got: "a directory",
            ..
        }
    ));
    assert!(matches!(
        open(Path::new("/dev/null")),
        BlockBackendError::NotADisk {
            got: "something else",
            ..
        }
    ));
    // Even root may not write here.
    let error = open(Path::new("/sys/kernel/uevent_seqnum"));
    assert!(
        matches!(error, BlockBackendError::Permission { read_only: false, .. }),
        "{error}"
    );
    for (size, sectors) in [(0, 0), (511, 0), (513, 1), (1537, 3)] {
        File::options()
            .write(true)
            .open(disk.path())
            .unwrap()
            .set_len(size)
            .unwrap();
        let backend = BlockBackend::open(&disk.path(), Access::default()).unwrap();
        assert_eq!((backend.sectors(), backend.size()), (sectors, sectors * 512));
    }
}

#[test]
fn what_a_disk_has_lost_is_no_hole() {
    let disk = TestDisk::new();
    let backend = BlockBackend::open(&disk.path(), Access::default()).unwrap();
    assert_eq!(backend.allocated().unwrap(), [(0, backend.size())]);
    shrink(&disk);
    let error = backend.allocated().unwrap_err();
    assert!(
        matches!(error, BlockBackendError::Shrunk { got: 512, .. }),
        "{error}"
    );
}

#[test]
fn a_disk_whose_file_was_removed_is_refused() {
    let disk = TestDisk::new();
    let open = |path: &Path| BlockBackend::open(path, Access::default()).unwrap();
    let backend = open(&disk.path());
    let other = disk.dir.path().join("other");
    // Whatever it is called.
    fs::rename(disk.path(), &other).unwrap();
    backend.check_kept().unwrap();
    fs::copy(&other, disk.path()).unwrap();
    fs::remove_file(&other).unwrap();
    let error = backend.check_kept().unwrap_err();
    assert!(
        matches!(&error, BlockBackendError::Removed { path } if *path == disk.path()),
        "{error}"
    );
    let removed = File::open(disk.path()).unwrap();
    fs::remove_file(disk.path()).unwrap();
    let path = format!("/proc/self/fd/{}", removed.as_raw_fd());
    open(Path::new(&path)).check_kept().unwrap();
}
