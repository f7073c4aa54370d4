//! qcow2 images.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use imago::file::File as ImageFile;
use imago::qcow2::Qcow2;
use imago::storage::StorageCreateOptions;
use imago::{FormatCreateBuilder, Storage};

use super::bounds::Loop;
use super::*;
use crate::virtio::testing::END;

const SIZE: u64 = 4 << 20;

/// Makes an image, on a backing file if one is given with its format.
fn make(path: &Path, backing: Option<(&Path, &str)>) {
    let file = ImageFile::create_open(StorageCreateOptions::new().filename(path)).unwrap();
    let mut image = Qcow2::<ImageFile>::create_builder(file).size(SIZE);
    if let Some((path, format)) = backing {
        image = image.backing(path.to_str().unwrap().into(), format.into());
    }
    image.create().unwrap();
}

pub(super) fn access(read_only: bool) -> Access {
    Access {
        read_only,
        format: ImageFormat::Qcow2,
        ..Default::default()
    }
}

fn device(path: &Path) -> VirtioBlock {
    device_of(BlockBackend::open(path, access(false)).unwrap())
}

fn device_of(backend: BlockBackend) -> VirtioBlock {
    VirtioBlock::new(Arc::new(backend), "root", BlockParameters::default()).unwrap()
}

pub(super) fn image() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    make(&path, None);
    (dir, path)
}

/// Writes sectors full of `byte`.
pub(super) fn write(driver: &mut Driver, sector: u64, len: u32, byte: u8) {
    driver.fill(BUFFER, &vec![byte; len as usize]);
    assert_eq!(request(driver, OUT, sector, &[reads(BUFFER, len)]), (OK, 1));
}

/// Whether sectors are full of `byte`; read in two odd parts.
fn holds(driver: &mut Driver, sector: u64, len: u32, byte: u8) -> bool {
    let at = BUFFER + 1;
    let parts = [writes(at, 77), writes(at + 77, len - 77)];
    assert_eq!(request(driver, IN, sector, &parts), (OK, len + 1));
    driver.bytes(at, len as usize) == vec![byte; len as usize]
}

#[test]
fn what_is_written_is_in_the_image() {
    let (_dir, path) = image();
    let mut driver = Driver::ready(device(&path));
    assert_eq!(
        driver.get(0x100),
        (SIZE / 512) as u32,
        "the guest sees the size of the disk"
    );
    assert_eq!(driver.transport.describe().backend_size, SIZE);
    assert!(holds(&mut driver, 9, 512, 0));
    write(&mut driver, 9, 199_680, 0xab);
    driver.take_dirty(0);
    assert!(holds(&mut driver, 9, 199_680, 0xab));
    assert!(driver.take_dirty(BUFFER + 0x3000), "read data marks its pages");
    assert_eq!(request(&mut driver, FLUSH, 0, &[]), (OK, 1));
    // On the disk, not only in what this process knows.
    let mut other = Driver::ready(device(&path));
    assert!(holds(&mut other, 9, 199_680, 0xab));
    assert!(holds(&mut other, 0, 9 * 512, 0));
    assert!(fs::metadata(&path).unwrap().len() < SIZE);
    assert_eq!(
        request(&mut driver, IN, SIZE / 512, &[writes(BUFFER, 512)]),
        (IOERR, 1)
    );
    assert_eq!(request(&mut driver, OUT, 0, &[reads(END, 512)]), (IOERR, 1));
}

#[test]
fn discards_and_zeroes() {
    let (_dir, path) = image();
    let mut driver = Driver::ready(device(&path));
    write(&mut driver, 0, 512 << 10, 0xab);
    assert_eq!(request(&mut driver, FLUSH, 0, &[]), (OK, 1));
    // Clusters of 64 KiB: two are given up, and the odd sectors around them are left or zeroed.
    assert_eq!(range(&mut driver, DISCARD, 120, 300, 0), OK);
    assert_eq!(range(&mut driver, WRITE_ZEROES, 600, 300, 1), OK);
    assert_eq!(range(&mut driver, WRITE_ZEROES, 1000, 10, 0), OK);
    assert_eq!(request(&mut driver, FLUSH, 0, &[]), (OK, 1));
    for (sector, len, byte) in [
        (0, 120, 0xab),
        (128, 256, 0),
        (500, 100, 0xab),
        (600, 300, 0),
        (900, 100, 0xab),
        (1000, 10, 0),
    ] {
        assert!(
            holds(&mut driver, sector, len * 512, byte),
            "{len} sectors at {sector}"
        );
    }
}

#[test]
fn an_image_changes_hands() {
    let (_dir, path) = image();
    change_hands(&path);
}

#[test]
fn an_image_on_a_block_device_changes_hands() {
    let (_dir, path) = image();
    // Room for what is written: a block device does not grow.
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(2 * SIZE)
        .unwrap();
    let device = Loop::new(&path);
    change_hands(&device.0);
}

fn change_hands(path: &Path) {
    let mut source = Driver::ready(device(path));
    source.backend().take_locks().unwrap();
    // The destination has it open before the source is done with it, and writes nothing.
    let before = fs::read(path).unwrap();
    let there = device_of(BlockBackend::open(path, access(false)).unwrap().taken_over());
    assert!(fs::read(path).unwrap() == before);
    write(&mut source, 1000, 99_840, 0xcd);
    let envelope = source.save();
    let mut destination = source.move_to(there, envelope).unwrap();
    assert!(destination.backend().take_locks().is_err());
    source.backend().release_locks().unwrap();
    destination.backend().take_locks().unwrap();
    destination.backend().invalidate().unwrap();
    let released = fs::read(path).unwrap();
    drop(source);
    assert!(
        fs::read(path).unwrap() == released,
        "a process that has released the image writes nothing"
    );
    destination.transport.resume();
    destination.run();
    assert!(holds(&mut destination, 1000, 99_840, 0xcd));
    write(&mut destination, 0, 512, 0xee);
    destination.save();
    let mut again = Driver::ready(device(path));
    assert!(holds(&mut again, 0, 512, 0xee));
    assert!(holds(&mut again, 1000, 99_840, 0xcd));
}

/// The error when the image at `path` cannot be opened on these files.
fn refused(path: &Path, backing: &[BackingFile]) -> String {
    let error = BlockBackend::open_on(path, access(true), backing).unwrap_err();
    let cause = std::error::Error::source(&error).map(ToString::to_string);
    let message = format!("{error} {}", cause.unwrap_or_default());
    assert!(!message.contains('\n'), "{message}");
    message
}

fn backing(path: &Path, format: Option<ImageFormat>) -> BackingFile {
    BackingFile {
        path: path.to_owned(),
        format,
    }
}

fn device_on(path: &Path, files: &[BackingFile]) -> VirtioBlock {
    let backend = BlockBackend::open_on(path, access(false), files).unwrap();
    VirtioBlock::new(Arc::new(backend), "root", BlockParameters::default()).unwrap()
}

#[test]
fn backing_files_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let [base, middle, top] = ["base", "middle", "top"].map(|name| dir.path().join(name));
    fs::write(&base, vec![0x11; SIZE as usize]).unwrap();
    make(&middle, Some((&base, "raw")));
    make(&top, Some((&middle, "qcow2")));
    let files = [backing(&middle, None), backing(&base, Some(ImageFormat::Raw))];
    let mut driver = Driver::ready(device_on(&top, &files));
    assert!(holds(&mut driver, 100, 4096, 0x11));
    write(&mut driver, 100, 512, 0x22);
    assert!(holds(&mut driver, 100, 512, 0x22));
    assert!(holds(&mut driver, 101, 512, 0x11));
    assert!(fs::read(&base).unwrap().iter().all(|&byte| byte == 0x11));
    let backend = BlockBackend::open_on(&top, access(true), &files).unwrap();
    backend.check_kept().unwrap();
    // After another host had it, on the files that are open.
    driver.backend().flush().unwrap();
    for path in [&middle, &base] {
        fs::rename(path, path.with_extension("away")).unwrap();
    }
    driver.backend().invalidate().unwrap();
    assert!(holds(&mut driver, 100, 512, 0x22));
    assert!(holds(&mut driver, 101, 512, 0x11));
    fs::remove_file(base.with_extension("away")).unwrap();
    let error = backend.check_kept().unwrap_err();
    assert!(
        matches!(&error, BlockBackendError::Removed { path } if *path == base),
        "{error}"
    );
}

#[test]
fn only_named_backing_files_are_opened() {
    let dir = tempfile::tempdir().unwrap();
    let [base, middle, top] = ["base", "middle", "top"].map(|name| dir.path().join(name));
    fs::write(&base, vec![0x11; SIZE as usize]).unwrap();
    make(&middle, Some((Path::new("base"), "raw")));
    make(&top, Some((&middle, "qcow2")));
    let error = refused(&middle, &[]);
    let option = format!("add backing={}", base.display());
    assert!(error.contains(&option), "{error}");
    // Nor one further down.
    let error = refused(&top, &[backing(&middle, None)]);
    assert!(error.contains(&option), "{error}");
    let error = refused(&middle, &[backing(&base, Some(ImageFormat::Qcow2))]);
    assert!(
        error.contains("to be qcow2") && error.contains("says raw"),
        "{error}"
    );
    let error = refused(&middle, &[backing(&base, None), backing(&top, None)]);
    assert!(error.contains("which is raw"), "{error}");
    let error = BlockBackend::open_on(&base, Access::default(), &[backing(&top, None)]).unwrap_err();
    assert!(matches!(error, BlockBackendError::NoImage { .. }), "{error}");
    // A file that cannot be a disk cannot be a backing file either; opening a FIFO does not wait for its other end.
    for (path, word) in [
        (dir.path().join("none"), "found nothing"),
        (dir.path().to_owned(), "a directory"),
        ("/dev/null".into(), "something else"),
        (fifo(&dir), "something else"),
    ] {
        let error = refused(&middle, &[backing(&path, Some(ImageFormat::Raw))]);
        assert!(error.contains(word), "{error}");
    }
    // Without a format it would have to be guessed.
    fs::remove_file(&top).unwrap();
    make(&top, Some((&base, "")));
    let error = refused(&top, &[backing(&base, None)]);
    assert!(error.contains("backing-format=raw or qcow2"), "{error}");
    BlockBackend::open_on(&top, access(true), &[backing(&base, Some(ImageFormat::Raw))]).unwrap();
    fs::remove_file(&top).unwrap();
    make(&top, None);
    let error = refused(&top, &[backing(&base, None)]);
    assert!(error.contains("expected no backing file"), "{error}");
}

/// A FIFO without a writer.
fn fifo(dir: &TempDir) -> PathBuf {
    let path = dir.path().join("fifo");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    path
}

#[test]
fn data_in_another_file_are_refused() {
    let (dir, path) = image();
    let mut image = fs::read(&path).unwrap();
    // An incompatible feature (qcow2's specification, "External data file bit").
    image[79] |= 4;
    fs::write(&path, &image).unwrap();
    assert!(refused(&path, &[]).contains("external data file"));
    let top = dir.path().join("top");
    make(&top, Some((&path, "qcow2")));
    assert!(refused(&top, &[backing(&path, None)]).contains("external data file"));
}

#[test]
fn backing_files_are_never_written() {
    let dir = tempfile::tempdir().unwrap();
    let [base, one, two] = ["base", "one", "two"].map(|name| dir.path().join(name));
    fs::write(&base, vec![0x11; SIZE as usize]).unwrap();
    let on_base = |path: &Path| {
        make(path, Some((&base, "raw")));
        BlockBackend::open_on(path, access(false), &[backing(&base, None)]).unwrap()
    };
    let (one, two) = (on_base(&one), on_base(&two));
    one.lock().unwrap();
    two.lock().unwrap();
    let writer = BlockBackend::open(&base, Access::default()).unwrap();
    let error = writer.lock().unwrap_err();
    assert!(
        matches!(&error, BlockBackendError::Locked { path, .. } if *path == base),
        "{error}"
    );
    one.unlock().unwrap();
    assert!(writer.lock().is_err());
    drop(two);
    writer.lock().unwrap();
    // Nor is a backing file used while another process writes to it.
    let error = one.lock().unwrap_err();
    assert!(
        matches!(&error, BlockBackendError::Locked { path, .. } if *path == base),
        "{error}"
    );
    drop(writer);
    one.lock().unwrap();
    one.write_zeroes(0, SIZE, false).unwrap();
    one.flush().unwrap();
    assert!(fs::read(&base).unwrap() == vec![0x11; SIZE as usize]);
    // A destination must have all of them.
    let mark = one.mark().unwrap();
    let copy = dir.path().join("copy");
    fs::copy(&base, &copy).unwrap();
    let there = |base: &Path| {
        let files = [backing(base, Some(ImageFormat::Raw))];
        BlockBackend::open_on(one.path(), access(false), &files)
            .unwrap()
            .check_mark(mark)
    };
    there(&base).unwrap();
    let error = there(&copy).unwrap_err();
    assert!(
        matches!(&error, BlockBackendError::NotTheSame { path } if *path == copy),
        "{error}"
    );
}

/// Whether another opening of the image finds a sector full of `byte`.
pub(super) fn is_in_the_file(path: &Path, sector: u64, byte: u8) -> bool {
    let (copies, name) = (tempfile::tempdir().unwrap(), "copy");
    let copy = copies.path().join(name);
    fs::copy(path, &copy).unwrap();
    holds(&mut Driver::ready(device(&copy)), sector, 512, byte)
}

/// Has the device do its work until something is so.
pub(super) fn serve_until(driver: &mut Driver, is_so: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        assert!(Instant::now() < until, "not in ten seconds");
        std::thread::sleep(Duration::from_millis(5));
        driver.turn();
    }
}

#[test]
fn what_the_guest_was_told_is_written_gets_into_the_file_in_time() {
    let (_dir, path) = image();
    let mut driver = Driver::ready(device(&path));
    write(&mut driver, 9, 512, 1);
    assert!(is_in_the_file(&path, 9, 0), "too early to show anything");
    serve_until(&mut driver, || is_in_the_file(&path, 9, 1));
    write(&mut driver, 9, 512, 2);
    assert!(is_in_the_file(&path, 9, 2), "where it is was known before");
    // Nothing is behind any more, and the device comes to rest.
    write(&mut driver, 4096, 512, 3);
    serve_until(&mut driver, || is_in_the_file(&path, 4096, 3));
    std::thread::sleep(Duration::from_millis(50));
    driver.run();
    assert!(!driver.turn());
}

#[test]
fn what_a_guest_flushes_is_in_the_file_in_every_mode() {
    for cache in [CacheMode::Writeback, CacheMode::Writethrough, CacheMode::Unsafe] {
        let (_dir, path) = image();
        let backend = Arc::new(BlockBackend::open(&path, access(false)).unwrap());
        let parameters = BlockParameters {
            cache,
            ..Default::default()
        };
        let mut driver = Driver::ready(VirtioBlock::new(backend, "root", parameters).unwrap());
        write(&mut driver, 9, 512, 1);
        assert_eq!(request(&mut driver, FLUSH, 0, &[]), (OK, 1));
        assert!(is_in_the_file(&path, 9, 1), "{cache:?}");
    }
}

#[test]
fn an_image_that_is_closed_has_all_and_takes_nothing() {
    let (_dir, path) = image();
    let backend = Arc::new(BlockBackend::open(&path, access(false)).unwrap());
    let device = VirtioBlock::new(backend.clone(), "root", BlockParameters::default()).unwrap();
    let mut driver = Driver::ready(device);
    write(&mut driver, 9, 512, 1);
    backend.close().unwrap();
    assert!(is_in_the_file(&path, 9, 1));
    // As in a process that ends: a thread that wants the image waits for ever.
    std::mem::forget((driver, backend));
}

#[test]
fn what_is_no_image() {
    let (_dir, path) = image();
    let good = fs::read(&path).unwrap();
    let open = |format| {
        BlockBackend::open(
            &path,
            Access {
                format,
                ..Default::default()
            },
        )
    };
    let mut bad = vec![vec![0; 1 << 20], good[..50].to_vec()];
    // Another version, clusters of 2^63 bytes, a first table beyond the file, unknown features.
    for (at, byte) in [(7, 9), (23, 63), (40, 0xff), (72, 0xff)] {
        let mut image = good.clone();
        image[at] = byte;
        bad.push(image);
    }
    for (number, image) in bad.iter().enumerate() {
        fs::write(&path, image).unwrap();
        let error = open(ImageFormat::Qcow2)
            .err()
            .unwrap_or_else(|| panic!("{number}"));
        assert!(error.to_string().contains("cannot open it as qcow2"), "{error}");
        assert!(!error.to_string().contains('\n'));
    }
    // A guest may write what it likes to a raw image.
    fs::write(&path, &good).unwrap();
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let raw = open(ImageFormat::Raw).unwrap();
    assert_eq!(raw.size(), 1 << 20);
    let direct = Access {
        direct: true,
        ..access(false)
    };
    let error = BlockBackend::open(&path, direct).unwrap_err().to_string();
    assert!(error.contains("direct=on"), "{error}");
}
