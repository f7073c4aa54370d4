//! The process behind an API socket, for a VM that does not answer.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::socket_peercred;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// What the program is called.
const PROGRAM: &str = "godwit";

/// A process that listens at a socket. What is done to it is done to no other that gets its number later.
pub(super) struct Owner {
    /// Its number.
    pub(super) pid: Pid,
    pidfd: OwnedFd,
}

impl Owner {
    /// The one that listens at `path`, if it is a VM's.
    pub(super) fn of(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        let pid = listener(path).with_context(|| format!("whose API socket {shown} is"))?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).with_context(|| format!("process {pid}"))?;
        // The process that listened before the descriptor was opened still does, so the descriptor is its own.
        let again = listener(path).with_context(|| format!("whose API socket {shown} is"))?;
        ensure!(
            again == pid,
            "API socket {shown}: another process listens there now"
        );
        let program = program(pid).with_context(|| format!("process {pid}"))?;
        if !program.starts_with(PROGRAM) {
            bail!(
                "API socket {shown}: expected {PROGRAM} behind it, got process {pid}, which is {program:?}"
            );
        }
        Ok(Self { pid, pidfd })
    }

    /// Readable when it has ended.
    pub(super) fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// Kills the process and waits for its end, for a limited time. Returns whether it has ended.
    pub(super) fn kill(&self, timeout: Duration) -> anyhow::Result<bool> {
        let pid = self.pid;
        pidfd_send_signal(&self.pidfd, Signal::KILL).with_context(|| format!("cannot end process {pid}"))?;
        self.wait(timeout)
    }

    /// Whether it ends within `timeout`.
    fn wait(&self, timeout: Duration) -> anyhow::Result<bool> {
        let timeout = Timespec::try_from(timeout).context("timeout")?;
        let ready = poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&timeout));
        Ok(ready.context("process")? > 0)
    }
}

/// The process that listens on the socket at `path`. The kernel answers without waiting, also if that process is
/// stopped.
pub(super) fn listener(path: &Path) -> io::Result<Pid> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket_peercred(socket.as_fd())?.pid)
}

/// A process's name, which any user may read, unlike the path of its program.
fn program(pid: Pid) -> io::Result<String> {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm"))?;
    Ok(name.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn the_process_behind_a_socket_is_found_and_others_are_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.sock");
        let ours = UnixListener::bind(&path).unwrap();
        assert_eq!(listener(&path).unwrap(), rustix::process::getpid());
        // This program's own tests are called after it.
        std::fs::write(format!("/proc/{}/comm", std::process::id()), "stranger").unwrap();
        let refused = Owner::of(&path).err().unwrap().to_string();
        assert!(refused.contains("expected godwit behind it"), "{refused}");
        drop(ours);
        let refused = listener(&path).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }
}
