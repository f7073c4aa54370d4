//! Cards with several pairs of queues, and taps that another program has opened.

use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_net::VIRTIO_NET_F_MQ;

use super::super::device::COMMANDS;
use super::super::testing::{SENDER, Wire, card, is_ours, leave_for, open, parameters};
use super::super::{NetState, Tap, TapError, TapSource, VirtioNet};
use super::{BUFFERS, LINUX, NOTHING, PACKET, ip_header};
use crate::virtio::testing::{Driver, reads, writes};

const MQ: u64 = 1 << VIRTIO_NET_F_MQ;
/// Mergeable buffers, and segments that are left to the guest: without them a buffer holds any packet.
const LARGE: u64 = 1 << 15 | 0x3 << 7 | 0x3 << 54;
/// The guest's host number, and the far end's.
const GUEST: u16 = 1;
const FAR: u16 = 2;
/// Buffers of each pair.
const COUNT: u64 = 8;

/// A frame of UDP between ports of that number; a port is a flow.
fn udp(from: u16, to: u16, port: u16) -> Vec<u8> {
    let mut frame = [&[0xff; 6][..], &SENDER, &[8, 0]].concat();
    frame.extend(ip_header(17, 20 + 8 + 18, from, to));
    for word in [port, port, 8 + 18, 0] {
        frame.extend(word.to_be_bytes());
    }
    frame.extend([0; 18]);
    frame
}

/// Sets the number of pairs; returns the card's answer.
fn set_pairs(driver: &mut Driver, control: usize, pairs: u16) -> u8 {
    driver.select(control);
    driver.fill(PACKET, &[&[4, 0][..], &pairs.to_le_bytes()].concat());
    assert_eq!(driver.submit(&[reads(PACKET, 4), writes(PACKET + 4, 1)]), 1);
    driver.bytes(PACKET + 4, 1)[0]
}

/// Makes buffers of the first pairs available.
fn provide_all(driver: &mut Driver, pairs: u64) {
    for pair in 0..pairs {
        driver.select(2 * pair as usize);
        for number in 0..COUNT {
            let at = BUFFERS + (pair * COUNT + number) * u64::from(LINUX);
            driver.add(&[writes(at, LINUX)]);
        }
        driver.kick();
    }
}

/// Sends a packet of the flow from the pair, and waits until the far end has it.
fn send_from(driver: &mut Driver, wire: &Wire, pair: usize, port: u16) {
    let packet = [&NOTHING, &udp(GUEST, FAR, port)[..]].concat();
    driver.select(2 * pair + 1);
    driver.fill(PACKET, &packet);
    assert_eq!(driver.submit(&[reads(PACKET, packet.len() as u32)]), 0);
    assert_eq!(wire.receive(is_ours).1, packet[12..]);
}

/// The pair to which an answer of the flow comes.
fn answered_to(driver: &mut Driver, wire: &Wire, pairs: u64, port: u16) -> u64 {
    let answer = udp(FAR, GUEST, port);
    wire.send(NOTHING, &answer);
    loop {
        for pair in 0..pairs {
            driver.select(2 * pair as usize);
            let used = driver.used();
            let came = used.iter().any(|(head, written)| {
                let at = BUFFERS + (pair * COUNT + u64::from(*head) % COUNT) * u64::from(LINUX);
                driver.bytes(at, *written as usize)[12..] == answer
            });
            if came {
                return pair;
            }
        }
        driver.wait();
    }
}

fn card_of(wire: &Wire, tap: &str, queue_pairs: u16) -> VirtioNet {
    wire.put(VirtioNet::new(open(tap), parameters(queue_pairs)).unwrap(), tap)
}

fn ready(card: VirtioNet) -> Driver {
    let mut driver = Driver::new(card);
    let features = driver.offered() & !LARGE;
    driver.bring_up_with(features);
    driver
}

#[test]
fn the_driver_says_how_many_pairs_it_uses() {
    leave_for("many0");
    let mut driver = Driver::ready(VirtioNet::new(open("many0"), parameters(4)).unwrap());
    assert_eq!(driver.queue_count(), 9);
    assert_eq!(driver.get(0x108), 1500 << 16 | 4);
    for (pairs, answer) in [(4, 0), (1, 0), (3, 0), (0, 1), (5, 1), (u16::MAX, 1)] {
        assert_eq!(set_pairs(&mut driver, 8, pairs), answer, "{pairs}");
    }
    assert_eq!(driver.count("commands"), 3);
    driver.fill(PACKET, &[4, 0, 2]);
    driver.submit(&[reads(PACKET, 3), writes(PACKET + 4, 1)]);
    assert_eq!(driver.bytes(PACKET + 4, 1), [1], "half a number");
    // A driver that knows of one pair has its control queue right after it, and nothing to set.
    let features = driver.offered() & !MQ;
    driver.bring_up_with(features);
    assert_eq!(set_pairs(&mut driver, 2, 1), 1);
    assert_eq!(Driver::ready(card("many0")).queue_count(), 5);
}

#[test]
fn a_driver_that_floods_the_control_queue_waits() {
    leave_for("many0");
    let mut driver = Driver::ready(VirtioNet::new(open("many0"), parameters(4)).unwrap());
    driver.run();
    driver.select(8);
    let flood = 3 * COMMANDS;
    for number in 0..flood {
        let at = PACKET + 16 * number;
        let pairs = 1 + 3 * (number % 2) as u16;
        driver.fill(at, &[&[4, 0][..], &pairs.to_le_bytes(), &[0xff]].concat());
        driver.add(&[reads(at, 4), writes(at + 4, 1)]);
    }
    let begin = Instant::now();
    driver.set(0x050, 8);
    driver.turn();
    assert_eq!(driver.used().len(), 1, "a turn is one command");
    driver.run();
    let at_once = 1 + driver.used().len() as u64;
    assert!(at_once <= COMMANDS + 1, "{at_once} of {flood} at once");
    // The others come in time, without a kick.
    driver.wait_for((flood - at_once) as usize);
    assert!(begin.elapsed() >= Duration::from_secs(1), "{:?}", begin.elapsed());
    assert_eq!(driver.count("commands"), flood);
    assert_eq!(driver.bytes(PACKET + 16 * (flood - 1) + 4, 1), [0]);
}

#[test]
fn answers_come_to_the_pair_that_asked() {
    let wire = Wire::between(&["many0"]);
    let mut driver = ready(card_of(&wire, "many0", 4));
    assert_eq!(set_pairs(&mut driver, 8, 4), 0);
    provide_all(&mut driver, 4);
    for (pair, port) in [(3, 1000), (1, 1001), (0, 1002), (2, 1003)] {
        send_from(&mut driver, &wire, pair, port);
        assert_eq!(answered_to(&mut driver, &wire, 4, port), pair as u64);
    }
    // With fewer, none is lost.
    assert_eq!(set_pairs(&mut driver, 8, 1), 0);
    for port in 1000..1004 {
        assert_eq!(answered_to(&mut driver, &wire, 4, port), 0);
    }
    // Not even one that was left in a queue that is not in use.
    send_from(&mut driver, &wire, 3, 1000);
    assert_eq!(answered_to(&mut driver, &wire, 4, 1000), 0);
    assert_eq!(set_pairs(&mut driver, 8, 2), 0);
    send_from(&mut driver, &wire, 1, 1000);
    assert_eq!(answered_to(&mut driver, &wire, 4, 1000), 1);
}

#[test]
fn the_pairs_in_use_move() {
    let wire = Wire::between(&["many0", "many1"]);
    let mut source = ready(card_of(&wire, "many0", 4));
    assert_eq!(set_pairs(&mut source, 8, 3), 0);
    let mut envelope = source.save();
    let mut driver = source.move_to(card_of(&wire, "many1", 4), source.save()).unwrap();
    driver.transport.resume();
    driver.run();
    drop(source);
    provide_all(&mut driver, 4);
    send_from(&mut driver, &wire, 2, 1000);
    assert_eq!(answered_to(&mut driver, &wire, 4, 1000), 2);
    let state: NetState = envelope.take("dev0").unwrap();
    assert_eq!((state.queue_pairs, state.active_pairs), (4, 3));
    assert_eq!(set_pairs(&mut driver, 8, 4), 0);
    send_from(&mut driver, &wire, 3, 1000);
    assert_eq!(answered_to(&mut driver, &wire, 4, 1000), 3);
}

#[test]
fn queues_that_were_opened_elsewhere() {
    let wire = Wire::between(&["many0"]);
    // A program that starts this one opens a queue of the tap, and another.
    let opened = open("many0").with_queues(2).unwrap();
    let descriptors: Vec<_> = opened.queues().map(|queue| queue.as_raw_fd()).collect();
    let source = TapSource::Descriptors(descriptors);
    for _ in 0..2 {
        let tap = Tap::open(&source).unwrap();
        assert_eq!((tap.name(), tap.mtu()), ("many0", 1500));
        let mut driver = ready(wire.put(VirtioNet::new(tap, parameters(2)).unwrap(), "many0"));
        assert_eq!(set_pairs(&mut driver, 4, 2), 0);
        provide_all(&mut driver, 2);
        send_from(&mut driver, &wire, 1, 1000);
        assert_eq!(answered_to(&mut driver, &wire, 2, 1000), 1);
        // A guest that uses one queue leaves both attached for the next user of the tap.
        assert_eq!(set_pairs(&mut driver, 4, 1), 0);
    }
    let error = VirtioNet::new(Tap::open(&source).unwrap(), parameters(4)).unwrap_err();
    assert!(
        matches!(
            error,
            TapError::Descriptors {
                expected: 4,
                got: 2,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn descriptors_of_no_tap_are_refused() {
    leave_for("many0");
    let refused = |descriptors: &[i32]| {
        let source = TapSource::Descriptors(descriptors.into());
        Tap::open(&source).unwrap_err().to_string()
    };
    let file = tempfile::tempfile().unwrap();
    let closed = refused(&[1 << 20]);
    assert!(closed.contains("expected one that was open"), "{closed}");
    let other = refused(&[file.as_raw_fd()]);
    assert!(other.contains("expected a queue of a tap"), "{other}");
    let tap = open("many0");
    let both = refused(&[tap.queue(0).as_fd().as_raw_fd(), file.as_raw_fd()]);
    assert!(both.contains("expected a queue of a tap"), "{both}");
    assert!(refused(&[]).contains("got 0"));
}
