//! A network card on a real tap: packets, the control queue, announcements, moves.

mod limits;
mod queues;

use std::ops::Range;

use migration_state::Envelope;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MRG_RXBUF};

use super::device::{RECEIVE, TRANSMIT};
use super::testing::{SENDER, Wire, card, frame, ip, is_ours, leave_for, open, parameters};
use super::*;
use crate::virtio::DeviceError;
use crate::virtio::VirtioDevice;
use crate::virtio::testing::{DATA, Driver, DriverBuffer, END, VERSION_1, reads, writes};

/// The control queue of a card with one pair of queues.
const CONTROL: usize = 2;
const MRG_RXBUF: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const GUEST_ANNOUNCE: u64 = 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;
/// What a driver accepts that knows nothing of checksums, segments and spread packets.
const PLAIN: u64 = VERSION_1 | GUEST_ANNOUNCE | 1 << 17 | 1 << 16 | 1 << 29;
/// A header that leaves no checksum and no segmentation to the receiver.
const NOTHING: [u8; 12] = [0; 12];
/// Sizes of buffers: what Linux takes, and the least that a driver may.
const LINUX: u32 = 1536;
const LEAST: u32 = 1526;

/// Where the sender's packet is.
const PACKET: u64 = DATA;
/// Where the receiver's buffers are.
const BUFFERS: u64 = DATA + 0x1_1000;

/// Makes the buffers with these numbers, of `len` bytes, available to the receiver.
fn provide(driver: &mut Driver, numbers: Range<u64>, len: u32) {
    driver.select(RECEIVE);
    for number in numbers {
        driver.add(&[writes(BUFFERS + number * u64::from(len), len)]);
    }
    driver.kick();
}

/// Waits for packets of ours, and returns the header and the rest of each.
fn received(driver: &mut Driver, len: u32) -> Vec<(Vec<u8>, Vec<u8>)> {
    loop {
        let mut packets = returned(driver, len);
        packets.retain(|(_, body)| is_ours(body));
        if !packets.is_empty() {
            return packets;
        }
        driver.wait();
    }
}

/// What is in the buffers that came back.
fn returned(driver: &mut Driver, len: u32) -> Vec<(Vec<u8>, Vec<u8>)> {
    driver.select(RECEIVE);
    let mut used = driver.used().into_iter();
    let mut packets = Vec::new();
    while let Some((head, written)) = used.next() {
        let part = |head: u32, written: u32| {
            driver.bytes(BUFFERS + u64::from(head) * u64::from(len), written as usize)
        };
        let mut packet = part(head, written);
        let buffers = u16::from_le_bytes([packet[10], packet[11]]);
        for _ in 1..buffers {
            let (head, written) = used.next().expect("all buffers of a packet come at once");
            packet.extend(part(head, written));
        }
        let body = packet.split_off(12);
        packets.push((packet, body));
    }
    packets
}

/// Sends what `parts` say after filling the memory at [`PACKET`].
fn transmit(driver: &mut Driver, packet: &[u8], parts: &[DriverBuffer]) {
    driver.select(TRANSMIT);
    driver.fill(PACKET, packet);
    assert_eq!(driver.submit(parts), 0);
}

fn transmit_frame(driver: &mut Driver, frame: &[u8]) {
    let packet = [&NOTHING, frame].concat();
    transmit(driver, &packet, &[reads(PACKET, packet.len() as u32)]);
}

/// A header of IPv4 for `total` bytes with it, from and to hosts of 10.0.0.0/24.
fn ip_header(protocol: u16, total: usize, from: u16, to: u16) -> Vec<u8> {
    let words = [
        0x4500,
        total as u16,
        0,
        0,
        0x4000 | protocol,
        0,
        0x0a00,
        from,
        0x0a00,
        to,
    ];
    // A bridge drops packets with a wrong checksum.
    let sum = words.iter().map(|&word| u32::from(word)).sum::<u32>();
    let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
    let words = words.into_iter().enumerate();
    words
        .flat_map(|(index, word)| if index == 5 { checksum } else { word }.to_be_bytes())
        .collect()
}

/// A frame of IPv4 and TCP with so much data, and the header that leaves its segments and checksum to the receiver.
fn segments(data: usize) -> ([u8; 12], Vec<u8>) {
    let mut header = [0; 12];
    // NEEDS_CSUM, TCPv4, 54 bytes of headers, 1448 of data a segment, the checksum at 34 + 16.
    header[..10].copy_from_slice(&[1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0]);
    let mut frame = vec![0xff; 6];
    frame.extend(SENDER);
    frame.extend([8, 0]);
    frame.extend(ip_header(6, 40 + data, 1, 2));
    frame.extend([0, 80, 0, 90, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0, 0, 0, 0, 0, 0]);
    frame.extend((0..data).map(|n| n as u8));
    (header, frame)
}

#[test]
fn packets_go_both_ways() {
    let wire = Wire::between(&["tap0"]);
    let mut driver = Driver::ready(wire.card("tap0"));
    provide(&mut driver, 0..60, LINUX);
    driver.take_dirty(0);
    wire.send(NOTHING, &frame(&[7; 100]));
    let packets = received(&mut driver, LINUX);
    let expected = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    assert_eq!(packets, [(expected.to_vec(), frame(&[7; 100]))]);
    assert!(driver.take_dirty(BUFFERS), "a packet marks its pages");
    assert!(driver.interrupts() > 0);

    wire.send(NOTHING, &frame(&[8; 1400]));
    assert_eq!(received(&mut driver, LINUX)[0].1, frame(&[8; 1400]));
    assert!(
        !driver.take_dirty(BUFFERS + 0x2000),
        "what no packet reached is not marked"
    );

    // The framing is the driver's choice.
    let sent = frame(&[9; 500]);
    let packet = [&NOTHING, &sent[..]].concat();
    let rest = packet.len() as u32 - 12 - 5;
    let parts = [reads(PACKET, 12), reads(PACKET + 12, 5), reads(PACKET + 17, rest)];
    transmit(&mut driver, &packet, &parts);
    assert_eq!(wire.receive(is_ours).1, sent);
    assert_eq!((driver.count("tx_packets"), driver.count("tx_bytes")), (1, 514));
    // The kernel may have had a word of its own.
    assert!(driver.count("rx_packets") >= 2 && driver.count("rx_bytes") >= 114 + 1414);
}

#[test]
fn a_packet_without_room_waits_in_the_tap() {
    let wire = Wire::between(&["tap0"]);
    for (features, len, enough) in [(PLAIN, LEAST, 1), (PLAIN | MRG_RXBUF, 200, 8)] {
        let mut driver = Driver::new(wire.card("tap0"));
        driver.bring_up_with(features);
        wire.send(NOTHING, &frame(&[1; 100]));
        wire.send(NOTHING, &frame(&[2; 100]));
        provide(&mut driver, 0..enough - 1, len);
        driver.run();
        assert!(driver.used().is_empty());
        provide(&mut driver, enough - 1..enough, len);
        assert_eq!(received(&mut driver, len)[0].1, frame(&[1; 100]));
        provide(&mut driver, enough..enough + 1, len);
        assert_eq!(received(&mut driver, len)[0].1, frame(&[2; 100]));
    }
}

#[test]
fn many_packets_are_taken_in_turns() {
    let wire = Wire::between(&["tap0"]);
    let mut driver = Driver::new(wire.card("tap0"));
    driver.bring_up_with(PLAIN);
    // Every queue was served once, as after each activation.
    driver.run();
    for number in 0..200 {
        wire.send(NOTHING, &frame(&[number; 60]));
    }
    driver.select(RECEIVE);
    for number in 0..256 {
        driver.add(&[writes(BUFFERS + number * u64::from(LEAST), LEAST)]);
    }
    driver.turn();
    assert!(
        driver.used().len() <= 64 * 2,
        "a turn of the queue's kick and one of the tap"
    );
    let mut bodies = Vec::new();
    driver.kick();
    for (head, written) in driver.used() {
        let at = BUFFERS + u64::from(head) * u64::from(LEAST);
        bodies.push(driver.bytes(at, written as usize)[26]);
    }
    assert_eq!(bodies.last(), Some(&199));
    assert!(bodies.is_sorted());
}

#[test]
fn segments_are_left_to_a_guest_that_takes_them() {
    let mut wire = Wire::between(&["tap0"]);
    let mut driver = Driver::ready(wire.card("tap0"));
    provide(&mut driver, 0..60, LINUX);
    let (header, sent) = segments(60_000);
    driver.interrupts();
    wire.send(header, &sent);
    let packets = received(&mut driver, LINUX);
    assert_eq!(packets.len(), 1);
    let (got, body) = &packets[0];
    assert_eq!((got[0], got[1]), (1, 1), "checksum and segments are the guest's");
    assert_eq!(got[10], 40, "buffers");
    assert!(body == &sent, "{:x?}", &body[..60]);
    assert_eq!(driver.interrupts(), 1);

    wire.take_segments();
    let packet = [&header, &sent[..]].concat();
    transmit(&mut driver, &packet, &[reads(PACKET, packet.len() as u32)]);
    let (got, body) = wire.receive(is_ours);
    assert!((got[1], &body) == (1, &sent), "{:x?}", &body[..60]);
}

#[test]
fn segments_are_cut_for_a_guest_that_does_not() {
    let wire = Wire::between(&["tap0"]);
    let mut driver = Driver::new(wire.card("tap0"));
    driver.bring_up_with(PLAIN);
    provide(&mut driver, 0..60, LEAST);
    let (header, sent) = segments(14_480);
    wire.send(header, &sent);
    let mut packets = Vec::new();
    while packets.len() < 10 {
        packets.extend(received(&mut driver, LEAST));
    }
    for (number, (header, body)) in packets.iter().enumerate() {
        assert_eq!(header[..10], [0; 10], "nothing is left to the guest");
        assert_eq!(body[54..], sent[54 + number * 1448..][..1448]);
        assert_ne!(body[50..52], [0, 0], "the checksum");
    }
}

#[test]
fn buffers_that_make_no_sense_come_back() {
    let wire = Wire::between(&["tap0"]);
    for features in [PLAIN, PLAIN | MRG_RXBUF] {
        let bad: [&[DriverBuffer]; 4] = [
            &[writes(BUFFERS, 11)],
            &[writes(END - 100, LEAST)],
            &[writes(u64::MAX - 5, LEAST)],
            &[reads(BUFFERS, LEAST)],
        ];
        for parts in bad {
            let mut driver = Driver::new(wire.card("tap0"));
            driver.bring_up_with(features);
            driver.select(RECEIVE);
            driver.add(parts);
            driver.add(&[writes(BUFFERS + u64::from(LEAST), LEAST)]);
            driver.kick();
            assert_eq!(driver.used(), [(0, 0)], "{parts:?}");
            wire.send(NOTHING, &frame(&[3; 100]));
            assert_eq!(received(&mut driver, LEAST)[0].1, frame(&[3; 100]));
            assert_eq!(driver.get(0x070), 15);
        }
    }
}

#[test]
fn packets_that_make_no_sense_come_back() {
    let wire = Wire::between(&["tap0"]);
    let mut driver = Driver::ready(wire.card("tap0"));
    let bad: [&[DriverBuffer]; 6] = [
        &[reads(PACKET, 12)],
        &[reads(PACKET, 13)],
        &[reads(END - 100, 500)],
        &[reads(u64::MAX - 100, 500)],
        &[reads(PACKET, 0x10_0000)],
        &[writes(PACKET, 500)],
    ];
    for parts in bad {
        transmit(&mut driver, &[0; 600], parts);
    }
    // A header that the kernel does not take: a checksum outside the packet.
    transmit(
        &mut driver,
        &[1, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0],
        &[reads(PACKET, 500)],
    );
    transmit_frame(&mut driver, &frame(&[4; 100]));
    assert_eq!(wire.receive(is_ours).1, frame(&[4; 100]));
    assert_eq!((driver.count("tx_packets"), driver.count("tx_dropped")), (1, 7));
}

#[test]
fn a_tap_that_goes_down_or_away_does_no_harm() {
    let wire = Wire::between(&["tap0"]);
    let mut driver = Driver::ready(wire.card("tap0"));
    provide(&mut driver, 0..60, LINUX);
    ip("link set dev tap0 down");
    transmit_frame(&mut driver, &frame(&[1; 100]));
    assert_eq!(driver.count("tx_dropped"), 1);
    ip("link set dev tap0 up");
    // The bridge takes its time to see that its port is up.
    while wire.try_receive(is_ours).is_none() {
        transmit_frame(&mut driver, &frame(&[2; 100]));
    }
    ip("link delete dev tap0");
    driver.run();
    transmit_frame(&mut driver, &frame(&[3; 100]));
    driver.select(RECEIVE);
    driver.kick();
    driver.bring_up();
    transmit_frame(&mut driver, &frame(&[4; 100]));
    assert_eq!(driver.get(0x070), 15);
}

#[test]
fn control_commands_are_answered() {
    leave_for("tap0");
    let mut driver = Driver::ready(card("tap0"));
    driver.select(CONTROL);
    let cases: [(&[u8], u8); 4] = [(&[3, 0], 0), (&[3, 1], 1), (&[5, 0, 0], 1), (&[3], 1)];
    for (command, answer) in cases {
        driver.fill(PACKET, command);
        let parts = [reads(PACKET, command.len() as u32), writes(PACKET + 0x100, 1)];
        assert_eq!(driver.submit(&parts), 1);
        assert_eq!(driver.bytes(PACKET + 0x100, 1), [answer], "{command:?}");
    }
    assert_eq!(driver.submit(&[reads(PACKET, 2)]), 0);
    assert_eq!(driver.submit(&[reads(END, 2), writes(PACKET, 1)]), 1);
    assert_eq!(driver.submit(&[reads(PACKET, 2), writes(END, 1)]), 0);
}

#[test]
fn the_configuration_says_what_the_card_is() {
    leave_for("tap0");
    let mut driver = Driver::new(card("tap0"));
    assert_eq!(driver.get(0x100), 0x0000_0002);
    assert_eq!(driver.get(0x104), 0x0001_0100, "the address ends, the link is up");
    assert_eq!(driver.get(0x108), 1500 << 16 | 1);
    assert_eq!(driver.get(0x10c), 0);
}

fn is_rarp(frame: &[u8]) -> bool {
    frame[12..14] == [0x80, 0x35]
}

#[test]
fn a_guest_that_arrives_is_announced() {
    let wire = Wire::between(&["tap0", "tap1"]);
    let source = Driver::ready(wire.card("tap0"));
    let envelope = source.save();
    let mut driver = source.move_to(wire.card("tap1"), envelope).unwrap();
    driver.run();
    assert!(wire.try_receive(is_rarp).is_none(), "a paused guest is announced");
    driver.transport.resume();
    driver.run();
    for round in 0..5 {
        let (_, frame) = loop {
            match wire.try_receive(is_rarp) {
                Some(packet) => break packet,
                None => driver.wait(),
            }
        };
        assert_eq!(frame.len(), 60, "round {round}");
        assert_eq!(frame[6..12], [2, 0, 0, 0, 0, 1]);
    }
    assert_eq!(driver.get(0x060) & 2, 2, "the configuration has changed");
    assert_eq!(driver.get(0x104) >> 16, 3, "link up, announce");
    driver.select(CONTROL);
    driver.fill(PACKET, &[3, 0]);
    assert_eq!(driver.submit(&[reads(PACKET, 2), writes(PACKET + 2, 1)]), 1);
    assert_eq!(driver.get(0x104) >> 16, 1);
    assert!(wire.try_receive(is_rarp).is_none());
}

#[test]
fn a_guest_that_only_paused_is_not_announced() {
    let wire = Wire::between(&["tap0"]);
    let mut driver = Driver::ready(wire.card("tap0"));
    let _ = driver.save();
    driver.transport.resume();
    driver.run();
    transmit_frame(&mut driver, &frame(&[5; 100]));
    let (_, first) = wire.receive(|frame| is_rarp(frame) || is_ours(frame));
    assert!(is_ours(&first), "{first:x?}");
    assert_eq!(driver.get(0x104) >> 16, 1);
}

#[test]
fn requests_under_way_move() {
    let wire = Wire::between(&["tap0", "tap1"]);
    let mut source = Driver::ready(wire.card("tap0"));
    provide(&mut source, 0..60, LINUX);
    source.select(TRANSMIT);
    source.fill(PACKET, &[&NOTHING, &frame(&[6; 100])[..]].concat());
    source.add(&[reads(PACKET, 126)]);
    let envelope = source.save();
    let mut driver = source.move_to(wire.card("tap1"), envelope).unwrap();
    driver.transport.resume();
    driver.run();
    assert_eq!(wire.receive(is_ours).1, frame(&[6; 100]));
    // What was negotiated holds for the new tap: segments are the guest's.
    let (header, sent) = segments(30_000);
    wire.send(header, &sent);
    let is_ip = |(_, body): &(Vec<u8>, Vec<u8>)| body[12..14] == [8, 0];
    let packet = loop {
        if let Some(packet) = received(&mut driver, LINUX).into_iter().find(is_ip) {
            break packet;
        }
    };
    assert!(packet.1 == sent, "{:x?}", &packet.1[..60]);
}

#[test]
fn a_state_of_another_card_is_refused() {
    leave_for("tap0");
    let mut card = card("tap0");
    let mac = "02:00:00:00:00:09".parse().unwrap();
    let good = NetState {
        mac: "02:00:00:00:00:01".parse().unwrap(),
        mtu: 1500,
        queue_pairs: 1,
        active_pairs: 1,
    };
    let (mtu, queue_pairs, active_pairs) = (9000, 2, 0);
    for (what, state) in [
        ("MAC address", NetState { mac, ..good }),
        ("MTU", NetState { mtu, ..good }),
        ("pairs of queues", NetState { queue_pairs, ..good }),
        ("pairs of queues in use", NetState { active_pairs, ..good }),
        (
            "pairs of queues in use",
            NetState {
                active_pairs: 2,
                ..good
            },
        ),
    ] {
        let mut envelope = Envelope::new();
        envelope.put("dev0", &state).unwrap();
        let error = card.restore(&mut envelope, "dev0").unwrap_err();
        assert!(
            matches!(&error, DeviceError::Mismatch { what: got, .. } if *got == what),
            "{error}"
        );
    }
}

#[test]
fn a_tap_that_cannot_be_used_is_refused_by_name() {
    leave_for("tap0");
    ip("link add name bridge type bridge");
    let try_open = |name: &str| Tap::open(&TapSource::Name(name.into()));
    let error = |name: &str| try_open(name).unwrap_err().to_string();
    assert!(error("none").contains("ip tuntap add dev none mode tap"));
    assert!(error("a-name-that-is-too-long").contains("found none"));
    assert!(matches!(try_open("bridge"), Err(TapError::NotATap { .. })));
    let tap = try_open("tap0").unwrap();
    assert!(matches!(try_open("tap0"), Err(TapError::Busy { .. })));
    let single = VirtioNet::new(tap, parameters(2)).unwrap_err().to_string();
    assert!(
        single.contains("ip tuntap add dev tap0 mode tap multi_queue"),
        "{single}"
    );
    let tap = open("tap0");
    let parameters = NetParameters {
        mtu: 9000,
        ..parameters(1)
    };
    let small = VirtioNet::new(tap, parameters).unwrap_err().to_string();
    assert!(small.contains("ip link set dev tap0 mtu 9000"), "{small}");
    ip("link set dev tap0 mtu 9000");
    VirtioNet::new(open("tap0"), parameters).unwrap();
}

#[test]
fn golden_record() {
    let state = NetState {
        mac: "02:fc:00:00:00:07".parse().unwrap(),
        mtu: 1500,
        queue_pairs: 4,
        active_pairs: 3,
    };
    migration_state::assert_golden(2, "02fc00000007 dc0b 04 03", &state);
}
