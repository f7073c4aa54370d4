//! A child process that never outlives the test.
#![allow(unsafe_code)] // `pre_exec`: the child asks for a signal at the death of its parent.

use std::io::{Write, empty};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail, ensure};
use lab::WaitLimit;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, set_parent_process_death_signal};

use crate::TestOutput;

/// A running program. Dropping it kills and reaps it.
pub struct TestProcess {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: TestOutput,
    stderr: TestOutput,
    shown: String,
}

/// Standard streams of a program that go elsewhere than to the test.
#[derive(Default)]
pub struct Elsewhere {
    /// Where standard output goes.
    pub stdout: Option<Stdio>,
    /// Where standard error goes.
    pub stderr: Option<Stdio>,
}

/// A program that has ended.
#[derive(Debug)]
pub struct Finished {
    /// The exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// What it printed on stdout.
    pub stdout: String,
    /// What it printed on stderr.
    pub stderr: String,
}

impl TestProcess {
    /// Starts the command with its standard streams as pipes of this process.
    ///
    /// The process dies with the thread that calls this, at the latest.
    pub fn spawn(command: Command) -> Result<Self> {
        Self::spawn_to(command, Elsewhere::default())
    }

    /// The same with some of its output elsewhere; what the test sees of it is empty.
    pub fn spawn_to(mut command: Command, elsewhere: Elsewhere) -> Result<Self> {
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let shown = words
            .map(|word| word.to_string_lossy())
            .collect::<Vec<_>>()
            .join(" ");
        command
            .stdin(Stdio::piped())
            .stdout(elsewhere.stdout.unwrap_or_else(Stdio::piped))
            .stderr(elsewhere.stderr.unwrap_or_else(Stdio::piped));
        // SAFETY: the closure runs between fork and exec and makes a single prctl call: no allocation, no lock.
        unsafe {
            command.pre_exec(|| set_parent_process_death_signal(Some(Signal::KILL)).map_err(Into::into));
        }
        let mut child = command.spawn().with_context(|| format!("cannot start {shown}"))?;
        let stdin = child.stdin.take();
        let stdout = child
            .stdout
            .take()
            .map_or_else(|| TestOutput::follow(empty()), TestOutput::follow);
        let stderr = child
            .stderr
            .take()
            .map_or_else(|| TestOutput::follow(empty()), TestOutput::follow);
        Ok(Self {
            child,
            stdin,
            stdout,
            stderr,
            shown,
        })
    }

    /// Runs the command to its end.
    pub fn run(command: Command, patience: impl Into<WaitLimit>) -> Result<Finished> {
        let mut process = Self::spawn(command)?;
        process.close_stdin();
        process.finish(patience)
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Standard output so far.
    pub fn stdout(&self) -> &TestOutput {
        &self.stdout
    }

    /// Standard error so far.
    pub fn stderr(&self) -> &TestOutput {
        &self.stderr
    }

    /// Writes to its standard input.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        let stdin = self.stdin.as_mut().context("standard input is closed")?;
        stdin
            .write_all(bytes)
            .and_then(|()| stdin.flush())
            .with_context(|| format!("input of {}", self.shown))
    }

    /// Ends its standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(self.pid(), signal).with_context(|| format!("cannot signal {}", self.shown))
    }

    /// Waits for its end; an error if it is still there after that.
    pub fn wait(&mut self, patience: impl Into<WaitLimit>) -> Result<ExitStatus> {
        let pidfd = pidfd_open(self.pid(), PidfdFlags::empty()).context("pidfd_open")?;
        let mut deadline = patience.into().begin();
        while let Some(left) = deadline.left() {
            let left = Timespec::try_from(left).context("timeout")?;
            if poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&left)).context("poll")? > 0 {
                return self.child.wait().context("wait");
            }
        }
        bail!(
            "{} does not end; its last messages:\n{}",
            self.shown,
            self.stderr.text()
        )
    }

    /// Waits for its end and returns what it printed.
    pub fn finish(mut self, patience: impl Into<WaitLimit>) -> Result<Finished> {
        let patience = patience.into();
        let status = self.wait(patience)?;
        self.stdout.wait_end(patience)?;
        self.stderr.wait_end(patience)?;
        Ok(Finished {
            code: status.code(),
            stdout: self.stdout.text(),
            stderr: self.stderr.text(),
        })
    }

    /// Waits for an end with status 0.
    pub fn wait_success(&mut self, patience: impl Into<WaitLimit>) -> Result<()> {
        let patience = patience.into();
        let status = self.wait(patience)?;
        if !status.success() {
            let how = status
                .signal()
                .map_or_else(|| status.to_string(), |signal| format!("signal {signal}"));
            bail!(
                "{} ended with {how}; its last messages:\n{}",
                self.shown,
                self.stderr.text()
            );
        }
        self.stdout.wait_end(patience)
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for TestProcess {
    fn drop(&mut self) {
        // It may have ended long ago; then neither does anything.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Finished {
    /// Fails unless the exit code is `code`.
    pub fn expect_code(&self, code: i32) -> Result<&Self> {
        ensure!(
            self.code == Some(code),
            "expected exit code {code}, got {:?}\nstdout: {}\nstderr: {}",
            self.code,
            self.stdout,
            self.stderr
        );
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn status_and_output_are_kept() {
        let finished =
            TestProcess::run(shell("echo out; echo err >&2; exit 3"), Duration::from_secs(10)).unwrap();
        assert_eq!(
            (finished.stdout.as_str(), finished.stderr.as_str()),
            ("out\n", "err\n")
        );
        finished.expect_code(3).unwrap();
        assert!(
            finished
                .expect_code(0)
                .unwrap_err()
                .to_string()
                .contains("got Some(3)")
        );
    }

    #[test]
    fn dropping_kills() {
        let mut process = TestProcess::spawn(shell("echo up; read line")).unwrap();
        process
            .stdout()
            .wait("up", 0, Duration::from_secs(10), |line| {
                (line == "up").then_some(())
            })
            .unwrap();
        assert!(process.wait(Duration::from_millis(10)).is_err());
        let output = process.stdout().clone();
        drop(process);
        output.wait_end(Duration::from_secs(10)).unwrap();
    }
}
