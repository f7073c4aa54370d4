//! Lines on their way to where they are read: a bounded queue, and a thread that writes.

use std::io::{self, Write};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use threads::Role;

use super::{Descriptor, RAW};

/// Bytes that wait for the thread; what comes on top is lost.
const ROOM: usize = 256 << 10;
/// How often the counts of lines that were lost or left out are written at most.
const COUNTS_INTERVAL: Duration = Duration::from_secs(1);

/// Accepts lines and never waits for a reader; clones share the queue.
#[derive(Clone)]
pub(super) struct Lines {
    shared: Arc<LinesShared>,
}

struct LinesShared {
    queue: Mutex<LineQueue>,
    changed: Condvar,
}

#[derive(Default)]
struct LineQueue {
    text: Vec<u8>,
    /// Lines for which there was no room behind `text`.
    lost: u64,
    /// Lines that were not to be written: too many of a kind.
    left_out: u64,
    /// Whether the thread has taken something that is not written yet.
    writing: bool,
}

impl Lines {
    /// Starts the thread, which lives as long as the process.
    pub(super) fn start(name: &str, to: Descriptor) -> io::Result<Self> {
        let lines = Self {
            shared: Arc::new(LinesShared {
                queue: Mutex::default(),
                changed: Condvar::new(),
            }),
        };
        let shared = lines.shared.clone();
        let mut writer = LineWriter::new(to);
        threads::spawn(Role::Log, name, move || shared.write_to(&mut writer))?;
        Ok(lines)
    }

    /// Takes whole lines. They are lost where there is no room.
    pub(super) fn push(&self, text: &[u8]) {
        let mut queue = self.shared.lock();
        // In order: what comes behind a gap waits until the gap can be named.
        if queue.lost > 0 || queue.text.len() + text.len() > ROOM {
            queue.lost += count_lines(text);
            return;
        }
        queue.text.extend_from_slice(text);
        drop(queue);
        self.shared.changed.notify_all();
    }

    /// Counts a line that is not to be written.
    pub(super) fn leave_out(&self) {
        let mut queue = self.shared.lock();
        queue.left_out += 1;
        if queue.left_out == 1 {
            drop(queue);
            self.shared.changed.notify_all();
        }
    }

    /// Waits until all is written or lost, for at most `patience`.
    pub(super) fn flush(&self, patience: Duration) {
        let queue = self.shared.lock();
        let unfinished = |queue: &mut LineQueue| queue.writing || !queue.text.is_empty();
        // A reader that does not read in time loses the lines.
        let _ = self
            .shared
            .changed
            .wait_timeout_while(queue, patience, unfinished);
    }
}

impl LinesShared {
    fn lock(&self) -> MutexGuard<'_, LineQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_to(&self, writer: &mut LineWriter) {
        loop {
            let (text, lost) = self.wait_for_lines(writer);
            writer.write(&text);
            writer.lost += lost;
            writer.write_counts();
            self.lock().writing = false;
            self.changed.notify_all();
        }
    }

    /// Waits for lines, or until counts of missing lines are due.
    fn wait_for_lines(&self, writer: &mut LineWriter) -> (Vec<u8>, u64) {
        let mut queue = self.lock();
        loop {
            writer.left_out += std::mem::take(&mut queue.left_out);
            let news = writer.counts_due();
            let due = news.is_some_and(|at| at <= Instant::now());
            if due || !queue.text.is_empty() || queue.lost > 0 {
                queue.writing = true;
                return (std::mem::take(&mut queue.text), std::mem::take(&mut queue.lost));
            }
            queue = match news {
                Some(at) => {
                    let left = at.saturating_duration_since(Instant::now());
                    let waited = self.changed.wait_timeout(queue, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

/// The thread's end: writes, and keeps account of what could not be written.
struct LineWriter {
    to: Descriptor,
    /// Lines that could not be written, and that were not reported yet.
    lost: u64,
    /// Lines that were too many of a kind, and that were not reported yet.
    left_out: u64,
    /// Whether the last line that was written has no end.
    torn: bool,
    /// When writing the counts was last tried.
    counted_at: Option<Instant>,
}

impl LineWriter {
    fn new(to: Descriptor) -> Self {
        Self {
            to,
            lost: 0,
            left_out: 0,
            torn: false,
            counted_at: None,
        }
    }

    /// When counts are to be written; `None` if there are none.
    fn counts_due(&self) -> Option<Instant> {
        let news = self.lost > 0 || self.left_out > 0;
        news.then(|| {
            self.counted_at
                .map_or_else(Instant::now, |last| last + COUNTS_INTERVAL)
        })
    }

    /// Writes lines, behind how many are missing before them.
    fn write(&mut self, text: &[u8]) {
        if text.is_empty() {
            return;
        }
        if self.lost > 0 && !self.write_lost_count() {
            self.lost += count_lines(text);
            return;
        }
        self.lost += self.put(text);
    }

    /// Writes the counts of missing lines, if they are due.
    fn write_counts(&mut self) {
        if self.counts_due().is_none_or(|at| at > Instant::now()) {
            return;
        }
        self.counted_at = Some(Instant::now());
        if self.lost > 0 && !self.write_lost_count() {
            return;
        }
        if self.left_out > 0 {
            let line = format!("{} log lines were left out: too many of a kind\n", self.left_out);
            if self.put(line.as_bytes()) == 0 {
                self.left_out = 0;
            }
        }
    }

    fn write_lost_count(&mut self) -> bool {
        let written = self.put(format!("{} log lines were lost\n", self.lost).as_bytes()) == 0;
        if written {
            self.lost = 0;
        }
        written
    }

    /// Writes lines; returns how many are missing, one that is there in part included.
    fn put(&mut self, text: &[u8]) -> u64 {
        let mut whole = Vec::with_capacity(text.len() + 1);
        if self.torn {
            whole.push(b'\n');
        }
        whole.extend_from_slice(text);
        if RAW.load(Ordering::Relaxed) && self.to.is_terminal() {
            whole = with_returns(&whole);
        }
        let mut written = 0;
        while written < whole.len() {
            match self.to.write(&whole[written..]) {
                Ok(count @ 1..) => written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The reader may have gone, or there is no room: the VM goes on all the same.
                Ok(0) | Err(_) => break,
            }
        }
        if written > 0 {
            self.torn = whole[written - 1] != b'\n';
        }
        count_lines(&whole[written..]).min(count_lines(text))
    }
}

fn count_lines(text: &[u8]) -> u64 {
    text.iter().filter(|byte| **byte == b'\n').count() as u64
}

/// Each line begins at the left in a raw terminal as well.
fn with_returns(text: &[u8]) -> Vec<u8> {
    let mut returned = Vec::with_capacity(text.len() + 8);
    for byte in text {
        if *byte == b'\n' {
            returned.push(b'\r');
        }
        returned.push(*byte);
    }
    returned
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{BufRead, BufReader, PipeReader};
    use std::os::fd::OwnedFd;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn pipe() -> (PipeReader, Lines) {
        let (reader, writer) = io::pipe().unwrap();
        let lines = Lines::start("log", Descriptor::File(File::from(OwnedFd::from(writer)))).unwrap();
        (reader, lines)
    }

    #[test]
    fn lines_without_a_reader_are_lost_and_counted() {
        let (reader, lines) = pipe();
        let many = 100_000u64;
        for number in 0..many {
            lines.push(format!("line {number}\n").as_bytes());
        }
        let mut read = BufReader::new(reader).lines().map(Result::unwrap);
        // There may be several gaps: the thread makes room whenever it takes what is waiting.
        let (mut next, mut lost) = (0, 0);
        while next < many {
            let line = read.next().unwrap();
            if line == format!("line {next}") {
                next += 1;
                continue;
            }
            let gap = line
                .strip_suffix(" log lines were lost")
                .unwrap_or_else(|| panic!("expected line {next}, got {line:?}"));
            let gap: u64 = gap.parse().unwrap();
            lost += gap;
            next += gap;
        }
        assert!(lost > 0 && lost < many && next == many, "{lost} lost of {many}");
        lines.push(b"behind the gap\n");
        assert_eq!(read.next().unwrap(), "behind the gap");
    }

    #[test]
    fn a_reader_that_went_away_loses_lines_and_nothing_else() {
        let (reader, lines) = pipe();
        drop(reader);
        for _ in 0..1000 {
            lines.push(b"to nobody\n");
        }
        lines.flush(PATIENCE);
        assert!(lines.shared.lock().text.is_empty());
    }

    #[test]
    fn lost_lines_are_counted_when_there_is_room_again() {
        let mut writer = LineWriter::new(Descriptor::File(
            File::options().write(true).open("/dev/full").unwrap(),
        ));
        writer.write(b"one\ntwo\n");
        writer.write_counts();
        writer.write(b"three\n");
        assert_eq!(writer.lost, 3);
        let file = tempfile::NamedTempFile::new().unwrap();
        writer.to = Descriptor::File(file.reopen().unwrap());
        writer.torn = true;
        writer.write(b"four\n");
        let text = std::fs::read_to_string(file.path()).unwrap();
        assert_eq!(text, "\n3 log lines were lost\nfour\n");
    }

    #[test]
    fn lines_that_were_too_many_are_counted_now_and_then() {
        let (reader, lines) = pipe();
        let began = Instant::now();
        for _ in 0..1000 {
            lines.leave_out();
        }
        let mut counted = 0;
        let mut read = BufReader::new(reader).lines().map(Result::unwrap);
        let mut count = 0;
        while counted < 1000 {
            let line = read.next().unwrap();
            let number = line
                .strip_suffix(" log lines were left out: too many of a kind")
                .unwrap();
            counted += number.parse::<u64>().unwrap();
            count += 1;
        }
        assert_eq!(counted, 1000);
        assert!(count <= 2 + began.elapsed().as_secs(), "{count} lines of news");
    }

    #[test]
    fn a_raw_terminal_needs_returns() {
        assert_eq!(with_returns(b"one\ntwo\n"), b"one\r\ntwo\r\n");
    }
}
