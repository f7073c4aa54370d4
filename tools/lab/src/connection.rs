//! One host's control channel: frames out, and what its processes have printed so far.

use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::patience::{Deadline, note_progress};
use crate::wire::{self, LabFrame, LabFrameKind};

/// What is kept of a process's output; the rest is dropped.
const LONGEST_LOG: usize = 64 << 20;

/// A host's control channel. Locks: `state` before `out`, neither held while waiting for the other side.
#[derive(Debug)]
pub(crate) struct LabConnection {
    state: Mutex<LabConnectionState>,
    changed: Condvar,
    out: Mutex<UnixStream>,
}

#[derive(Debug, Default)]
struct LabConnectionState {
    up: bool,
    gone: bool,
    next: u32,
    processes: HashMap<u32, Transcript>,
}

/// What one process has printed, and how it ended.
#[derive(Debug, Default)]
pub(crate) struct Transcript {
    /// Standard output so far.
    pub(crate) stdout: Vec<u8>,
    /// Standard error so far.
    pub(crate) stderr: Vec<u8>,
    /// Whole lines of both, in the order in which they became whole.
    pub(crate) lines: Vec<String>,
    /// Wait status, once it has ended.
    pub(crate) ended: Option<i32>,
    /// Why it could not be started.
    pub(crate) refused: Option<String>,
    parts: [Vec<u8>; 2],
}

/// Why a wait ended without what was waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Missed {
    /// The time is up.
    Time,
    /// The host is gone.
    Host,
}

impl LabConnection {
    /// Takes over the stream that QEMU has opened.
    pub(crate) fn new(stream: UnixStream) -> io::Result<Arc<Self>> {
        let mut input = io::BufReader::new(stream.try_clone()?);
        let connection = Arc::new(Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            out: Mutex::new(stream),
        });
        let reader = connection.clone();
        thread::spawn(move || {
            while let Ok(frame) = wire::read(&mut input) {
                reader.take(frame);
            }
            reader.lock().gone = true;
            reader.changed.notify_all();
        });
        Ok(connection)
    }

    /// Waits until the host says that it is up.
    pub(crate) fn wait_until_up(&self, deadline: &mut Deadline) -> Result<(), Missed> {
        self.wait(deadline, |state| state.up.then_some(()))
    }

    /// Asks for a process, by [`LabFrameKind::Spawn`] or [`LabFrameKind::Terminal`]; its number.
    pub(crate) fn spawn(&self, how: LabFrameKind, words: &[&str]) -> io::Result<u32> {
        let process = {
            let mut state = self.lock();
            let process = state.next;
            state.next += 1;
            state.processes.insert(process, Transcript::default());
            process
        };
        self.send(how, process, &wire::join(words.iter().copied()))?;
        Ok(process)
    }

    /// Sends a frame about a process.
    pub(crate) fn send(&self, kind: LabFrameKind, process: u32, body: &[u8]) -> io::Result<()> {
        wire::write(
            &mut *self.out.lock().unwrap_or_else(PoisonError::into_inner),
            kind,
            process,
            body,
        )
    }

    /// Waits until `read` finds something in what a process has printed.
    pub(crate) fn wait_for<T>(
        &self,
        process: u32,
        mut deadline: Deadline,
        mut read: impl FnMut(&Transcript) -> Option<T>,
    ) -> Result<T, Missed> {
        self.wait(&mut deadline, |state| {
            state.processes.get(&process).and_then(&mut read)
        })
    }

    /// Passes to `read` what a process has printed so far.
    pub(crate) fn with_transcript<T>(&self, process: u32, read: impl FnOnce(&Transcript) -> T) -> Option<T> {
        self.lock().processes.get(&process).map(read)
    }

    /// Drops what is kept of a process.
    pub(crate) fn remove(&self, process: u32) {
        self.lock().processes.remove(&process);
    }

    fn wait<T>(
        &self,
        deadline: &mut Deadline,
        mut read: impl FnMut(&LabConnectionState) -> Option<T>,
    ) -> Result<T, Missed> {
        let mut state = self.lock();
        loop {
            if let Some(found) = read(&state) {
                return Ok(found);
            }
            if state.gone {
                return Err(Missed::Host);
            }
            let left = deadline.left().ok_or(Missed::Time)?;
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn take(&self, frame: LabFrame) {
        note_progress();
        let mut state = self.lock();
        if frame.kind == LabFrameKind::Hello {
            state.up = true;
        } else if let Some(transcript) = state.processes.get_mut(&frame.process) {
            transcript.take(frame);
        }
        drop(state);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, LabConnectionState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Transcript {
    fn take(&mut self, frame: LabFrame) {
        match frame.kind {
            LabFrameKind::Stdout => self.output(0, &frame.body),
            LabFrameKind::Stderr => self.output(1, &frame.body),
            LabFrameKind::Exit => {
                for part in 0..2 {
                    self.end_line(part);
                }
                self.ended = Some(
                    frame
                        .body
                        .first_chunk()
                        .map_or(-1, |status| i32::from_le_bytes(*status)),
                );
            }
            LabFrameKind::Refused => self.refused = Some(String::from_utf8_lossy(&frame.body).into_owned()),
            LabFrameKind::Hello
            | LabFrameKind::Spawn
            | LabFrameKind::Terminal
            | LabFrameKind::Stdin
            | LabFrameKind::Signal => {}
        }
    }

    fn output(&mut self, stream: usize, bytes: &[u8]) {
        if self.stdout.len() + self.stderr.len() + bytes.len() > LONGEST_LOG {
            return;
        }
        if stream == 0 {
            &mut self.stdout
        } else {
            &mut self.stderr
        }
        .extend_from_slice(bytes);
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.parts[stream].extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                self.end_line(stream);
            }
        }
    }

    fn end_line(&mut self, stream: usize) {
        let part = std::mem::take(&mut self.parts[stream]);
        if !part.is_empty() {
            self.lines.push(
                String::from_utf8_lossy(&part)
                    .trim_end_matches(['\r', '\n'])
                    .to_owned(),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::WaitLimit;

    fn pair() -> (Arc<LabConnection>, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (LabConnection::new(ours).unwrap(), theirs)
    }

    fn soon() -> Deadline {
        WaitLimit::from(Duration::from_secs(10)).begin()
    }

    #[test]
    fn output_of_two_processes_is_kept_apart_and_in_lines() {
        let (connection, mut host) = pair();
        let first = connection.spawn(LabFrameKind::Spawn, &["a", "b"]).unwrap();
        let second = connection.spawn(LabFrameKind::Spawn, &["c"]).unwrap();
        assert_eq!(wire::split(&wire::read(&mut host).unwrap().body), ["a", "b"]);
        wire::write(&mut host, LabFrameKind::Stdout, first, b"one\r\ntw").unwrap();
        wire::write(&mut host, LabFrameKind::Stderr, first, b"aside\n").unwrap();
        wire::write(&mut host, LabFrameKind::Stdout, second, b"other").unwrap();
        wire::write(&mut host, LabFrameKind::Stdout, first, b"o\n").unwrap();
        wire::write(&mut host, LabFrameKind::Exit, first, &256i32.to_le_bytes()).unwrap();
        wire::write(&mut host, LabFrameKind::Exit, second, &9i32.to_le_bytes()).unwrap();
        let lines = |process| {
            connection.wait_for(process, soon(), |seen| {
                seen.ended.map(|end| (end, seen.lines.clone()))
            })
        };
        assert_eq!(
            lines(first).unwrap(),
            (256, vec!["one".into(), "aside".into(), "two".into()])
        );
        assert_eq!(lines(second).unwrap(), (9, vec!["other".into()]));
    }

    #[test]
    fn a_host_that_goes_ends_every_wait() {
        let (connection, host) = pair();
        let process = connection.spawn(LabFrameKind::Spawn, &["a"]).unwrap();
        drop(host);
        let missed = connection
            .wait_for(process, soon(), |seen| seen.ended)
            .unwrap_err();
        assert_eq!(missed, Missed::Host);
        assert_eq!(connection.wait_until_up(&mut soon()), Err(Missed::Host));
    }

    #[test]
    fn time_runs_out() {
        let (connection, _host) = pair();
        assert_eq!(
            connection.wait_until_up(&mut WaitLimit::from(Duration::ZERO).begin()),
            Err(Missed::Time)
        );
    }
}
