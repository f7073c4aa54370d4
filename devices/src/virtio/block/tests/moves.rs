//! A disk that is reset, saved and restored.

use std::fs::{self, File};

use migration_state::Envelope;

use super::*;
use crate::virtio::{DeviceError, VirtioDevice};

#[test]
fn a_reset_forgets_requests_that_were_not_taken() {
    with_both(|disk| {
        let mut driver = disk.driver();
        header(&driver, OUT, 0);
        driver.fill(BUFFER, &[0xab; 512]);
        driver.add(&[reads(HEADER, 16), reads(BUFFER, 512), writes(STATUS, 1)]);
        driver.set(0x050, 0);
        driver.set(0x070, 0);
        driver.run();
        assert_eq!(driver.bytes(STATUS, 1), [0xff]);
        assert_eq!(fs::read(disk.path()).unwrap()[..512], [0; 512]);
        driver.bring_up();
        assert_eq!(request(&mut driver, IN, 1, &[writes(BUFFER, 512)]), (OK, 513));
    });
}

#[test]
fn a_disk_moves_in_the_middle_of_a_sequence() {
    with_both(|disk| {
        let mut source = disk.driver();
        let backend = source.transport.host_backend().unwrap();
        backend.take_locks().unwrap();
        source.fill(BUFFER, &[0xab; 512]);
        assert_eq!(request(&mut source, OUT, 3, &[reads(BUFFER, 512)]), (OK, 1));
        header(&source, IN, 3);
        let head = source.add(&[reads(HEADER, 16), writes(BUFFER + 0x1000, 512), writes(STATUS, 1)]);
        let envelope = source.save();

        let mut destination = source.move_to(disk.device(false), envelope).unwrap();
        assert!(destination.backend().take_locks().is_err());
        source.backend().release_locks().unwrap();
        destination.backend().take_locks().unwrap();
        destination.backend().invalidate().unwrap();
        destination.transport.resume();
        destination.run();
        assert_eq!(destination.wait_for(1), [(u32::from(head), 513)]);
        assert_eq!(destination.bytes(BUFFER + 0x1000, 512), [0xab; 512]);
        assert_eq!(
            request(&mut destination, GET_ID, 0, &[writes(BUFFER, 20)]),
            (OK, 21)
        );
        assert_eq!(destination.bytes(BUFFER, 4), *b"root");
    });
}

#[test]
fn another_disk_is_refused() {
    let (disk, other) = (TestDisk::new(), TestDisk::new());
    let source = disk.driver();
    File::options()
        .write(true)
        .open(other.path())
        .unwrap()
        .set_len(4096)
        .unwrap();
    let error = source
        .move_to(other.device(false), source.save())
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("disk size in sectors: expected 8, got 64"),
        "{error}"
    );
    // A driver that was promised writes, and one that was not.
    let error = source.move_to(disk.device(true), source.save());
    let error = error.err().unwrap().to_string();
    assert!(error.contains("features in the saved state"), "{error}");
    let read_only = Driver::ready(disk.device(true));
    let error = read_only.move_to(disk.device(false), read_only.save());
    let error = error.err().unwrap().to_string();
    assert!(error.contains("features in the saved state"), "{error}");
    let error =
        Driver::new(disk.device(true)).move_to(disk.device(false), Driver::new(disk.device(true)).save());
    let error = error.err().unwrap().to_string();
    assert!(
        error.contains("disk: expected writable, got read-only"),
        "{error}"
    );
    let error = disk
        .device(false)
        .restore(&mut Envelope::new(), "dev0")
        .unwrap_err();
    assert!(matches!(error, DeviceError::State(_)));
}

#[test]
fn golden_record() {
    let mut id = [0; ID_LEN];
    id[..2].copy_from_slice(b"vd");
    let state = BlockState {
        sectors: 300,
        read_only: true,
        id,
        writeback: true,
    };
    let golden = "ac0201 7664000000000000000000000000000000000000 01";
    migration_state::assert_golden(2, golden, &state);
}
