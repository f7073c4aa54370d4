//! The one way to print. Nothing of it panics, and no thread of a VM waits in it for a reader.
//!
//! A VM's process hands its lines to a bounded queue, and a thread of its own writes them (`lines.rs`): what cannot be
//! written in time is lost, counted, and the count is written when there is room again. A client has no guest that
//! could be held up: it writes by itself, and gives up on a reader that does not read.

#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]
// Tests start threads that may take their test along.
#![cfg_attr(test, allow(clippy::disallowed_methods))]

mod allowance;
mod damping;
mod descriptor;
mod lines;
mod log;

use std::io::{self, Write};
use std::panic::PanicHookInfo;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use lines::Lines;

pub use allowance::Allowance;
pub use descriptor::Descriptor;
pub use log::start_log;

/// How long a client waits for a reader of standard error, and one of standard output who is no terminal.
const CLIENT_PATIENCE: Duration = Duration::from_secs(2);
/// How long the end of a VM's process waits for its last lines to be written.
const END_PATIENCE: Duration = Duration::from_millis(500);

/// Lines for standard error. There once the process is a VM's.
static STDERR: OnceLock<Lines> = OnceLock::new();
/// The log: a file of its own, or else standard error.
static LOG: OnceLock<Lines> = OnceLock::new();
/// Whether the terminal is raw: it then takes a line feed for no more than that.
static RAW: AtomicBool = AtomicBool::new(false);

/// Prints one line to standard error. Does not fail without a reader.
pub fn print_line(line: &str) {
    let line = format!("godwit: {line}\n");
    match STDERR.get() {
        Some(stderr) => stderr.push(line.as_bytes()),
        None => {
            // There is no other place to report the error.
            let _ = Descriptor::Stderr.write_patiently(line.as_bytes(), CLIENT_PATIENCE);
        }
    }
}

/// Prints a client's answer to standard output. An error is only reported: the request was carried out.
pub fn print(text: &str) {
    let printed = Descriptor::Stdout.write_patiently(text.as_bytes(), CLIENT_PATIENCE);
    if let Err(error) = ignore_broken_pipe(printed) {
        print_line(&format!("cannot print: {error}"));
    }
}

/// Writes what is of no use if it is cut short, e.g. a picture that goes to a file, however long its reader takes.
pub fn write_stdout(bytes: &[u8]) -> io::Result<()> {
    ignore_broken_pipe(Descriptor::Stdout.write_all(bytes))
}

/// A reader that closed the pipe is no error: it has read enough.
fn ignore_broken_pipe(written: io::Result<()>) -> io::Result<()> {
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// From here on lines on standard error begin at the left by themselves, or no longer do.
pub fn set_raw_terminal(raw: bool) {
    RAW.store(raw, Ordering::Relaxed);
}

/// Waits, for a bounded time, until all lines are written.
pub fn flush() {
    [&STDERR, &LOG]
        .into_iter()
        .filter_map(OnceLock::get)
        .for_each(|lines| lines.flush(END_PATIENCE));
}

/// Prints panics as other lines are printed: the default hook would wait for the reader of standard error.
pub fn report_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let text = panic_text(panic);
        match LOG.get() {
            Some(log) => log.push(text.as_bytes()),
            None => print_line(text.trim_end()),
        }
    }));
}

fn panic_text(panic: &PanicHookInfo<'_>) -> String {
    let thread = thread::current();
    let name = thread.name().unwrap_or("without a name").to_owned();
    let mut text = format!("thread {name:?}: {panic}\n");
    let trace = std::backtrace::Backtrace::capture();
    if trace.status() == std::backtrace::BacktraceStatus::Captured {
        text.push_str(&format!("{trace}\n"));
    }
    text
}
