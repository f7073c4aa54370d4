//! `--detach`: the VM runs on in a session of its own, and the command that started it reports whether it came up.
#![allow(unsafe_code)] // fork

use std::fs::{self, OpenOptions};
use std::io::{self, PipeReader, PipeWriter, Read, Write, pipe};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use api::rundir::LogDraft;
use rustix::process::{
    Pid, Signal, WaitOptions, getpid, getppid, set_parent_process_death_signal, setsid, waitpid,
};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use crate::Exit;
use crate::args::CommonArgs;

/// Who a process is after [`detach`].
pub(super) enum DetachedPart {
    /// The VM's.
    Vm(Launch),
    /// That which started the VM, and what it ends with.
    Starter(Exit),
}

/// What a VM's process still has to do for the command that started it.
pub(super) struct Launch {
    log: LogTarget,
    /// The pipe to the command that waits until the VM is up.
    waiting: Option<PipeWriter>,
}

/// Where the log goes.
enum LogTarget {
    Stderr,
    File(PathBuf),
    /// Beside the name that it is to have.
    Draft(LogDraft),
}

/// Leaves the VM to a process of its own, if `common` says so, which nothing ties to the terminal: it has its own
/// session, and no input.
pub(super) fn detach(common: &CommonArgs) -> anyhow::Result<DetachedPart> {
    // The client that asks for the path may have another working directory.
    let file = common.log.as_deref().map(std::path::absolute).transpose();
    let file = file.context("log file")?;
    if !common.detach {
        let log = file.map_or(LogTarget::Stderr, LogTarget::File);
        return Ok(DetachedPart::Vm(Launch { log, waiting: None }));
    }
    let (reader, writer) = pipe().context("pipe")?;
    let starter = getpid();
    if let Some(vm) = fork().context("cannot start the VM's process")? {
        drop(writer);
        return Ok(DetachedPart::Starter(wait_for(vm, reader)?));
    }
    drop(reader);
    // If the waiting command is interrupted, the VM ends as well: the user would not know of it.
    set_parent_process_death_signal(Some(Signal::KILL)).context("the starter's end")?;
    ensure!(getppid() == Some(starter), "the starter has ended");
    setsid().context("session")?;
    let nothing = OpenOptions::new().read(true).write(true).open("/dev/null");
    let nothing = nothing.context("/dev/null")?;
    dup2_stdin(&nothing).context("standard input")?;
    dup2_stdout(&nothing).context("standard output")?;
    let log = match file {
        Some(file) => LogTarget::File(file),
        None => LogTarget::Draft(LogDraft::create(&super::launch::checked_name(common)?)?),
    };
    Ok(DetachedPart::Vm(Launch {
        log,
        waiting: Some(writer),
    }))
}

impl Launch {
    /// The file that the log is written to, if it is one.
    pub(super) fn log(&self) -> Option<&Path> {
        match &self.log {
            LogTarget::Stderr => None,
            LogTarget::File(path) => Some(path),
            LogTarget::Draft(draft) => Some(draft.path()),
        }
    }

    /// Whether the VM has no terminal.
    pub(super) fn is_detached(&self) -> bool {
        self.waiting.is_some()
    }

    /// The VM has its name, and so has its log from now on. Returns where that is.
    pub(super) fn named(&mut self) -> anyhow::Result<Option<PathBuf>> {
        let path = match std::mem::replace(&mut self.log, LogTarget::Stderr) {
            LogTarget::Stderr => None,
            LogTarget::File(path) => Some(path),
            LogTarget::Draft(draft) => Some(draft.publish()?),
        };
        self.log = path.clone().map_or(LogTarget::Stderr, LogTarget::File);
        Ok(path)
    }

    /// The VM is up. From here on it says nothing to where it was started.
    pub(super) fn up(self, name: &str) {
        let (Some(mut waiting), LogTarget::File(log)) = (self.waiting, self.log) else {
            return;
        };
        output::flush();
        if let Err(error) = set_parent_process_death_signal(None) {
            tracing::warn!(%error, "the VM ends with whoever started it");
        }
        // What is not part of the log, the message of a panic for example, goes to the same file.
        match OpenOptions::new().append(true).open(&log) {
            Ok(log) => {
                if let Err(error) = dup2_stderr(&log) {
                    tracing::warn!(%error, "standard error stays where it was");
                }
            }
            Err(error) => tracing::warn!(%error, "standard error stays where it was"),
        }
        if let Err(error) = waiting.write_all(name.as_bytes()) {
            tracing::warn!(%error, "whoever started this VM does not hear that it is up");
        }
    }
}

/// Waits until the VM is up, or has ended. The VM's process has printed its own error.
fn wait_for(vm: Pid, mut news: PipeReader) -> anyhow::Result<Exit> {
    let mut name = String::new();
    news.read_to_string(&mut name).context("news of the VM")?;
    if !name.is_empty() {
        // A user who does not read the name knows it, or finds it by `godwit ps`.
        output::print(&format!("{name}\n"));
        return Ok(Exit::Done);
    }
    let ended = waitpid(Some(vm), WaitOptions::empty()).context("the VM's process")?;
    let code = ended.and_then(|(_, status)| status.exit_status());
    let known = [Exit::Usage, Exit::InDoubt, Exit::GuestFailed];
    let exit = known.into_iter().find(|exit| code == Some(*exit as i32));
    Ok(exit.unwrap_or(Exit::Failed))
}

/// The process twice: `None` in the new one, its number in the old one.
fn fork() -> anyhow::Result<Option<Pid>> {
    let status = fs::read_to_string("/proc/self/status")?;
    let threads = status.lines().find_map(|line| line.strip_prefix("Threads:"));
    let threads = threads.map(str::trim);
    ensure!(
        threads == Some("1"),
        "expected one thread so far, got {threads:?}"
    );
    // SAFETY: there is no other thread, so that the new process finds every lock free and all of memory whole.
    let pid = unsafe { libc::fork() };
    match pid {
        0 => Ok(None),
        pid => Ok(Some(
            Pid::from_raw(pid)
                .filter(|_| pid > 0)
                .ok_or_else(io::Error::last_os_error)?,
        )),
    }
}
