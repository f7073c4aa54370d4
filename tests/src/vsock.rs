//! The other end of the echo services that guests' agents have on vsock and on the ports of their consoles.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::PATIENCE;

/// Where a guest's agent listens.
pub const ECHO_PORT: u32 = 1024;

/// After which a device gives up a connection that the guest does not answer.
const ANSWER_TIME: Duration = Duration::from_secs(8);

/// A stream to a program in a guest that sends back what comes.
pub struct Echo {
    stream: UnixStream,
    /// Bytes checked so far: no two places of a stream look alike.
    checked: u64,
}

impl Echo {
    /// Connects to a port of the guest whose socket is at `uds`. A guest that is too busy to answer in the time that it
    /// is given is asked again.
    pub fn connect(uds: &Path, port: u32) -> Result<Self> {
        let mut deadline = PATIENCE.begin();
        loop {
            let begin = Instant::now();
            let connected = Self::request_connection(uds, port);
            // A refusal comes at once; only a guest that does not answer takes longer.
            if connected.is_ok() || begin.elapsed() < ANSWER_TIME || deadline.left().is_none() {
                return connected;
            }
            eprintln!("not answered within {ANSWER_TIME:?}");
        }
    }

    fn request_connection(uds: &Path, port: u32) -> Result<Self> {
        let stream = UnixStream::connect(uds).with_context(|| uds.display().to_string())?;
        let mut echo = Self::over(stream)?;
        writeln!(echo.stream, "CONNECT {port}")?;
        let line = echo.line()?;
        ensure!(line.starts_with("OK "), "expected OK, got {line:?}");
        Ok(echo)
    }

    /// Connects to a port of the guest's console whose socket is at `uds`.
    pub fn port(uds: &Path) -> Result<Self> {
        Self::over(UnixStream::connect(uds).with_context(|| uds.display().to_string())?)
    }

    /// Takes the guest that connects to a listener.
    pub fn accept(listener: &UnixListener) -> Result<Self> {
        Self::over(listener.accept()?.0)
    }

    fn over(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(PATIENCE.longest))?;
        stream.set_write_timeout(Some(PATIENCE.longest))?;
        Ok(Self { stream, checked: 0 })
    }

    /// A line, and not a byte of what follows it.
    fn line(&mut self) -> Result<String> {
        let begin = Instant::now();
        let mut line = String::new();
        let mut byte = [0];
        while !line.ends_with('\n') {
            let read = self.stream.read(&mut byte).context("a line")?;
            let after = begin.elapsed();
            ensure!(
                read == 1,
                "expected a line, got {line:?} and the end after {after:?}"
            );
            line.push(byte[0].into());
        }
        Ok(line)
    }

    /// Sends so many bytes, and checks that they come back.
    pub fn check(&mut self, bytes: usize) -> Result<()> {
        let from = self.checked;
        let sent: Vec<u8> = (from..from + bytes as u64).map(content).collect();
        let mut writer = self.stream.try_clone()?;
        let mut got = vec![0; bytes];
        std::thread::scope(|scope| {
            let written = scope.spawn(|| writer.write_all(&sent));
            let read = self.stream.read_exact(&mut got).context("the echo");
            written
                .join()
                .ok()
                .context("the writer panicked")?
                .context("sending")?;
            read
        })?;
        if let Some(at) = (0..bytes).find(|at| got[*at] != sent[*at]) {
            let place = from + at as u64;
            bail!("byte {place} of the echo: expected {}, got {}", sent[at], got[at]);
        }
        self.checked += bytes as u64;
        Ok(())
    }

    /// Waits until the other side has ended the stream.
    pub fn wait_end(mut self) -> Result<()> {
        match self.stream.read(&mut [0]) {
            Ok(0) => Ok(()),
            Ok(_) => bail!("expected the end of the stream, got data"),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
            Err(error) => Err(error).context("expected the end of the stream"),
        }
    }
}

/// The byte at a place of a stream.
fn content(place: u64) -> u8 {
    (place.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}
