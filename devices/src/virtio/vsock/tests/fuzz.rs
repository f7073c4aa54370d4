//! Whatever packets a guest sends and whatever programs do: chains come back, and a sensible connection works after.

use std::io::Write;
use std::os::unix::net::UnixListener;

use proptest::prelude::*;

use super::super::connections::FIRST_PORT;
use super::super::packet::{HOST_CID, VsockHeader};
use super::rig::*;
use crate::cases::cases;

#[derive(Clone, Debug)]
enum VsockAct {
    /// The guest sends a packet.
    Send(VsockHeader, usize),
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

/// From plain numbers, as in `mmio/fuzz.rs`: unions cost more than what is to be tested.
fn header() -> impl Strategy<Value = VsockHeader> {
    let choices = any::<[u8; 8]>();
    (choices, any::<[u32; 5]>(), any::<[u16; 2]>(), any::<(u64, u64)>()).prop_map(
        |(choices, words, shorts, cids)| {
            let cids = match choices[0] % 13 {
                0..12 => (GUEST_CID.into(), HOST_CID),
                _ => cids,
            };
            let mut bytes = VsockHeader {
                source_cid: cids.0,
                destination_cid: cids.1,
                source_port: match choices[1] % 7 {
                    0..6 => PORT,
                    _ => words[0],
                },
                destination_port: match choices[2] % 7 {
                    0..4 => FIRST_PORT + words[1] % 4,
                    4..6 => 52,
                    _ => words[1],
                },
                len: 0,
                kind: match choices[3] % 13 {
                    0..12 => 1,
                    _ => shorts[0],
                },
                op: None,
                flags: word(choices[4], words[2]),
                buffer_size: word(choices[5], words[3]),
                forwarded: word(choices[6], words[4]),
            }
            .encode();
            let op = match choices[7] % 13 {
                0..12 => shorts[1] % 9,
                _ => shorts[1],
            };
            bytes[30..32].copy_from_slice(&op.to_le_bytes());
            VsockHeader::decode(&bytes)
        },
    )
}

fn word(choice: u8, value: u32) -> u32 {
    match choice % 6 {
        0..3 => 0,
        3..5 => value % 100_000,
        _ => value,
    }
}

fn act() -> impl Strategy<Value = VsockAct> {
    let line = prop::collection::vec(any::<u8>(), 0..40);
    let numbers = (0u8..18, any::<u8>(), any::<u32>());
    (numbers, header(), line).prop_map(|((kind, choice, number), header, line)| {
        let (who, number) = (usize::from(choice % 4), number as usize);
        match kind {
            0..8 => VsockAct::Send(header, if choice < 128 { 0 } else { number % 70_000 }),
            8..10 if choice % 5 < 4 => VsockAct::Connect(b"CONNECT 1024\n".to_vec()),
            8..10 => VsockAct::Connect(line),
            10..12 => VsockAct::Write(who, number % 100_000),
            12..14 => VsockAct::Read(who),
            14 => VsockAct::Close(who),
            _ => VsockAct::Receive,
        }
    })
}

proptest! {
    #![proptest_config(cases(1000))]

    #[test]
    fn any_packets_and_programs(acts in prop::collection::vec(act(), 0..40)) {
        let mut rig = VsockRig::new();
        let listener = UnixListener::bind(rig.path("v.sock_52")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut programs = Vec::new();
        for act in acts {
            match act {
                VsockAct::Send(header, len) => rig.send(header, &vec![0x5a; len]),
                VsockAct::Connect(line) => {
                    let mut client = rig.client();
                    client.write_all(&line).unwrap();
                    programs.push(client);
                }
                VsockAct::Write(who, len) => {
                    if let Some(program) = programs.get_mut(who) {
                        let _ = program.write(&vec![0xa5; len]);
                    }
                }
                VsockAct::Read(who) => {
                    if let Some(program) = programs.get_mut(who) {
                        let _ = std::io::Read::read(program, &mut [0; 50_000]);
                    }
                }
                VsockAct::Close(who) => {
                    if who < programs.len() {
                        programs.remove(who);
                    }
                }
                VsockAct::Receive => drop(rig.received()),
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
