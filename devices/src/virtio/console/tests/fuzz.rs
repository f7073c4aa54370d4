//! Whatever guest and programs do, in whatever order: no panic, no hang, and a new start always helps.

use std::io::Write;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::super::TerminalSize;
use super::moves::moved;
use super::rig::*;
use crate::cases::cases;
use crate::virtio::testing::{DATA, reads};

#[derive(Clone, Debug)]
enum ConsoleAct {
    Say(u32, u16, u16),
    PostMessages(usize),
    Post(usize, u64),
    Send(usize, u32),
    Connect(&'static str),
    Leave(usize),
    Write(usize, usize),
    Type(usize),
    Resize(u16),
    BringUp,
    Move,
}

fn act() -> impl Strategy<Value = ConsoleAct> {
    let value = || prop_oneof![4 => Just(1u16), 2 => Just(0), 1 => any::<u16>()];
    prop_oneof![
        6 => (0u32..4, 0u16..9, value()).prop_map(|(port, event, value)| ConsoleAct::Say(port, event, value)),
        1 => any::<u32>().prop_map(|port| ConsoleAct::Say(port, PORT_OPEN, 1)),
        2 => (1usize..70).prop_map(ConsoleAct::PostMessages),
        3 => (0usize..3, 1u64..70).prop_map(|(port, count)| ConsoleAct::Post(port, count)),
        3 => (0usize..3, 0u32..400_000).prop_map(|(port, len)| ConsoleAct::Send(port, len)),
        3 => prop_oneof![Just("a"), Just("b")].prop_map(ConsoleAct::Connect),
        2 => (0usize..4).prop_map(ConsoleAct::Leave),
        2 => (0usize..4, 1usize..70_000).prop_map(|(client, len)| ConsoleAct::Write(client, len)),
        1 => (1usize..70_000).prop_map(ConsoleAct::Type),
        1 => any::<u16>().prop_map(ConsoleAct::Resize),
        1 => Just(ConsoleAct::BringUp),
        1 => Just(ConsoleAct::Move),
    ]
}

fn perform(rig: &mut ConsoleRig, clients: &mut Vec<UnixStream>, act: ConsoleAct) {
    match act {
        ConsoleAct::Say(port, event, value) => {
            let message = [
                &port.to_le_bytes()[..],
                &event.to_le_bytes(),
                &value.to_le_bytes(),
            ]
            .concat();
            rig.driver.fill(DATA, &message);
            rig.driver.select(CONTROL_FROM_GUEST).add(&[reads(DATA, 8)]);
            rig.driver.kick();
        }
        ConsoleAct::PostMessages(count) => rig.post_messages(count),
        ConsoleAct::Post(port, count) => rig.post(port, count),
        ConsoleAct::Send(port, len) => {
            rig.driver.select(to_guest(port) + 1).add(&[reads(SENT, len)]);
            rig.driver.kick();
        }
        ConsoleAct::Connect(name) => {
            let client = UnixStream::connect(rig.path(name)).unwrap();
            client.set_nonblocking(true).unwrap();
            clients.push(client);
        }
        ConsoleAct::Leave(client) if client < clients.len() => drop(clients.remove(client)),
        ConsoleAct::Write(client, len) if client < clients.len() => {
            // A program whose data the guest does not take, or that was disconnected, takes none.
            let _ = clients[client].write(&vec![7; len]);
        }
        ConsoleAct::Leave(_) | ConsoleAct::Write(..) => {}
        ConsoleAct::Type(len) => drop(rig.terminal.enqueue(&vec![7; len])),
        ConsoleAct::Resize(columns) => rig.terminal.resize(TerminalSize { columns, rows: 24 }),
        ConsoleAct::BringUp => rig.driver.bring_up(),
        ConsoleAct::Move => {
            let saved = rig.driver.save();
            *rig = moved(rig, saved);
        }
    }
    rig.driver.run();
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn any_order_of_events(acts in prop::collection::vec(act(), 0..60)) {
        let (mut rig, mut clients) = (ConsoleRig::open(), Vec::new());
        acts.into_iter().for_each(|act| perform(&mut rig, &mut clients, act));
        drop(clients);
        rig.driver.bring_up();
        rig.start();
        let mut client = rig.client("a");
        rig.post(1, 1);
        prop_assert_eq!(rig.received(1), b"");
        rig.messages();
        client.write_all(b"after all").unwrap();
        prop_assert_eq!(rig.received(1), b"after all");
        rig.send(1, b"answer");
        prop_assert_eq!(read(&mut client), b"answer");
    }
}
