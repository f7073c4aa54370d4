//! Data both ways, and where data wait.

use std::io::Write;

use super::super::INPUT_LIMIT;
use super::rig::*;
use crate::virtio::testing::reads;

#[test]
fn the_console_takes_everything_at_once() {
    let mut rig = ConsoleRig::open();
    rig.send(0, b"hello ");
    rig.send(0, b"world");
    assert_eq!((rig.taken(0), rig.screen.take()), (2, b"hello world".to_vec()));
    // Long ones in several turns.
    let long: Vec<u8> = (0..600_000u32).map(|at| (at / 7) as u8).collect();
    rig.send(0, &long);
    assert_eq!(rig.taken(0), 1);
    assert!(rig.screen.take() == long, "other content");
}

#[test]
fn what_is_typed_waits_for_the_guest() {
    let mut rig = ConsoleRig::open();
    let typed: Vec<u8> = (0..2 * INPUT_LIMIT as u32).map(|at| (at / 3) as u8).collect();
    assert_eq!(rig.terminal.enqueue(&typed), INPUT_LIMIT);
    assert_eq!(rig.terminal.enqueue(b"x"), 0);
    rig.post(0, 3);
    let first = rig.received(0);
    assert_eq!(first, typed[..3 * BUFFER as usize]);
    assert_eq!(rig.terminal.enqueue(&typed), first.len(), "room again");
    // Not to a guest that has closed it.
    rig.send_message(0, PORT_OPEN, 0);
    rig.post(0, 1);
    assert_eq!(rig.received(0), b"");
    rig.send_message(0, PORT_OPEN, 1);
    assert_eq!(rig.received(0), typed[first.len()..][..BUFFER as usize]);
}

#[test]
fn ports_carry_data_both_ways_and_each_its_own() {
    let mut rig = ConsoleRig::open();
    let (mut a, mut b) = (rig.client("a"), rig.client("b"));
    for port in [1, 2] {
        rig.post(port, 4);
    }
    a.write_all(b"for a").unwrap();
    b.write_all(b"for b").unwrap();
    assert_eq!(
        (rig.received(1), rig.received(2)),
        (b"for a".into(), b"for b".into())
    );
    rig.send(1, b"from a");
    rig.send(2, b"from b");
    assert_eq!(
        (read(&mut a), read(&mut b)),
        (b"from a".to_vec(), b"from b".to_vec())
    );
    assert_eq!((rig.taken(1), rig.taken(2), rig.screen.take()), (1, 1, vec![]));
}

#[test]
fn what_the_guest_has_no_room_for_stays_in_the_socket() {
    let mut rig = ConsoleRig::open();
    let mut client = rig.client("a");
    let sent = flood(&mut client);
    rig.driver.run();
    assert!(client.write(&[1]).is_err(), "something keeps it");
    let mut got = Vec::new();
    while got.len() < sent.len() {
        rig.post(1, 40);
        let more = rig.received(1);
        assert!(!more.is_empty());
        got.extend(more);
    }
    assert!(got == sent, "other content");
}

#[test]
fn nothing_comes_before_the_guest_opens_the_port() {
    let mut rig = ConsoleRig::open();
    rig.send_message(1, PORT_OPEN, 0);
    let mut client = rig.client("a");
    client.write_all(b"early").unwrap();
    rig.post(1, 1);
    assert_eq!(rig.received(1), b"");
    rig.send_message(1, PORT_OPEN, 1);
    assert_eq!(rig.received(1), b"early");
    // A program that closes while the guest does not listen leaves nothing behind, and the next one is accepted.
    rig.send_message(1, PORT_OPEN, 0);
    client.write_all(b"late").unwrap();
    drop(client);
    rig.messages();
    let mut next = rig.client("a");
    rig.send_message(1, PORT_OPEN, 1);
    next.write_all(b"next").unwrap();
    rig.post(1, 1);
    assert_eq!(rig.received(1), b"next");
}

#[test]
fn what_no_program_reads_stays_in_the_guests_queue() {
    let mut rig = ConsoleRig::open();
    rig.send(1, b"before");
    assert_eq!(rig.taken(1), 0);
    let mut client = rig.client("a");
    assert_eq!((rig.taken(1), read(&mut client)), (1, b"before".to_vec()));
    // More than a socket takes, in chains of which one is cut somewhere.
    let long: Vec<u8> = (0..700_000u32).map(|at| (at / 5) as u8).collect();
    rig.driver.fill(SENT, &long);
    for part in 0..7 {
        let at = SENT + 100_000 * part;
        rig.driver.select(5).add(&[reads(at, 1), reads(at + 1, 99_999)]);
    }
    rig.driver.kick();
    let mut taken = rig.taken(1);
    assert!(taken < 7, "all of {} bytes", long.len());
    let mut got = Vec::new();
    while got.len() < long.len() {
        got.extend(read(&mut client));
        taken += rig.taken(1);
    }
    assert!(got == long, "other content");
    assert_eq!(taken, 7);
}

#[test]
fn the_rest_of_a_chain_goes_to_no_other_program() {
    let mut rig = ConsoleRig::open();
    let first = rig.client("a");
    let long = vec![b'x'; 700_000];
    rig.send(1, &long);
    rig.send(1, &long[..10]);
    assert_eq!(rig.taken(1), 0);
    drop(first);
    rig.post(1, 1);
    assert_eq!(rig.taken(1), 1, "the one that was begun");
    let mut second = rig.client("a");
    rig.messages();
    assert_eq!((rig.taken(1), read(&mut second).len()), (1, 10));
}

#[test]
fn what_a_program_sent_before_it_closed_arrives() {
    let mut rig = ConsoleRig::open();
    let mut client = rig.client("a");
    client.write_all(b"last words").unwrap();
    rig.messages();
    drop(client);
    rig.send(1, b"nobody there");
    assert_eq!(rig.messages(), [], "not before the data have arrived");
    rig.post(1, 2);
    assert_eq!(rig.received(1), b"last words");
    assert_eq!(rig.messages(), [(1, PORT_OPEN, 0, vec![])]);
    assert_eq!(rig.taken(1), 0, "for the next one");
    let mut next = rig.client("a");
    assert_eq!(read(&mut next), b"nobody there");
}

#[test]
fn programs_stay_connected_over_a_reset() {
    let mut rig = ConsoleRig::open();
    let mut client = rig.client("a");
    rig.driver.bring_up();
    rig.post_messages(8);
    rig.send_message(0, DEVICE_READY, 1);
    rig.send_message(1, PORT_READY, 1);
    rig.send_message(1, PORT_OPEN, 1);
    assert_eq!(rig.messages().last(), Some(&(1, PORT_OPEN, 1, vec![])));
    client.write_all(b"again").unwrap();
    rig.post(1, 1);
    assert_eq!(rig.received(1), b"again");
    // But not one that has half of something.
    rig.send(1, &vec![b'x'; 700_000]);
    rig.driver.bring_up();
    rig.driver.run();
    while !read(&mut client).is_empty() {}
    assert!(client.write_all(b"x").is_err());
}
