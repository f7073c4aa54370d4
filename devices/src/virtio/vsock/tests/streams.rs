//! Connections from either side, data both ways, and how they end.

use std::io::Write;
use std::net::Shutdown;

use super::super::packet::{HOST_CID, NO_RECEIVE, NO_SEND, NOTHING_MORE, PacketOp, VsockHeader};
use super::rig::*;

/// A packet that says what the guest will not do any more.
fn shutdown(host_port: u32, flags: u32) -> VsockHeader {
    VsockHeader {
        flags,
        ..packet(PacketOp::Shutdown, host_port)
    }
}

#[test]
fn the_guest_finds_its_address() {
    let mut driver = VsockRig::new().driver;
    assert_eq!(
        (driver.get(0x008), driver.get(0x100), driver.get(0x104)),
        (19, GUEST_CID, 0)
    );
}

#[test]
fn a_program_connects_to_the_guest() {
    let mut rig = VsockRig::new();
    let mut client = rig.dial();
    let (request, _) = rig.one();
    assert_eq!(
        (request.op, request.destination_port),
        (Some(PacketOp::Request), PORT)
    );
    assert_eq!(
        (request.source_cid, request.destination_cid),
        (HOST_CID, GUEST_CID.into())
    );
    assert_eq!(
        read(&mut client),
        b"",
        "nothing is promised before the guest accepts"
    );
    let port = request.source_port;
    rig.send(packet(PacketOp::Response, port), &[]);
    assert_eq!(read(&mut client), format!("OK {port}\n").as_bytes());

    rig.send(packet(PacketOp::Data, port), b"from the guest");
    assert_eq!(read(&mut client), b"from the guest");
    client.write_all(b"from the host").unwrap();
    let (data, bytes) = rig.one();
    assert_eq!(
        (data.op, bytes.as_slice()),
        (Some(PacketOp::Data), &b"from the host"[..])
    );
    assert_eq!(data.forwarded, 14);
    assert!(rig.driver.interrupts() > 0);
}

#[test]
fn what_follows_the_line_is_the_guests() {
    let mut rig = VsockRig::new();
    let mut client = rig.client();
    client.write_all(b"CONNECT 1024\nearly").unwrap();
    let (request, _) = rig.one();
    rig.send(packet(PacketOp::Response, request.source_port), &[]);
    assert_eq!(rig.one().1, b"early");
}

#[test]
fn the_guest_connects_to_a_program() {
    let mut rig = VsockRig::new();
    let mut stream = rig.open_to_host(52);
    rig.send(packet(PacketOp::Data, 52), b"ping");
    assert_eq!(read(&mut stream), b"ping");
    stream.write_all(b"pong").unwrap();
    assert_eq!(rig.one().1, b"pong");
    // No program listens on the next port.
    rig.send(packet(PacketOp::Request, 53), &[]);
    let (reset, _) = rig.one();
    assert_eq!((reset.op, reset.source_port), (Some(PacketOp::Reset), 53));
    let counted = |name| rig.driver.count(name);
    assert_eq!((counted("connections"), counted("resets")), (1, 1));
    // Two requests and the data; an answer, the data, a refusal.
    assert_eq!((counted("tx_packets"), counted("tx_bytes")), (3, 4));
    assert_eq!((counted("rx_packets"), counted("rx_bytes")), (3, 4));
}

#[test]
fn a_guest_that_refuses() {
    let mut rig = VsockRig::new();
    let mut client = rig.dial();
    let (request, _) = rig.one();
    rig.send(packet(PacketOp::Reset, request.source_port), &[]);
    assert!(has_ended(&mut client));
    assert_eq!(rig.ops(), [], "a reset is not answered");
}

#[test]
fn a_program_may_stop_sending_and_go_on_receiving() {
    let mut rig = VsockRig::new();
    let (mut client, port) = rig.open();
    client.write_all(b"last words").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let received = rig.received();
    assert_eq!(received[0].1, b"last words");
    assert_eq!(
        (received[1].0.op, received[1].0.flags),
        (Some(PacketOp::Shutdown), NO_SEND)
    );
    assert_eq!(received.len(), 2);
    rig.send(packet(PacketOp::Data, port), b"answer");
    assert_eq!(read(&mut client), b"answer");
    rig.send(shutdown(port, NO_SEND), &[]);
    assert!(has_ended(&mut client));
    let (last, _) = rig.one();
    assert_eq!((last.op, last.flags), (Some(PacketOp::Shutdown), NOTHING_MORE));
}

#[test]
fn a_guest_may_stop_sending_and_go_on_receiving() {
    let mut rig = VsockRig::new();
    let (mut client, port) = rig.open();
    rig.send(shutdown(port, NO_SEND), &[]);
    assert!(has_ended(&mut client));
    client.write_all(b"still there?").unwrap();
    assert_eq!(rig.one().1, b"still there?");
    rig.send(packet(PacketOp::Data, port), b"not allowed");
    assert_eq!(rig.ops(), [PacketOp::Reset]);
}

#[test]
fn a_guest_that_closes_is_let_go_when_its_data_is_through() {
    let mut rig = VsockRig::new();
    let (mut client, port) = rig.open();
    let sent = pattern(32 << 10);
    rig.send(packet(PacketOp::Data, port), &sent);
    rig.send(shutdown(port, NOTHING_MORE), &[]);
    assert_eq!(rig.ops().last(), Some(&PacketOp::Reset));
    assert_eq!(read(&mut client), sent);
    assert!(has_ended(&mut client));
}

#[test]
fn a_program_that_closes() {
    let mut rig = VsockRig::new();
    let (client, port) = rig.open();
    drop(client);
    let received = rig.received();
    let (shutdown, _) = received.last().unwrap();
    assert_eq!(
        (shutdown.op, shutdown.flags),
        (Some(PacketOp::Shutdown), NOTHING_MORE)
    );
    rig.send(packet(PacketOp::Reset, port), &[]);
    assert_eq!(rig.ops(), []);
    // The ports are free: what comes now is of no connection.
    rig.send(packet(PacketOp::Data, port), b"late");
    assert_eq!(rig.ops(), [PacketOp::Reset]);
}

#[test]
fn a_guest_that_does_not_receive_any_more() {
    let mut rig = VsockRig::new();
    let (mut client, port) = rig.open();
    rig.send(shutdown(port, NO_RECEIVE), &[]);
    assert!(client.write_all(b"unwanted").is_err());
    rig.send(packet(PacketOp::Data, port), b"but it sends");
    assert_eq!(read(&mut client), b"but it sends");
}

#[test]
fn a_reset_of_the_device_ends_all_streams() {
    let mut rig = VsockRig::new();
    let (mut client, _) = rig.open();
    let mut waiting = rig.client();
    rig.driver.run();
    rig.driver.bring_up();
    assert!(has_ended(&mut client) && has_ended(&mut waiting));
    rig.post(4);
    rig.open();
}
