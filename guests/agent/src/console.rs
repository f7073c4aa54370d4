//! The console: which it is, and what it does with what is typed.

use std::fs::{File, OpenOptions};
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};

/// How long its driver may take to find it, and how often the agent checks.
const PATIENCE: Duration = Duration::from_secs(600);
const INTERVAL: Duration = Duration::from_millis(10);

/// Makes the console that the kernel's command line names last the agent's input and output. /dev/console may be another
/// one when the first program starts: Linux finds a virtio console that has ports beside it from a work queue, which
/// nothing in its boot waits for.
pub(crate) fn take(line: &str) -> io::Result<()> {
    let Some(name) = named(line) else { return Ok(()) };
    let console = open(name)?;
    dup2_stdin(&console)?;
    dup2_stdout(&console)?;
    dup2_stderr(&console)?;
    quiet()
}

/// The console's name in /dev.
fn named(line: &str) -> Option<&str> {
    let mut consoles = line
        .split_ascii_whitespace()
        .filter_map(|word| word.strip_prefix("console="));
    consoles.next_back()?.split(',').next()
}

fn open(name: &str) -> io::Result<File> {
    let begun = Instant::now();
    loop {
        match OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/dev/{name}"))
        {
            Err(error) if is_early(&error) && begun.elapsed() < PATIENCE => thread::sleep(INTERVAL),
            opened => return opened,
        }
    }
}

/// Whether the device may be there later: its node comes with the driver, what is behind it with the device.
fn is_early(error: &io::Error) -> bool {
    [Errno::NOENT, Errno::NODEV, Errno::NXIO]
        .iter()
        .any(|early| error.raw_os_error() == Some(early.raw_os_error()))
}

/// Keeps the terminal from printing the commands between the agent's lines.
fn quiet() -> io::Result<()> {
    let input = io::stdin();
    let mut modes = tcgetattr(&input)?;
    modes.local_modes.remove(LocalModes::ECHO);
    Ok(tcsetattr(&input, OptionalActions::Now, &modes)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_console_counts() {
        assert_eq!(named("console=ttyS0,115200 quiet console=hvc0 x"), Some("hvc0"));
        assert_eq!(named("console=hvc0 console=ttyS0,115200n8"), Some("ttyS0"));
        assert_eq!(named("quiet earlyprintk=ttyS0"), None);
    }
}
