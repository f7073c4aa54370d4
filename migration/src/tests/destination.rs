//! What a destination makes of sources that behave, and of those that do not.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use super::destination_hand::*;
use super::fake::{FakeDestination, describe};
use super::guest::{HIGH, TestGuest};
use super::rig::control;
use crate::protocol::{
    AttemptOutcome, Features, FrameHeader, FrameKind, Hello, MemoryTransfer, Message, PageTable, Span,
};
use crate::*;

const TCP: &str = "tcp:127.0.0.1:0";

#[test]
fn a_machine_arrives_whole_over_any_number_of_streams() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("receiver");
    for at in [TCP.to_owned(), format!("unix:{}", path.display())] {
        for streams in [1, 4] {
            let mut receiver = receiver(&at);
            let (received, registers, destination) =
                meet(&mut receiver, |to, _| Hand::open(to, streams).move_over());
            let received = received.unwrap();
            assert!(received.confirmed && received.bytes_received > PAGES * PAGE_SIZE);
            let guest = destination.guest.unwrap();
            assert_eq!(guest.registers(), registers);
            guest.check_stamps();
        }
    }
    assert!(!path.exists(), "the socket's file goes with the receiver");
}

#[test]
fn compressed_pages_are_unpacked_in_place() {
    for method in [Compression::Lz4, Compression::Zstd] {
        let (received, registers, destination) = meet(&mut receiver(TCP), |to, _| {
            let mut hand = Hand::open(to, 1);
            hand.send_compressed(0, method, vec![span(0, 3), span(HIGH + 4 * PAGE_SIZE, PAGES - 4)]);
            hand.send_compressed(0, method, vec![span(3 * PAGE_SIZE, PAGES - 3), span(HIGH, 4)]);
            hand.end_round();
            let state = hand.state();
            hand.control.link.send_state(&state).unwrap();
            hand.receive_ready();
            hand.finish()
        });
        received.unwrap();
        let guest = destination.guest.unwrap();
        assert_eq!(guest.registers(), registers);
        guest.check_stamps();
    }
}

#[test]
fn memory_is_handed_over_as_files() {
    let dir = tempfile::tempdir().unwrap();
    let mut receiver = receiver(&format!("unix:{}", dir.path().join("s").display()));
    let (received, (), _) = meet(&mut receiver, |to, _| {
        let (guest, files) = TestGuest::shared(PAGES, PAGES);
        let mut hand = Hand::describe(to, guest, MemoryTransfer::Handover);
        hand.control
            .link
            .send_with_files(&Message::MemoryFiles, &[files[0].as_fd()])
            .unwrap();
        let reason = hand.control.refused();
        assert!(reason.contains("expected 2 files, got 1"), "{reason}");
    });
    assert!(
        matches!(received, Err(ReceiveError::Handover { .. })),
        "{received:?}"
    );

    let (received, (source, found), destination) = meet(&mut receiver, |to, _| {
        let (guest, files) = TestGuest::shared(PAGES, PAGES);
        let mut hand = Hand::describe(to, guest, MemoryTransfer::Handover);
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        hand.control
            .link
            .send_with_files(&Message::MemoryFiles, &files)
            .unwrap();
        assert_eq!(hand.control.receive(), ACCEPT);
        hand.control.link.send(&Message::DigestRequest).unwrap();
        let found = (
            hand.control.receive(),
            Message::Digest(migration_io::digest(&hand.guest.memory).unwrap()),
        );
        let state = hand.state();
        hand.control.link.send_state(&state).unwrap();
        hand.receive_ready();
        (hand.finish(), found)
    });
    received.unwrap();
    assert_eq!(found.0, found.1);
    let guest = destination.guest.unwrap();
    assert_eq!(guest.registers(), source);
    guest.check_stamps();
}

#[test]
fn files_are_not_expected_over_tcp() {
    let (received, (), _) = meet(&mut receiver(TCP), |to, _| {
        let hand = Hand::describe(to, TestGuest::new(PAGES, PAGES), MemoryTransfer::Handover);
        assert!(hand.control.refused().contains("expected a Unix socket"));
    });
    assert!(matches!(received, Err(ReceiveError::Handover { .. })));
}

#[test]
fn the_state_waits_for_the_last_round() {
    let (received, registers, destination) = meet(&mut receiver(TCP), |to, _| {
        let mut hand = Hand::open(to, 2);
        let state = hand.state();
        // The end and the state come first, then the pages.
        hand.control.link.send(&Message::RoundEnd(1)).unwrap();
        hand.control.link.send_state(&state).unwrap();
        hand.send(0, vec![span(0, PAGES)], vec![]);
        hand.send(1, vec![span(HIGH, PAGES)], vec![]);
        hand.end_streams();
        hand.receive_ack();
        hand.receive_ready();
        hand.finish()
    });
    received.unwrap();
    let guest = destination.guest.unwrap();
    assert_eq!(guest.registers(), registers);
    guest.check_stamps();
}

/// Sends bytes on a connection of their own. Returns what the destination sends until the end.
fn shout(to: &Endpoint, bytes: &[u8]) -> Vec<u8> {
    let Endpoint::Tcp(addresses) = to else {
        panic!("TCP only")
    };
    let mut stream = TcpStream::connect(&addresses[..]).unwrap();
    stream.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    // A reset is an end as well.
    let _ = stream.read_to_end(&mut answer);
    answer
}

fn frame(kind: FrameKind, content: &[u8]) -> Vec<u8> {
    [
        &FrameHeader::new(kind, content.len()).unwrap().encode()[..],
        content,
    ]
    .concat()
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

#[test]
fn refused_connections_do_not_disturb_a_source() {
    let mut receiver = receiver(TCP);
    let (received, _, destination) = meet(&mut receiver, |to, _| {
        // More silent connections than may wait at a time, some in the middle of a message.
        let silent: Vec<Peer> = (0..80).map(|_| Peer::dial(to)).collect();
        let mut hand = Hand::open(to, 2);
        let token = hand.token;
        let join = |token, index| Peer::wish(to, &Message::Join { token, index }).refused();
        assert!(join([7; 16], 0).contains("expected the token"), "wrong token");
        assert!(join(token, 2).contains("expected a stream number below 2, got 2"));
        assert!(join(token, 1).contains("expected each stream once, got number 1"));
        let second = Peer::wish(to, &Message::Begin(Features::OURS)).refused();
        assert!(
            second.contains("busy") && second.contains("a migration under way"),
            "{second}"
        );
        let odd = Peer::wish(to, &Message::Ping).refused();
        assert!(odd.contains("\"ping\", expected begin, join or ask"), "{odd}");
        // Not the source's language: it would understand no more than a hello.
        let old = shout(to, &frame(FrameKind::Control, b"\0GODWITMG\x01\x01\x031.0"));
        assert!(contains(&old, "GODWITMG") && contains(&old, "expected one of 6 to 6"));
        assert!(contains(
            &shout(to, b"GET / HTTP/1.1\r\n\r\n"),
            "expected a frame of kind"
        ));
        shout(to, &[1, 0, 0, 0, 255, 255, 255, 255]);
        hand.make_ready();
        let waiting = Peer::wish(to, &Message::Begin(Features::OURS)).refused();
        assert!(waiting.contains("waits for its source's decision"), "{waiting}");
        let registers = hand.finish();
        drop(silent);
        registers
    });
    received.unwrap();
    destination.guest.unwrap().check_stamps();
    let late = Peer::wish(receiver.endpoint(), &Message::Begin(Features::OURS)).refused();
    assert!(late.contains("a machine that has arrived"), "{late}");
}

#[test]
fn bytes_on_a_stream_count_as_life() {
    let options = ReceiveOptions {
        io_timeout: Duration::from_secs(1),
        ..ReceiveOptions::default()
    };
    let mut receiver = Receiver::listen(&TCP.parse().unwrap(), options).unwrap();
    let (received, _, _) = meet(&mut receiver, |to, _| {
        let mut hand = Hand::open(to, 1);
        // The round has ended here; what was sent is still under way, on a slow network.
        hand.control.link.send(&Message::RoundEnd(1)).unwrap();
        for page in 0..PAGES {
            hand.send(0, vec![span(page * PAGE_SIZE, 1)], vec![]);
            // The time itself is what is simulated.
            thread::sleep(Duration::from_millis(150));
        }
        hand.end_streams();
        hand.receive_ack();
        hand.send(0, vec![span(HIGH, PAGES)], vec![]);
        hand.end_round();
        let state = hand.state();
        hand.control.link.send_state(&state).unwrap();
        hand.receive_ready();
        hand.finish()
    });
    received.unwrap();
}

#[test]
fn a_greeting_has_a_time_limit() {
    let receiver = receiver(TCP);
    let to = receiver.endpoint();
    // Headers alone: their content is not waited for, let alone kept.
    for (header, refusal) in [
        ([3, 0, 0, 0, 0, 0, 0, 4], "said \"state\", expected hello"),
        ([1, 0, 0, 0, 0, 0, 16, 0], "at most 8192 bytes, got 1048576"),
    ] {
        let began = Instant::now();
        let answer = shout(to, &header);
        assert!(contains(&answer, refusal), "{}", String::from_utf8_lossy(&answer));
        assert!(began.elapsed() < Duration::from_secs(2));
    }
}

#[test]
fn connections_whose_greeting_has_come_do_not_crowd_out_others() {
    let receiver = receiver(TCP);
    let to = receiver.endpoint();
    let begin = || Peer::wish(to, &Message::Begin(Features::OURS));
    // They wait for a job, as many as may be silent at a time.
    let _begun: Vec<Peer> = (0..64).map(|_| begin()).collect();
    let mut slow = Peer::dial(to);
    let _next = begin();
    slow.link.send(&Message::Hello(Hello::ours())).unwrap();
    assert!(matches!(slow.receive(), Message::Hello(_)));
}

/// One attempt that has to fail. Returns both sides' words for it.
fn spoil(act: impl FnOnce(&mut Hand) + Send) -> (ReceiveError, String) {
    let mut receiver = receiver(TCP);
    let (received, reason, _) = meet(&mut receiver, |to, _| {
        let mut hand = Hand::open(to, 2);
        act(&mut hand);
        hand.control.refused()
    });
    assert_receives(&mut receiver);
    (received.unwrap_err(), reason)
}

#[test]
fn nonsense_on_a_stream_ends_the_attempt_with_its_own_reason() {
    let (error, reason) = spoil(|hand| {
        let wide = TestGuest::new(PAGES, PAGES + 1);
        let table = PageTable {
            data: vec![span(HIGH + PAGES * PAGE_SIZE, 1)],
            zero: vec![],
        };
        hand.streams[1].link.send_pages(&wide.memory, &table).unwrap();
    });
    assert!(matches!(error, ReceiveError::Pages(_)), "{error:?}");
    assert!(reason.contains("0x100010000+0x1000"), "{reason}");

    let (error, reason) = spoil(|hand| hand.send(0, vec![], vec![span(1 << 40, 1)]));
    assert!(matches!(error, ReceiveError::Pages(_)), "{error:?}");
    assert!(reason.contains("0x10000000000+0x1000"), "{reason}");

    let (error, reason) = spoil(|hand| hand.send(0, vec![], vec![span(0, 1 << 51)]));
    assert!(
        matches!(
            error,
            ReceiveError::Stream {
                index: 0,
                source: LinkError::Protocol { .. }
            }
        ),
        "{error:?}"
    );
    assert!(reason.contains("256 MiB of zero pages"), "{reason}");

    let (error, reason) = spoil(|hand| hand.streams[0].link.send(&Message::RoundEnd(2)).unwrap());
    assert!(
        matches!(error, ReceiveError::Round { expected: 1, got: 2 }),
        "{error:?}"
    );
    assert!(reason.contains("round 2"), "{reason}");

    let (error, _) = spoil(|hand| hand.streams[0].link.send(&Message::Ping).unwrap());
    assert!(
        matches!(
            error,
            ReceiveError::Stream {
                source: LinkError::Unexpected { got: "ping", .. },
                ..
            }
        ),
        "{error:?}"
    );

    // Truncated: the content stops in the middle, and so does the stream.
    let (error, reason) = spoil(|hand| {
        let table = postcard::to_stdvec(&(vec![(0u64, 4 * PAGE_SIZE)], Vec::<(u64, u64)>::new())).unwrap();
        hand.streams[0].send_bytes(&[&frame(FrameKind::Pages, &table)[..], &[1; 5000]].concat());
        hand.streams[0].hang_up();
    });
    assert!(
        matches!(
            error,
            ReceiveError::Stream {
                index: 0,
                source: LinkError::Closed { .. }
            }
        ),
        "{error:?}"
    );
    assert!(
        reason.contains("data stream 0") && reason.contains("the content of pages"),
        "{reason}"
    );
}

#[test]
fn nonsense_on_the_control_connection_ends_the_attempt() {
    let populated =
        |spans: Vec<Span>| spoil(move |hand| hand.control.link.send(&Message::Populated(spans)).unwrap());
    for hostile in [
        vec![],
        vec![span(0, 0)],
        vec![span(1, 1)],
        vec![span(PAGE_SIZE, 1), span(0, 2)],
        vec![span(0, 2), span(PAGE_SIZE, 1)],
    ] {
        let (error, reason) = populated(hostile);
        assert!(matches!(error, ReceiveError::Populated { .. }), "{error:?}");
        assert!(reason.contains("each page once"), "{reason}");
    }
    for outside in [
        span(0, 1 << 51),
        span(PAGES * PAGE_SIZE, 1),
        span(u64::MAX - 4095, 1),
    ] {
        let (error, _) = populated(vec![outside]);
        assert!(matches!(error, ReceiveError::Pages(_)), "{error:?}");
    }
    let (error, _) = spoil(|hand| hand.go());
    assert!(
        matches!(error, ReceiveError::Link(LinkError::Unexpected { got: "go", .. })),
        "{error:?}"
    );
    let (error, _) = spoil(|hand| hand.control.link.send(&Message::RoundEnd(7)).unwrap());
    assert!(
        matches!(error, ReceiveError::Round { expected: 1, got: 7 }),
        "{error:?}"
    );
    let (error, _) = spoil(|hand| hand.control.link.send_state(&[9; 100]).unwrap());
    assert!(
        matches!(error, ReceiveError::Machine { call: "restore", .. }),
        "{error:?}"
    );
    let (error, _) = spoil(|hand| hand.control.link.send_rehearsal(&[9; 100]).unwrap());
    assert!(
        matches!(error, ReceiveError::Machine { call: "rehearse", .. }),
        "{error:?}"
    );
}

#[test]
fn a_description_that_promises_too_much_builds_nothing() {
    let mut receiver = receiver(TCP);
    let mut describe_as = |change: fn(&mut MachineDescription, &mut MemoryTransfer)| {
        let (received, reason, destination) = meet(&mut receiver, |to, _| {
            let mut peer = Peer::wish(to, &Message::Begin(Features::OURS));
            assert!(matches!(peer.receive(), Message::Session { .. }));
            let (mut machine, mut transfer) =
                (describe(&TestGuest::new(1, 1).memory), MemoryTransfer::Streams(1));
            change(&mut machine, &mut transfer);
            let describe = Message::Describe {
                machine,
                transfer,
                disks: OfferedDisks::default(),
            };
            peer.link.send(&describe).unwrap();
            peer.refused()
        });
        assert_eq!(destination.discarded, 0, "nothing was built");
        (received.unwrap_err(), reason)
    };
    let (error, _) = describe_as(|machine, _| machine.memory[1].len = u64::MAX - 4095);
    assert!(matches!(error, ReceiveError::MemoryMap(_)), "{error:?}");
    for got in [0, MAX_STREAMS + 1, u32::MAX] {
        let (error, reason) = match got {
            0 => describe_as(|_, transfer| *transfer = MemoryTransfer::Streams(0)),
            u32::MAX => describe_as(|_, transfer| *transfer = MemoryTransfer::Streams(u32::MAX)),
            _ => describe_as(|_, transfer| *transfer = MemoryTransfer::Streams(MAX_STREAMS + 1)),
        };
        assert!(matches!(error, ReceiveError::StreamCount { .. }), "{error:?}");
        assert!(
            reason.contains(&format!("{got} data streams, expected 1 to 32")),
            "{reason}"
        );
    }
    assert_receives(&mut receiver);
}

#[test]
fn a_receiver_that_is_dropped_ends_all_waits() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let receiver = receiver(&format!("unix:{}", path.display()));
    let mut waiting = Peer::dial(receiver.endpoint());
    waiting.link.send(&Message::Hello(Hello::ours())).unwrap();
    assert!(matches!(waiting.receive(), Message::Hello(_)));
    assert_eq!(ask(receiver.endpoint(), [1; 16]), AttemptOutcome::Unknown);
    drop(receiver);
    assert!(waiting.link.receive_message("the end").is_err());
    assert!(fs::metadata(&path).is_err());
}

#[test]
fn a_cancelled_receiver_reports_it_and_accepts_no_more() {
    let mut receiver = receiver(TCP);
    let there = control();
    there.cancel();
    let mut destination = FakeDestination::default();
    let error = receiver.receive(&mut destination, &there).unwrap_err();
    assert!(matches!(
        error,
        ReceiveError::Transport(TransportError::Cancelled)
    ));
    let (received, reason, _) = meet(&mut receiver, |to, there| {
        let hand = Hand::open(to, 1);
        there.cancel();
        hand.control.refused()
    });
    assert!(matches!(received, Err(ReceiveError::Link(LinkError::Cancelled))));
    assert!(reason.contains("cancelled"), "{reason}");
}
