//! Requests to a disk, valid and hostile, and their answers.

use std::fs;
use std::time::{Duration, Instant};

use super::*;
use crate::rate::Bucket;
use crate::virtio::VirtioDevice;
use crate::virtio::testing::END;

#[test]
fn what_is_written_is_read_and_on_the_disk() {
    with_both(|disk| {
        let mut driver = disk.driver();
        driver.fill(BUFFER, &[0xab; 1024]);
        assert_eq!(request(&mut driver, OUT, 3, &[reads(BUFFER, 1024)]), (OK, 1));
        assert_eq!(request(&mut driver, FLUSH, 0, &[]), (OK, 1));
        driver.take_dirty(0);
        let halves = [writes(BUFFER + 0x1000, 100), writes(BUFFER + 0x3000, 1436)];
        assert_eq!(request(&mut driver, IN, 3, &halves), (OK, 1537));
        assert_eq!(driver.bytes(BUFFER + 0x1000, 100), [0xab; 100]);
        assert_eq!(driver.bytes(BUFFER + 0x3000, 924), [0xab; 924]);
        assert_eq!(driver.bytes(BUFFER + 0x3000 + 924, 512), [5; 512]);
        assert!(driver.take_dirty(BUFFER + 0x3000), "read data marks its pages");
        let content = fs::read(disk.path()).unwrap();
        assert_eq!(content[3 * 512..5 * 512], [0xab; 1024]);
        assert_eq!(content[5 * 512], 5);
        assert!(driver.interrupts() > 0);
    });
}

#[test]
fn what_is_done_is_counted() {
    with_both(|disk| {
        let mut driver = disk.driver();
        request(&mut driver, OUT, 3, &[reads(BUFFER, 1024)]);
        request(&mut driver, IN, 3, &[writes(BUFFER, 512)]);
        request(&mut driver, FLUSH, 0, &[]);
        range(&mut driver, DISCARD, 8, 8, 0);
        range(&mut driver, WRITE_ZEROES, 16, 16, 1);
        request(&mut driver, IN, 64, &[writes(BUFFER, 512)]);
        driver.submit(&[reads(HEADER, 16)]);
        for (name, expected) in [
            ("writes", 1),
            ("written_bytes", 1024),
            ("reads", 1),
            ("read_bytes", 512),
            ("flushes", 1),
            ("discards", 1),
            ("discarded_bytes", 8 * 512),
            ("zeroes", 1),
            ("zeroed_bytes", 16 * 512),
            ("failed", 2),
            ("throttled", 0),
        ] {
            assert_eq!(driver.count(name), expected, "{name}");
        }
    });
}

#[test]
fn what_is_written_is_logged_for_a_mirror() {
    with_both(|disk| {
        let device = disk.device(false);
        let backend = device.backend.clone();
        let mut driver = Driver::ready(device);
        request(&mut driver, OUT, 0, &[reads(BUFFER, 512)]);
        let log = backend.start_log();
        assert_eq!(log.marked(), [0]);
        request(&mut driver, OUT, 3, &[reads(BUFFER, 1024)]);
        range(&mut driver, DISCARD, 16, 8, 0);
        range(&mut driver, WRITE_ZEROES, 31, 2, 1);
        // Past the end: nothing is written.
        request(&mut driver, OUT, 64, &[reads(BUFFER, 512)]);
        assert_eq!(log.marked(), [0b11101]);
        log.clear(0, &[0b101]);
        assert_eq!(log.marked(), [0b11000]);
        let mut sector = [0; 512];
        backend.read_at(40 * 512, &mut sector).unwrap();
        assert_eq!(sector, [40; 512]);
        let allocated = backend.allocated().unwrap();
        assert!(
            allocated.iter().all(|(offset, len)| offset + len <= 64 * 512),
            "{allocated:?}"
        );
        backend.stop_log();
        request(&mut driver, OUT, 8, &[reads(BUFFER, 512)]);
        assert_eq!(log.marked(), [0b11000]);
    });
}

/// Bytes of the disk that take up space.
fn space(disk: &TestDisk) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&fs::metadata(disk.path()).unwrap()) * 512
}

#[test]
fn what_is_discarded_or_zeroed() {
    with_both(|disk| {
        let mut driver = disk.driver();
        let before = space(disk);
        assert_eq!(range(&mut driver, DISCARD, 8, 8, 0), OK);
        assert_eq!(space(disk), before - 4096, "its space is given up");
        assert_eq!(range(&mut driver, WRITE_ZEROES, 16, 16, 1), OK);
        assert_eq!(space(disk), before - 3 * 4096);
        // Not whole pages, and to keep its space.
        assert_eq!(range(&mut driver, WRITE_ZEROES, 33, 2, 0), OK);
        assert_eq!(range(&mut driver, WRITE_ZEROES, 40, 0, 0), OK);
        let content = fs::read(disk.path()).unwrap();
        for (sector, bytes) in content.chunks(512).enumerate() {
            let expected = match sector {
                8..=31 | 33..=34 => 0,
                other => other as u8,
            };
            assert_eq!(bytes, [expected; 512], "sector {sector}");
        }
        // The end, and one past it; flags that mean something else; more than is allowed.
        for (kind, sector, sectors, flags, status) in [
            (DISCARD, 56, 8, 0, OK),
            (DISCARD, 57, 8, 0, IOERR),
            (DISCARD, u64::MAX, 8, 0, IOERR),
            (DISCARD, 0, 8, 1, UNSUPP),
            (DISCARD, 0, u32::MAX, 0, IOERR),
            (WRITE_ZEROES, 64, 1, 0, IOERR),
            (WRITE_ZEROES, 0, 1, 2, UNSUPP),
            (WRITE_ZEROES, 0, 1 << 17, 0, IOERR),
        ] {
            let got = range(&mut driver, kind, sector, sectors, flags);
            assert_eq!(
                got, status,
                "{kind}: {sectors} sectors at {sector}, flags {flags}"
            );
        }
        for data in [
            vec![],
            vec![reads(BUFFER, 15)],
            vec![reads(BUFFER, 32)],
            vec![reads(BUFFER, 16), writes(BUFFER, 16)],
            vec![reads(END, 16)],
        ] {
            assert_eq!(request(&mut driver, DISCARD, 0, &data).0, IOERR, "{data:?}");
        }
        assert_eq!(fs::metadata(disk.path()).unwrap().len(), 64 * 512);
        let mut read_only = Driver::ready(disk.device(true));
        assert_eq!(read_only.offered() & (1 << 13 | 1 << 14), 0);
        assert_eq!(range(&mut read_only, DISCARD, 0, 8, 0), IOERR);
    });
}

#[test]
fn requests_wait_for_tokens() {
    with_both(|disk| {
        let limits = Limits {
            operations: Some(Bucket {
                size: 2,
                one_time_burst: 1,
                refill_time_ms: 20,
            }),
            ..Default::default()
        };
        let mut driver = Driver::ready(disk.limited(false, limits));
        let begin = Instant::now();
        for number in 0..6 {
            header(&driver, IN, 0);
            driver.add(&[reads(HEADER, 16), writes(BUFFER, 512), writes(STATUS, 1)]);
            driver.kick();
            if number == 2 {
                assert_eq!(driver.wait_for(3).len(), 3, "the bucket and the burst");
                assert_eq!(driver.count("throttled"), 0);
            }
        }
        let mut done = driver.used().len();
        while done < 3 {
            driver.wait();
            done += driver.used().len();
        }
        assert!(driver.count("throttled") > 0);
        // Three more operations, each after ten milliseconds.
        assert!(
            begin.elapsed() >= Duration::from_millis(29),
            "{:?}",
            begin.elapsed()
        );
        let described = BlockParameters::from_bytes(&driver.transport.describe().parameters);
        assert_eq!(described.unwrap().limits, limits);
        // What waits for tokens is taken along by a move, and need not be kicked for.
        for _ in 0..6 {
            driver.add(&[reads(HEADER, 16), writes(BUFFER, 512), writes(STATUS, 1)]);
        }
        driver.kick();
        let before = driver.used().len();
        assert!(before < 6);
        let mut moved = driver.move_to(disk.device(false), driver.save()).unwrap();
        moved.transport.resume();
        moved.run();
        assert_eq!(before + moved.wait_for(6 - before).len(), 6);
    });
}

#[test]
fn a_write_marks_no_data_pages() {
    with_both(|disk| {
        let mut driver = disk.driver();
        header(&driver, OUT, 0);
        driver.take_dirty(0);
        driver.submit(&[reads(HEADER, 16), reads(BUFFER, 512), writes(STATUS, 1)]);
        assert!(!driver.take_dirty(BUFFER));
    });
}

#[test]
fn the_configuration_says_what_the_disk_is() {
    let disk = TestDisk::new();
    let mut driver = Driver::new(disk.device(true));
    assert_eq!(
        (driver.get(0x100), driver.get(0x104), driver.get(0x10c)),
        (64, 0, 254)
    );
    assert_eq!(
        driver.offered() & (1 << 5 | 1 << 9 | 1 << 2),
        1 << 5 | 1 << 9 | 1 << 2
    );
    assert_eq!(Driver::new(disk.device(false)).offered() & 1 << 5, 0);
    let mut config = [0xff; 20];
    disk.device(false).read_config(12, &mut config);
    assert_eq!(config[..4], [254, 0, 0, 0]);
    assert_eq!(config[4..8], [0; 4]);
    assert_eq!(config[8..], [0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn the_identity_is_padded_or_cut() {
    let disk = TestDisk::new();
    let mut driver = disk.driver();
    assert_eq!(request(&mut driver, GET_ID, 0, &[writes(BUFFER, 20)]), (OK, 21));
    assert_eq!(driver.bytes(BUFFER, 20), *b"root\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(request(&mut driver, GET_ID, 0, &[writes(BUFFER, 2)]), (OK, 3));
    assert_eq!(request(&mut driver, GET_ID, 0, &[reads(BUFFER, 20)]).0, IOERR);
}

#[test]
fn the_guest_is_told_what_fails() {
    with_both(|disk| {
        let mut driver = disk.driver();
        let sector = [writes(BUFFER, 512)];
        assert_eq!(request(&mut driver, IN, 64, &sector), (IOERR, 1));
        assert_eq!(request(&mut driver, IN, u64::MAX, &sector), (IOERR, 1));
        assert_eq!(request(&mut driver, IN, 1 << 55, &sector), (IOERR, 1));
        assert_eq!(request(&mut driver, IN, 63, &[writes(BUFFER, 1024)]), (IOERR, 1));
        assert_eq!(request(&mut driver, OUT, 64, &[reads(BUFFER, 512)]), (IOERR, 1));
        assert_eq!(request(&mut driver, IN, 0, &[writes(BUFFER, 511)]), (IOERR, 1));
        assert_eq!(request(&mut driver, IN, 0, &[reads(BUFFER, 512)]), (IOERR, 1));
        assert_eq!(request(&mut driver, OUT, 0, &[writes(BUFFER, 512)]), (IOERR, 1));
        assert_eq!(request(&mut driver, IN, 0, &[writes(END - 100, 512)]), (IOERR, 1));
        assert_eq!(request(&mut driver, IN, 0, &[writes(u64::MAX, 512)]), (IOERR, 1));
        assert_eq!(
            request(&mut driver, IN, 0, &[writes(BUFFER, 0xffff_fe00)]),
            (IOERR, 1)
        );
        assert_eq!(request(&mut driver, 12, 0, &[]), (UNSUPP, 1));
        assert_eq!(request(&mut driver, IN, 63, &sector), (OK, 513));
        assert_eq!(fs::metadata(disk.path()).unwrap().len(), 64 * 512);
    });
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    with_both(|disk| {
        let mut driver = Driver::ready(disk.device(true));
        driver.fill(BUFFER, &[0xab; 512]);
        assert_eq!(request(&mut driver, OUT, 0, &[reads(BUFFER, 512)]), (IOERR, 1));
        assert_eq!(request(&mut driver, IN, 7, &[writes(BUFFER, 512)]), (OK, 513));
        assert_eq!(driver.bytes(BUFFER, 512), [7; 512]);
        assert_eq!(fs::read(disk.path()).unwrap()[..512], [0; 512]);
    });
}

#[test]
fn the_driver_may_split_as_it_likes() {
    with_both(|disk| {
        let mut driver = disk.driver();
        header(&driver, IN, 9);
        // The header in three parts, data and status in one.
        let parts = [
            reads(HEADER, 1),
            reads(HEADER + 1, 10),
            reads(HEADER + 11, 5),
            writes(BUFFER, 513),
        ];
        assert_eq!(driver.submit(&parts), 513);
        assert_eq!(driver.bytes(BUFFER, 512), [9; 512]);
        assert_eq!(driver.bytes(BUFFER + 512, 1), [OK]);
        // Header and data in one.
        header(&driver, OUT, 9);
        driver.fill(HEADER + 16, &[0xee; 512]);
        assert_eq!(
            driver.submit(&[reads(HEADER, 528), writes(STATUS, 1), writes(STATUS, 0)]),
            1
        );
        assert_eq!(fs::read(disk.path()).unwrap()[9 * 512..10 * 512], [0xee; 512]);
    });
}

#[test]
fn hostile_chains_come_back() {
    with_both(|disk| {
        let mut driver = disk.driver();
        header(&driver, IN, 0);
        assert_eq!(driver.submit(&[reads(HEADER, 16)]), 0);
        assert_eq!(driver.submit(&[reads(HEADER, 16), writes(STATUS, 0)]), 0);
        assert_eq!(driver.submit(&[reads(HEADER, 15), writes(STATUS, 1)]), 1);
        assert_eq!(driver.bytes(STATUS, 1), [IOERR]);
        assert_eq!(driver.submit(&[writes(STATUS, 1)]), 1);
        assert_eq!(driver.submit(&[writes(STATUS, 1), reads(HEADER, 16)]), 0);
        assert_eq!(driver.submit(&[reads(HEADER, 16), writes(END, 1)]), 0);
        assert_eq!(driver.submit(&[reads(HEADER, 16), writes(u64::MAX, u32::MAX)]), 0);
        assert_eq!(driver.submit(&[reads(END, 16), writes(STATUS, 1)]), 1);
        // A chain that bites its tail.
        driver.describe(200, HEADER, 16, 1, 201);
        driver.describe(201, HEADER, 16, 1, 200);
        driver.publish(200);
        driver.kick();
        assert_eq!(driver.used(), [(200, 0)]);
        // A chain that would be fine if it did not go on outside the table.
        header(&driver, FLUSH, 0);
        driver.describe(200, HEADER, 16, 1, 201);
        driver.describe(201, STATUS, 1, 3, 256);
        driver.publish(200);
        driver.kick();
        assert_eq!(driver.used(), [(200, 0)]);
        assert_eq!(driver.bytes(STATUS, 1), [0xff]);
        // And the device still works.
        assert_eq!(request(&mut driver, IN, 1, &[writes(BUFFER, 512)]), (OK, 513));
    });
}

#[test]
fn indirect_descriptors() {
    with_both(|disk| {
        let mut driver = disk.driver();
        header(&driver, IN, 5);
        let table = BUFFER + 0x8000;
        let mut bytes = Vec::new();
        for (index, (address, len, flags)) in
            (1u16..).zip([(HEADER, 16u32, 1u16), (BUFFER, 512, 3), (STATUS, 1, 2)])
        {
            bytes.extend(address.to_le_bytes());
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(index.to_le_bytes());
        }
        driver.fill(table, &bytes);
        driver.describe(0, table, 48, 4, 0);
        driver.publish(0);
        driver.kick();
        assert_eq!(driver.wait_for(1), [(0, 513)]);
        assert_eq!(driver.bytes(BUFFER, 512), [5; 512]);
        // Four thousand descriptors in a table are more than the queue's 256.
        let long: Vec<u8> = bytes[..16].iter().copied().cycle().take(16 * 4096).collect();
        driver.fill(table, &long);
        for index in 0..4096u64 {
            driver.fill(table + 16 * index + 14, &(index as u16 + 1).to_le_bytes());
        }
        driver.describe(0, table, 16 * 4096, 4, 0);
        driver.publish(0);
        driver.kick();
        assert_eq!(driver.used(), [(0, 0)]);
    });
}
