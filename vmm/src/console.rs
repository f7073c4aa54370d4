//! The guest's console: what it prints goes to standard output and to everybody who attached.
//!
//! The serial port writes on a vCPU's thread, the virtio console on the device thread, so nothing here may wait for a reader: bytes go into a bounded
//! buffer, a thread of its own carries them to standard output, and a reader that is too slow loses bytes.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use devices::legacy::Serial;
use devices::virtio::console::{Size, Terminal};
use rustix::termios::tcgetwinsize;
use tokio::sync::broadcast;

use crate::output::Descriptor;

/// Bytes that wait for standard output before the oldest are lost.
const BACKLOG: usize = 1 << 20;
/// The last bytes of output, which a client sees when it attaches.
const HISTORY: usize = 16 << 10;
/// Chunks that an attached client may be behind before it loses some.
const CLIENT_CHUNKS: usize = 4096;
/// How long the end of the process waits for standard output to take the rest.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(500);

/// Handle to the console; clones share it.
#[derive(Clone)]
pub struct Console {
    shared: Arc<Shared>,
}

struct Shared {
    output: Mutex<Output>,
    changed: Condvar,
    clients: broadcast::Sender<Vec<u8>>,
}

#[derive(Default)]
struct Output {
    backlog: VecDeque<u8>,
    history: VecDeque<u8>,
    writing: bool,
}

impl Console {
    /// A console whose output also goes to standard output, by a thread that lives as long as the process.
    pub fn to_stdout() -> io::Result<Self> {
        let console = Self::detached();
        let shared = console.shared.clone();
        std::thread::Builder::new()
            .name("console".into())
            .spawn(move || shared.carry_to(Descriptor::Stdout))?;
        Ok(console)
    }

    /// A console whose output goes to those who attach, and nowhere else.
    pub(crate) fn detached() -> Self {
        let (clients, _) = broadcast::channel(CLIENT_CHUNKS);
        Self {
            shared: Arc::new(Shared {
                output: Mutex::default(),
                changed: Condvar::new(),
                clients,
            }),
        }
    }

    /// The last output, and everything that comes after it.
    pub fn attach(&self) -> (Vec<u8>, broadcast::Receiver<Vec<u8>>) {
        let output = self.shared.lock();
        (
            output.history.iter().copied().collect(),
            self.shared.clients.subscribe(),
        )
    }

    /// Waits, for a bounded time, until standard output has taken everything.
    pub fn flush(&self) {
        let output = self.shared.lock();
        let unfinished = |output: &mut Output| !output.backlog.is_empty() || output.writing;
        // Giving up after the time-out is all that can be done about a reader that does not read.
        let _ = self
            .shared
            .changed
            .wait_timeout_while(output, FLUSH_TIMEOUT, unfinished);
    }

    /// The end of it that a device writes to.
    pub fn sink(&self) -> Box<dyn Write + Send> {
        Box::new(Sink(self.clone()))
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Output> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry_to(&self, mut writer: impl Write) {
        loop {
            let mut output = self
                .changed
                .wait_while(self.lock(), |output| output.backlog.is_empty())
                .unwrap_or_else(PoisonError::into_inner);
            let chunk: Vec<u8> = output.backlog.drain(..).collect();
            output.writing = true;
            drop(output);
            // Nobody may be reading any more; the guest runs on all the same.
            let _ = writer.write_all(&chunk).and_then(|()| writer.flush());
            self.lock().writing = false;
            self.changed.notify_all();
        }
    }
}

/// The size of the terminal that standard input is; `None` if it is none, or does not say.
pub(crate) fn terminal_size() -> Option<Size> {
    let size = tcgetwinsize(io::stdin()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some(Size {
        columns: size.ws_col,
        rows: size.ws_row,
    })
}

/// The device that gets a machine's console input.
#[derive(Clone)]
pub enum Keyboard {
    /// The serial port.
    Serial(Arc<Mutex<Serial>>),
    /// The virtio console.
    Virtio(Arc<Terminal>),
}

impl Keyboard {
    fn enqueue(&self, bytes: &[u8]) -> usize {
        match self {
            Self::Serial(serial) => serial
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .enqueue(bytes),
            Self::Virtio(terminal) => terminal.enqueue(bytes),
        }
    }

    fn resize(&self, size: Size) {
        match self {
            // It has no way to tell.
            Self::Serial(_) => {}
            Self::Virtio(terminal) => terminal.resize(size),
        }
    }
}

/// Where console input goes; nowhere until there is a machine.
#[derive(Clone, Default)]
pub struct ConsoleInput(Arc<Mutex<Input>>);

#[derive(Default)]
struct Input {
    keyboard: Option<Keyboard>,
    /// The size of the terminal, if somebody has said it.
    size: Option<Size>,
}

impl ConsoleInput {
    /// How long to wait before offering again what a guest that does not read has no room for.
    pub const RETRY: Duration = Duration::from_millis(20);

    /// From here on input goes to `keyboard`.
    pub fn connect(&self, keyboard: Keyboard) {
        let mut input = self.lock();
        if let Some(size) = input.size {
            keyboard.resize(size);
        }
        input.keyboard = Some(keyboard);
    }

    /// Offers input to the guest; returns how many bytes were taken. Without a machine all are, and lost.
    pub fn offer(&self, bytes: &[u8]) -> usize {
        let keyboard = self.lock().keyboard.clone();
        keyboard.map_or(bytes.len(), |keyboard| keyboard.enqueue(bytes))
    }

    /// The terminal that somebody looks at has this size; the last one to say so counts.
    pub fn resize(&self, size: Size) {
        let mut input = self.lock();
        input.size = Some(size);
        if let Some(keyboard) = &input.keyboard {
            keyboard.resize(size);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Input> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Sink(Console);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut output = self.0.shared.lock();
        push_bounded(&mut output.backlog, bytes, BACKLOG);
        push_bounded(&mut output.history, bytes, HISTORY);
        // Under the lock, so that an attaching client gets each byte once. Nobody attached is no error.
        let _ = self.0.shared.clients.send(bytes.to_vec());
        self.0.shared.changed.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn push_bounded(queue: &mut VecDeque<u8>, bytes: &[u8], limit: usize) {
    queue.extend(bytes);
    let excess = queue.len().saturating_sub(limit);
    queue.drain(..excess);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_sees_what_was_and_what_comes() {
        let console = Console::detached();
        let mut sink = console.sink();
        sink.write_all(b"before").unwrap();
        let (history, mut live) = console.attach();
        sink.write_all(b"after").unwrap();
        assert_eq!(history, b"before");
        assert_eq!(live.try_recv().unwrap(), b"after");
    }

    #[test]
    fn output_without_a_reader_is_bounded() {
        let console = Console::detached();
        let mut sink = console.sink();
        for _ in 0..3 {
            sink.write_all(&vec![b'x'; BACKLOG]).unwrap();
        }
        assert_eq!(console.shared.lock().backlog.len(), BACKLOG);
        assert_eq!(console.attach().0.len(), HISTORY);
    }
}
