//! Control messages about ports and terminals.

use super::super::TerminalSize;
use super::rig::*;
use crate::bus::BusDevice;
use crate::virtio::testing::{Driver, VERSION_1};

const SIZE: TerminalSize = TerminalSize {
    columns: 132,
    rows: 43,
};

fn config(driver: &mut Driver) -> [u32; 3] {
    [0x100, 0x104, 0x108].map(|at| driver.get(at))
}

#[test]
fn ports_are_introduced_when_the_driver_asks() {
    let mut rig = ConsoleRig::new(&["a", "b.c"]);
    assert_eq!(config(&mut rig.driver), [0, 3, 0]);
    rig.post_messages(32);
    assert_eq!(rig.messages(), []);
    rig.send_message(0, DEVICE_READY, 1);
    let add = |port| (port, PORT_ADD, 0, vec![]);
    assert_eq!(rig.messages(), [add(0), add(1), add(2)]);
    rig.send_message(0, PORT_READY, 1);
    assert_eq!(
        rig.messages(),
        [(0, CONSOLE_PORT, 1, vec![]), (0, PORT_OPEN, 1, vec![])]
    );
    rig.send_message(2, PORT_READY, 1);
    assert_eq!(rig.messages(), [(2, PORT_NAME, 1, b"b.c".to_vec())]);
    // One that the guest could not make anything of is left alone.
    rig.send_message(1, PORT_READY, 0);
    let _client = rig.client("a");
    assert_eq!(rig.messages(), []);
}

#[test]
fn the_guest_is_told_when_programs_come_and_go() {
    let mut rig = ConsoleRig::open();
    let first = rig.client("b");
    assert_eq!(rig.messages(), [(2, PORT_OPEN, 1, vec![])]);
    let second = rig.client("b");
    assert_eq!(rig.messages(), [], "one at a time");
    drop(first);
    rig.post(2, 1);
    assert_eq!(
        rig.messages(),
        [(2, PORT_OPEN, 0, vec![]), (2, PORT_OPEN, 1, vec![])]
    );
    drop(second);
    assert_eq!(rig.messages(), [(2, PORT_OPEN, 0, vec![])]);
}

#[test]
fn messages_wait_for_buffers_and_do_not_pile_up() {
    let mut rig = ConsoleRig::new(&["a", "b"]);
    for _ in 0..100 {
        rig.send_message(0, DEVICE_READY, 1);
    }
    rig.post_messages(2);
    assert_eq!(rig.messages().len(), 2);
    assert_eq!(rig.messages().len(), 1);
    rig.send_message(1, PORT_READY, 1);
    assert_eq!(rig.messages(), [(1, PORT_NAME, 1, b"a".to_vec())]);
}

#[test]
fn the_terminals_size_comes_by_message_where_there_are_ports() {
    let mut rig = ConsoleRig::new(&["a"]);
    rig.terminal.resize(SIZE);
    rig.post_messages(32);
    rig.send_message(0, DEVICE_READY, 1);
    rig.messages();
    rig.send_message(0, PORT_READY, 1);
    assert_eq!(rig.messages()[2], (0, RESIZE, 0, vec![132, 0, 43, 0]));
    rig.terminal.resize(SIZE);
    assert_eq!(rig.messages(), [], "it knows");
    rig.terminal.resize(TerminalSize { rows: 1, ..SIZE });
    rig.terminal.resize(TerminalSize { rows: 44, ..SIZE });
    assert_eq!(rig.messages(), [(0, RESIZE, 0, vec![132, 0, 44, 0])]);
    assert_eq!(config(&mut rig.driver)[0], 44 << 16 | 132);
    // A driver that loses the port and finds it again is sent the size again.
    rig.send_message(0, PORT_READY, 1);
    assert_eq!(rig.messages().last().unwrap().1, RESIZE);
}

#[test]
fn the_terminals_size_is_configuration_where_there_are_none() {
    let mut rig = ConsoleRig::new(&[]);
    assert_eq!(rig.driver.queue_count(), 2);
    assert_eq!(rig.driver.offered() & 0b111, 0b101, "no ports");
    assert_eq!(config(&mut rig.driver), [0, 1, 0]);
    assert_eq!(rig.driver.interrupts(), 0);
    rig.terminal.resize(SIZE);
    rig.driver.run();
    assert_eq!((rig.driver.interrupts(), rig.driver.get(0x060)), (1, 2));
    assert_eq!(config(&mut rig.driver)[0], 43 << 16 | 132);
    rig.terminal.resize(SIZE);
    rig.driver.run();
    assert_eq!(rig.driver.interrupts(), 0, "it knows");
    // A driver that comes up later is interrupted too: Linux does not read the size by itself.
    rig.driver.bring_up();
    rig.driver.run();
    assert_eq!(rig.driver.interrupts(), 1);
}

#[test]
fn a_byte_can_be_printed_without_a_driver() {
    let mut rig = ConsoleRig::new(&["a"]);
    rig.driver.set(0x070, 0);
    rig.driver.set(0x108, u32::from(b'!'));
    rig.driver.transport.write(0x108, b"?");
    assert_eq!(rig.screen.take(), b"!?");
    rig.driver.set(0x100, 7);
    rig.driver.set(0x104, 7);
    assert_eq!(config(&mut rig.driver), [0, 2, 0]);
    assert_eq!(rig.screen.take(), b"");
}

#[test]
fn a_driver_that_knows_of_no_ports_has_a_console() {
    let mut rig = ConsoleRig::new(&["a"]);
    rig.driver.bring_up_with(VERSION_1 | 1);
    rig.terminal.enqueue(b"in");
    rig.post(0, 1);
    assert_eq!(rig.received(0), b"in");
    rig.send(0, b"out");
    assert_eq!((rig.taken(0), rig.screen.take()), (1, b"out".to_vec()));
    // No program is accepted whose data the guest could not get.
    let mut client = rig.client("a");
    rig.post(1, 1);
    flood(&mut client);
    assert_eq!(rig.received(1), b"");
}
