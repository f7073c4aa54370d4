//! Standard output, standard error and the log's file, as they are written to: each write may fail, none panics.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::stdio;

/// What is certain to go into a pipe that can be written to (pipe(7), `PIPE_BUF`).
const PIECE: usize = 4096;

/// Where output goes.
#[derive(Debug)]
pub enum Descriptor {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// A file, or a FIFO.
    File(File),
}

impl Descriptor {
    /// Whether it is a terminal.
    pub fn is_terminal(&self) -> bool {
        rustix::termios::isatty(self)
    }

    /// Writes all of it, but gives up on a reader that takes nothing for so long. A terminal's reader takes as long as
    /// he likes.
    pub(super) fn write_patiently(&self, mut bytes: &[u8], patience: Duration) -> io::Result<()> {
        let patience = (!self.is_terminal()).then_some(patience);
        while !bytes.is_empty() {
            if !self.wait_writable(patience)? {
                return Err(io::ErrorKind::TimedOut.into());
            }
            match rustix::io::write(self, &bytes[..bytes.len().min(PIECE)]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => bytes = &bytes[count..],
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Waits until a write would not; `false` if that takes longer than `patience`.
    fn wait_writable(&self, patience: Option<Duration>) -> io::Result<bool> {
        let deadline = patience.map(|patience| Instant::now() + patience);
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut [PollFd::new(self, PollFlags::OUT)], left.as_ref()) {
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Stdout => stdio::stdout(),
            Self::Stderr => stdio::stderr(),
            Self::File(file) => file.as_fd(),
        }
    }
}

/// Waits for the reader: only for threads that have nothing else to do.
impl Write for Descriptor {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match rustix::io::write(&*self, bytes) {
                // Another process that shares the open file made it non-blocking.
                Err(Errno::AGAIN) => {
                    self.wait_writable(None)?;
                }
                written => return Ok(written?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_reader_that_reads_nothing_is_given_up() {
        let (mut reader, writer) = io::pipe().unwrap();
        let descriptor = Descriptor::File(File::from(std::os::fd::OwnedFd::from(writer)));
        let much = vec![b'x'; 1 << 20];
        let error = descriptor
            .write_patiently(&much, Duration::from_millis(10))
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let reading = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).map(|_| all)
        });
        descriptor
            .write_patiently(b"and this", Duration::from_secs(60))
            .unwrap();
        drop(descriptor);
        assert!(reading.join().unwrap().unwrap().ends_with(b"xand this"));
    }

    #[test]
    fn a_reader_that_is_gone_is_an_error() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let descriptor = Descriptor::File(File::from(std::os::fd::OwnedFd::from(writer)));
        let error = descriptor
            .write_patiently(b"x", Duration::from_secs(60))
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
