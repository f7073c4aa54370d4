//! One end of a connection, its reader and its writers.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use super::rig::control;
use crate::link::{Admitted, Link, Sorted};
use crate::protocol::{Features, Frame, FrameHeader, FrameKind, Message};
use crate::transport::Connection;
use crate::*;

const PATIENT: Duration = Duration::from_secs(20);

/// A connection, and its other end as a plain socket.
fn pair(control: &Control) -> (Connection, UnixStream) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let connection = Connection::connect(&Endpoint::Unix(path), PATIENT, control).unwrap();
    (connection, listener.accept().unwrap().0)
}

fn frame(message: &Message) -> Vec<u8> {
    let content = postcard::to_stdvec(message).unwrap();
    let header = FrameHeader::new(FrameKind::Control, content.len())
        .unwrap()
        .encode();
    [&header[..], &content].concat()
}

fn read(peer: &mut UnixStream, bytes: usize) -> Vec<u8> {
    let mut read = vec![0; bytes];
    peer.read_exact(&mut read).unwrap();
    read
}

fn rest(mut peer: UnixStream) -> usize {
    let mut read = Vec::new();
    peer.read_to_end(&mut read).unwrap()
}

#[test]
fn a_poll_does_not_wait_for_the_rest_of_a_frame() {
    let control = control();
    let (connection, mut peer) = pair(&control);
    let mut link = Link::new(&connection, &control, PATIENT, PATIENT);
    let pong = frame(&Message::Pong);
    let began = Instant::now();
    for byte in &pong[..pong.len() - 1] {
        peer.write_all(&[*byte]).unwrap();
        link.check("nothing").unwrap();
        // Nor is a sender held up by it.
        link.send(&Message::Ping).unwrap();
    }
    assert!(began.elapsed() < PATIENT / 2);
    peer.write_all(&pong[pong.len() - 1..]).unwrap();
    assert_eq!(link.receive_message("pong").unwrap(), Message::Pong);
    peer.write_all(&pong).unwrap();
    let error = link.check("nothing").unwrap_err();
    assert!(
        error.to_string().contains("\"pong\", expected nothing"),
        "{error}"
    );
}

#[test]
fn a_poll_ends_a_frame_that_takes_longer_than_a_step() {
    let control = control();
    let (connection, mut peer) = pair(&control);
    let step = Duration::from_millis(30);
    let mut link = Link::new(&connection, &control, PATIENT, step);
    peer.write_all(&[1]).unwrap();
    link.check("nothing").unwrap();
    while link.frame_due().unwrap() > Instant::now() {
        std::thread::yield_now();
    }
    assert!(matches!(
        link.check("nothing"),
        Err(LinkError::TimedOut { after, .. }) if after == step
    ));
}

#[test]
fn an_answer_that_comes_while_something_is_sent_is_not_lost() {
    let control = control();
    let (connection, mut peer) = pair(&control);
    let mut link = Link::new(&connection, &control, PATIENT, PATIENT);
    link.admit(Admitted::Messages);
    let state = vec![7; 32 << 20];
    std::thread::scope(|scope| {
        // The peer does not read yet, so that sending the state waits for room and receives the answer meanwhile.
        peer.write_all(&frame(&Message::Pong)).unwrap();
        let peer = &mut peer;
        let sending = scope.spawn(|| {
            link.send_state(&state).unwrap();
            link.receive_message("pong").unwrap()
        });
        read(peer, 8 + state.len());
        assert_eq!(sending.join().unwrap(), Message::Pong);
    });
}

#[test]
fn an_answer_is_waited_for_as_long_as_bytes_arrive() {
    let control = control();
    let (connection, mut peer) = pair(&control);
    let step = Duration::from_millis(50);
    let mut link = Link::new(&connection, &control, PATIENT, step);
    // Half a second's worth of data in the system's buffers, which arrives steadily.
    let began = Instant::now();
    let flying = |began: Instant| 1_000_000_u64.saturating_sub(began.elapsed().as_micros() as u64 * 2);
    let error = link.receive_message_after("ack", || flying(began)).unwrap_err();
    assert!(
        matches!(error, LinkError::TimedOut { after, .. } if after == step),
        "{error}"
    );
    // Less than a quantum of 64 KiB is no more than a trickle.
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(400), "{took:?}");
    peer.write_all(&frame(&Message::Pong)).unwrap();
    assert_eq!(link.receive_message_after("ack", || 0).unwrap(), Message::Pong);
}

#[test]
fn only_frames_that_are_due_are_accepted() {
    let control = control();
    let header = |kind, len: u32| {
        let mut header = [kind, 0, 0, 0, 0, 0, 0, 0];
        header[4..].copy_from_slice(&len.to_le_bytes());
        header
    };
    let judge = |admitted, header: [u8; 8]| {
        let (connection, mut peer) = pair(&control);
        let mut link = Link::new(&connection, &control, PATIENT, PATIENT);
        link.admit(admitted);
        peer.write_all(&header).unwrap();
        link.check("nothing").err().map(|error| chain(&error))
    };
    for (admitted, kind, len, refusal) in [
        (Admitted::Greeting, 1, 8192, None),
        (Admitted::Greeting, 1, 8193, Some("at most 8192 bytes, got 8193")),
        (Admitted::Greeting, 2, 1, Some("said \"pages\"")),
        (Admitted::Greeting, 3, 64 << 20, Some("said \"state\"")),
        (Admitted::Messages, 1, 1 << 20, None),
        (Admitted::Messages, 5, 1, Some("said \"rehearsal\"")),
        (Admitted::Machine, 3, 64 << 20, None),
        (Admitted::Machine, 2, 1, Some("said \"pages\"")),
        (Admitted::Pages, 4, 16 << 10, None),
        (Admitted::Pages, 1, 8193, Some("at most 8192 bytes, got 8193")),
        (Admitted::Pages, 3, 1, Some("said \"state\"")),
    ] {
        let found = judge(admitted, header(kind, len));
        match refusal {
            None => assert_eq!(found, None, "{admitted:?} {kind} {len}"),
            Some(text) => assert!(found.as_ref().unwrap().contains(text), "{found:?}"),
        }
    }
}

#[test]
fn no_frame_follows_one_that_was_cut_short() {
    let control = control();
    let (connection, peer) = pair(&control);
    let patience = Duration::from_millis(50);
    let mut link = Link::new(&connection, &control, patience, patience);
    let pulse = link.pulse();
    link.send_state(&vec![1; 32 << 20]).unwrap_err();
    assert!(link.has_begun());
    let taken = {
        // Room again, but nothing may follow half a frame.
        let mut peer = peer.try_clone().unwrap();
        peer.set_read_timeout(Some(patience)).unwrap();
        std::io::copy(&mut peer, &mut std::io::sink()).unwrap_err()
    };
    assert_eq!(taken.kind(), std::io::ErrorKind::WouldBlock);
    pulse.send_if_idle(Duration::ZERO);
    let go = Message::Go {
        stopped_for_ns: 1,
        round_trip_ns: 1,
    };
    assert!(matches!(link.send(&go), Err(LinkError::Torn { what: "go" })));
    assert!(!link.has_begun(), "not a byte of it was sent");
    assert!(!link.abort(false, "too late"));
    drop(connection);
    assert_eq!(rest(peer), 0);
}

#[test]
fn a_message_without_room_is_not_sent_after_the_limit_of_the_pause() {
    let control = control();
    let (connection, peer) = pair(&control);
    let mut link = Link::new(&connection, &control, PATIENT, PATIENT);
    let mut filled = 0;
    while let Ok(taken) = rustix::net::send(&connection, &[0; 4096], rustix::net::SendFlags::DONTWAIT) {
        filled += taken;
    }
    control.limit_pause(Instant::now(), Duration::from_millis(20));
    let go = Message::Go {
        stopped_for_ns: 1,
        round_trip_ns: 1,
    };
    let error = link.send(&go).unwrap_err();
    assert!(
        matches!(error, LinkError::PausedTooLong { .. }) && !link.has_begun(),
        "{error}"
    );
    drop(connection);
    assert_eq!(rest(peer), filled);
}

#[test]
fn keep_alives_neither_wait_nor_mix_with_frames() {
    let control = control();
    let (connection, mut peer) = pair(&control);
    let patience = Duration::from_millis(50);
    let mut link = Link::new(&connection, &control, patience, PATIENT);
    let pulse = link.pulse();
    let alive = frame(&Message::KeepAlive);
    let hour = Duration::from_secs(3600);

    assert!(pulse.send_if_idle(hour) > hour / 2, "nothing is due");
    pulse.send_if_idle(Duration::ZERO);
    assert_eq!(read(&mut peer, alive.len()), alive);

    // What the system took in part goes on in front of the next frame.
    connection_write(&connection, &alive[..4]);
    pulse.set_unsent(&alive[4..]);
    link.send(&Message::Ping).unwrap();
    assert_eq!(
        read(&mut peer, 2 * alive.len()),
        [alive.clone(), frame(&Message::Ping)].concat()
    );

    // Without room nothing is sent, and no rest is left.
    let fill = [0xaa; 4096];
    let mut filled = 0;
    while let Ok(bytes) = rustix::net::send(&connection, &fill, rustix::net::SendFlags::DONTWAIT) {
        filled += bytes;
    }
    let began = Instant::now();
    pulse.send_if_idle(Duration::ZERO);
    assert!(began.elapsed() < PATIENT / 2);
    read(&mut peer, filled);
    link.send(&Message::Pong).unwrap();
    assert_eq!(read(&mut peer, alive.len()), frame(&Message::Pong));
}

fn connection_write(connection: &Connection, bytes: &[u8]) {
    assert_eq!(rustix::io::write(connection, bytes).unwrap(), bytes.len());
}

#[test]
fn keep_alives_are_sorted_from_other_frames() {
    let control = control();
    let (connection, mut peer) = pair(&control);
    let mut link = Link::new(&connection, &control, PATIENT, PATIENT);
    assert!(link.poll("anything").unwrap().is_none());
    let begin = Message::Begin(Features::OURS);
    peer.write_all(&[frame(&Message::KeepAlive), frame(&begin)].concat())
        .unwrap();
    assert!(matches!(link.poll("anything").unwrap(), Some(Sorted::SignOfLife)));
    match link.poll("anything").unwrap() {
        Some(Sorted::Frame(Frame::Message(said))) => assert_eq!(said, begin),
        other => panic!("{other:?}"),
    }
}
