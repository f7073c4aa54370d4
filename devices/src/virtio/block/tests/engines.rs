//! What is in flight when something happens to the device.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};

use super::*;
use crate::virtio::testing::END;

/// Requests that are sent at once.
const MANY: u64 = 60;
/// Bytes that each of them reads.
const LEN: u32 = 16 << 10;
const BUFFERS: u64 = DATA + 0x1_0000;

/// A disk that is not in the page cache, so that reads of it take their time.
fn cold() -> TestDisk {
    let disk = TestDisk::new();
    let mut file = File::options().read(true).write(true).open(disk.path()).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    for number in 0..MANY {
        file.write_all(&[number as u8; LEN as usize]).unwrap();
    }
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    disk
}

/// A driver that has sent many reads, of which it knows that some are in flight: tried until that is so.
fn in_flight() -> (TestDisk, Driver) {
    for _ in 0..50 {
        let disk = cold();
        let mut driver = disk.driver();
        for number in 0..MANY {
            // From back to front: nothing is read ahead.
            send(&mut driver, number, MANY - 1 - number);
        }
        driver.set(0x050, 0);
        driver.turn();
        if driver.used_count() < MANY as u16 {
            return (disk, driver);
        }
    }
    panic!("reads that are not in the page cache are done at once");
}

fn send(driver: &mut Driver, number: u64, part: u64) {
    let header = HEADER + 0x100 * number;
    let mut bytes = [0; 17];
    bytes[8..16].copy_from_slice(&(part * u64::from(LEN) / 512).to_le_bytes());
    bytes[16] = 0xff;
    driver.fill(header, &bytes);
    let buffer = writes(BUFFERS + number * u64::from(LEN), LEN);
    driver.add(&[reads(header, 16), buffer, writes(header + 16, 1)]);
}

/// What came of the reads.
fn check(driver: &mut Driver) {
    let used = driver.used();
    let heads: BTreeSet<_> = used.iter().map(|(head, _)| head).collect();
    assert_eq!(heads.len(), MANY as usize);
    assert!(used.iter().all(|&(_, written)| written == LEN + 1), "{used:?}");
    for number in 0..MANY {
        assert_eq!(driver.bytes(HEADER + 0x100 * number + 16, 1), [OK]);
        let read = driver.bytes(BUFFERS + number * u64::from(LEN), LEN as usize);
        assert!(
            read.iter().all(|&byte| u64::from(byte) == MANY - 1 - number),
            "read {number}"
        );
    }
}

#[test]
fn a_drain_waits_for_what_is_in_flight() {
    let (disk, mut driver) = in_flight();
    driver.take_dirty(0);
    let envelope = driver.save();
    // Nothing happens afterwards.
    let first = driver.bytes(0, END as usize);
    let mut moved = driver.move_to(disk.device(false), envelope).unwrap();
    driver.run();
    assert!(driver.bytes(0, END as usize) == first);
    check(&mut moved);
    moved.transport.resume();
    moved.run();
    assert!(moved.used().is_empty());
    assert_eq!(request(&mut moved, IN, 0, &[writes(BUFFER, 512)]), (OK, 513));
}

#[test]
fn what_arrives_later_is_marked_when_it_is_there() {
    let (_disk, mut driver) = in_flight();
    let pages = |driver: &Driver| {
        (BUFFERS..BUFFERS + MANY * u64::from(LEN))
            .step_by(4096)
            .filter(|&page| driver.is_dirty(page))
            .count()
    };
    driver.take_dirty(0);
    let before = driver.used_count();
    while driver.used_count() < MANY as u16 {
        driver.wait();
    }
    let expected = usize::from(MANY as u16 - before) * LEN as usize / 4096;
    assert_eq!(pages(&driver), expected);
    check(&mut driver);
}

#[test]
fn a_reset_waits_for_what_is_in_flight() {
    let (_disk, mut driver) = in_flight();
    driver.set(0x070, 0);
    let first = driver.bytes(0, END as usize);
    std::thread::sleep(std::time::Duration::from_millis(20));
    driver.run();
    assert!(
        driver.bytes(0, END as usize) == first,
        "something was written after the reset"
    );
    driver.bring_up();
    assert_eq!(request(&mut driver, IN, 0, &[writes(BUFFER, 512)]), (OK, 513));
    assert!(driver.used().is_empty());
}

#[test]
fn a_disk_that_goes_waits_for_what_is_in_flight() {
    let (_disk, driver) = in_flight();
    let memory = driver.memory.clone();
    drop(driver);
    let bytes = |memory: &crate::GuestMemory| {
        let mut bytes = vec![0; END as usize];
        vm_memory::Bytes::read_slice(memory, &mut bytes, vm_memory::GuestAddress(0)).unwrap();
        bytes
    };
    let first = bytes(&memory);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(bytes(&memory) == first);
}

#[test]
fn more_than_there_is_room_for() {
    with_both(|disk| {
        let mut driver = disk.driver();
        header(&driver, IN, 7);
        // The same chain a thousand times, which no driver would do.
        let head = driver.add(&[reads(HEADER, 16), writes(BUFFER, 512), writes(STATUS, 1)]);
        let mut count = 0;
        for _ in 0..10 {
            for _ in 0..100 {
                driver.publish(head);
            }
            driver.kick();
            count += driver.wait_for(100).len();
        }
        assert!((1000..=1001).contains(&count));
        assert_eq!(driver.bytes(BUFFER, 512), [7; 512]);
        assert_eq!(driver.bytes(STATUS, 1), [OK]);
    });
}

#[test]
fn a_flush_is_asked_for_once() {
    let disk = TestDisk::new();
    let mut driver = disk.driver();
    driver.fill(BUFFER, &[0xab; 512]);
    assert_eq!(request(&mut driver, FLUSH, 0, &[]), (OK, 1));
    for _ in 0..3 {
        assert_eq!(request(&mut driver, OUT, 3, &[reads(BUFFER, 512)]), (OK, 1));
        assert_eq!(request(&mut driver, FLUSH, 0, &[]), (OK, 1));
        // Nothing is left to be made durable, so this comes back in the same turn.
        header(&driver, FLUSH, 0);
        driver.add(&[reads(HEADER, 16), writes(STATUS, 1)]);
        driver.kick();
        assert_eq!(driver.used().len(), 1);
    }
}
