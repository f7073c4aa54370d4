//! A program's output, line by line as it comes, with waiting for what shall come.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Result, bail};
use lab::{WaitLimit, note_progress};

/// Lines of output that an error shows.
const SHOWN: usize = 25;

/// Everything that a program has printed so far; clones see the same.
#[derive(Clone)]
pub struct TestOutput {
    shared: Arc<SharedText>,
}

struct SharedText {
    text: Mutex<Text>,
    changed: Condvar,
}

#[derive(Default)]
struct Text {
    lines: Vec<String>,
    /// The line that has no end yet.
    partial: Vec<u8>,
    ended: bool,
}

impl TestOutput {
    /// Reads `source` to its end on a thread of its own.
    pub fn follow(mut source: impl Read + Send + 'static) -> Self {
        let shared = Arc::new(SharedText {
            text: Mutex::default(),
            changed: Condvar::new(),
        });
        let reader = shared.clone();
        std::thread::spawn(move || {
            let mut chunk = [0; 16 << 10];
            while let Ok(count @ 1..) = source.read(&mut chunk) {
                reader.lock().append(&chunk[..count]);
                note_progress();
                reader.changed.notify_all();
            }
            reader.lock().ended = true;
            reader.changed.notify_all();
        });
        Self { shared }
    }

    /// Number of whole lines so far: a mark to wait from.
    pub fn mark(&self) -> usize {
        self.shared.lock().lines.len()
    }

    /// Waits for a line, at or after `mark`, of which `find` makes something. Fails where the output ends or
    /// the wait is given up before; the error names `what` and shows the last lines.
    pub fn wait<T>(
        &self,
        what: &str,
        mark: usize,
        patience: impl Into<WaitLimit>,
        mut find: impl FnMut(&str) -> Option<T>,
    ) -> Result<T> {
        let mut deadline = patience.into().begin();
        let mut next = mark;
        let mut text = self.shared.lock();
        loop {
            while let Some(line) = text.lines.get(next) {
                next += 1;
                if let Some(found) = find(line) {
                    return Ok(found);
                }
            }
            let left = deadline.left().filter(|_| !text.ended);
            let Some(left) = left else {
                let why = if text.ended {
                    "the output ended"
                } else {
                    "nothing came in time"
                };
                bail!("waiting for {what}: {why}; the last lines:\n{}", text.tail());
            };
            text = self.shared.wait(text, left);
        }
    }

    /// Waits for the end of the output.
    pub fn wait_end(&self, patience: impl Into<WaitLimit>) -> Result<()> {
        let mut deadline = patience.into().begin();
        let mut text = self.shared.lock();
        while !text.ended {
            let Some(left) = deadline.left() else {
                bail!("the output did not end; the last lines:\n{}", text.tail());
            };
            text = self.shared.wait(text, left);
        }
        Ok(())
    }

    /// All of it, an unfinished last line included. Ends of lines are `\n`.
    pub fn text(&self) -> String {
        let text = self.shared.lock();
        let mut whole = text
            .lines
            .iter()
            .flat_map(|line| [line.as_str(), "\n"])
            .collect::<String>();
        whole.push_str(&String::from_utf8_lossy(&text.partial));
        whole
    }
}

impl SharedText {
    fn lock(&self) -> MutexGuard<'_, Text> {
        self.text.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, text: MutexGuard<'a, Text>, timeout: Duration) -> MutexGuard<'a, Text> {
        self.changed
            .wait_timeout(text, timeout)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }
}

impl Text {
    fn append(&mut self, bytes: &[u8]) {
        self.partial.extend(bytes.iter().filter(|byte| **byte != b'\r'));
        while let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            self.lines
                .push(String::from_utf8_lossy(&line[..end]).into_owned());
        }
    }

    fn tail(&self) -> String {
        let from = self.lines.len().saturating_sub(SHOWN);
        let partial = String::from_utf8_lossy(&self.partial);
        let lines = self.lines[from..].iter().map(String::as_str).chain([&*partial]);
        lines.map(|line| format!("  | {line}\n")).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn lines_are_found_from_a_mark_on() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let output = TestOutput::follow(reader);
        writer.write_all(b"one\r\ntw").unwrap();
        let second = Duration::from_secs(5);
        assert_eq!(
            output
                .wait("one", 0, second, |line| (line == "one").then_some(1))
                .unwrap(),
            1
        );
        assert_eq!(output.mark(), 1);
        writer.write_all(b"o\nthr").unwrap();
        output
            .wait("two", 1, second, |line| (line == "two").then_some(()))
            .unwrap();
        drop(writer);
        let error = output
            .wait("one again", 1, second, |line| (line == "one").then_some(()))
            .unwrap_err();
        assert!(error.to_string().contains("the output ended"), "{error}");
        output.wait_end(second).unwrap();
        assert_eq!(output.text(), "one\ntwo\nthr");
    }

    #[test]
    fn waiting_ends_in_time() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let error = TestOutput::follow(reader)
            .wait("x", 0, Duration::from_millis(10), |_| Some(()))
            .unwrap_err();
        assert!(error.to_string().contains("nothing came in time"), "{error}");
    }
}
