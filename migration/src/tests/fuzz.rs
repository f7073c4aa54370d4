//! Conversations made up at random: whatever a source says, the destination is not harmed.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::Duration;

use migration_state::Envelope;
use proptest::prelude::*;
use proptest::sample::select;

use super::disk;
use super::fake::{FakeDestination, describe};
use super::guest::{HIGH, TestGuest};
use super::rig::control;
use crate::protocol::{
    CompressedTable, Features, FrameHeader, FrameKind, HEADER_LEN, Hello, MemoryTransfer, Message, PageTable,
    Span, Token,
};
use crate::space::disk_regions;
use crate::*;

const PAGES: u64 = 16;

/// Where a piece of the conversation goes, and what it is.
#[derive(Clone, Debug)]
struct FuzzPiece {
    on_stream: bool,
    bytes: Vec<u8>,
}

fn frame(kind: FrameKind, content: &[u8]) -> Vec<u8> {
    let header = FrameHeader::new(kind, content.len()).unwrap().encode();
    [&header[..], content].concat()
}

fn message(message: &Message) -> Vec<u8> {
    frame(FrameKind::Control, &postcard::to_stdvec(message).unwrap())
}

fn span() -> impl Strategy<Value = Span> {
    let gpa = prop_oneof![
        (0..PAGES + 2).prop_map(|page| page * PAGE_SIZE),
        (0..PAGES + 2).prop_map(|page| HIGH + page * PAGE_SIZE),
        // On the disk, and around its end.
        (690..710u64).prop_map(|page| disk_regions([disk::SIZE]).unwrap()[0].gpa + page * PAGE_SIZE),
        any::<u64>(),
    ];
    let len = prop_oneof![(0..4u64).prop_map(|pages| pages * PAGE_SIZE), any::<u64>()];
    (gpa, len).prop_map(|(gpa, len)| Span { gpa, len })
}

fn spans() -> impl Strategy<Value = Vec<Span>> {
    proptest::collection::vec(span(), 0..4)
}

/// Bytes that follow a table: mostly as many as it promises.
fn content(promised: u64, cut: bool) -> Vec<u8> {
    let len = promised.min(1 << 20) as usize;
    vec![0x5a; if cut { len / 2 } else { len }]
}

fn pages() -> impl Strategy<Value = Vec<u8>> {
    (spans(), spans(), any::<bool>()).prop_map(|(data, zero, cut)| {
        let promised = data.iter().fold(0u64, |sum, span| sum.saturating_add(span.len));
        let table = postcard::to_stdvec(&PageTable { data, zero }).unwrap();
        [frame(FrameKind::Pages, &table), content(promised, cut)].concat()
    })
}

fn compressed() -> impl Strategy<Value = Vec<u8>> {
    let method = select(vec![Compression::Lz4, Compression::Zstd]);
    (method, spans(), 0u32..4096, any::<bool>()).prop_map(|(method, pages, len, cut)| {
        let table = postcard::to_stdvec(&CompressedTable { method, pages, len }).unwrap();
        [frame(FrameKind::Compressed, &table), content(len.into(), cut)].concat()
    })
}

fn control_message() -> impl Strategy<Value = Vec<u8>> {
    let known = prop_oneof![
        (0u32..4).prop_map(Message::RoundEnd),
        spans().prop_map(Message::Populated),
        any::<u64>().prop_map(|ns| Message::Go {
            stopped_for_ns: ns,
            round_trip_ns: ns.rotate_left(7),
        }),
        any::<u32>().prop_map(|index| Message::Join {
            token: [1; 16],
            index
        }),
        select(vec![
            Message::Ping,
            Message::DigestRequest,
            Message::Farewell,
            Message::KeepAlive,
            Message::Accept { disks: vec![0] },
            Message::Hello(Hello::ours()),
        ]),
    ];
    known.prop_map(|known| message(&known))
}

fn state() -> impl Strategy<Value = Vec<u8>> {
    let whole = || {
        let mut envelope = Envelope::new();
        envelope
            .put("guest", &TestGuest::new(PAGES, PAGES).registers())
            .unwrap();
        envelope.encode()
    };
    let kind = select(vec![FrameKind::State, FrameKind::Rehearsal]);
    let bytes = proptest::collection::vec(any::<u8>(), 0..64);
    (kind, any::<bool>(), bytes).prop_map(move |(kind, good, bytes)| match (kind, good) {
        (FrameKind::State, true) => frame(kind, &whole()),
        (_, true) => frame(kind, &Envelope::new().encode()),
        (_, false) => frame(kind, &bytes),
    })
}

fn piece() -> impl Strategy<Value = FuzzPiece> {
    let raw = proptest::collection::vec(any::<u8>(), 0..HEADER_LEN * 4);
    let bytes = prop_oneof![3 => control_message(), 3 => pages(), 1 => compressed(), 1 => state(), 1 => raw];
    let flip = proptest::option::weighted(0.2, (any::<prop::sample::Index>(), 0u8..8));
    (any::<bool>(), bytes, flip).prop_map(|(on_stream, mut bytes, flip)| {
        if let Some((at, bit)) = flip.filter(|_| !bytes.is_empty()) {
            // In the table or the header; content is content, whatever it is.
            let at = at.index(bytes.len().min(32));
            bytes[at] ^= 1 << bit;
        }
        FuzzPiece { on_stream, bytes }
    })
}

/// Reads frames until a message that `find` makes something of.
fn receive<T>(from: &mut TcpStream, find: impl Fn(&Message) -> Option<T>) -> Option<T> {
    loop {
        let mut header = [0; HEADER_LEN];
        from.read_exact(&mut header).ok()?;
        let mut content = vec![0; FrameHeader::decode(header).ok()?.len as usize];
        from.read_exact(&mut content).ok()?;
        if let Some(found) = find(&postcard::from_bytes(&content).ok()?) {
            return Some(found);
        }
    }
}

/// Opens a migration as a good source would, says the pieces, and goes. Returns its token,
/// and the stream, which stays open.
fn converse(port: u16, pieces: &[FuzzPiece]) -> Option<(Token, TcpStream)> {
    let connect = || TcpStream::connect(("127.0.0.1", port)).unwrap();
    let mut control = connect();
    let opening = [Message::Hello(Hello::ours()), Message::Begin(Features::OURS)];
    let opening: Vec<u8> = opening.iter().flat_map(message).collect();
    control.write_all(&opening).ok()?;
    let token = receive(&mut control, |message| match message {
        Message::Session { token, .. } => Some(*token),
        _ => None,
    })?;
    let machine = MachineDescription {
        devices: vec![disk::device()],
        ..describe(&TestGuest::new(PAGES, PAGES).memory)
    };
    let transfer = MemoryTransfer::Streams(1);
    control
        .write_all(&message(&Message::Describe {
            machine,
            transfer,
            disks: OfferedDisks {
                come: true,
                marks: vec![disk::MARK],
            },
        }))
        .ok()?;
    receive(&mut control, |message| {
        matches!(message, Message::Accept { .. }).then_some(())
    })?;
    let mut stream = connect();
    let join = [Message::Hello(Hello::ours()), Message::Join { token, index: 0 }];
    stream
        .write_all(&join.iter().flat_map(message).collect::<Vec<u8>>())
        .ok()?;
    receive(&mut stream, |message| {
        matches!(message, Message::Joined).then_some(())
    })?;
    for piece in pieces {
        let to = if piece.on_stream {
            &mut stream
        } else {
            &mut control
        };
        // The destination may have had enough.
        if to.write_all(&piece.bytes).is_err() {
            break;
        }
    }
    let _ = control.shutdown(Shutdown::Both);
    Some((token, stream))
}

/// Asks what became of the machine, and closes the connection.
fn ask(port: u16, token: Token) {
    let mut connection = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let question = [Message::Hello(Hello::ours()), Message::Ask(token)];
    let question: Vec<u8> = question.iter().flat_map(message).collect();
    connection.write_all(&question).unwrap();
    receive(&mut connection, |message| {
        matches!(message, Message::AttemptOutcome(_)).then_some(())
    });
}

proptest! {
    #[test]
    fn any_conversation_ends_without_harm(pieces in proptest::collection::vec(piece(), 0..12)) {
        let patience = Duration::from_secs(5);
        let options = ReceiveOptions { io_timeout: patience, step_timeout: patience };
        let mut receiver = Receiver::listen(&"tcp:127.0.0.1:0".parse().unwrap(), options).unwrap();
        let Endpoint::Tcp(addresses) = receiver.endpoint() else { panic!("TCP only") };
        let port = addresses[0].port();
        let (there, mut destination) = (control(), FakeDestination::default());
        let received = thread::scope(|scope| {
            scope.spawn(|| {
                let (token, _stream) = converse(port, &pieces).expect("a destination that opens");
                // A machine that got ready is given up on a question, and on nothing else.
                ask(port, token);
            });
            receiver.receive(&mut destination, &there)
        });
        match received {
            Ok(_) => prop_assert!(destination.running),
            Err(error) => {
                prop_assert!(!destination.running && destination.guest.is_none(), "{error}");
                prop_assert!(!error.is_committed());
            }
        }
    }
}
