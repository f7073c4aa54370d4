//! A guest and a host with a device between them: the guest's side by packets, the host's by real sockets.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;

use super::super::packet::{HEADER_LEN, HOST_CID, PacketOp, TYPE_STREAM, VsockHeader};
use super::super::{VirtioVsock, VsockBackend, VsockParameters};
use crate::rate::Limits;
use crate::virtio::HostBackend;
use crate::virtio::testing::{DATA, Driver, DriverBuffer, folder, reads, writes};

pub(super) const GUEST_CID: u32 = 3;
/// The guest's port in these tests.
pub(super) const PORT: u32 = 1024;
/// Room for data in each buffer for the guest.
pub(super) const ROOM: u32 = 4096;

pub(super) const TO_GUEST: usize = 0;
pub(super) const FROM_GUEST: usize = 1;
pub(super) const EVENTS: usize = 2;

/// Where the guest's packets are, and its buffers.
const PACKET: u64 = DATA;
const BUFFERS: u64 = DATA + 0x4_0000;
const BUFFER_BYTES: u64 = 0x2000;
/// So many buffers can wait for packets.
const BUFFER_COUNT: u64 = 32;
pub(super) const EVENT: u64 = DATA + 0x3_0000;

pub(super) struct VsockRig {
    pub(super) directory: TempDir,
    pub(super) backend: Arc<VsockBackend>,
    pub(super) driver: Driver,
}

/// A device with its socket at `path`, as the process that runs the guest has it.
pub(super) fn device(path: &Path) -> (Arc<VsockBackend>, VirtioVsock) {
    limited(path, Limits::default())
}

/// One with limits.
fn limited(path: &Path, limits: Limits) -> (Arc<VsockBackend>, VirtioVsock) {
    let backend = Arc::new(VsockBackend::open(path).unwrap());
    let guest_cid = GUEST_CID;
    let device = VirtioVsock::new(backend.clone(), VsockParameters { guest_cid, limits });
    (backend, device.unwrap())
}

impl VsockRig {
    /// With buffers for the guest.
    pub(super) fn new() -> Self {
        Self::with_limits(Limits::default())
    }

    pub(super) fn with_limits(limits: Limits) -> Self {
        let mut rig = Self::without(limits);
        rig.post(BUFFER_COUNT);
        rig
    }

    pub(super) fn without_buffers() -> Self {
        Self::without(Limits::default())
    }

    fn without(limits: Limits) -> Self {
        let directory = folder();
        let (backend, device) = limited(&directory.path().join("v.sock"), limits);
        backend.take_locks().unwrap();
        Self {
            directory,
            backend,
            driver: Driver::ready(device),
        }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Makes buffers for the guest available.
    pub(super) fn post(&mut self, count: u64) {
        self.driver.select(TO_GUEST);
        for _ in 0..count {
            let next = BUFFERS + BUFFER_BYTES * (self.driver.next_head() / 2 % BUFFER_COUNT);
            self.driver
                .add(&[writes(next, HEADER_LEN as u32), writes(next + 0x1000, ROOM)]);
        }
        self.driver.kick();
    }

    /// Makes a buffer for events available.
    pub(super) fn post_event(&mut self) {
        self.driver.select(EVENTS).add(&[writes(EVENT, 4)]);
        self.driver.kick();
    }

    /// What the guest has received since the last call; its buffers are available again.
    pub(super) fn received(&mut self) -> Vec<(VsockHeader, Vec<u8>)> {
        self.driver.run();
        let mut received = Vec::new();
        loop {
            let used = self.driver.select(TO_GUEST).used();
            if used.is_empty() {
                return received;
            }
            for (head, written) in &used {
                // Two descriptors a buffer.
                let at = BUFFERS + BUFFER_BYTES * (u64::from(*head) / 2 % BUFFER_COUNT);
                let header = self.driver.bytes(at, HEADER_LEN);
                let header = VsockHeader::decode(&header.try_into().unwrap());
                assert_eq!(*written, HEADER_LEN as u32 + header.len);
                received.push((header, self.driver.bytes(at + 0x1000, header.len as usize)));
            }
            self.post(used.len() as u64);
        }
    }

    /// What the guest has received, where that is one packet.
    pub(super) fn one(&mut self) -> (VsockHeader, Vec<u8>) {
        let mut received = self.received();
        assert_eq!(received.len(), 1, "{received:?}");
        received.remove(0)
    }

    /// What the packets are for that the guest has received.
    pub(super) fn ops(&mut self) -> Vec<PacketOp> {
        let received = self.received();
        received.iter().map(|(header, _)| header.op.unwrap()).collect()
    }

    /// Sends a packet of the guest's with its data.
    pub(super) fn send(&mut self, header: VsockHeader, data: &[u8]) {
        let header = VsockHeader {
            len: data.len() as u32,
            ..header
        };
        self.driver.fill(PACKET, &header.encode());
        self.driver.fill(PACKET + 0x100, data);
        self.send_parts(&[
            reads(PACKET, HEADER_LEN as u32),
            reads(PACKET + 0x100, data.len() as u32),
        ]);
    }

    /// Sends whatever is in these parts of memory.
    pub(super) fn send_parts(&mut self, parts: &[DriverBuffer]) {
        assert_eq!(self.driver.select(FROM_GUEST).submit(parts), 0);
    }

    /// Sends what is in these bytes.
    pub(super) fn send_bytes(&mut self, bytes: &[u8]) {
        self.driver.fill(PACKET, bytes);
        self.send_parts(&[reads(PACKET, bytes.len() as u32)]);
    }

    /// A program that has connected and asked for the guest's port.
    pub(super) fn dial(&mut self) -> UnixStream {
        let mut client = self.client();
        client.write_all(format!("CONNECT {PORT}\n").as_bytes()).unwrap();
        client
    }

    /// A program that has connected.
    pub(super) fn client(&self) -> UnixStream {
        let client = UnixStream::connect(self.path("v.sock")).unwrap();
        client.set_nonblocking(true).unwrap();
        client
    }

    /// A connection that a program on the host has asked for and the guest has accepted, and the host's port.
    pub(super) fn open(&mut self) -> (UnixStream, u32) {
        let mut client = self.dial();
        let (request, _) = self.one();
        assert_eq!(request.op, Some(PacketOp::Request));
        let port = request.source_port;
        self.send(packet(PacketOp::Response, port), &[]);
        assert_eq!(read(&mut client), format!("OK {port}\n").as_bytes());
        (client, port)
    }

    /// A connection to a program that waits on `port` of the host.
    pub(super) fn open_to_host(&mut self, port: u32) -> UnixStream {
        let listener = UnixListener::bind(self.path(&format!("v.sock_{port}"))).unwrap();
        self.send(packet(PacketOp::Request, port), &[]);
        assert_eq!(self.ops(), [PacketOp::Response]);
        let (stream, _) = listener.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }
}

/// A packet of the guest's, which has much room, to a port of the host.
pub(super) fn packet(op: PacketOp, host_port: u32) -> VsockHeader {
    VsockHeader {
        source_cid: GUEST_CID.into(),
        destination_cid: HOST_CID,
        source_port: PORT,
        destination_port: host_port,
        len: 0,
        kind: TYPE_STREAM,
        op: Some(op),
        flags: 0,
        buffer_size: 1 << 30,
        forwarded: 0,
    }
}

/// What there is to read now.
pub(super) fn read(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
    }
    bytes
}

/// Whether the stream has come to its end, in whatever way, with nothing left to read.
pub(super) fn has_ended(stream: &mut UnixStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

/// Bytes of which no two neighbourhoods are alike.
pub(super) fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32)
        .map(|at| (at.wrapping_mul(0x9e37_79b1) >> 24) as u8)
        .collect()
}
