//! Guests and programs that make no sense.

use std::io::Write;
use std::time::{Duration, Instant};

use super::super::connection::BUFFER_SIZE;
use super::super::connections::{MAX_REFUSALS, VsockConnections};
use super::super::packet::{HEADER_LEN, PORT_ANY, PacketOp, VsockHeader};
use super::rig::*;
use crate::virtio::testing::{DATA, END, reads, writes};

#[test]
fn packets_of_no_connection_are_refused() {
    let mut rig = VsockRig::new();
    let ops = [
        PacketOp::Response,
        PacketOp::Shutdown,
        PacketOp::Data,
        PacketOp::CreditUpdate,
        PacketOp::CreditRequest,
    ];
    for op in ops {
        rig.send(packet(op, 7), &[]);
        let (reset, _) = rig.one();
        assert_eq!(
            (reset.op, reset.source_port, reset.destination_port),
            (Some(PacketOp::Reset), 7, PORT)
        );
    }
    let plain = packet(PacketOp::Request, 52);
    let odd = [
        VsockHeader { kind: 2, ..plain },
        VsockHeader { op: None, ..plain },
        VsockHeader {
            destination_cid: 77,
            ..plain
        },
        VsockHeader {
            source_port: PORT_ANY,
            ..plain
        },
    ];
    for header in odd {
        rig.send(header, &[]);
        let (reset, _) = rig.one();
        assert_eq!((reset.op, reset.kind), (Some(PacketOp::Reset), header.kind));
        assert_eq!(reset.source_cid, header.destination_cid);
    }
    rig.send(packet(PacketOp::Reset, 7), &[]);
    // With a foreign CID as the sender: there is no such sender to answer.
    rig.send(
        VsockHeader {
            source_cid: 9,
            ..plain
        },
        &[],
    );
    assert_eq!(rig.ops(), []);
}

#[test]
fn what_a_connection_does_not_expect_ends_it() {
    let odd: [fn(u32) -> VsockHeader; 3] = [
        |port| packet(PacketOp::Request, port),
        |port| packet(PacketOp::Response, port),
        |port| VsockHeader {
            op: None,
            ..packet(PacketOp::Data, port)
        },
    ];
    for odd in odd {
        let mut rig = VsockRig::new();
        let (mut client, port) = rig.open();
        rig.send(odd(port), &[]);
        assert_eq!(rig.ops(), [PacketOp::Reset]);
        assert!(has_ended(&mut client));
    }
}

#[test]
fn packets_that_are_none_come_back() {
    let mut rig = VsockRig::new();
    rig.send_parts(&[reads(DATA, HEADER_LEN as u32 - 1)]);
    rig.send_parts(&[reads(END, HEADER_LEN as u32)]);
    rig.send_parts(&[writes(DATA, HEADER_LEN as u32)]);
    assert_eq!(rig.ops(), []);
    for len in [1, BUFFER_SIZE as u32 + 1, u32::MAX] {
        let (mut client, port) = rig.open();
        let header = VsockHeader {
            len,
            ..packet(PacketOp::Data, port)
        };
        rig.send_bytes(&header.encode());
        assert_eq!(rig.ops(), [PacketOp::Reset]);
        assert!(has_ended(&mut client));
    }
    assert_eq!(rig.driver.get(0x070), 15);
}

#[test]
fn buffers_that_cannot_take_a_packet_come_back_empty() {
    let mut rig = VsockRig::without_buffers();
    let mut client = rig.dial();
    rig.driver.run();
    rig.driver.select(TO_GUEST);
    let useless = [
        writes(DATA, HEADER_LEN as u32),
        reads(DATA, 100),
        writes(DATA, 0),
        writes(END - 10, 5000),
    ];
    for part in useless {
        rig.driver.add(&[part]);
        rig.driver.kick();
        let used = rig.driver.used();
        assert_eq!((used.len(), used[0].1), (1, 0), "{part:?}");
    }
    // The last one swallowed the request, so it is over.
    rig.driver.add(&[writes(DATA, 5000)]);
    rig.driver.kick();
    let header = rig.driver.bytes(DATA, HEADER_LEN).try_into().unwrap();
    assert_eq!(VsockHeader::decode(&header).op, Some(PacketOp::Reset));
    assert!(has_ended(&mut client));
    assert_eq!(rig.driver.get(0x070), 15);
}

#[test]
fn refusals_that_the_guest_does_not_take_hold_up_its_packets() {
    let mut rig = VsockRig::without_buffers();
    for _ in 0..MAX_REFUSALS {
        rig.send(packet(PacketOp::Data, 7), &[]);
    }
    let header = packet(PacketOp::Data, 8);
    rig.driver.fill(DATA, &header.encode());
    rig.driver
        .select(FROM_GUEST)
        .add(&[reads(DATA, HEADER_LEN as u32)]);
    rig.driver.kick();
    assert_eq!(rig.driver.used(), []);
    rig.post(1);
    assert_eq!(rig.driver.select(FROM_GUEST).used().len(), 1);
    assert_eq!(rig.received().len(), MAX_REFUSALS + 1);
}

#[test]
fn programs_that_talk_nonsense_are_cut_off() {
    let mut rig = VsockRig::new();
    for line in [
        "HELLO\n",
        "CONNECT\n",
        "CONNECT 1024 CONNECT 1024 CONNECT 1024 CONNECT 1024",
    ] {
        let mut client = rig.client();
        client.write_all(line.as_bytes()).unwrap();
        assert_eq!(rig.ops(), []);
        assert!(has_ended(&mut client), "{line:?}");
    }
    rig.open();
}

#[test]
fn answers_have_a_time_limit() {
    let rig = VsockRig::without_buffers();
    let mut connections = VsockConnections::new(rig.backend.clone(), GUEST_CID);
    let mut silent = rig.client();
    let mut dialled = rig.client();
    dialled.write_all(b"CONNECT 1024\n").unwrap();
    connections.process_host_events();
    connections.process_host_events();
    assert_eq!(
        connections.next(&mut [0; 100]).unwrap().op,
        Some(PacketOp::Request)
    );
    connections.end_all_overdue(Instant::now());
    assert!(!has_ended_now(&mut silent) && !has_ended_now(&mut dialled));
    connections.end_all_overdue(Instant::now() + Duration::from_secs(60));
    assert!(has_ended_now(&mut silent));
    assert_eq!(connections.metrics.unanswered.get(), 1);
    assert_eq!(connections.next(&mut [0; 100]).unwrap().op, Some(PacketOp::Reset));
    assert!(has_ended_now(&mut dialled));
}

fn has_ended_now(stream: &mut std::os::unix::net::UnixStream) -> bool {
    match std::io::Read::read(stream, &mut [0]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
    }
}
