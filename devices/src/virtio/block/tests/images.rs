//! qcow2 images.

use std::fs::{self, File};
use std::path::Path;

use imago::file::File as ImageFile;
use imago::qcow2::Qcow2;
use imago::storage::StorageCreateOptions;
use imago::{FormatCreateBuilder, Storage};

use super::*;
use crate::virtio::testing::END;

const SIZE: u64 = 4 << 20;

/// Makes an image, on another one if that is said with its format.
fn make(path: &Path, backing: Option<(&Path, &str)>) {
    let file = ImageFile::create_open(StorageCreateOptions::new().filename(path)).unwrap();
    let mut image = Qcow2::<ImageFile>::create_builder(file).size(SIZE);
    if let Some((path, format)) = backing {
        image = image.backing(path.to_str().unwrap().into(), format.into());
    }
    image.create().unwrap();
}

fn access(read_only: bool) -> Access {
    Access {
        read_only,
        format: Format::Qcow2,
        ..Default::default()
    }
}

fn device(path: &Path) -> Block {
    let backend = Backend::open(path, access(false)).unwrap();
    Block::new(Arc::new(backend), "root", Parameters::default()).unwrap()
}

fn image() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    make(&path, None);
    (dir, path)
}

/// Writes sectors full of `byte`.
fn write(driver: &mut Driver, sector: u64, len: u32, byte: u8) {
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
    let mut source = Driver::ready(device(&path));
    source.transport.take_locks().unwrap();
    // The destination has it open before the source is done with it, and writes nothing.
    let before = fs::read(&path).unwrap();
    let there = device(&path);
    assert!(fs::read(&path).unwrap() == before);
    write(&mut source, 1000, 99_840, 0xcd);
    let envelope = source.save();
    let mut destination = source.move_to(there, envelope).unwrap();
    assert!(destination.transport.take_locks().is_err());
    source.transport.release_locks().unwrap();
    destination.transport.take_locks().unwrap();
    destination.transport.invalidate().unwrap();
    let released = fs::read(&path).unwrap();
    drop(source);
    assert!(
        fs::read(&path).unwrap() == released,
        "who has let go of it writes nothing"
    );
    destination.transport.resume();
    destination.run();
    assert!(holds(&mut destination, 1000, 99_840, 0xcd));
    write(&mut destination, 0, 512, 0xee);
    destination.save();
    let mut again = Driver::ready(device(&path));
    assert!(holds(&mut again, 0, 512, 0xee));
    assert!(holds(&mut again, 1000, 99_840, 0xcd));
}

#[test]
fn what_an_image_is_on() {
    let dir = tempfile::tempdir().unwrap();
    let (base, top) = (dir.path().join("base"), dir.path().join("top"));
    fs::write(&base, vec![0x11; SIZE as usize]).unwrap();
    make(&top, Some((&base, "raw")));
    let mut driver = Driver::ready(device(&top));
    assert!(holds(&mut driver, 100, 4096, 0x11));
    write(&mut driver, 100, 512, 0x22);
    assert!(holds(&mut driver, 100, 512, 0x22));
    assert!(holds(&mut driver, 101, 512, 0x11));
    assert!(fs::read(&base).unwrap().iter().all(|&byte| byte == 0x11));
    let refused = |path: &Path| Backend::open(path, access(true)).unwrap_err();
    let message = |error: BackendError| format!("{error}: {:?}", std::error::Error::source(&error));
    fs::remove_file(&base).unwrap();
    let error = message(refused(&top));
    assert!(error.contains("base") && error.contains("as qcow2"), "{error}");
    // Without a format somebody would have to guess.
    fs::remove_file(&top).unwrap();
    fs::write(&base, vec![0x11; SIZE as usize]).unwrap();
    make(&top, Some((&base, "")));
    let error = message(refused(&top));
    assert!(error.contains("format"), "{error}");
}

#[test]
fn what_is_no_image() {
    let (_dir, path) = image();
    let good = fs::read(&path).unwrap();
    let open = |format| {
        Backend::open(
            &path,
            Access {
                format,
                ..Default::default()
            },
        )
    };
    let mut bad = vec![vec![0; 1 << 20], good[..50].to_vec()];
    // Another version, clusters of 2^63 bytes, a first table beyond everything, features that nobody knows.
    for (at, byte) in [(7, 9), (23, 63), (40, 0xff), (72, 0xff)] {
        let mut image = good.clone();
        image[at] = byte;
        bad.push(image);
    }
    for (number, image) in bad.iter().enumerate() {
        fs::write(&path, image).unwrap();
        let error = open(Format::Qcow2).err().unwrap_or_else(|| panic!("{number}"));
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
    let raw = open(Format::Raw).unwrap();
    assert_eq!(raw.size(), 1 << 20);
    let direct = Access {
        direct: true,
        ..access(false)
    };
    let error = Backend::open(&path, direct).unwrap_err().to_string();
    assert!(error.contains("direct=on"), "{error}");
}
