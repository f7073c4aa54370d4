//! Destinations that are silent, or send nonsense.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::destination_hand::ACCEPT;
use super::fake::FakeSource;
use super::guest::{Load, TestGuest};
use super::rig::{assert_stayed, control, hasty, options, receiver};
use crate::link::Link;
use crate::protocol::{Features, FrameHeader, FrameKind, Hello, Message};
use crate::transport::{Connection, Listener};
use crate::*;

fn busy() -> FakeSource {
    let mut guest = TestGuest::new(64, 16);
    guest.start(Load { pages: 80 });
    FakeSource::new(guest)
}

fn frame(message: &Message) -> Vec<u8> {
    let content = postcard::to_stdvec(message).unwrap();
    [
        &FrameHeader::new(FrameKind::Control, content.len())
            .unwrap()
            .encode()[..],
        &content,
    ]
    .concat()
}

#[test]
fn a_destination_without_a_receiver_is_a_failure() {
    let to = receiver(&options()).endpoint().clone();
    let mut source = busy();
    let report = migrate(&mut source, &to, &options(), &control()).report;
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
    let to = Endpoint::from(fake.local_addr().unwrap());
    let report = thread::scope(|scope| {
        scope.spawn(|| answer(fake.accept().unwrap().0));
        migrate(&mut source, &to, options, &control()).report
    });
    assert_stayed(&mut source, &report, Outcome::Failed);
    report.error.unwrap()
}

/// Reads whatever comes until the source closes the connection.
fn read_to_end(mut stream: TcpStream) {
    let mut rest = [0; 4096];
    while matches!(stream.read(&mut rest), Ok(1..)) {}
}

fn send_messages(stream: TcpStream, messages: &[Message]) {
    send_bytes(stream, &messages.iter().flat_map(frame).collect::<Vec<u8>>());
}

fn send_bytes(mut stream: TcpStream, bytes: &[u8]) {
    stream.write_all(bytes).unwrap();
    read_to_end(stream);
}

fn greeting() -> Vec<Message> {
    let mut messages = vec![
        Message::Hello(Hello::ours()),
        Message::Session {
            token: [7; 16],
            features: Features::default(),
        },
    ];
    messages.extend(std::iter::repeat_n(Message::Pong, 4));
    messages
}

#[test]
fn a_silent_destination_is_given_up() {
    let began = Instant::now();
    let error = meet(&hasty(), read_to_end);
    assert!(
        error.contains("timed out after 1000 ms waiting for hello"),
        "{error}"
    );
    let error = meet(&hasty(), |stream| send_messages(stream, &greeting()));
    assert!(error.contains("waiting for accept or refuse"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_destination_that_does_not_read_is_given_up() {
    let mut guest = TestGuest::new(8192, 4096);
    for page in 0..8192 {
        guest.write(page * PAGE_SIZE, false);
    }
    guest.start(Load { pages: 8192 });
    let mut source = FakeSource::new(guest);
    let fake = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = Endpoint::from(fake.local_addr().unwrap());
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let report = thread::scope(|scope| {
        scope.spawn(move || {
            let mut control = fake.accept().unwrap().0;
            let accept = [greeting(), vec![ACCEPT]].concat();
            control
                .write_all(&accept.iter().flat_map(frame).collect::<Vec<u8>>())
                .unwrap();
            let joined = [Message::Hello(Hello::ours()), Message::Joined];
            let joined: Vec<u8> = joined.iter().flat_map(frame).collect();
            let streams: Vec<TcpStream> = (0..options().streams)
                .map(|_| {
                    let mut stream = fake.accept().unwrap().0;
                    stream.write_all(&joined).unwrap();
                    stream
                })
                .collect();
            // Holds the connections, unread, until the source has given up.
            let _ = wait.recv();
            drop((control, streams));
        });
        let report = migrate(&mut source, &to, &hasty(), &control()).report;
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
fn a_destination_that_sends_nonsense_is_given_up() {
    let error = meet(&options(), |stream| {
        send_bytes(stream, b"HTTP/1.1 400 Bad Request\r\n\r\n")
    });
    assert!(error.contains("does not speak the protocol"), "{error}");
    let error = meet(&options(), |stream| send_messages(stream, &[ACCEPT]));
    assert!(error.contains("said \"accept\", expected hello"), "{error}");
    let early = [greeting(), vec![Message::RoundAck(7)]].concat();
    let error = meet(&options(), |stream| send_messages(stream, &early));
    assert!(error.contains("said \"round ack\""), "{error}");
    let ready = [greeting(), vec![Message::Ready { restore_ns: u64::MAX }]].concat();
    let error = meet(&options(), |stream| send_messages(stream, &ready));
    assert!(error.contains("said \"ready\""), "{error}");
    let newer = postcard::to_stdvec(&(0u8, *b"GODWITMG", 7u16, 8u16, "9.9")).unwrap();
    let header = FrameHeader::new(FrameKind::Control, newer.len())
        .unwrap()
        .encode();
    let error = meet(&options(), |stream| {
        send_bytes(stream, &[&header[..], &newer].concat())
    });
    assert!(
        error.contains("versions 7 to 8 (godwit 9.9), expected one of 6 to 6"),
        "{error}"
    );
}

#[test]
fn a_destination_that_trickles_is_given_up() {
    let error = meet(&hasty(), |mut stream| {
        stream.set_read_timeout(Some(Duration::from_millis(40))).unwrap();
        // One byte now and then of what would be a long frame.
        stream.write_all(&[1, 0, 0, 0, 0, 16, 0, 0]).unwrap();
        let mut rest = [0; 64];
        while !matches!(stream.read(&mut rest), Ok(0)) && stream.write_all(&[0]).is_ok() {}
    });
    assert!(
        error.contains("timed out after 1000 ms waiting for hello"),
        "{error}"
    );
}

#[test]
fn a_destination_that_sends_only_keep_alives_is_given_up() {
    let error = meet(&hasty(), |mut stream| {
        let alive = frame(&Message::KeepAlive);
        while stream.write_all(&alive).is_ok() {}
    });
    assert!(error.contains("waiting for hello"), "{error}");
}

#[test]
fn a_source_that_waits_is_not_silent() {
    let error = meet(&hasty(), |mut stream| {
        let alive = frame(&Message::KeepAlive);
        stream
            .write_all(&greeting().iter().flat_map(frame).collect::<Vec<u8>>())
            .unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let (mut said, mut piece) = (Vec::new(), [0; 4096]);
        let until = Instant::now() + Duration::from_millis(2500);
        while Instant::now() < until {
            // A time-out is the pace of this side's own signs of life.
            if let Ok(bytes) = stream.read(&mut piece) {
                said.extend_from_slice(&piece[..bytes]);
            }
            stream.write_all(&alive).unwrap();
        }
        let heard = said
            .windows(alive.len())
            .filter(|window| *window == alive)
            .count();
        // One every 250 ms, if this machine has the time.
        assert!(heard >= 3, "{heard} signs of life");
        stream.shutdown(std::net::Shutdown::Both).unwrap();
    });
    assert!(error.contains("accept or refuse"), "{error}");
}

#[test]
fn a_frame_is_torn_only_if_a_part_of_it_was_taken() {
    let dir = tempfile::tempdir().unwrap();
    let listener = Listener::bind(&Endpoint::Unix(dir.path().join("s"))).unwrap();
    let (control, patience) = (control(), Duration::from_millis(100));
    let connect = || Connection::connect(listener.endpoint(), Duration::from_secs(5), &control).unwrap();

    let connection = connect();
    drop(listener.accept(&control, None).unwrap().unwrap());
    let mut link = Link::new(&connection, &control, patience, patience);
    assert!(link.send(&Message::Ping).is_err() && !link.has_begun());

    let connection = connect();
    let _unread = listener.accept(&control, None).unwrap().unwrap();
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
    assert!(link.has_begun());
}
