//! The guest's console: what it prints goes to standard output and to every client that attached.
//!
//! The serial port writes on a vCPU's thread, the virtio console on the device thread, so nothing here may wait for a
//! reader: bytes go into a bounded buffer, a thread of its own carries them to standard output, and a reader that is
//! too slow loses bytes.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use devices::legacy::Serial;
use devices::virtio::console::{ConsoleTerminal, TerminalSize};
use output::{Allowance, Descriptor};
use rustix::termios::tcgetwinsize;
use threads::Role;
use tokio::sync::Notify;

/// Bytes that wait for standard output before the oldest are lost.
const BACKLOG: usize = 1 << 20;
/// The last bytes of output, which a client sees when it attaches.
const HISTORY: usize = 16 << 10;
/// Bytes that an attached client may be behind before it loses the oldest.
const CLIENT_BACKLOG: usize = 256 << 10;
/// How long the end of the process waits for standard output to take the rest.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(500);
/// Bytes a second that standard output gets if it is no terminal: a file system is full some day.
const RATE: u64 = 1 << 20;
/// Bytes that it gets at once.
const BURST: u64 = 16 << 20;
/// How often a reader is told at most how much output it missed.
const NEWS_INTERVAL: Duration = Duration::from_secs(1);

/// Handle to the console; clones share it.
#[derive(Clone)]
pub struct Console {
    shared: Arc<ConsoleShared>,
}

struct ConsoleShared {
    output: Mutex<ConsoleOutput>,
    changed: Condvar,
}

#[derive(Default)]
struct ConsoleOutput {
    backlog: VecDeque<u8>,
    history: VecDeque<u8>,
    writing: bool,
    clients: Vec<Weak<ConsoleClient>>,
}

/// Output that an attached client has not read yet.
#[derive(Default)]
struct ConsoleClient {
    bytes: Mutex<VecDeque<u8>>,
    more: Notify,
}

/// The output for one attached client.
pub struct Attached(Arc<ConsoleClient>);

impl Attached {
    /// The next of it: at first the last output of before, then everything that comes, as far as it is taken in time.
    pub async fn next(&mut self) -> Vec<u8> {
        loop {
            let bytes: Vec<u8> = self.0.lock().drain(..).collect();
            if !bytes.is_empty() {
                return bytes;
            }
            self.0.more.notified().await;
        }
    }
}

impl ConsoleClient {
    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Console {
    /// A console whose output also goes to standard output, by a thread that lives as long as the process.
    pub fn to_stdout() -> io::Result<Self> {
        Self::to(Descriptor::Stdout)
    }

    fn to(descriptor: Descriptor) -> io::Result<Self> {
        let console = Self::detached();
        let shared = console.shared.clone();
        threads::spawn(Role::Console, "console", move || shared.carry_to(descriptor))?;
        Ok(console)
    }

    /// A console whose output goes to those who attach, and nowhere else.
    pub fn detached() -> Self {
        Self {
            shared: Arc::new(ConsoleShared {
                output: Mutex::default(),
                changed: Condvar::new(),
            }),
        }
    }

    /// The last output, and everything that comes after it.
    pub fn attach(&self) -> Attached {
        let mut output = self.shared.lock();
        let client = Arc::new(ConsoleClient {
            bytes: Mutex::new(output.history.clone()),
            more: Notify::new(),
        });
        output.clients.push(Arc::downgrade(&client));
        Attached(client)
    }

    /// Waits, for a bounded time, until standard output has taken everything.
    pub fn flush(&self) {
        let output = self.shared.lock();
        let unfinished = |output: &mut ConsoleOutput| !output.backlog.is_empty() || output.writing;
        // Giving up after the time-out is all that can be done about a reader that does not read.
        let _ = self
            .shared
            .changed
            .wait_timeout_while(output, FLUSH_TIMEOUT, unfinished);
    }

    /// The end of it that a device writes to.
    pub fn sink(&self) -> Box<dyn Write + Send> {
        Box::new(SerialSink(self.clone()))
    }
}

impl ConsoleShared {
    fn lock(&self) -> MutexGuard<'_, ConsoleOutput> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry_to(&self, mut descriptor: Descriptor) {
        let mut allowance = (!descriptor.is_terminal()).then(|| Allowance::new(BURST, RATE, Instant::now()));
        let mut left_out = LeftOut::default();
        loop {
            let chunk = self.wait_for_output(left_out.bytes > 0);
            let passed = match &mut allowance {
                Some(allowance) => allowance.spend(chunk.len() as u64, Instant::now()) as usize,
                None => chunk.len(),
            };
            // The reader may have gone; the guest runs on all the same.
            let _ = descriptor.write_all(&chunk[..passed]);
            left_out.add((chunk.len() - passed) as u64);
            self.lock().writing = false;
            self.changed.notify_all();
        }
    }

    /// Waits for output; with `news`, also no longer than until there is something to say.
    fn wait_for_output(&self, news: bool) -> Vec<u8> {
        let empty = |output: &mut ConsoleOutput| output.backlog.is_empty();
        let mut output = if news {
            let waited = self.changed.wait_timeout_while(self.lock(), NEWS_INTERVAL, empty);
            waited.unwrap_or_else(PoisonError::into_inner).0
        } else {
            let waited = self.changed.wait_while(self.lock(), empty);
            waited.unwrap_or_else(PoisonError::into_inner)
        };
        output.writing = !output.backlog.is_empty();
        output.backlog.drain(..).collect()
    }
}

/// Output that was too much at a time, and that was not reported yet.
#[derive(Default)]
struct LeftOut {
    bytes: u64,
    reported_at: Option<Instant>,
}

impl LeftOut {
    fn add(&mut self, bytes: u64) {
        self.bytes += bytes;
        if self.bytes > 0
            && self
                .reported_at
                .is_none_or(|last| last.elapsed() >= NEWS_INTERVAL)
        {
            tracing::warn!(
                "{} bytes of the guest's console were left out: more than {RATE} a second for standard output",
                self.bytes
            );
            *self = Self {
                bytes: 0,
                reported_at: Some(Instant::now()),
            };
        }
    }
}

/// The size of the terminal that standard input is; `None` if it is none, or does not say.
pub fn terminal_size() -> Option<TerminalSize> {
    let size = tcgetwinsize(io::stdin()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some(TerminalSize {
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
    Virtio(Arc<ConsoleTerminal>),
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

    fn resize(&self, size: TerminalSize) {
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
    /// The size of the terminal, if a client has set it.
    size: Option<TerminalSize>,
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

    /// Sets the size of the terminal that shows the console; the last call counts.
    pub fn resize(&self, size: TerminalSize) {
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

struct SerialSink(Console);

impl Write for SerialSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut output = self.0.shared.lock();
        let was_empty = output.backlog.is_empty();
        push_bounded(&mut output.backlog, bytes, BACKLOG);
        push_bounded(&mut output.history, bytes, HISTORY);
        // Under the lock, so that an attaching client gets each byte once.
        output.clients.retain(|client| {
            let Some(client) = client.upgrade() else {
                return false;
            };
            push_bounded(&mut client.lock(), bytes, CLIENT_BACKLOG);
            client.more.notify_one();
            true
        });
        if was_empty {
            self.0.shared.changed.notify_all();
        }
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
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::OwnedFd;

    use super::*;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(future)
    }

    #[test]
    fn a_client_sees_what_was_and_what_comes() {
        let console = Console::detached();
        let mut sink = console.sink();
        sink.write_all(b"before").unwrap();
        let mut client = console.attach();
        assert_eq!(block_on(client.next()), b"before");
        sink.write_all(b"after").unwrap();
        sink.write_all(b"wards").unwrap();
        assert_eq!(block_on(client.next()), b"afterwards");
    }

    #[test]
    fn output_without_a_reader_is_bounded() {
        let console = Console::detached();
        let mut client = console.attach();
        let mut sink = console.sink();
        for _ in 0..3 {
            sink.write_all(&vec![b'x'; BACKLOG]).unwrap();
        }
        sink.write_all(b"the end").unwrap();
        assert_eq!(console.shared.lock().backlog.len(), BACKLOG);
        assert_eq!(block_on(console.attach().next()).len(), HISTORY);
        let kept = block_on(client.next());
        assert_eq!(kept.len(), CLIENT_BACKLOG);
        assert!(kept.ends_with(b"the end"));
        drop(client);
        sink.write_all(b"x").unwrap();
        assert!(console.shared.lock().clients.is_empty());
    }

    #[test]
    fn a_guest_that_prints_without_end_does_not_fill_a_disk() {
        let (mut reader, writer) = io::pipe().unwrap();
        let console = Console::to(Descriptor::File(File::from(OwnedFd::from(writer)))).unwrap();
        let began = Instant::now();
        let reading = std::thread::spawn(move || {
            let (mut chunk, mut count) = (vec![0; 1 << 20], 0);
            loop {
                let read = reader.read(&mut chunk).unwrap();
                count += read as u64;
                if chunk[..read].contains(&b'!') {
                    return count;
                }
            }
        });
        let (mut sink, mut printed) = (console.sink(), 0);
        while printed < 4 * BURST {
            sink.write_all(&[b'x'; 4096]).unwrap();
            printed += 4096;
            if printed % (BACKLOG as u64) == 0 {
                // So that what is lost is lost for its rate.
                console.flush();
            }
        }
        // Its output is passed on again as soon as it prints less.
        while !reading.is_finished() {
            sink.write_all(b"!").unwrap();
            console.flush();
        }
        let most = BURST + RATE * (began.elapsed().as_secs() + 1);
        let read = reading.join().unwrap();
        assert!((BURST..=most).contains(&read), "{read} of {printed} bytes came");
    }
}
