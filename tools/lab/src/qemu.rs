//! QEMU processes that end when this process ends, however it ends.

#![allow(
    unsafe_code,
    reason = "a hook between fork and exec asks the kernel to kill the child with us"
)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use rustix::process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal};

/// A running QEMU; dropping it kills and reaps it.
#[derive(Debug)]
pub(crate) struct QemuProcess(Child);

impl QemuProcess {
    /// Starts a command.
    pub(crate) fn start(command: Command) -> io::Result<Self> {
        // The kernel sends the signal when the *thread* that forked ends, so one thread forks all children and
        // lives until the process ends.
        static SPAWNER: OnceLock<Sender<QemuStart>> = OnceLock::new();
        let spawner = SPAWNER.get_or_init(|| {
            let (sender, jobs) = channel::<QemuStart>();
            thread::spawn(move || {
                for QemuStart { command, answer } in jobs {
                    // The caller waits for the answer.
                    let _ = answer.send(spawn(command));
                }
            });
            sender
        });
        let gone = |_| io::Error::other("the thread that starts processes is gone");
        let (answer, answered) = channel();
        spawner
            .send(QemuStart { command, answer })
            .map_err(|_| io::Error::other("nothing starts processes"))?;
        answered.recv().map_err(gone)?.map(Self)
    }

    /// Its process id, which no other process gets until this is dropped.
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.0)
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<String> {
        match self.0.try_wait() {
            Ok(None) => None,
            Ok(Some(status)) => Some(status.to_string()),
            Err(error) => Some(error.to_string()),
        }
    }
}

impl Drop for QemuProcess {
    fn drop(&mut self) {
        // Both fail only if it has been reaped already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct QemuStart {
    command: Command,
    answer: Sender<io::Result<Child>>,
}

fn spawn(mut command: Command) -> io::Result<Child> {
    let us = getpid();
    let die_with_us = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // If the parent died before that call, the kernel will not send the signal.
        if getppid() == Some(us) {
            Ok(())
        } else {
            Err(io::ErrorKind::NotConnected.into())
        }
    };
    // SAFETY: the hook makes two system calls and allocates nothing, as is allowed between fork and exec.
    unsafe { command.pre_exec(die_with_us) };
    command.spawn()
}
