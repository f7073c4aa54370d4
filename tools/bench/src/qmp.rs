//! A client of QEMU's machine protocol: one JSON object a line, answers and events mixed.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tests::PATIENCE;

/// A connection to one QEMU.
pub(crate) struct Qmp {
    reader: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects to the socket at `path`, which QEMU creates before anything else that it does, but not at once.
    pub(crate) fn connect(path: &Path) -> Result<Self> {
        let deadline = Instant::now() + PATIENCE.longest;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                // Only trying shows when a socket appears.
                Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                Err(error) => return Err(error).with_context(|| format!("QEMU's socket {}", path.display())),
            }
        };
        stream.set_read_timeout(Some(PATIENCE.longest))?;
        let mut qmp = Self {
            reader: BufReader::new(stream),
            events: VecDeque::new(),
        };
        qmp.read().context("QEMU's greeting")?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns its answer.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        self.reader
            .get_mut()
            .write_all(line.as_bytes())
            .with_context(|| format!("QEMU: {command}"))?;
        loop {
            let mut answer = self
                .read()
                .with_context(|| format!("QEMU's answer to {command}"))?;
            if answer.get("event").is_some() {
                self.events.push_back(answer);
            } else if let Some(error) = answer.get("error") {
                bail!("QEMU: {command}: {error}");
            } else {
                return Ok(answer["return"].take());
            }
        }
    }

    /// Waits for the first event of which `find` makes something, those that came before included. Events before
    /// it are forgotten.
    pub(crate) fn wait<T>(
        &mut self,
        what: &str,
        mut find: impl FnMut(&Value) -> Result<Option<T>>,
    ) -> Result<T> {
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self
                    .read()
                    .with_context(|| format!("waiting for QEMU's {what}"))?,
            };
            if let Some(found) = find(&event)? {
                return Ok(found);
            }
        }
    }

    /// Drops the events that came so far, such as those of an earlier migration.
    pub(crate) fn clear_events(&mut self) {
        self.events.clear();
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("QEMU closed the connection");
        }
        serde_json::from_str(&line).with_context(|| format!("expected JSON, got {line:?}"))
    }
}

/// An event's time on the host's real-time clock, in milliseconds.
pub(crate) fn time_ms(event: &Value) -> Result<f64> {
    let part = |name: &str| event["timestamp"][name].as_f64();
    let (seconds, micros) = part("seconds")
        .zip(part("microseconds"))
        .context("an event without a time")?;
    Ok(seconds * 1e3 + micros / 1e3)
}
