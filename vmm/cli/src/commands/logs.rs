//! `logs`: what a VM's process has logged, and goes on to log.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use api::InstanceInfo;
use api::client::{Client, ClientError};
use api::rundir::{self, RundirError};
use output::write_stdout;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify;
use rustix::io::Errno;

use super::client::block_on;
use super::owner::Owner;
use crate::Exit;
use crate::args::LogsArgs;

pub(super) fn run(args: &LogsArgs) -> anyhow::Result<Exit> {
    let FoundLog { path, socket } = find(&args.vm)?;
    let mut file = File::open(&path).with_context(|| format!("log {}", path.display()))?;
    // To read a FIFO would take lines from its other reader.
    let kind = file.metadata().context("log")?;
    ensure!(kind.is_file(), "log {}: expected a regular file", path.display());
    let shown = match socket.filter(|_| args.follow) {
        Some(socket) => follow(&mut file, &path, &socket),
        None => print(&mut file),
    };
    shown.with_context(|| format!("log {}", path.display()))?;
    Ok(Exit::Done)
}

/// A log, and the VM that writes it, if there is one.
struct FoundLog {
    path: PathBuf,
    socket: Option<PathBuf>,
}

fn find(vm: &str) -> anyhow::Result<FoundLog> {
    let kept = || rundir::log_path(vm).ok().filter(|path| path.exists());
    let socket = match rundir::resolve(vm) {
        Ok(socket) => socket,
        Err(error @ RundirError::NoSuchVm { .. }) => {
            let path = kept().ok_or(error)?;
            return Ok(FoundLog { path, socket: None });
        }
        Err(error) => return Err(error.into()),
    };
    let asked: Result<InstanceInfo, _> = block_on(Client::new(&socket).get("/"))?;
    let (path, socket) = match asked {
        Ok(info) => (info.log, Some(socket)),
        // Its process hangs, and may go on.
        Err(ClientError::NoAnswer { .. }) if kept().is_some() => (kept(), Some(socket)),
        // It was killed.
        Err(ClientError::Connect { .. }) if kept().is_some() => (kept(), None),
        Err(error) => return Err(error.into()),
    };
    match path {
        Some(path) => Ok(FoundLog { path, socket }),
        None => bail!("{vm} logs to its standard error: only with --log FILE or --detach is the log kept"),
    }
}

fn print(file: &mut File) -> io::Result<()> {
    let mut chunk = vec![0; 64 << 10];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(()),
            count => write_stdout(&chunk[..count])?,
        }
    }
}

/// Prints what is there and what comes, until the process behind `socket` has ended.
fn follow(file: &mut File, path: &Path, socket: &Path) -> io::Result<()> {
    let changes = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    inotify::add_watch(&changes, path, inotify::WatchFlags::MODIFY)?;
    let Ok(owner) = Owner::of(socket) else {
        // It has just ended.
        return print(file);
    };
    loop {
        print(file)?;
        let mut ready = [
            PollFd::new(&changes, PollFlags::IN),
            PollFd::new(owner.pidfd(), PollFlags::IN),
        ];
        poll(&mut ready, None)?;
        if !ready[1].revents().is_empty() {
            return print(file);
        }
        while !matches!(rustix::io::read(&changes, &mut [0; 4096]), Err(Errno::AGAIN)) {}
    }
}
