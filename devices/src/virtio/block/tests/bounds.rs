//! How long the device thread, vCPUs and drains wait for a disk, whatever the guest asks of it and however slow it is.

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::slow::{FSYNC, SlowFile, WRITE};
use super::*;
use crate::virtio::mmio::MmioTransportError;

/// What is stated, and what a slow machine may add. Less than [`Driver::wait`] waits.
const RESET_TIME: Duration = Duration::from_millis(500);
const SOON: Duration = Duration::from_secs(5);

/// What a slow disk is to the host.
#[derive(Clone, Copy, Debug)]
enum BoundedDisk {
    /// A file whose requests are served by the disk's own thread.
    File(IoEngine),
    /// A block device on such a file: its requests are in flight with io_uring.
    Device,
}

/// A block device on a file, as long as it lives.
pub(super) struct Loop(pub(super) PathBuf);

impl Loop {
    pub(super) fn new(file: &Path) -> Self {
        let output = losetup(&["--find".as_ref(), "--show".as_ref(), file]);
        Self(String::from_utf8(output).unwrap().trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        losetup(&["--detach".as_ref(), &self.0]);
    }
}

fn losetup(arguments: &[&Path]) -> Vec<u8> {
    // The user's path may lack the directory of `losetup`.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new("losetup");
    let output = command.args(arguments).env("PATH", path).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

/// Does it with a disk of each kind, which does nothing when it is held, and with a driver that has read from it.
fn on_each(test: impl Fn(Driver, &SlowFile)) {
    for kind in [
        BoundedDisk::File(IoEngine::Sync),
        BoundedDisk::File(IoEngine::Async),
        BoundedDisk::Device,
    ] {
        eprintln!("{kind:?}");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("slow");
        let file = SlowFile::new(&path, 4 << 20);
        let (device, parameters) = match kind {
            BoundedDisk::File(engine) => (
                None,
                BlockParameters {
                    engine,
                    ..Default::default()
                },
            ),
            // Nothing waits for what the host has cached.
            BoundedDisk::Device => (
                Some(Loop::new(&path)),
                BlockParameters {
                    direct: true,
                    ..Default::default()
                },
            ),
        };
        let access = Access {
            direct: parameters.direct,
            ..Default::default()
        };
        let backend = BlockBackend::open(device.as_ref().map_or(&path, |device| &device.0), access).unwrap();
        let mut driver = Driver::ready(VirtioBlock::new(Arc::new(backend), "slow", parameters).unwrap());
        assert_eq!(request(&mut driver, IN, 0, &[writes(BUFFER, 512)]), (OK, 513));
        test(driver, &file);
    }
}

/// The same with an image that has a sector of data, whose metadata are not in the file yet.
fn slow_image(cache: CacheMode) -> (TempDir, SlowFile, Driver) {
    let (dir, image) = images::image();
    let path = dir.path().join("slow");
    let file = SlowFile::new(&path, 4 << 20);
    let content = fs::read(image).unwrap();
    let mut there = fs::File::options().write(true).open(&path).unwrap();
    there.write_all(&content).unwrap();
    let backend = BlockBackend::open(&path, images::access(false)).unwrap();
    let parameters = BlockParameters {
        cache,
        ..Default::default()
    };
    let mut driver = Driver::ready(VirtioBlock::new(Arc::new(backend), "slow", parameters).unwrap());
    images::write(&mut driver, 9, 512, 0xab);
    assert!(!images::is_in_the_file(&path, 9, 0xab));
    (dir, file, driver)
}

/// Holds the file and checks that `act` does not wait for it. If it does, the file is released after [`SOON`], so that
/// the test can fail.
fn does_not_wait_for(file: &SlowFile, act: impl FnOnce()) {
    file.hold();
    let (over, is_over) = mpsc::channel::<()>();
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if matches!(is_over.recv_timeout(SOON), Err(RecvTimeoutError::Timeout)) {
                file.release();
            }
        });
        act();
        drop(over);
    });
    assert!(start.elapsed() < SOON, "waited {:?}", start.elapsed());
}

/// Makes a request available and kicks.
fn begin(driver: &mut Driver, kind: u32, data: &[DriverBuffer]) {
    header(driver, kind, 0);
    driver.add(&[&[reads(HEADER, 16)], data, &[writes(STATUS, 1)]].concat());
    driver.kick();
}

/// A drain that fails after the time that it was given.
fn drain_fails(driver: &Driver, word: &str) {
    let begin = Instant::now();
    let error = driver
        .transport
        .drain(begin + Duration::from_millis(50))
        .unwrap_err();
    assert!(matches!(error, MmioTransportError::Device { .. }), "{error}");
    let error = error.to_string();
    assert!(
        error.contains(word) && begin.elapsed() < SOON,
        "{error}, {:?}",
        begin.elapsed()
    );
}

#[test]
fn a_drain_of_a_disk_that_hangs_fails_in_time() {
    on_each(|mut driver, file| {
        driver.fill(BUFFER, &[0xab; 512]);
        for (kind, data) in [
            (OUT, reads(BUFFER, 512)),
            (IN, writes(BUFFER + 0x1000, 512)),
            (FLUSH, reads(BUFFER, 0)),
        ] {
            file.hold();
            let data = if kind == FLUSH { &[][..] } else { &[data] };
            let start = Instant::now();
            begin(&mut driver, kind, data);
            driver.transport.pause();
            assert!(
                start.elapsed() < SOON,
                "the device thread waited {:?}",
                start.elapsed()
            );
            assert!(driver.used().is_empty());
            drain_fails(&driver, "has begun");
            // It goes on where it was.
            driver.transport.resume();
            driver.run();
            assert!(driver.used().is_empty());
            file.release();
            driver.wait_for(1);
            assert_eq!(driver.bytes(STATUS, 1), [OK], "{kind}");
        }
        assert_eq!(driver.bytes(BUFFER + 0x1000, 512), [0xab; 512]);
        driver.save();
    });
}

#[test]
fn a_reset_of_a_disk_that_hangs_ends_when_nothing_can_be_written_any_more() {
    on_each(|mut driver, file| {
        file.hold();
        begin(&mut driver, IN, &[writes(BUFFER, 512)]);
        file.wait_held();
        driver.fill(BUFFER, &[7; 512]);
        let start = Instant::now();
        driver.set(0x070, 0);
        let waited = start.elapsed();
        assert!((RESET_TIME..SOON).contains(&waited), "the vCPU waited {waited:?}");
        // Until it is over no step is taken.
        assert_eq!(driver.get(0x070), 15);
        for value in [1, 3, 11, 15] {
            driver.set(0x070, value);
            assert_eq!(driver.get(0x070), 15, "after {value}");
        }
        driver.transport.pause();
        drain_fails(&driver, "reset");
        driver.transport.resume();
        file.release();
        while driver.get(0x070) != 0 {
            driver.wait();
        }
        assert!(driver.used().is_empty());
        driver.bring_up();
        assert_eq!(request(&mut driver, IN, 0, &[writes(BUFFER, 512)]), (OK, 513));
    });
}

#[test]
fn no_vcpu_waits_while_the_cache_is_turned_off() {
    on_each(|mut driver, file| {
        driver.fill(BUFFER, &[0xee; 512]);
        assert_eq!(request(&mut driver, OUT, 0, &[reads(BUFFER, 512)]), (OK, 1));
        file.hold();
        let start = Instant::now();
        crate::bus::BusDevice::write(&mut driver.transport, 0x100 + 32, &[0]);
        assert!(start.elapsed() < SOON, "the vCPU waited {:?}", start.elapsed());
        // What it asks for next comes afterwards.
        begin(&mut driver, FLUSH, &[]);
        assert!(driver.used().is_empty());
        file.release();
        driver.wait_for(1);
        assert_eq!(driver.bytes(STATUS, 1), [OK]);
    });
}

#[test]
fn zeroes_are_written_while_others_go_on() {
    on_each(|mut driver, file| {
        file.hold();
        let mut bytes = [0; 16];
        bytes[8..12].copy_from_slice(&4096u32.to_le_bytes());
        driver.fill(BUFFER, &bytes);
        let start = Instant::now();
        begin(&mut driver, WRITE_ZEROES, &[reads(BUFFER, 16)]);
        assert!(start.elapsed() < SOON && driver.used().is_empty());
        file.release();
        driver.wait_for(1);
        assert_eq!(driver.bytes(STATUS, 1), [OK]);
        assert_eq!(driver.count("zeroed_bytes"), 4096 * 512);
    });
}

#[test]
fn requests_have_a_most() {
    with_both(|disk| {
        let file = fs::File::options().write(true).open(disk.path()).unwrap();
        file.set_len(64 << 20).unwrap();
        let mut driver = disk.driver();
        // SIZE_MAX and SEG_MAX.
        let (size, count) = (driver.get(0x108), driver.get(0x10c));
        assert_eq!((size, count), (64 << 10, 254));
        // The same buffer again and again, so that little memory suffices.
        let many = |count: usize| vec![writes(BUFFER, 1 << 20); count];
        assert_eq!(request(&mut driver, IN, 0, &many(16)), (OK, (16 << 20) + 1));
        assert_eq!(request(&mut driver, IN, 0, &many(17)), (IOERR, 1));
        let allowed = vec![writes(BUFFER, size); count as usize];
        assert_eq!(request(&mut driver, IN, 0, &allowed), (OK, size * count + 1));
    });
}

#[test]
fn little_is_in_flight_at_once() {
    on_each(|mut driver, file| {
        file.hold();
        for number in 0..32 {
            let at = HEADER + 0x20 * number;
            driver.fill(at, &[0; 16]);
            driver.add(&[reads(at, 16), writes(BUFFER + 0x1000, 1 << 20), writes(STATUS, 1)]);
        }
        driver.kick();
        driver.transport.pause();
        file.release();
        // What was not begun is still the guest's, and comes with it wherever it goes on.
        driver.transport.drain(Instant::now() + 4 * SOON).unwrap();
        assert_eq!(driver.used().len(), 16);
        driver.transport.resume();
        driver.wait_for(16);
    });
}

#[test]
fn a_drain_goes_on_with_what_is_done_in_part() {
    let disk = TestDisk::with(IoEngine::Async);
    let content: Vec<u8> = (0..16u32 << 20).map(|at| (at / 4096) as u8).collect();
    let file = fs::File::create(disk.path()).unwrap();
    (&file).write_all(&content).unwrap();
    // What is in the page cache is there at once: nothing would be in flight.
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let mut driver = disk.driver();
    begin(&mut driver, IN, &[writes(BUFFER, 1 << 20); 16]);
    driver.turn();
    driver.transport.pause();
    let start = Instant::now();
    driver.transport.drain(start + SOON).unwrap();
    assert!(start.elapsed() < SOON, "the drain waited {:?}", start.elapsed());
    assert_eq!(driver.used().len(), 1);
    assert_eq!(driver.bytes(STATUS, 1), [OK]);
}

#[test]
fn what_a_driver_wrote_before_it_reset_the_disk_is_durable_after_a_drain() {
    with_both(|disk| {
        let mut driver = disk.driver();
        assert_eq!(request(&mut driver, OUT, 0, &[reads(BUFFER, 512)]).0, OK);
        driver.set(0x070, 0);
        driver.transport.pause();
        driver.transport.drain(Instant::now() + SOON).unwrap();
    });
}

#[test]
fn the_device_thread_does_not_wait_for_a_write_out() {
    // When its time has come.
    let (_dir, file, mut driver) = slow_image(CacheMode::Writeback);
    does_not_wait_for(&file, || {
        images::serve_until(&mut driver, || file.holds());
        begin(&mut driver, IN, &[writes(BUFFER, 512)]);
        driver.transport.pause();
        drain_fails(&driver, "slow");
        driver.transport.resume();
    });
    file.release();
    driver.wait_for(1);
    // When the driver resets the disk.
    let (dir, file, mut driver) = slow_image(CacheMode::Writeback);
    does_not_wait_for(&file, || {
        driver.set(0x070, 0);
        file.wait_held();
        // Nothing of that touches the guest's memory: the next driver comes and goes.
        for _ in 0..2 {
            assert_eq!(driver.get(0x070), 0);
            driver.bring_up();
            driver.set(0x070, 0);
        }
        driver.bring_up();
    });
    file.release();
    assert_eq!(request(&mut driver, IN, 9, &[writes(BUFFER, 512)]), (OK, 513));
    driver.transport.pause();
    driver.transport.drain(Instant::now() + SOON).unwrap();
    assert!(images::is_in_the_file(&dir.path().join("slow"), 9, 0xab));
    // When it flushes a disk that need not outlive the host.
    let (dir, file, mut driver) = slow_image(CacheMode::Unsafe);
    does_not_wait_for(&file, || begin(&mut driver, FLUSH, &[]));
    assert!(driver.used().is_empty());
    file.release();
    driver.wait_for(1);
    assert_eq!(driver.bytes(STATUS, 1), [OK]);
    assert!(images::is_in_the_file(&dir.path().join("slow"), 9, 0xab));
}

#[test]
fn an_image_whose_queue_breaks_is_written_out() {
    let (dir, _file, mut driver) = slow_image(CacheMode::Writeback);
    // A head beyond the queue's end.
    driver.publish(u16::MAX);
    driver.kick();
    let until = Instant::now() + SOON;
    while !images::is_in_the_file(&dir.path().join("slow"), 9, 0xab) {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_failed_flush_without_an_answer_is_reported_by_the_next() {
    on_each(|mut driver, file| {
        assert_eq!(request(&mut driver, OUT, 0, &[reads(BUFFER, 512)]), (OK, 1));
        // The kernel reports a failure to each open file once, and that went to the host side.
        for by_a_drain in [true, false] {
            file.fail(FSYNC);
            driver.transport.pause();
            if by_a_drain {
                drain_fails(&driver, "durable");
            } else {
                driver.backend().flush().unwrap_err();
            }
            drain_fails(&driver, "durable");
            driver.transport.resume();
            assert_eq!(request(&mut driver, FLUSH, 0, &[]), (IOERR, 1));
            assert_eq!(request(&mut driver, FLUSH, 0, &[]), (OK, 1));
            driver.transport.pause();
            driver.transport.drain(Instant::now() + SOON).unwrap();
            driver.transport.resume();
            assert_eq!(request(&mut driver, OUT, 0, &[reads(BUFFER, 512)]), (OK, 1));
        }
    });
}

#[test]
fn a_flush_in_flight_reports_that_another_has_failed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("slow");
    let file = SlowFile::new(&path, 4 << 20);
    let backend = Arc::new(BlockBackend::open(&path, Access::default()).unwrap());
    let device = VirtioBlock::new(backend.clone(), "slow", BlockParameters::default()).unwrap();
    let mut driver = Driver::ready(device);
    assert_eq!(request(&mut driver, OUT, 0, &[reads(BUFFER, 512)]), (OK, 1));
    file.hold();
    begin(&mut driver, FLUSH, &[]);
    file.wait_held();
    // The host's side flushes meanwhile.
    backend.record_flush_failure();
    file.release();
    driver.wait_for(1);
    assert_eq!(driver.bytes(STATUS, 1), [IOERR]);
    assert_eq!(request(&mut driver, FLUSH, 0, &[]), (OK, 1));
}

#[test]
fn a_disk_can_move_once_its_guest_knows_of_a_failed_flush() {
    let (_dir, file, mut driver) = slow_image(CacheMode::Unsafe);
    file.fail(FSYNC);
    driver.transport.pause();
    drain_fails(&driver, "durable");
    driver.transport.resume();
    assert_eq!(request(&mut driver, FLUSH, 0, &[]), (IOERR, 1));
    driver.transport.pause();
    driver.transport.drain(Instant::now() + SOON).unwrap();
}

#[test]
fn what_could_not_be_written_out_for_want_of_room_is_not_lost() {
    let (dir, file, mut driver) = slow_image(CacheMode::Writeback);
    file.fail(WRITE);
    driver.transport.pause();
    drain_fails(&driver, "durable");
    driver.transport.drain(Instant::now() + SOON).unwrap();
    assert!(images::is_in_the_file(&dir.path().join("slow"), 9, 0xab));
    driver.transport.resume();
    assert_eq!(request(&mut driver, FLUSH, 0, &[]), (OK, 1));
}
