//! What comes on standard input goes to the guest. Where that is a terminal, it is only touched while this job is in
//! its foreground: elsewhere the kernel would stop the process, and the guest with it.

use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::process::getpgrp;
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetpgrp, tcsetattr, ttyname};
use threads::Role;
use vmm::console::ConsoleInput;
use vmm::server::ApiServer;
use vmm::supervisor::SupervisorHandle;

use super::terminal::{ESCAPE, made_raw, not_raw};

/// How often a job checks whether it is in the foreground: there is no event for one that never was stopped, and there
/// whether the terminal is still raw: a shell may set its modes after it has handed it over.
const LOOK: Duration = Duration::from_millis(250);

/// The terminal that standard input is.
pub(crate) struct JobTerminal {
    file: File,
    modes: Mutex<Modes>,
}

#[derive(Default)]
struct Modes {
    /// What it had before this job made it raw; nothing while it is not raw.
    before: Option<Termios>,
    /// This job is done with it.
    restored: bool,
}

impl JobTerminal {
    /// `None` if standard input is no terminal.
    fn of_stdin() -> io::Result<Option<Arc<Self>>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        Ok(Some(Arc::new(Self {
            file: open_again(&stdin)?,
            modes: Mutex::default(),
        })))
    }

    /// Makes the terminal raw, so that every key goes to the guest, if this job is in its foreground; returns whether
    /// it is. A shell that had the terminal meanwhile has changed its modes.
    fn make_raw(&self) -> bool {
        let mut modes = self.modes();
        if modes.restored || !self.is_ours() {
            not_raw();
            return false;
        }
        let Ok(now) = tcgetattr(&self.file) else {
            return false;
        };
        let cooked = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        if now.local_modes.intersects(cooked) {
            let mut raw = now.clone();
            raw.make_raw();
            if tcsetattr(&self.file, OptionalActions::Now, &raw).is_err() {
                return false;
            }
            modes.before = Some(now);
        }
        match &modes.before {
            Some(before) => made_raw(&self.file, before),
            None => not_raw(),
        }
        true
    }

    /// Restores the terminal's modes, unless this job is in the background: then another job uses the terminal.
    pub(crate) fn restore(&self) {
        let mut modes = self.modes();
        modes.restored = true;
        not_raw();
        if let Some(before) = modes.before.take().filter(|_| self.is_ours())
            && let Err(error) = tcsetattr(&self.file, OptionalActions::Now, &before)
        {
            tracing::warn!(%error, "cannot restore the terminal; `reset` does");
        }
    }

    /// Whether this job is in the terminal's foreground. A terminal without job control is always this job's.
    fn is_ours(&self) -> bool {
        tcgetpgrp(&self.file).map_or(true, |foreground| foreground == getpgrp())
    }

    fn modes(&self) -> MutexGuard<'_, Modes> {
        self.modes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The terminal behind `stdin`, opened for this process alone where its name is known: then a read does not wait for a
/// line if the terminal has other modes by then, and the reads of other processes do not change.
fn open_again(stdin: &io::Stdin) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = ttyname(stdin, Vec::new()).and_then(|name| open(name, flags, Mode::empty()));
    Ok(File::from(match opened {
        Ok(terminal) => terminal,
        Err(_) => stdin.as_fd().try_clone_to_owned()?,
    }))
}

/// Passes standard input on to the guest. In a terminal, which is returned, the escape key goes to the supervisor
/// instead.
pub(crate) fn forward_stdin(
    server: &ApiServer,
    supervisor: SupervisorHandle,
) -> anyhow::Result<Option<Arc<JobTerminal>>> {
    let terminal = JobTerminal::of_stdin().context("terminal")?;
    if let Some(terminal) = &terminal {
        // At once, so that what is typed from now on is not echoed.
        terminal.make_raw();
    }
    let input = server.console_input().clone();
    let continued = server.continued().clone();
    let keyboard = terminal.clone();
    // Ends with the process: a read cannot be interrupted otherwise.
    threads::spawn(Role::Input, "stdin", move || match keyboard {
        Some(terminal) => forward_keys(&terminal, &continued, &input, &supervisor),
        None => forward_bytes(&input),
    })
    .context("stdin thread")?;
    Ok(terminal)
}

fn forward_bytes(input: &ConsoleInput) {
    let mut chunk = [0; 4096];
    while let Ok(count @ 1..) = io::stdin().lock().read(&mut chunk) {
        offer(input, &chunk[..count]);
    }
}

/// Until the terminal is gone. `continued` is raised when the process goes on after it was stopped.
fn forward_keys(
    terminal: &JobTerminal,
    continued: &OwnedFd,
    input: &ConsoleInput,
    supervisor: &SupervisorHandle,
) {
    let mut chunk = [0; 4096];
    loop {
        let ours = terminal.make_raw();
        if !wait(terminal, continued, ours) {
            continue;
        }
        // Not through a buffer: it would hold input that is meant for the next job in the foreground.
        match rustix::io::read(&terminal.file, &mut chunk) {
            Ok(0) => return,
            Ok(count) if chunk[..count].contains(&ESCAPE) => supervisor.escape(),
            Ok(count) => offer(input, &chunk[..count]),
            // This job has come to the background in between, or the terminal has hung up.
            Err(rustix::io::Errno::IO) if !terminal.is_ours() => {}
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(_) => return,
        }
    }
}

/// Waits for a key, or for what may bring this job to the foreground; whether there is a key for it.
fn wait(terminal: &JobTerminal, continued: &OwnedFd, ours: bool) -> bool {
    let interval = Timespec::try_from(LOOK).ok();
    let mut ready = [
        PollFd::new(continued, PollFlags::IN),
        PollFd::new(&terminal.file, PollFlags::IN),
    ];
    let watched = if ours { 2 } else { 1 };
    if !poll(&mut ready[..watched], interval.as_ref()).is_ok_and(|count| count > 0) {
        return false;
    }
    if !ready[0].revents().is_empty() {
        // Only that it was raised counts.
        let _ = rustix::io::read(continued, &mut [0; 8]);
        return false;
    }
    ours
}

fn offer(input: &ConsoleInput, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        bytes = &bytes[input.offer(bytes)..];
        if !bytes.is_empty() {
            std::thread::sleep(ConsoleInput::RETRY);
        }
    }
}
