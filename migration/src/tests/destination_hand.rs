//! A source made by hand, which sends what a test wants it to.

use std::net::Shutdown;
use std::thread;
use std::time::Duration;

use migration_io::{Compressor, Method};
use migration_state::Envelope;

use super::fake::{FakeDestination, describe};
use super::guest::{HIGH, TestGuest};
use super::rig::control;
use crate::link::{Link, LinkError};
use crate::protocol::{
    AttemptOutcome, CompressedTable, Features, Hello, MemoryTransfer, Message, PageTable, Span, Token,
};
use crate::transport::Connection;
use crate::*;

/// Pages of either region.
pub(super) const PAGES: u64 = 16;

/// One connection to the destination. Its parts live until the test process ends.
pub(super) struct Peer {
    pub(super) link: Link<'static>,
    connection: &'static Connection,
}

/// A migration by hand, and the guest that moves.
pub(super) struct Hand {
    pub(super) guest: TestGuest,
    pub(super) control: Peer,
    pub(super) streams: Vec<Peer>,
    pub(super) token: Token,
    round: u32,
}

pub(super) fn receiver(at: &str) -> Receiver {
    let patient = Duration::from_secs(5);
    let options = ReceiveOptions {
        io_timeout: patient,
        step_timeout: patient,
    };
    Receiver::listen(&at.parse().unwrap(), options).unwrap()
}

/// Lets `act` loose on a receiver. Returns what was received, what `act` found, and the destination.
pub(super) fn meet<T: Send>(
    receiver: &mut Receiver,
    act: impl FnOnce(&Endpoint, &Control) -> T + Send,
) -> (Result<Received, ReceiveError>, T, FakeDestination) {
    let (to, there) = (receiver.endpoint().clone(), control());
    let mut destination = FakeDestination::default();
    let (received, found) = thread::scope(|scope| {
        let acting = scope.spawn(|| act(&to, &there));
        let received = receiver.receive(&mut destination, &there);
        (received, acting.join().unwrap())
    });
    match &received {
        Ok(_) => assert!(destination.running && destination.discarded == 0),
        Err(error) => assert!(!destination.running && (error.is_committed() || destination.guest.is_none())),
    }
    (received, found, destination)
}

/// A whole migration by hand: the receiver is as good as new.
pub(super) fn assert_receives(receiver: &mut Receiver) {
    let (received, registers, destination) = meet(receiver, |to, _| Hand::open(to, 2).move_over());
    assert!(received.unwrap().confirmed);
    let guest = destination.guest.unwrap();
    assert_eq!(guest.registers(), registers);
    guest.check_stamps();
}

impl Peer {
    pub(super) fn dial(to: &Endpoint) -> Self {
        let control: &'static Control = Box::leak(Box::new(control()));
        let connection = Connection::connect(to, Duration::from_secs(5), control).unwrap();
        let connection: &'static Connection = Box::leak(Box::new(connection));
        let patient = Duration::from_secs(8);
        Self {
            link: Link::new(connection, control, patient, patient),
            connection,
        }
    }

    /// Connects and sends "hello" and the greeting.
    pub(super) fn wish(to: &Endpoint, wish: &Message) -> Self {
        let mut peer = Self::dial(to);
        peer.link.send(&Message::Hello(Hello::ours())).unwrap();
        peer.link.send(wish).unwrap();
        assert!(matches!(peer.receive(), Message::Hello(_)));
        peer
    }

    pub(super) fn receive(&mut self) -> Message {
        self.link.receive_message("anything").unwrap()
    }

    /// Receives the reason of a refusal.
    pub(super) fn refused(mut self) -> String {
        match self.link.receive_message("an abort") {
            Err(LinkError::Aborted { reason, .. }) => reason,
            other => panic!("{other:?}"),
        }
    }

    /// Bytes as they are.
    pub(super) fn send_bytes(&self, bytes: &[u8]) {
        assert_eq!(rustix::io::write(self.connection, bytes).unwrap(), bytes.len());
    }

    pub(super) fn hang_up(&self) {
        self.connection.shutdown(Shutdown::Both).unwrap();
    }
}

/// Asks what became of a machine.
pub(super) fn ask(to: &Endpoint, token: Token) -> AttemptOutcome {
    match Peer::wish(to, &Message::Ask(token)).receive() {
        Message::AttemptOutcome(outcome) => outcome,
        other => panic!("{other:?}"),
    }
}

pub(super) fn span(gpa: u64, pages: u64) -> Span {
    Span {
        gpa,
        len: pages * PAGE_SIZE,
    }
}

/// The destination's answer where no disk comes along.
pub(super) const ACCEPT: Message = Message::Accept { disks: Vec::new() };

impl Hand {
    /// A migration whose machine is described, with a guest that has written every other page.
    pub(super) fn describe(to: &Endpoint, guest: TestGuest, transfer: MemoryTransfer) -> Self {
        for page in (0..PAGES).step_by(2) {
            guest.write(page * PAGE_SIZE, false);
            guest.write(HIGH + page * PAGE_SIZE, false);
        }
        let mut control = Peer::wish(to, &Message::Begin(Features::OURS));
        let token = match control.receive() {
            Message::Session { token, .. } => token,
            other => panic!("{other:?}"),
        };
        control.link.send(&Message::Ping).unwrap();
        assert_eq!(control.receive(), Message::Pong);
        let machine = describe(&guest.memory);
        let describe = Message::Describe {
            machine,
            transfer,
            disks: OfferedDisks::default(),
        };
        control.link.send(&describe).unwrap();
        Self {
            guest,
            control,
            streams: Vec::new(),
            token,
            round: 0,
        }
    }

    /// The same, accepted, and the streams joined.
    pub(super) fn open(to: &Endpoint, streams: u32) -> Self {
        let mut hand = Self::describe(to, TestGuest::new(PAGES, PAGES), MemoryTransfer::Streams(streams));
        assert_eq!(hand.control.receive(), ACCEPT);
        let token = hand.token;
        let join = |index| {
            let mut stream = Peer::wish(to, &Message::Join { token, index });
            assert_eq!(stream.receive(), Message::Joined);
            stream
        };
        hand.streams = (0..streams).map(join).collect();
        hand
    }

    /// Sends ranges on a stream.
    pub(super) fn send(&mut self, stream: usize, data: Vec<Span>, zero: Vec<Span>) {
        let table = PageTable { data, zero };
        self.streams[stream]
            .link
            .send_pages(&self.guest.memory, &table)
            .unwrap();
    }

    pub(super) fn send_compressed(&mut self, stream: usize, method: Compression, pages: Vec<Span>) {
        let codec = match method {
            Compression::Lz4 => Method::Lz4,
            Compression::Zstd => Method::Zstd,
        };
        let mut compressor = Compressor::new(codec).unwrap();
        let ranges: Vec<MemoryRange> = pages.iter().map(|span| (*span).into()).collect();
        let block = compressor.compress(&self.guest.memory, &ranges).unwrap().unwrap();
        let len = block.len() as u32;
        let table = CompressedTable { method, pages, len };
        self.streams[stream].link.send_compressed(&table, block).unwrap();
    }

    /// Ends a round on all streams.
    pub(super) fn end_streams(&mut self) {
        self.round += 1;
        for stream in &mut self.streams {
            stream.link.send(&Message::RoundEnd(self.round)).unwrap();
        }
    }

    /// Ends it on the control connection, and awaits the ack.
    pub(super) fn end_round(&mut self) {
        self.end_streams();
        self.control.link.send(&Message::RoundEnd(self.round)).unwrap();
        self.receive_ack();
    }

    pub(super) fn receive_ack(&mut self) {
        let ack = self.control.receive();
        assert!(
            matches!(ack, Message::RoundAck(round) if round == self.round),
            "{ack:?}"
        );
    }

    pub(super) fn state(&self) -> Vec<u8> {
        let mut envelope = Envelope::new();
        envelope.put("guest", &self.guest.registers()).unwrap();
        envelope.encode()
    }

    /// Sends all memory, spread over the streams, in two rounds, of which the second overwrites the first.
    pub(super) fn send_all(&mut self) {
        let populated = vec![span(0, PAGES), span(HIGH, PAGES)];
        self.control.link.send(&Message::Populated(populated)).unwrap();
        let last = self.streams.len() - 1;
        self.send(0, vec![span(0, PAGES)], vec![]);
        self.send(
            last,
            vec![span(HIGH, PAGES / 2)],
            vec![span(HIGH + PAGES / 2 * PAGE_SIZE, PAGES / 2)],
        );
        self.end_round();
        self.guest.write(0, true);
        self.guest.write(HIGH, false);
        self.send(0, vec![span(HIGH, PAGES)], vec![]);
        self.send(last, vec![], vec![span(0, 1)]);
        self.end_round();
    }

    /// Up to "ready".
    pub(super) fn make_ready(&mut self) {
        self.send_all();
        let state = self.state();
        self.control.link.send_state(&state).unwrap();
        self.receive_ready();
    }

    pub(super) fn receive_ready(&mut self) {
        let ready = self.control.receive();
        assert!(matches!(ready, Message::Ready { .. }), "{ready:?}");
    }

    pub(super) fn go(&mut self) {
        let go = Message::Go {
            stopped_for_ns: 1_000_000,
            round_trip_ns: 1000,
        };
        self.control.link.send(&go).unwrap();
    }

    /// All of it. Returns what the guest is like at its end.
    pub(super) fn move_over(mut self) -> super::guest::Registers {
        self.make_ready();
        self.finish()
    }

    pub(super) fn finish(mut self) -> super::guest::Registers {
        self.go();
        let resumed = self.control.receive();
        assert!(matches!(resumed, Message::Resumed { .. }), "{resumed:?}");
        self.control.link.send(&Message::Farewell).unwrap();
        self.guest.registers()
    }
}
