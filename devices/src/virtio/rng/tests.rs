use super::device::MAX_BYTES;
use super::*;
use crate::virtio::testing::{DATA, Driver, END, reads, writes};

fn is_random(bytes: &[u8]) -> bool {
    // 64 zero bytes in a row do not happen.
    bytes
        .chunks(64)
        .all(|chunk| chunk.len() < 64 || chunk.iter().any(|&byte| byte != 0))
}

#[test]
fn buffers_are_filled_with_random_bytes() {
    let mut driver = Driver::ready(Rng::new());
    assert_eq!(driver.get(0x008), 4);
    assert_eq!(
        driver.submit(&[writes(DATA, 100), writes(DATA + 0x2000, 5000)]),
        5100
    );
    assert!(is_random(&driver.bytes(DATA, 64)));
    assert!(is_random(&driver.bytes(DATA + 0x2000, 4992)));
    assert_eq!(driver.bytes(DATA + 100, 64), [0; 64]);
    assert_eq!(driver.interrupts(), 1);
    assert!(driver.take_dirty(DATA + 0x3000));
    assert_eq!((driver.count("requests"), driver.count("bytes")), (1, 5100));
}

#[test]
fn one_request_gets_a_bounded_amount() {
    let mut driver = Driver::ready(Rng::new());
    let written = driver.submit(&[writes(DATA, 0x10_0000)]);
    assert_eq!(u64::from(written), MAX_BYTES);
    assert_eq!(driver.bytes(DATA + MAX_BYTES, 64), [0; 64]);
}

#[test]
fn hostile_chains_come_back() {
    let mut driver = Driver::ready(Rng::new());
    assert_eq!(driver.submit(&[reads(DATA, 100)]), 0);
    assert_eq!(driver.submit(&[writes(END, 100)]), 0);
    assert_eq!(driver.submit(&[writes(u64::MAX - 10, 100)]), 0);
    assert_eq!(driver.submit(&[writes(DATA, 0), writes(DATA, 1)]), 1);
    assert_eq!(driver.submit(&[writes(DATA, 10), reads(DATA, 10)]), 0);
    assert_eq!(driver.get(0x070), 15);
}

#[test]
fn golden_record() {
    migration_state::assert_golden(1, "", &RngState {});
}
