//! Flow control both ways, and that a slow connection holds up no other.

use std::io::{Read, Write};

use super::super::connection::BUFFER_SIZE;
use super::super::connections::MAX_CONNECTIONS;
use super::super::packet::{PacketOp, VsockHeader};
use super::rig::*;

#[test]
fn the_guest_gets_no_more_than_it_has_room_for() {
    let mut rig = VsockRig::new();
    let mut client = rig.dial();
    let (request, _) = rig.one();
    let port = request.source_port;
    let room = |op, forwarded| VsockHeader {
        buffer_size: 10,
        forwarded,
        ..packet(op, port)
    };
    rig.send(room(PacketOp::Response, 0), &[]);
    read(&mut client);
    client.write_all(b"0123456789abcdef").unwrap();
    let received = rig.received();
    assert_eq!(received[0].1, b"0123456789");
    assert_eq!(received[1].0.op, Some(PacketOp::CreditRequest));
    assert_eq!(received.len(), 2);
    // A guest that answers and has no room is not asked again.
    rig.send(room(PacketOp::CreditUpdate, 0), &[]);
    assert_eq!(rig.ops(), []);
    rig.send(room(PacketOp::CreditUpdate, 4), &[]);
    let received = rig.received();
    assert_eq!(received[0].1, b"abcd");
    rig.send(room(PacketOp::CreditUpdate, 14), &[]);
    assert_eq!(rig.one().1, b"ef");
}

#[test]
fn the_guest_is_told_of_room_and_may_ask() {
    let mut rig = VsockRig::new();
    let (mut client, port) = rig.open();
    rig.send(packet(PacketOp::CreditRequest, port), &[]);
    let (update, _) = rig.one();
    assert_eq!((update.op, update.forwarded), (Some(PacketOp::CreditUpdate), 0));
    assert_eq!(update.buffer_size as usize, BUFFER_SIZE);
    rig.send(packet(PacketOp::Data, port), &pattern(BUFFER_SIZE / 2));
    assert_eq!(read(&mut client).len(), BUFFER_SIZE / 2);
    let (update, _) = rig.one();
    assert_eq!(update.op, Some(PacketOp::CreditUpdate));
    assert_eq!(update.forwarded as usize, BUFFER_SIZE / 2);
}

/// Fills everything between the guest and a program that does not read; returns how much that is.
fn clog(rig: &mut VsockRig, port: u32) -> usize {
    let mut sent = 0u32;
    loop {
        rig.send(packet(PacketOp::CreditRequest, port), &[]);
        let (update, _) = rig.received().pop().unwrap();
        let room = BUFFER_SIZE - sent.wrapping_sub(update.forwarded) as usize;
        if room == 0 {
            return sent as usize;
        }
        rig.send(packet(PacketOp::Data, port), &pattern(room));
        sent += room as u32;
    }
}

#[test]
fn a_program_that_never_reads_holds_up_its_own_connection() {
    let mut rig = VsockRig::new();
    let (mut slow, port) = rig.open();
    let sent = clog(&mut rig, port);
    // Others are served.
    let mut other = rig.open_to_host(52);
    rig.send(packet(PacketOp::Data, 52), b"ping");
    assert_eq!(read(&mut other), b"ping");
    // All of it arrives once the program reads.
    let mut got = 0;
    let mut room = [0; 1000];
    while got < sent {
        got += slow.read(&mut room).unwrap();
        rig.driver.run();
    }
    assert!(rig.ops().contains(&PacketOp::CreditUpdate));
    rig.send(packet(PacketOp::Data, port), b"on we go");
    assert_eq!(read(&mut slow), b"on we go");
}

#[test]
fn a_guest_that_ignores_credit_is_cut_off() {
    let mut rig = VsockRig::new();
    let (mut client, port) = rig.open();
    clog(&mut rig, port);
    rig.send(packet(PacketOp::Data, port), b"!");
    assert_eq!(rig.ops(), [PacketOp::Reset]);
    while !has_ended(&mut client) {}
}

#[test]
fn a_long_stream_arrives_as_it_was_sent() {
    let mut rig = VsockRig::new();
    let (mut client, port) = rig.open();
    let sent = pattern(1 << 20);
    let (mut from_client, mut echoed, mut got) = (0, 0u32, Vec::new());
    while got.len() < sent.len() {
        if let Ok(count) = client.write(&sent[from_client..]) {
            from_client += count;
        }
        for (header, bytes) in rig.received() {
            if header.op == Some(PacketOp::Data) {
                echoed = echoed.wrapping_add(header.len);
                let answer = VsockHeader {
                    forwarded: echoed,
                    ..packet(PacketOp::Data, port)
                };
                rig.send(answer, &bytes);
                got.extend(read(&mut client));
            }
        }
    }
    assert!(got == sent, "the stream is damaged");
}

#[test]
fn there_is_an_end_to_connections() {
    let mut rig = VsockRig::new();
    let mut silent: Vec<_> = (0..MAX_CONNECTIONS)
        .map(|_| {
            let client = rig.client();
            rig.driver.run();
            client
        })
        .collect();
    let mut one_too_many = rig.client();
    rig.driver.run();
    assert!(has_ended(&mut one_too_many));
    rig.send(packet(PacketOp::Request, 52), &[]);
    assert_eq!(rig.ops(), [PacketOp::Reset]);
    // One that goes makes room for another.
    drop(silent.pop());
    rig.driver.run();
    rig.open();
}
