//! A guest and a host with a device between them: the guest's side by buffers, the host's by real sockets.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tempfile::TempDir;

use super::super::{ConsoleBackend, ConsoleTerminal, VirtioConsole};
use crate::virtio::HostBackend;
use crate::virtio::testing::{DATA, Driver, reads, writes};

pub(super) const CONTROL_TO_GUEST: usize = 2;
pub(super) const CONTROL_FROM_GUEST: usize = 3;

pub(super) const DEVICE_READY: u16 = 0;
pub(super) const PORT_ADD: u16 = 1;
pub(super) const PORT_READY: u16 = 3;
pub(super) const CONSOLE_PORT: u16 = 4;
pub(super) const RESIZE: u16 = 5;
pub(super) const PORT_OPEN: u16 = 6;
pub(super) const PORT_NAME: u16 = 7;

/// Where the guest's messages and data are, and its buffers: for messages, and for the data of each port.
const MESSAGE: u64 = DATA;
pub(super) const SENT: u64 = DATA + 0x1000;
const MESSAGES: u64 = DATA + 0xf_0000;
const MESSAGE_BYTES: u64 = 128;
const BUFFERS: u64 = DATA + 0x10_0000;
const PORT_BYTES: u64 = 0x2_0000;
/// Bytes of a buffer for a port's data.
pub(super) const BUFFER: u64 = 0x200;

/// A control message: port, event, value, and what follows.
pub(super) type ConsoleMessage = (u32, u16, u16, Vec<u8>);

/// What a guest prints.
#[derive(Clone, Default)]
pub(super) struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Screen {
    /// What has been printed since the last call.
    pub(super) fn take(&self) -> Vec<u8> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

pub(super) struct ConsoleRig {
    pub(super) directory: TempDir,
    pub(super) backend: Arc<ConsoleBackend>,
    pub(super) terminal: Arc<ConsoleTerminal>,
    pub(super) screen: Screen,
    pub(super) driver: Driver,
}

/// A device whose ports with these names have their sockets in a folder.
pub(super) fn device(
    folder: &Path,
    names: &[&str],
) -> (Arc<ConsoleBackend>, Arc<ConsoleTerminal>, VirtioConsole) {
    let ports: Vec<_> = names
        .iter()
        .map(|name| ((*name).to_owned(), folder.join(name)))
        .collect();
    let backend = Arc::new(ConsoleBackend::open(&ports).unwrap());
    let terminal = Arc::new(ConsoleTerminal::new().unwrap());
    let device = VirtioConsole::new(terminal.clone(), backend.clone(), true);
    (backend, terminal, device)
}

impl ConsoleRig {
    /// A device as the process that runs the guest has it, with the driver up as far as DRIVER_OK.
    pub(super) fn new(names: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (backend, terminal, device) = device(directory.path(), names);
        backend.take_locks().unwrap();
        let screen = Screen::default();
        terminal.connect(Box::new(screen.clone()));
        Self {
            directory,
            backend,
            terminal,
            screen,
            driver: Driver::ready(device),
        }
    }

    /// With the ports `a` and `b`, which the guest knows and has open, as it has the console.
    pub(super) fn open() -> Self {
        let mut rig = Self::new(&["a", "b"]);
        rig.start();
        rig
    }

    /// The driver, which is up, accepts its ports, and programs in the guest open them.
    pub(super) fn start(&mut self) {
        self.post_messages(32);
        self.send_message(0, DEVICE_READY, 1);
        for port in 0..3 {
            self.send_message(port, PORT_READY, 1);
            self.send_message(port, PORT_OPEN, 1);
        }
        self.messages();
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The guest sends a control message.
    pub(super) fn send_message(&mut self, port: u32, event: u16, value: u16) {
        let message = [
            &port.to_le_bytes()[..],
            &event.to_le_bytes(),
            &value.to_le_bytes(),
        ]
        .concat();
        self.send_message_bytes(&message);
    }

    pub(super) fn send_message_bytes(&mut self, message: &[u8]) {
        self.driver.fill(MESSAGE, message);
        let part = reads(MESSAGE, message.len() as u32);
        assert_eq!(self.driver.select(CONTROL_FROM_GUEST).submit(&[part]), 0);
    }

    /// Makes buffers for control messages available.
    pub(super) fn post_messages(&mut self, count: usize) {
        self.driver.select(CONTROL_TO_GUEST);
        for _ in 0..count {
            let at = MESSAGES + MESSAGE_BYTES * self.driver.next_head();
            self.driver.add(&[writes(at, MESSAGE_BYTES as u32)]);
        }
        self.driver.kick();
    }

    /// The control messages that have come since the last call; their buffers are available again.
    pub(super) fn messages(&mut self) -> Vec<ConsoleMessage> {
        self.driver.run();
        let used = self.driver.select(CONTROL_TO_GUEST).used();
        let messages = used.iter().map(|(head, written)| {
            let at = MESSAGES + MESSAGE_BYTES * u64::from(*head);
            let bytes = self.driver.bytes(at, *written as usize);
            let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
            let port = u32::from_le_bytes(bytes[..4].try_into().unwrap());
            (port, half(4), half(6), bytes[8..].to_vec())
        });
        let messages = messages.collect();
        self.post_messages(used.len());
        messages
    }

    /// Makes buffers for a port's data available.
    pub(super) fn post(&mut self, port: usize, count: u64) {
        self.driver.select(to_guest(port));
        for _ in 0..count {
            let at = BUFFERS + PORT_BYTES * port as u64 + BUFFER * self.driver.next_head();
            self.driver.add(&[writes(at, BUFFER as u32)]);
        }
        self.driver.kick();
    }

    /// What the guest has got through a port since the last call.
    pub(super) fn received(&mut self, port: usize) -> Vec<u8> {
        self.driver.run();
        let used = self.driver.select(to_guest(port)).used();
        let bytes = used.into_iter().flat_map(|(head, written)| {
            let at = BUFFERS + PORT_BYTES * port as u64 + BUFFER * u64::from(head);
            self.driver.bytes(at, written as usize)
        });
        bytes.collect()
    }

    /// The guest sends something, in one chain.
    pub(super) fn send(&mut self, port: usize, bytes: &[u8]) {
        self.driver.fill(SENT, bytes);
        let part = reads(SENT, bytes.len() as u32);
        self.driver.select(to_guest(port) + 1).add(&[part]);
        self.driver.kick();
    }

    /// How many of the guest's chains have come back since the last call.
    pub(super) fn taken(&mut self, port: usize) -> usize {
        self.driver.run();
        self.driver.select(to_guest(port) + 1).used().len()
    }

    /// A program that has connected to a port.
    pub(super) fn client(&mut self, name: &str) -> UnixStream {
        let client = UnixStream::connect(self.path(name)).unwrap();
        client.set_nonblocking(true).unwrap();
        self.driver.run();
        client
    }
}

/// The queue for the guest of a port; the one after it is for the host.
pub(super) fn to_guest(port: usize) -> usize {
    [0, 4, 6][port]
}

/// What there is to read now.
pub(super) fn read(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
    }
    bytes
}

/// Writes until the stream takes no more; returns the bytes.
pub(super) fn flood(stream: &mut UnixStream) -> Vec<u8> {
    let mut sent = Vec::new();
    loop {
        let chunk = [sent.len() as u8; 1000];
        match stream.write(&chunk) {
            Ok(count) => sent.extend(&chunk[..count]),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                return sent;
            }
        }
    }
}
