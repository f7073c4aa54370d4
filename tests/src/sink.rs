//! Streams whose reader is missing, stuck, or gone.

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Write};
use std::process::Stdio;

use anyhow::Result;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// What becomes of a stream that a program writes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputSink {
    /// Each write fails for want of room.
    Full,
    /// A pipe whose reader closes it after one line.
    Left,
    /// A pipe that is full, and never read.
    Stuck,
}

impl OutputSink {
    /// A stream into it, and the end that is to be kept.
    pub fn open(self) -> Result<(Stdio, Option<PipeReader>)> {
        Ok(match self {
            Self::Full => (File::options().write(true).open("/dev/full")?.into(), None),
            Self::Left => {
                let (reader, writer) = io::pipe()?;
                (writer.into(), Some(reader))
            }
            Self::Stuck => {
                let (reader, writer) = full_pipe()?;
                (writer.into(), Some(reader))
            }
        })
    }
}

/// A pipe that is full.
fn full_pipe() -> Result<(PipeReader, PipeWriter)> {
    let (reader, mut writer) = io::pipe()?;
    let flags = fcntl_getfl(&writer)?;
    fcntl_setfl(&writer, flags | OFlags::NONBLOCK)?;
    while writer.write(&[b'x'; 4096]).is_ok() {}
    fcntl_setfl(&writer, flags)?;
    Ok((reader, writer))
}
