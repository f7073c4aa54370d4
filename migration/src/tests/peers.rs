//! Peers that vanish, are silent, or talk nonsense.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::fake::{FakeDestination, FakeSource, Fault, describe};
use super::guest::{Guest, Load};
use super::rig::{assert_moved, assert_stayed, attempt, control, hasty, listener, options};
use crate::link::Link;
use crate::protocol::{Header, Hello, Kind, Message};
use crate::*;

fn busy() -> FakeSource {
    let mut guest = Guest::new(64, 16);
    guest.start(Load { pages: 80 });
    FakeSource::new(guest)
}

fn frame(message: &Message) -> Vec<u8> {
    let content = postcard::to_stdvec(message).unwrap();
    [
        &Header::new(Kind::Control, content.len()).unwrap().encode()[..],
        &content,
    ]
    .concat()
}

/// Which way a proxy counts.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    ToDestination,
    ToSource,
}

/// Forwards one connection, and cuts it after so many bytes one way.
struct Proxy {
    endpoint: Endpoint,
    /// Bytes that went to the destination and to the source.
    passed: [Arc<AtomicU64>; 2],
    running: thread::JoinHandle<()>,
    /// The stream to the source, once there is one.
    source: Arc<OnceLock<TcpStream>>,
}

fn proxy(to: &Endpoint, way: Way, limit: u64) -> Proxy {
    let Endpoint::Tcp { host, port } = to.clone() else {
        panic!("TCP only")
    };
    let front = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = Endpoint::Tcp {
        host: host.clone(),
        port: front.local_addr().unwrap().port(),
    };
    let passed: [Arc<AtomicU64>; 2] = Default::default();
    let source = Arc::new(OnceLock::new());
    let (counts, to_source) = (passed.clone(), source.clone());
    let running = thread::spawn(move || {
        let (a, _) = front.accept().unwrap();
        to_source.set(a.try_clone().unwrap()).unwrap();
        let b = TcpStream::connect((host, port)).unwrap();
        let [there, back] =
            [Way::ToDestination, Way::ToSource].map(|this| if this == way { limit } else { u64::MAX });
        thread::scope(|scope| {
            scope.spawn(|| pump(&a, &b, there, &counts[0]));
            scope.spawn(|| pump(&b, &a, back, &counts[1]));
        });
    });
    Proxy {
        endpoint,
        passed,
        running,
        source,
    }
}

fn pump(mut from: &TcpStream, mut to: &TcpStream, limit: u64, passed: &AtomicU64) {
    let mut buffer = [0; 4096];
    let mut left = limit;
    while left > 0 {
        let want = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let Ok(got @ 1..) = from.read(&mut buffer[..want]) else {
            break;
        };
        if to.write_all(&buffer[..got]).is_err() {
            break;
        }
        left -= got as u64;
        passed.fetch_add(got as u64, Ordering::SeqCst);
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

/// One attempt through a proxy that cuts. Asserts that the guest is in one place at most, and in one place for
/// sure unless the report says that it is in doubt.
fn cut(way: Way, limit: u64) -> (Outcome, [u64; 2]) {
    let mut source = busy();
    let mut destination = FakeDestination::default();
    let listener = listener();
    let through = proxy(listener.endpoint(), way, limit);
    let (report, received) = attempt(
        &mut source,
        &through.endpoint,
        &mut destination,
        &listener,
        &options(),
    );
    through.running.join().unwrap();
    let what = format!("{way:?} {limit}: {report:?} {received:?}");
    match report.outcome {
        Outcome::Moved => {
            received.unwrap();
            assert_moved(&source, &destination, &report);
        }
        Outcome::InDoubt => {
            assert!(source.guest.is_held() && !source.locked, "{what}");
            assert_eq!(destination.running, received.is_ok(), "{what}");
        }
        outcome => {
            assert!(
                received.is_err() && !destination.running && destination.guest.is_none(),
                "{what}"
            );
            assert_stayed(&mut source, &report, outcome);
        }
    }
    (
        report.outcome,
        through.passed.map(|count| count.load(Ordering::SeqCst)),
    )
}

#[test]
fn a_connection_may_be_cut_after_any_byte() {
    let (outcome, [_, back]) = cut(Way::ToSource, u64::MAX);
    assert_eq!(outcome, Outcome::Moved);
    // Each byte of what the destination says.
    let outcomes: Vec<Outcome> = (0..=back + 8)
        .step_by(3)
        .map(|limit| cut(Way::ToSource, limit).0)
        .collect();
    for expected in [Outcome::Failed, Outcome::InDoubt, Outcome::Moved] {
        assert!(outcomes.contains(&expected), "{expected:?} in {outcomes:?}");
    }
    // The handshake's bytes, then points all over the pages and the end.
    let starts = (0..200).step_by(17);
    let pages = (1..40).map(|step| step * step * 300);
    for limit in starts.chain(pages) {
        cut(Way::ToDestination, limit);
    }
}

#[test]
fn a_peer_that_is_gone_before_a_byte_of_go_leaves_the_guest_running() {
    let mut source = busy();
    let mut destination = FakeDestination::default();
    let listener = listener();
    let through = proxy(listener.endpoint(), Way::ToSource, u64::MAX);
    let stream = through.source.clone();
    source.on_release = Some(Box::new(move || {
        stream.get().unwrap().shutdown(Shutdown::Both).unwrap()
    }));
    let (report, received) = attempt(
        &mut source,
        &through.endpoint,
        &mut destination,
        &listener,
        &options(),
    );
    through.running.join().unwrap();
    assert!(source.calls.contains(&"release"));
    assert!(
        matches!(
            received,
            Err(ReceiveError::Link(LinkError::Closed { what: "go" }))
        ),
        "{received:?}"
    );
    assert_stayed(&mut source, &report, Outcome::Failed);
}

#[test]
fn after_ready_only_the_source_decides() {
    let mut source = busy();
    let (here, there) = (control(), Arc::new(control()));
    let cancel = there.clone();
    let mut destination = FakeDestination::default();
    source.on_release = Some(Box::new(move || cancel.cancel()));
    let listener = listener();
    let report = thread::scope(|scope| {
        scope.spawn(|| {
            let connection = listener.accept(&there).unwrap();
            receive(&mut destination, &connection, &ReceiveOptions::default(), &there).unwrap();
        });
        migrate(&mut source, listener.endpoint(), &options(), &here)
    });
    assert_moved(&source, &destination, &report);
}

#[test]
fn a_cancel_after_go_comes_too_late() {
    let mut source = busy();
    let (here, there) = (Arc::new(control()), control());
    let mut destination = FakeDestination::default();
    destination
        .faults
        .insert("resume", Fault::Slow(Duration::from_millis(200)));
    let listener = listener();
    let report = thread::scope(|scope| {
        scope.spawn(|| {
            let connection = listener.accept(&there).unwrap();
            receive(&mut destination, &connection, &ReceiveOptions::default(), &there).unwrap();
        });
        scope.spawn(|| {
            while there.progress().phase != Phase::Commit {
                thread::yield_now();
            }
            here.cancel();
        });
        migrate(&mut source, listener.endpoint(), &options(), &here)
    });
    assert_moved(&source, &destination, &report);
}

#[test]
fn nobody_at_the_destination_is_a_failure() {
    let to = listener().endpoint().clone();
    let mut source = busy();
    let report = migrate(&mut source, &to, &options(), &control());
    assert!(
        report.error.as_ref().unwrap().contains(&to.to_string()),
        "{report:?}"
    );
    assert_stayed(&mut source, &report, Outcome::Failed);
}

/// A source that meets a destination made by hand. Returns the error that it reports.
fn meet(options: &MigrateOptions, answer: impl FnOnce(TcpStream) + Send) -> String {
    let mut source = busy();
    let fake = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = Endpoint::Tcp {
        host: "127.0.0.1".into(),
        port: fake.local_addr().unwrap().port(),
    };
    let report = thread::scope(|scope| {
        scope.spawn(|| answer(fake.accept().unwrap().0));
        migrate(&mut source, &to, options, &control())
    });
    assert_stayed(&mut source, &report, Outcome::Failed);
    report.error.unwrap()
}

/// Reads whatever comes until the source hangs up.
fn listen(mut stream: TcpStream) {
    let mut rest = [0; 4096];
    while matches!(stream.read(&mut rest), Ok(1..)) {}
}

fn say(stream: TcpStream, messages: &[Message]) {
    say_bytes(stream, &messages.iter().flat_map(frame).collect::<Vec<u8>>());
}

fn say_bytes(mut stream: TcpStream, bytes: &[u8]) {
    stream.write_all(bytes).unwrap();
    listen(stream);
}

fn greeting() -> Vec<Message> {
    let mut messages = vec![Message::Hello(Hello::ours())];
    messages.extend(std::iter::repeat_n(Message::Pong, 4));
    messages
}

#[test]
fn a_silent_destination_is_left() {
    let began = Instant::now();
    let error = meet(&hasty(), listen);
    assert!(
        error.contains("timed out after 1000 ms waiting for hello"),
        "{error}"
    );
    let error = meet(&hasty(), |stream| say(stream, &greeting()));
    assert!(error.contains("waiting for accept or refuse"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_destination_that_does_not_read_is_left() {
    let mut guest = Guest::new(8192, 4096);
    for page in 0..8192 {
        guest.write(page * PAGE_SIZE, false);
    }
    guest.start(Load { pages: 8192 });
    let mut source = FakeSource::new(guest);
    let fake = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = Endpoint::Tcp {
        host: "127.0.0.1".into(),
        port: fake.local_addr().unwrap().port(),
    };
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let report = thread::scope(|scope| {
        scope.spawn(move || {
            let mut stream = fake.accept().unwrap().0;
            let accept = [greeting(), vec![Message::Accept]].concat();
            stream
                .write_all(&accept.iter().flat_map(frame).collect::<Vec<u8>>())
                .unwrap();
            // Holds the connection, unread, until the source has given up.
            let _ = wait.recv();
        });
        let report = migrate(&mut source, &to, &hasty(), &control());
        drop(done);
        report
    });
    assert!(
        report.error.as_ref().unwrap().contains("waiting for pages"),
        "{report:?}"
    );
    assert_stayed(&mut source, &report, Outcome::Failed);
}

#[test]
fn a_destination_that_talks_nonsense_is_left() {
    let error = meet(&options(), |stream| {
        say_bytes(stream, b"HTTP/1.1 400 Bad Request\r\n\r\n")
    });
    assert!(error.contains("does not speak the protocol"), "{error}");
    let error = meet(&options(), |stream| say(stream, &[Message::Accept]));
    assert!(error.contains("said \"accept\", expected hello"), "{error}");
    let early = [greeting(), vec![Message::Accept, Message::RoundAck(7)]].concat();
    let error = meet(&options(), |stream| say(stream, &early));
    assert!(error.contains("said \"round ack\""), "{error}");
    let ready = [
        greeting(),
        vec![Message::Accept, Message::Ready { restore_ns: u64::MAX }],
    ]
    .concat();
    let error = meet(&options(), |stream| say(stream, &ready));
    assert!(error.contains("said \"ready\""), "{error}");
    let newer = postcard::to_stdvec(&(0u8, *b"GODWITMG", 2u16, 3u16, "9.9")).unwrap();
    let header = Header::new(Kind::Control, newer.len()).unwrap().encode();
    let error = meet(&options(), |stream| {
        say_bytes(stream, &[&header[..], &newer].concat())
    });
    assert!(
        error.contains("versions 2 to 3 (godwit 9.9), expected one of 1 to 1"),
        "{error}"
    );
}

#[test]
fn a_destination_that_trickles_is_left() {
    let error = meet(&hasty(), |mut stream| {
        stream.set_read_timeout(Some(Duration::from_millis(40))).unwrap();
        // One byte now and then of what would be a long frame.
        stream.write_all(&[1, 0, 0, 0, 0, 0, 1, 0]).unwrap();
        let mut rest = [0; 64];
        while !matches!(stream.read(&mut rest), Ok(0)) && stream.write_all(&[0]).is_ok() {}
    });
    assert!(
        error.contains("timed out after 1000 ms waiting for hello"),
        "{error}"
    );
}

#[test]
fn a_destination_that_only_keeps_itself_alive_is_left() {
    let error = meet(&hasty(), |mut stream| {
        let alive = frame(&Message::KeepAlive);
        while stream.write_all(&alive).is_ok() {}
    });
    assert!(error.contains("waiting for hello"), "{error}");
}

/// Lets `bytes` loose on a destination. Returns how it ended.
fn attack(bytes: &[u8], close: bool) -> ReceiveError {
    let listener = listener();
    let Endpoint::Tcp { port, .. } = *listener.endpoint() else {
        panic!("TCP only")
    };
    let mut destination = FakeDestination::default();
    let there = control();
    let hasty = ReceiveOptions {
        io_timeout: Duration::from_secs(2),
        step_timeout: Duration::from_secs(4),
    };
    let received = thread::scope(|scope| {
        scope.spawn(|| {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
            // The destination may have had enough before the end.
            let _ = stream.write_all(bytes);
            if close {
                let _ = stream.shutdown(Shutdown::Write);
            }
            listen(stream);
        });
        let connection = listener.accept(&there).unwrap();
        receive(&mut destination, &connection, &hasty, &there)
    });
    assert!(destination.guest.is_none() && !destination.running);
    received.unwrap_err()
}

#[test]
fn a_source_that_talks_nonsense_is_left() {
    let hello = Message::Hello(Hello::ours());
    let machine = describe(&Guest::new(16, 16).memory);
    let opening = [hello.clone(), Message::Describe(machine.clone())];
    let after = |rest: &[u8]| [opening.iter().flat_map(frame).collect::<Vec<u8>>(), rest.to_vec()].concat();
    let pages = |gpa: u64, len: u64| {
        let table = postcard::to_stdvec(&(vec![(gpa, len)], Vec::<(u64, u64)>::new())).unwrap();
        [
            &Header::new(Kind::Pages, table.len()).unwrap().encode()[..],
            &table,
        ]
        .concat()
    };
    let zero = |gpa: u64, len: u64| {
        let table = postcard::to_stdvec(&(Vec::<(u64, u64)>::new(), vec![(gpa, len)])).unwrap();
        [
            &Header::new(Kind::Pages, table.len()).unwrap().encode()[..],
            &table,
        ]
        .concat()
    };
    assert!(matches!(
        attack(&after(&pages(15 << 12, 8192)), false),
        ReceiveError::Pages(_)
    ));
    assert!(matches!(
        attack(&after(&zero(1 << 40, 4096)), false),
        ReceiveError::Pages(_)
    ));
    assert!(matches!(
        attack(&after(&pages(1, 4096)), false),
        ReceiveError::Link(LinkError::Protocol { .. })
    ));
    assert!(matches!(
        attack(&after(&pages(0, 4096)), true),
        ReceiveError::Link(LinkError::Closed { .. })
    ));
    assert!(matches!(
        attack(&after(&pages(0, 4096)), false),
        ReceiveError::Link(LinkError::TimedOut { .. })
    ));
    assert!(matches!(
        attack(&after(&[3, 0, 0, 0, 2, 0, 0, 0, 9, 9]), false),
        ReceiveError::Machine { .. }
    ));
    let go = frame(&Message::Go {
        stopped_for_ns: u64::MAX,
        round_trip_ns: 0,
    });
    assert!(matches!(
        attack(&after(&go), false),
        ReceiveError::Link(LinkError::Unexpected { .. })
    ));

    let mut vast = machine;
    vast.memory[1].len = 1 << 62;
    vast.memory[0].gpa = 1;
    let vast = [frame(&hello), frame(&Message::Describe(vast))].concat();
    assert!(matches!(attack(&vast, false), ReceiveError::MemoryMap(_)));
    let pings = [frame(&hello), frame(&Message::Ping).repeat(1000)].concat();
    assert!(matches!(
        attack(&pings, false),
        ReceiveError::Link(LinkError::Unexpected { .. })
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_end_an_attempt_without_harm(
        bytes in proptest::collection::vec(any::<u8>(), 0..300),
        known in any::<bool>(),
    ) {
        let machine = describe(&Guest::new(16, 16).memory);
        let opening = [Message::Hello(Hello::ours()), Message::Describe(machine)];
        let opening: Vec<u8> = if known { opening.iter().flat_map(frame).collect() } else { Vec::new() };
        attack(&[opening, bytes].concat(), true);
    }
}

#[test]
fn a_frame_is_torn_only_if_a_part_of_it_was_taken() {
    let dir = tempfile::tempdir().unwrap();
    let listener = Listener::bind(&Endpoint::Unix(dir.path().join("s"))).unwrap();
    let (control, patience) = (control(), Duration::from_millis(100));
    let connect = || Connection::connect(listener.endpoint(), Duration::from_secs(5)).unwrap();

    let connection = connect();
    drop(listener.accept(&control).unwrap());
    let mut link = Link::new(&connection, &control, patience, patience);
    assert!(link.send(&Message::Ping).is_err() && !link.is_torn());

    let connection = connect();
    let _unread = listener.accept(&control).unwrap();
    let mut link = Link::new(&connection, &control, patience, patience);
    let error = link.send_state(&vec![1; 32 << 20]).unwrap_err();
    assert!(
        matches!(
            error,
            LinkError::TimedOut {
                what: "the state",
                ..
            }
        ),
        "{error}"
    );
    assert!(link.is_torn());
}
