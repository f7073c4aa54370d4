//! Whatever packets a guest sends and whatever programs do: chains come back, and a sensible connection works after.

use std::io::Write;
use std::os::unix::net::UnixListener;

use proptest::prelude::*;

use super::super::connections::FIRST_PORT;
use super::super::packet::{HOST_CID, Header};
use super::rig::*;
use crate::cases::cases;

#[derive(Clone, Debug)]
enum Act {
    /// The guest sends a packet.
    Send(Header, usize),
    /// A program connects and says this.
    Connect(Vec<u8>),
    /// A program writes so much.
    Write(usize, usize),
    /// A program reads what is there.
    Read(usize),
    /// A program closes.
    Close(usize),
    /// The guest takes what was sent to it.
    Receive,
}

fn header() -> impl Strategy<Value = Header> {
    let port = || prop_oneof![4 => FIRST_PORT..FIRST_PORT + 4, 2 => Just(52u32), 1 => any::<u32>()];
    let word = || prop_oneof![3 => Just(0u32), 2 => 0u32..100_000, 1 => any::<u32>()];
    let guest_port = prop_oneof![6 => Just(PORT), 1 => any::<u32>()];
    let op = prop_oneof![12 => 0u16..9, 1 => any::<u16>()];
    let kind = prop_oneof![12 => Just(1u16), 1 => any::<u16>()];
    let cids = prop_oneof![12 => Just((3u64, HOST_CID)), 1 => any::<(u64, u64)>()];
    let ports = (guest_port, port());
    (cids, ports, kind, op, word(), word(), word()).prop_map(
        |(cids, ports, kind, op, flags, size, forwarded)| {
            let mut bytes = Header {
                source_cid: cids.0,
                destination_cid: cids.1,
                source_port: ports.0,
                destination_port: ports.1,
                len: 0,
                kind,
                op: None,
                flags,
                buffer_size: size,
                forwarded,
            }
            .encode();
            bytes[30..32].copy_from_slice(&op.to_le_bytes());
            Header::decode(&bytes)
        },
    )
}

fn act() -> impl Strategy<Value = Act> {
    let line = prop_oneof![
        4 => Just(b"CONNECT 1024\n".to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..40)
    ];
    prop_oneof![
        8 => (header(), prop_oneof![Just(0usize), 0usize..70_000]).prop_map(|(header, len)| Act::Send(header, len)),
        2 => line.prop_map(Act::Connect),
        2 => (0usize..4, 0usize..100_000).prop_map(|(who, len)| Act::Write(who, len)),
        2 => (0usize..4).prop_map(Act::Read),
        1 => (0usize..4).prop_map(Act::Close),
        3 => Just(Act::Receive),
    ]
}

proptest! {
    #![proptest_config(cases(1000))]

    #[test]
    fn any_packets_and_programs(acts in prop::collection::vec(act(), 0..40)) {
        let mut rig = Rig::new();
        let listener = UnixListener::bind(rig.path("v.sock_52")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut programs = Vec::new();
        for act in acts {
            match act {
                Act::Send(header, len) => rig.send(header, &vec![0x5a; len]),
                Act::Connect(line) => {
                    let mut client = rig.client();
                    client.write_all(&line).unwrap();
                    programs.push(client);
                }
                Act::Write(who, len) => {
                    if let Some(program) = programs.get_mut(who) {
                        let _ = program.write(&vec![0xa5; len]);
                    }
                }
                Act::Read(who) => {
                    if let Some(program) = programs.get_mut(who) {
                        let _ = std::io::Read::read(program, &mut [0; 50_000]);
                    }
                }
                Act::Close(who) => {
                    if who < programs.len() {
                        programs.remove(who);
                    }
                }
                Act::Receive => drop(rig.received()),
            }
            rig.driver.run();
            if let Ok((program, _)) = listener.accept() {
                program.set_nonblocking(true).unwrap();
                programs.push(program);
            }
            prop_assert_eq!(rig.driver.get(0x070), 15);
        }
        drop(programs);
        rig.received();
        rig.driver.bring_up();
        rig.post(8);
        rig.open();
    }
}
