//! Packets that wait for tokens.

use std::time::{Duration, Instant};

use super::super::testing::{Wire, frame, is_ours, open, parameters};
use super::super::{NetParameters, VirtioNet};
use super::{LEAST, NOTHING, PACKET, PLAIN, TRANSMIT, provide, received};
use crate::rate::{Bucket, Limits};
use crate::virtio::testing::{Driver, reads};

/// A card whose directions each have a limit.
fn limited(tap: &str, queue_pairs: u16, rx_limits: Limits, tx_limits: Limits) -> VirtioNet {
    let parameters = NetParameters {
        rx_limits,
        tx_limits,
        ..parameters(queue_pairs)
    };
    VirtioNet::new(open(tap), parameters).unwrap()
}

/// Bytes of the frames of the tests about limits, with Ethernet's header.
const FRAME: u64 = 1014;
/// A bucket of ten frames, which is filled once more in 100 ms.
const TEN: Limits = Limits {
    bandwidth: Some(Bucket {
        size: 10 * FRAME,
        one_time_burst: 0,
        refill_time_ms: 100,
    }),
    operations: None,
};

/// A bucket of two packets and one more at first, which is filled once more in 20 ms.
const TWO: Limits = Limits {
    bandwidth: None,
    operations: Some(Bucket {
        size: 2,
        one_time_burst: 1,
        refill_time_ms: 20,
    }),
};

#[test]
fn packets_to_the_guest_wait_for_tokens_in_the_tap() {
    let wire = Wire::between(&["tap0"]);
    let card = wire.put(limited("tap0", 1, TEN, Limits::default()), "tap0");
    let mut driver = Driver::new(card);
    driver.bring_up_with(PLAIN);
    provide(&mut driver, 0..60, LEAST);
    let begin = Instant::now();
    for number in 0..30 {
        wire.send(NOTHING, &frame(&[number; 1000]));
    }
    let mut packets = Vec::new();
    while packets.len() < 30 {
        packets.extend(received(&mut driver, LEAST));
    }
    let took = begin.elapsed();
    // Ten at once, and of the other twenty the last when there is a token for it: after 10 ms each.
    assert!(took >= Duration::from_millis(189), "30 packets in {took:?}");
    assert!(packets.iter().map(|(_, body)| body[14]).eq(0..30));
    assert!(driver.count("rx_throttled") > 0);
    assert_eq!(driver.count("tx_throttled"), 0);
}

#[test]
fn packets_of_the_guest_wait_for_tokens_in_its_queue() {
    let wire = Wire::between(&["tap0"]);
    let card = wire.put(limited("tap0", 1, Limits::default(), TWO), "tap0");
    let mut driver = Driver::ready(card);
    driver.select(TRANSMIT);
    driver.fill(PACKET, &[&NOTHING, &frame(&[6; 100])[..]].concat());
    let begin = Instant::now();
    (0..6).for_each(|_| {
        driver.add(&[reads(PACKET, 126)]);
    });
    driver.kick();
    let mut sent = driver.used().len();
    assert!((3..6).contains(&sent), "the bucket and the burst: {sent}");
    while sent < 6 {
        driver.wait();
        sent += driver.used().len();
    }
    // Three more, each after ten milliseconds.
    let took = begin.elapsed();
    assert!(took >= Duration::from_millis(29), "{took:?}");
    assert!(driver.count("tx_throttled") > 0);
    (0..6).for_each(|_| {
        wire.receive(is_ours);
    });
    // The limits are part of what the device is made with.
    let parameters = NetParameters::from_bytes(&driver.transport.describe().parameters).unwrap();
    assert_eq!(
        (parameters.rx_limits, parameters.tx_limits),
        (Limits::default(), TWO)
    );
}

#[test]
fn no_pair_of_queues_takes_all_tokens() {
    let wire = Wire::between(&["many0"]);
    let card = wire.put(limited("many0", 2, Limits::default(), TWO), "many0");
    let mut driver = Driver::ready(card);
    driver.fill(PACKET, &[&NOTHING, &frame(&[6; 100])[..]].concat());
    for queue in [1, 3] {
        driver.select(queue);
        for _ in 0..20 {
            driver.add(&[reads(PACKET, 126)]);
        }
        driver.kick();
    }
    let mut sent = [0, 0];
    while sent.iter().sum::<usize>() < 20 {
        driver.wait();
        for (sent, queue) in sent.iter_mut().zip([1, 3]) {
            *sent += driver.select(queue).used().len();
        }
    }
    assert!(sent.iter().all(|sent| *sent >= 5), "{sent:?}");
}
