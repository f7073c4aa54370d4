//! When writes are durable, where they go, and how large the disk is.

use std::fs::{self, File};

use super::*;
use crate::rate::Bucket;
use crate::virtio::VirtioDevice;
use crate::virtio::sys::Durability;
use crate::virtio::testing::VERSION_1;

const CONFIG_WCE: u64 = 1 << 11;
const FLUSH_FEATURE: u64 = 1 << 9;
/// The configuration space, and the guest's choice in it.
const CONFIG: u64 = 0x100;
const WRITEBACK: u64 = CONFIG + 32;

fn cached(cache: CacheMode) -> BlockParameters {
    BlockParameters {
        cache,
        ..Default::default()
    }
}

fn writeback(driver: &mut Driver) -> u8 {
    let mut byte = [0xff];
    crate::bus::BusDevice::read(&mut driver.transport, WRITEBACK, &mut byte);
    byte[0]
}

fn set_writeback(driver: &mut Driver, value: u8) {
    crate::bus::BusDevice::write(&mut driver.transport, WRITEBACK, &[value]);
}

/// Whether nothing is left to flush after a write.
fn writes_through(driver: &mut Driver, backend: &BlockBackend) -> bool {
    driver.fill(BUFFER, &[0xee; 512]);
    assert_eq!(request(driver, OUT, 5, &[reads(BUFFER, 512)]), (OK, 1));
    let clean = backend.unflushed_generation().is_none();
    backend.flush().unwrap();
    clean
}

#[test]
fn without_flush_every_write_is_written_through() {
    with_both(|disk| {
        let mut device = disk.device(false);
        device.activate(VERSION_1);
        assert_eq!(device.durability(), Durability::Durable);
        device.activate(device.features());
        assert_eq!(device.durability(), Durability::Cached);
        // A driver that cannot flush can still write.
        let mut driver = Driver::new(disk.device(false));
        assert!(driver.negotiate(VERSION_1));
        driver.set_up_queue(0x1000, 0x3000, 0x4000);
        driver.set(0x070, 15);
        driver.fill(BUFFER, &[0xcd; 512]);
        assert_eq!(request(&mut driver, OUT, 2, &[reads(BUFFER, 512)]), (OK, 1));
        assert_eq!(fs::read(disk.path()).unwrap()[1024..1536], [0xcd; 512]);
    });
}

#[test]
fn cache_modes_and_the_guests_choice() {
    let disk = TestDisk::with(IoEngine::Sync);
    for (cache, at_first) in [(CacheMode::Writeback, 1), (CacheMode::Writethrough, 0)] {
        let device = disk.with_parameters(false, cached(cache));
        let backend = device.backend.clone();
        let mut driver = Driver::ready(device);
        assert_eq!(writeback(&mut driver), at_first);
        assert_eq!(writes_through(&mut driver, &backend), at_first == 0);
        for choice in [0, 1, 0] {
            set_writeback(&mut driver, choice);
            assert_eq!(writeback(&mut driver), choice);
            assert_eq!(writes_through(&mut driver, &backend), choice == 0);
        }
        // The choice moves, and a reset forgets it.
        set_writeback(&mut driver, 1 - at_first);
        let parameters = BlockParameters::from_bytes(&driver.transport.describe().parameters).unwrap();
        assert_eq!(parameters.cache, cache);
        let device = disk.with_parameters(false, parameters);
        let mut moved = driver.move_to(device, driver.save()).unwrap();
        moved.transport.resume();
        assert_eq!(writeback(&mut moved), 1 - at_first);
        moved.bring_up();
        assert_eq!(writeback(&mut moved), at_first);
        // A driver that did not accept the feature cannot change the mode.
        let features = moved.offered() & !CONFIG_WCE;
        moved.bring_up_with(features);
        set_writeback(&mut moved, 1 - at_first);
        assert_eq!(writeback(&mut moved), at_first);
    }
}

#[test]
fn what_was_cached_is_durable_when_the_guest_turns_the_cache_off() {
    let disk = TestDisk::new();
    let device = disk.device(false);
    let backend = device.backend.clone();
    let mut driver = Driver::ready(device);
    driver.fill(BUFFER, &[0xee; 512]);
    assert_eq!(request(&mut driver, OUT, 5, &[reads(BUFFER, 512)]), (OK, 1));
    assert!(backend.unflushed_generation().is_some());
    set_writeback(&mut driver, 0);
    // What the guest asks for next comes after it.
    assert_eq!(request(&mut driver, IN, 5, &[writes(BUFFER, 512)]), (OK, 513));
    assert!(backend.unflushed_generation().is_none());
}

#[test]
fn an_unsafe_disk_is_flushed_for_moves_alone() {
    with_both(|disk| {
        let device = disk.with_parameters(false, cached(CacheMode::Unsafe));
        let backend = device.backend.clone();
        let mut driver = Driver::ready(device);
        assert_eq!(driver.offered() & (CONFIG_WCE | FLUSH_FEATURE), FLUSH_FEATURE);
        assert!(!writes_through(&mut driver, &backend));
        driver.bring_up_with(VERSION_1);
        driver.fill(BUFFER, &[0xee; 512]);
        assert_eq!(request(&mut driver, OUT, 5, &[reads(BUFFER, 512)]), (OK, 1));
        assert_eq!(request(&mut driver, FLUSH, 0, &[]), (OK, 1));
        assert!(backend.unflushed_generation().is_some());
        driver.save();
        assert!(backend.unflushed_generation().is_none());
    });
}

#[test]
fn direct_io_takes_buffers_as_they_are() {
    with_both(|disk| {
        let parameters = BlockParameters {
            direct: true,
            ..Default::default()
        };
        let mut driver = Driver::ready(disk.with_parameters(false, parameters));
        let block = {
            let mut config = [0; 4];
            crate::bus::BusDevice::read(&mut driver.transport, CONFIG + 20, &mut config);
            u32::from_le_bytes(config)
        };
        let sectors = u64::from(block) / 512;
        let long = block * 200;
        driver.fill(BUFFER, &vec![0xab; block as usize]);
        assert_eq!(
            request(&mut driver, OUT, 3 * sectors, &[reads(BUFFER, block)]),
            (OK, 1)
        );
        let content = fs::read(disk.path()).unwrap();
        let written = 3 * block as usize..4 * block as usize;
        assert!(content[written].iter().all(|&byte| byte == 0xab));
        // Neither address nor length of any part fits.
        let parts = [writes(BUFFER + 0x2001, 99), writes(BUFFER + 0x5003, block - 99)];
        assert_eq!(request(&mut driver, IN, 3 * sectors, &parts), (OK, block + 1));
        assert_eq!(driver.bytes(BUFFER + 0x2001, 99), [0xab; 99]);
        assert_eq!(
            driver.bytes(BUFFER + 0x5003, block as usize - 99),
            vec![0xab; block as usize - 99]
        );
        driver.fill(BUFFER + 7, &vec![0xcd; block as usize]);
        let odd = [reads(BUFFER + 7, 1), reads(BUFFER + 8, block - 1)];
        assert_eq!(request(&mut driver, OUT, 2 * sectors, &odd), (OK, 1));
        assert!(
            fs::read(disk.path()).unwrap()[2 * block as usize..3 * block as usize]
                .iter()
                .all(|&byte| byte == 0xcd)
        );
        // More than is moved at once.
        File::options()
            .write(true)
            .open(disk.path())
            .unwrap()
            .set_len(u64::from(long))
            .unwrap();
        let mut driver = Driver::ready(disk.with_parameters(false, parameters));
        let pattern: Vec<u8> = (0..long).map(|at| (at / 512) as u8).collect();
        driver.fill(BUFFER + 3, &pattern);
        assert_eq!(request(&mut driver, OUT, 0, &[reads(BUFFER + 3, long)]), (OK, 1));
        assert!(fs::read(disk.path()).unwrap() == pattern);
        assert_eq!(
            request(&mut driver, IN, 0, &[writes(BUFFER + 0x1000 + 1, long)]),
            (OK, long + 1)
        );
        assert!(driver.bytes(BUFFER + 0x1001, long as usize) == pattern);
        // Zeroes from the host's own memory.
        assert_eq!(range(&mut driver, WRITE_ZEROES, sectors, sectors as u32, 0), OK);
        assert_eq!(fs::read(disk.path()).unwrap()[block as usize], 0);
    });
}

#[test]
fn what_cannot_be_opened_for_direct_io_says_so() {
    let error = BlockBackend::open(
        std::path::Path::new("/proc/self/status"),
        Access {
            read_only: true,
            direct: true,
            ..Default::default()
        },
    );
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("O_DIRECT") && error.contains("direct=on"),
        "{error}"
    );
}

#[test]
fn a_disk_that_grows_and_shrinks() {
    with_both(|disk| {
        let device = disk.device(false);
        let control = device.control().clone();
        let mut driver = Driver::ready(device);
        let file = File::options().write(true).open(disk.path()).unwrap();
        let sector = [writes(BUFFER, 512)];
        assert_eq!(control.refresh_size().unwrap(), 64 * 512);
        driver.run();
        driver.interrupts();
        file.set_len(96 * 512).unwrap();
        // Not before the host has asked for it.
        assert_eq!(request(&mut driver, IN, 64, &sector), (IOERR, 1));
        let generation = driver.get(0x0fc);
        assert_eq!(control.refresh_size().unwrap(), 96 * 512);
        driver.run();
        assert_eq!(driver.get(0x060) & 2, 2, "the configuration has changed");
        assert_ne!(driver.get(0x0fc), generation);
        assert_eq!(driver.get(0x100), 96);
        assert_eq!(request(&mut driver, IN, 64, &sector), (OK, 513));
        assert_eq!(driver.transport.describe().backend_size, 96 * 512);

        file.set_len(32 * 512).unwrap();
        assert_eq!(
            request(&mut driver, IN, 32, &sector),
            (IOERR, 1),
            "nothing is there"
        );
        control.refresh_size().unwrap();
        driver.run();
        assert_eq!(driver.get(0x100), 32);
        assert_eq!(request(&mut driver, OUT, 32, &[reads(BUFFER, 512)]), (IOERR, 1));
        assert_eq!(request(&mut driver, IN, 31, &sector), (OK, 513));
        assert_eq!(fs::metadata(disk.path()).unwrap().len(), 32 * 512);

        // A part of a sector at the end is hidden, and an empty disk is valid.
        for (bytes, sectors) in [(33 * 512 + 100, 33), (0, 0)] {
            file.set_len(bytes).unwrap();
            assert_eq!(control.refresh_size().unwrap(), sectors * 512);
            driver.run();
            assert_eq!(u64::from(driver.get(0x100)), sectors);
            assert_eq!(request(&mut driver, IN, sectors, &sector), (IOERR, 1));
        }
    });
}

#[test]
fn a_resize_just_before_a_move_is_told_after_it() {
    let disk = TestDisk::new();
    let device = disk.device(false);
    let control = device.control().clone();
    let mut driver = Driver::ready(device);
    driver.set(0x064, 3);
    File::options()
        .write(true)
        .open(disk.path())
        .unwrap()
        .set_len(96 * 512)
        .unwrap();
    control.refresh_size().unwrap();
    let envelope = driver.save();
    let mut moved = driver.move_to(disk.device(false), envelope).unwrap();
    moved.transport.resume();
    assert_eq!(moved.get(0x060) & 2, 2);
    assert_eq!(moved.get(0x100), 96);
}

#[test]
fn limits_that_change_hold_from_then_on() {
    let disk = TestDisk::new();
    let device = disk.device(false);
    let control = device.control().clone();
    let mut driver = Driver::ready(device);
    let one = Limits {
        operations: Some(Bucket {
            size: 1,
            one_time_burst: 0,
            refill_time_ms: 3_600_000,
        }),
        ..Default::default()
    };
    control.set_limits(one);
    driver.run();
    assert_eq!(driver.get(0x060) & 2, 0, "nothing that the guest could see");
    assert_eq!(request(&mut driver, IN, 1, &[writes(BUFFER, 512)]), (OK, 513));
    header(&driver, IN, 2);
    driver.add(&[reads(HEADER, 16), writes(BUFFER, 512), writes(STATUS, 1)]);
    driver.kick();
    assert!(driver.used().is_empty());
    control.set_limits(Limits::default());
    assert_eq!(driver.wait_for(1).len(), 1);
    assert!(driver.transport.describe().parameters.is_empty());
}
