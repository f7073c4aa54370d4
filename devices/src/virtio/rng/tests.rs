//! The entropy device as a guest uses it.

use std::time::{Duration, Instant};

use super::device::MAX_BYTES;
use super::*;
use crate::rate::{Bucket, Limits};
use crate::virtio::testing::{DATA, Driver, END, reads, rng, writes};

fn is_random(bytes: &[u8]) -> bool {
    // 64 zero bytes in a row do not happen.
    bytes
        .chunks(64)
        .all(|chunk| chunk.len() < 64 || chunk.iter().any(|&byte| byte != 0))
}

#[test]
fn buffers_are_filled_with_random_bytes() {
    let mut driver = Driver::ready(rng());
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
    let mut driver = Driver::ready(rng());
    let written = driver.submit(&[writes(DATA, 0x10_0000)]);
    assert_eq!(u64::from(written), MAX_BYTES);
    assert_eq!(driver.bytes(DATA + MAX_BYTES, 64), [0; 64]);
}

#[test]
fn hostile_chains_come_back() {
    let mut driver = Driver::ready(rng());
    assert_eq!(driver.submit(&[reads(DATA, 100)]), 0);
    assert_eq!(driver.submit(&[writes(END, 100)]), 0);
    assert_eq!(driver.submit(&[writes(u64::MAX - 10, 100)]), 0);
    assert_eq!(driver.submit(&[writes(DATA, 0), writes(DATA, 1)]), 1);
    assert_eq!(driver.submit(&[writes(DATA, 10), reads(DATA, 10)]), 0);
    assert_eq!(driver.get(0x070), 15);
}

#[test]
fn requests_wait_for_tokens() {
    let bucket = |size| Bucket {
        size,
        one_time_burst: 0,
        refill_time_ms: 20,
    };
    let operations = Limits {
        bandwidth: None,
        operations: Some(bucket(2)),
    };
    // No request gets more than this, whatever it asks for.
    let bandwidth = Limits {
        bandwidth: Some(bucket(2 * MAX_BYTES)),
        operations: None,
    };
    // A request may take more than is left, so there is one more at once where bytes are counted.
    for (limits, at_least) in [(operations, 39), (bandwidth, 29)] {
        let mut driver = Driver::ready(VirtioRng::new(limits).unwrap());
        let begin = Instant::now();
        (0..6).for_each(|_| {
            driver.add(&[writes(DATA, 0x10_0000)]);
        });
        driver.kick();
        let at_once = driver.used().len();
        assert!((2..6).contains(&at_once), "{at_once}");
        driver.wait_for(6 - at_once);
        // Each of the others ten milliseconds after the one before.
        let took = begin.elapsed();
        assert!(took >= Duration::from_millis(at_least), "{took:?}");
        assert!(driver.count("throttled") > 0);
        let parameters = driver.transport.describe().parameters;
        assert_eq!(Limits::from_bytes(&parameters), Some(limits));
    }
}

#[test]
fn golden_record() {
    migration_state::assert_golden(1, "", &RngState {});
}
