//! The log of a VM's process.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use thiserror::Error;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::time::Uptime;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::damping::Damping;
use super::lines::Lines;
use super::{Descriptor, LOG, STDERR};

/// The log's verbosity, in tracing's syntax.
const LOG_VARIABLE: &str = "GODWIT_LOG";
/// For this user alone: lines have paths and peers in them.
const LOG_MODE: u32 = 0o600;

/// There can be no log.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum LogError {
    #[error("log file {path}")]
    Open { path: PathBuf, source: io::Error },
    #[error("log thread")]
    Thread(#[source] io::Error),
}

/// From here on this process is a VM's, and no thread waits for a reader of its output. The log goes to the file at
/// `path` or to standard error, never to standard output, which is the guest's console.
pub fn start_log(path: Option<&Path>) -> Result<(), LogError> {
    let file = path.map(open_log).transpose()?;
    let stderr = Lines::start("stderr", Descriptor::Stderr).map_err(LogError::Thread)?;
    let log = match file {
        Some(file) => Lines::start("log", Descriptor::File(file)).map_err(LogError::Thread)?,
        None => stderr.clone(),
    };
    let asked = std::env::var(LOG_VARIABLE)
        .ok()
        .and_then(|text| text.parse().ok());
    let filter: Targets = asked.unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO));
    let lines = tracing_subscriber::fmt::layer()
        .with_timer(Uptime::default())
        .with_target(false)
        // It would say so on standard error, and panic if that cannot be written either.
        .log_internal_errors(false)
        .with_writer(EventWriter(log.clone()));
    // The last layer is asked first: an event below the log's level must not count for the damping.
    let subscriber = tracing_subscriber::registry()
        .with(lines)
        .with(Damping::new(log.clone()))
        .with(filter);
    // Both are set once in a process's life.
    let _ = STDERR.set(stderr);
    let _ = LOG.set(log);
    let _ = subscriber.try_init();
    Ok(())
}

/// A FIFO without a reader does not hold up the start: it is opened for reading as well, and never read here, so that
/// lines wait for a reader as far as it has room.
fn open_log(path: &Path) -> Result<File, LogError> {
    let is_fifo = std::fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo());
    let mut options = File::options();
    if is_fifo {
        options.read(true).write(true);
    } else {
        options.create(true).append(true).mode(LOG_MODE);
    }
    // A terminal does not become this process's, and what became a FIFO just now does not block.
    let flags = OFlags::NOCTTY | OFlags::NONBLOCK;
    let file = options.custom_flags(flags.bits().cast_signed()).open(path);
    file.map_err(|source| LogError::Open {
        path: path.into(),
        source,
    })
}

/// Makes lines of events.
pub(super) struct EventWriter(pub(super) Lines);

/// One event, which comes whole.
pub(super) struct EventLine<'a>(&'a Lines);

impl<'a> MakeWriter<'a> for EventWriter {
    type Writer = EventLine<'a>;

    fn make_writer(&'a self) -> EventLine<'a> {
        EventLine(&self.0)
    }
}

impl Write for EventLine<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
