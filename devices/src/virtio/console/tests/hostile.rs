//! Messages, chains and queues that make no sense.

use super::rig::*;
use crate::virtio::testing::{END, reads, writes};

#[test]
fn messages_that_make_no_sense_change_nothing() {
    let mut rig = ConsoleRig::open();
    for (port, event, value) in [
        (3, PORT_READY, 1),
        (u32::MAX, PORT_OPEN, 1),
        (0, DEVICE_READY, 0),
        (1, PORT_OPEN, 2),
        (1, PORT_ADD, 0),
        (1, 2, 1),
        (1, PORT_NAME, 1),
        (1, RESIZE, 0),
        (1, u16::MAX, 1),
    ] {
        rig.send_message(port, event, value);
    }
    for len in 0..8 {
        rig.send_message_bytes(&[0; 8][..len]);
    }
    assert_eq!(rig.messages(), []);
    for part in [reads(END, 8), reads(u64::MAX - 3, 8), writes(SENT, 8)] {
        assert_eq!(rig.driver.select(CONTROL_FROM_GUEST).submit(&[part]), 0);
    }
    let _client = rig.client("a");
    assert_eq!(rig.messages(), [(1, PORT_OPEN, 1, vec![])]);
    // More than eight bytes: what follows is not for us.
    rig.send_message_bytes(&[1, 0, 0, 0, 6, 0, 0, 0, 9, 9]);
    assert_eq!(rig.driver.get(0x070), 15);
}

#[test]
fn buffers_that_hold_no_message_come_back_empty() {
    let mut rig = ConsoleRig::new(&["a"]);
    rig.send_message(0, DEVICE_READY, 1);
    rig.driver.select(CONTROL_TO_GUEST);
    for part in [
        writes(SENT, 7),
        writes(SENT, 0),
        reads(SENT, 8),
        writes(END - 4, 8),
    ] {
        rig.driver.add(&[part]);
    }
    rig.driver.kick();
    let written: Vec<_> = rig
        .driver
        .used()
        .into_iter()
        .map(|(_, written)| written)
        .collect();
    assert_eq!(written, [0; 4]);
    rig.post_messages(8);
    assert_eq!(rig.messages().len(), 2, "nothing was lost");
}

#[test]
fn data_chains_that_make_no_sense_come_back() {
    let mut rig = ConsoleRig::open();
    let mut client = rig.client("a");
    for port in [0, 1] {
        for parts in [
            &[reads(END, 8)][..],
            &[reads(u64::MAX - 3, 8)],
            &[writes(SENT, 8)],
            &[reads(SENT, 0)],
            &[writes(SENT, 8), reads(SENT, 8)],
        ] {
            rig.driver.select(to_guest(port) + 1).submit(parts);
        }
        // Four gigabytes, most of which there are not.
        rig.driver
            .select(to_guest(port) + 1)
            .submit(&[reads(END - 1000, u32::MAX)]);
    }
    assert_eq!((read(&mut client), rig.screen.take()), (vec![], vec![]));
    for parts in [
        &[writes(SENT, 0)][..],
        &[reads(SENT, 8)],
        &[writes(SENT, 8), reads(SENT, 8)],
    ] {
        assert_eq!(rig.driver.select(to_guest(1)).submit(parts), 0);
    }
    flood(&mut client);
    assert_eq!(rig.driver.select(to_guest(1)).submit(&[writes(END, 8)]), 0);
    rig.post(1, 1);
    assert_eq!(rig.received(1).len(), BUFFER as usize);
    assert_eq!(rig.driver.get(0x070), 15);
}

#[test]
fn a_guest_without_end_does_not_hold_others_up() {
    let mut rig = ConsoleRig::open();
    // All of memory, sixty-four times in one chain.
    let whole = vec![reads(0, END as u32); 60];
    rig.driver.select(1).add(&whole);
    rig.driver.set(0x050, 1);
    let mut turns = 0;
    while rig.driver.select(1).used().is_empty() {
        assert!(rig.driver.turn());
        assert!(rig.screen.take().len() <= 256 << 10);
        turns += 1;
    }
    assert!(turns >= 60 * (END as usize >> 18), "{turns} turns");
}
