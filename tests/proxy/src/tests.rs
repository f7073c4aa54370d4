//! Two ends of hand-made frames, and the proxy between them.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::*;

const PATIENCE: Duration = Duration::from_secs(20);

fn frame(kind: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind, 0, 0, 0];
    bytes.extend((content.len() as u32).to_le_bytes());
    bytes.extend(content);
    bytes
}

fn hello() -> Vec<u8> {
    frame(1, &[0; 12])
}

fn begin() -> Vec<u8> {
    frame(1, &[1, 7])
}

fn describe(streams: u8) -> Vec<u8> {
    frame(1, &[9, 0, 0, 0, streams])
}

fn join(index: u8) -> Vec<u8> {
    let mut content = vec![3];
    content.extend([9; 16]);
    content.push(index);
    frame(1, &content)
}

fn ask() -> Vec<u8> {
    let mut content = vec![5];
    content.extend([9; 16]);
    frame(1, &content)
}

/// Two pages at 0 and 1 MiB with their content, and a zero one.
fn pages() -> Vec<u8> {
    let mut bytes = frame(
        2,
        &[
            2, 0, 0x80, 0x20, 0x80, 0x80, 0x40, 0x80, 0x20, 1, 0x80, 0x40, 0x80, 0x20,
        ],
    );
    bytes.extend(vec![0x55; 8192]);
    bytes
}

/// One page as a block of 5 bytes.
fn compressed() -> Vec<u8> {
    let mut bytes = frame(4, &[1, 1, 0, 0x80, 0x20, 5]);
    bytes.extend([1, 2, 3, 4, 5]);
    bytes
}

/// A destination behind a proxy.
struct ProxyRig {
    listener: TcpListener,
    proxy: Proxy,
}

impl ProxyRig {
    fn new(plans: Vec<FaultPlan>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = Address::Tcp(listener.local_addr().unwrap());
        let proxy = Proxy::start(&"tcp:127.0.0.1:0".parse().unwrap(), &to, plans).unwrap();
        Self { listener, proxy }
    }

    /// With a fault at the first "ping" of the control connection.
    fn ping(fault: ProxyFault) -> Self {
        Self::new(vec![FaultPlan {
            point: point(ProxyConnection::Control, Direction::ToDestination, "ping"),
            fault,
        }])
    }

    /// Both ends of a new connection.
    fn connect(&self) -> (TcpStream, TcpStream) {
        let source = self.knock();
        let (destination, _) = self.listener.accept().unwrap();
        destination.set_read_timeout(Some(PATIENCE)).unwrap();
        (source, destination)
    }

    fn knock(&self) -> TcpStream {
        let Address::Tcp(address) = self.proxy.address() else {
            panic!("not TCP")
        };
        let source = TcpStream::connect(address).unwrap();
        source.set_read_timeout(Some(PATIENCE)).unwrap();
        source
    }
}

fn point(connection: ProxyConnection, direction: Direction, message: &str) -> FaultPoint {
    FaultPoint {
        connection,
        direction,
        message: message.into(),
        occurrence: 0,
    }
}

fn ping() -> Vec<u8> {
    frame(1, &[7])
}

fn go() -> Vec<u8> {
    frame(1, &[20, 1, 2])
}

fn expect(stream: &mut impl Read, bytes: &[u8]) {
    let mut got = vec![0; bytes.len()];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(got, bytes);
}

fn rest(stream: &mut impl Read) -> (Vec<u8>, io::Result<()>) {
    let mut got = Vec::new();
    let result = stream.read_to_end(&mut got).map(drop);
    (got, result)
}

fn is_reset(stream: &mut TcpStream) -> bool {
    let (got, result) = rest(stream);
    assert!(got.is_empty(), "{got:?}");
    result.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset)
}

#[test]
fn every_message_passes_whole_and_is_recorded() {
    let rig = ProxyRig::new(Vec::new());
    let (mut source, mut destination) = rig.connect();
    let sent = [
        hello(),
        begin(),
        frame(1, &[26, 1]),
        describe(2),
        frame(3, &[1; 70_000]),
        frame(5, &[]),
    ]
    .concat();
    source.write_all(&sent).unwrap();
    expect(&mut destination, &sent);
    destination.write_all(&frame(1, &[11])).unwrap();
    expect(&mut source, &frame(1, &[11]));

    for index in [0, 1] {
        let (mut source, mut destination) = rig.connect();
        let sent = [hello(), join(index), pages(), compressed(), pages()].concat();
        source.write_all(&sent).unwrap();
        drop(source);
        assert_eq!(rest(&mut destination).0, sent);
    }
    let (mut source, mut destination) = rig.connect();
    source.write_all(&[hello(), ask()].concat()).unwrap();
    expect(&mut destination, &[hello(), ask()].concat());

    let to = |connection, message| point(connection, Direction::ToDestination, message);
    let mut expected: Vec<FaultPoint> = ["hello", "begin", "message 26", "describe", "state", "rehearsal"]
        .map(|message| to(ProxyConnection::Control, message))
        .into();
    expected.push(point(ProxyConnection::Control, Direction::ToSource, "accept"));
    for index in [0, 1] {
        let stream = ["hello", "join", "pages", "compressed pages"];
        expected.extend(stream.map(|message| to(ProxyConnection::Stream(index), message)));
        expected.push(FaultPoint {
            occurrence: 1,
            ..to(ProxyConnection::Stream(index), "pages")
        });
    }
    expected.extend(["hello", "ask"].map(|message| to(ProxyConnection::Ask, message)));
    assert_eq!(rig.proxy.seen(), expected);
    assert_eq!(rig.proxy.struck(), 0);
}

#[test]
fn what_is_no_frame_passes_as_it_is() {
    let mut torn = frame(3, &[1; 100]);
    torn.truncate(50);
    let nonsense_table = frame(2, &[200]);
    for bytes in [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        torn,
        nonsense_table,
        b"abc".to_vec(),
    ] {
        let rig = ProxyRig::new(Vec::new());
        let (mut source, mut destination) = rig.connect();
        source.write_all(&bytes).unwrap();
        source.shutdown(std::net::Shutdown::Write).unwrap();
        let (got, result) = rest(&mut destination);
        result.unwrap();
        assert_eq!(got, bytes);
        destination.write_all(b"what is this?").unwrap();
        expect(&mut source, b"what is this?");
        assert_eq!(rig.proxy.seen()[0].message, "garbage");
    }
}

#[test]
fn a_message_is_dropped_doubled_or_changed() {
    let changed = |at: usize, bit: u8| {
        let mut bytes = ping();
        bytes[at] ^= bit;
        bytes
    };
    for (fault, comes) in [
        (ProxyFault::Drop, Vec::new()),
        (ProxyFault::Duplicate, [ping(), ping()].concat()),
        (ProxyFault::Corrupt(FramePart::Kind), changed(0, 0x40)),
        (ProxyFault::Corrupt(FramePart::Length), changed(4, 1)),
        (ProxyFault::Corrupt(FramePart::Content), changed(8, 1)),
        (ProxyFault::Corrupt(FramePart::Data), changed(8, 1)),
    ] {
        let rig = ProxyRig::ping(fault);
        let (mut source, mut destination) = rig.connect();
        source
            .write_all(&[hello(), ping(), ping(), go()].concat())
            .unwrap();
        expect(&mut destination, &[hello(), comes, ping(), go()].concat());
        assert_eq!(rig.proxy.struck(), 1);
    }
}

#[test]
fn the_content_of_pages_is_changed() {
    let rig = ProxyRig::new(vec![FaultPlan {
        point: FaultPoint {
            occurrence: 1,
            ..point(ProxyConnection::Control, Direction::ToDestination, "pages")
        },
        fault: ProxyFault::Corrupt(FramePart::Data),
    }]);
    let (mut source, mut destination) = rig.connect();
    source.write_all(&[pages(), pages()].concat()).unwrap();
    let mut changed = pages();
    let middle = changed.len() - 4096;
    changed[middle] ^= 1;
    expect(&mut destination, &[pages(), changed].concat());
}

#[test]
fn a_message_comes_later() {
    for fault in [
        ProxyFault::Delay(Duration::from_millis(50)),
        ProxyFault::Stall(Some(Duration::from_millis(50))),
    ] {
        let rig = ProxyRig::ping(fault);
        let (mut source, mut destination) = rig.connect();
        let begin = Instant::now();
        source.write_all(&[hello(), ping(), go()].concat()).unwrap();
        expect(&mut destination, &[hello(), ping(), go()].concat());
        assert!(begin.elapsed() >= Duration::from_millis(50));
    }
}

#[test]
fn one_direction_stalls_and_the_other_goes_on() {
    let rig = ProxyRig::ping(ProxyFault::Stall(None));
    let (mut source, mut destination) = rig.connect();
    source.write_all(&[hello(), ping(), go()].concat()).unwrap();
    expect(&mut destination, &hello());
    destination.write_all(&hello()).unwrap();
    expect(&mut source, &hello());
    destination
        .set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    let error = destination.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn a_network_is_silent_from_a_message_on_until_it_is_fast_again() {
    let rig = ProxyRig::ping(ProxyFault::Pace(NetworkPace::Bytes(0)));
    let (mut source, mut destination) = rig.connect();
    source.write_all(&[hello(), ping()].concat()).unwrap();
    expect(&mut destination, &hello());
    destination
        .set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    let error = destination.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    rig.proxy.pace(NetworkPace::Free);
    destination.set_read_timeout(Some(PATIENCE)).unwrap();
    expect(&mut destination, &ping());
}

#[test]
fn a_network_trickles_from_a_message_on() {
    let rig = ProxyRig::ping(ProxyFault::Pace(NetworkPace::Bytes(400)));
    let (mut source, mut destination) = rig.connect();
    let begin = Instant::now();
    source.write_all(&[ping(), pages()].concat()).unwrap();
    expect(&mut destination, &ping());
    destination.read_exact(&mut [0; 20]).unwrap();
    // Two bytes every 5 ms.
    assert!(begin.elapsed() >= Duration::from_millis(50));
}

#[test]
fn half_a_message_passes_and_then_the_end() {
    let rig = ProxyRig::ping(ProxyFault::Truncate);
    let (mut source, mut destination) = rig.connect();
    source.write_all(&[hello(), ping(), go()].concat()).unwrap();
    assert_eq!(rest(&mut destination).0, [&hello()[..], &ping()[..4]].concat());
    assert!(rest(&mut source).0.is_empty());
}

#[test]
fn a_reset_reaches_both_ends_of_that_connection_alone() {
    let rig = ProxyRig::ping(ProxyFault::Reset);
    let (mut source, mut destination) = rig.connect();
    source.write_all(&hello()).unwrap();
    expect(&mut destination, &hello());
    let (mut other, mut there) = rig.connect();
    source.write_all(&[ping(), go()].concat()).unwrap();
    assert!(is_reset(&mut source) && is_reset(&mut destination));
    other.write_all(&go()).unwrap();
    expect(&mut there, &go());
}

#[test]
fn when_the_network_is_gone_everything_is_until_it_is_healed() {
    let rig = ProxyRig::ping(ProxyFault::CutAll);
    let (mut source, mut destination) = rig.connect();
    let (mut other, mut there) = rig.connect();
    source.write_all(&ping()).unwrap();
    for stream in [&mut source, &mut destination, &mut other, &mut there] {
        assert!(is_reset(stream));
    }
    assert!(is_reset(&mut rig.knock()));
    rig.proxy.heal();
    let (mut source, mut destination) = rig.connect();
    source.write_all(&go()).unwrap();
    expect(&mut destination, &go());
    rig.proxy.cut_all();
    assert!(is_reset(&mut source));
}

#[test]
fn a_function_is_called_before_or_after_its_message_passes() {
    for when in [When::Before, When::After] {
        let (called, calls) = mpsc::channel();
        let (allow, allowed) = mpsc::channel::<()>();
        let call = move || {
            called.send(()).unwrap();
            allowed.recv_timeout(PATIENCE).unwrap();
        };
        let rig = ProxyRig::ping(ProxyFault::Call(when, Box::new(call)));
        let (mut source, mut destination) = rig.connect();
        source.write_all(&[ping(), go()].concat()).unwrap();
        calls.recv_timeout(PATIENCE).unwrap();
        destination.set_nonblocking(true).unwrap();
        let passed = destination.peek(&mut [0]).is_ok();
        assert_eq!(passed, when == When::After);
        destination.set_nonblocking(false).unwrap();
        allow.send(()).unwrap();
        expect(&mut destination, &[ping(), go()].concat());
    }
}

#[test]
fn an_end_or_a_death_at_one_side_is_one_at_the_other() {
    let rig = ProxyRig::new(Vec::new());
    let (source, mut destination) = rig.connect();
    source.shutdown(std::net::Shutdown::Write).unwrap();
    rest(&mut destination).1.unwrap();
    drop(destination);
    rest(&mut &source).1.unwrap();

    let (mut source, destination) = rig.connect();
    source.write_all(&go()).unwrap();
    destination.peek(&mut [0; 8]).unwrap();
    // Closed with data unread, as by a kill: a reset.
    drop(destination);
    assert!(is_reset(&mut source));
}

#[test]
fn a_destination_that_is_not_there_is_not_there_through_the_proxy_either() {
    let ProxyRig { listener, proxy } = ProxyRig::new(Vec::new());
    drop(listener);
    let Address::Tcp(address) = proxy.address() else {
        panic!("not TCP")
    };
    let mut source = TcpStream::connect(address).unwrap();
    source.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(is_reset(&mut source));
}

#[test]
fn files_pass_over_unix_sockets() {
    use std::io::{IoSlice, IoSliceMut};
    use std::mem::MaybeUninit;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use rustix::net::*;

    let dir = tempfile::tempdir().unwrap();
    let address = |name: &str| Address::Unix(dir.path().join(name));
    let listener = UnixListener::bind(dir.path().join("to")).unwrap();
    let proxy = Proxy::start(&address("proxy"), &address("to"), Vec::new()).unwrap();
    let source = UnixStream::connect(dir.path().join("proxy")).unwrap();
    let (destination, _) = listener.accept().unwrap();
    destination.set_read_timeout(Some(PATIENCE)).unwrap();

    let (mut reader, writer) = io::pipe().unwrap();
    let bytes = frame(1, &[10]);
    let files = [writer.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
    sendmsg(&source, &[IoSlice::new(&bytes)], &mut control, SendFlags::empty()).unwrap();
    drop(writer);

    let mut got = [0; 9];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        &destination,
        &mut [IoSliceMut::new(&mut got)],
        &mut control,
        RecvFlags::WAITALL,
    )
    .unwrap();
    assert_eq!((received.bytes, &got[..]), (9, &bytes[..]));
    let files: Vec<_> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => Some(files.collect::<Vec<_>>()),
            _ => None,
        })
        .flatten()
        .collect();
    assert_eq!(files.len(), 1);
    rustix::io::write(&files[0], b"here").unwrap();
    drop(files);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "here");
    assert_eq!(proxy.seen()[0].message, "memory files");
    drop(proxy);
    assert!(!dir.path().join("proxy").exists());
}

#[test]
fn addresses_are_read_as_they_are_shown() {
    for text in ["tcp:127.0.0.1:80", "tcp:[::1]:80", "unix:/run/x"] {
        assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
    }
    for text in ["", "unix:", "tcp:1", "127.0.0.1:80"] {
        assert!(text.parse::<Address>().is_err(), "{text:?}");
    }
}
