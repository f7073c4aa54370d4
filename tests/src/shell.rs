//! An interactive shell with job control, on a terminal of its own.

use std::fs::File;
use std::io::Write;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use rustix::process::Pid;
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcgetpgrp, tcsetattr};

use crate::terminal::open_terminal;
use crate::{TestHost, TestOutput};

/// An interactive bash. It ends when it is dropped, and its jobs with it.
pub struct Shell {
    /// The other end of the terminal.
    end: File,
    output: TestOutput,
    program: Child,
}

impl Shell {
    /// Starts it, with `host`'s environment.
    pub fn start(host: &TestHost) -> Result<Self> {
        let (end, terminal) = open_terminal(120, 40)?;
        let environment = host.command([""; 0]);
        // A session of its own, which the terminal controls.
        let mut command = Command::new("setsid");
        command.args(["--ctty", "--wait", "bash", "--norc", "--noprofile", "-i"]);
        for (key, value) in environment.get_envs() {
            match value {
                Some(value) => command.env(key, value),
                None => command.env_remove(key),
            };
        }
        command
            .env("PS1", "$ ")
            .env_remove("PROMPT_COMMAND")
            .stdin(terminal.try_clone()?)
            .stdout(terminal.try_clone()?)
            .stderr(Stdio::from(terminal));
        let program = command.spawn().context("bash")?;
        let output = TestOutput::follow(end.try_clone()?);
        Ok(Self { end, output, program })
    }

    /// What appears on the terminal.
    pub fn output(&self) -> &TestOutput {
        &self.output
    }

    /// Types something.
    pub fn type_text(&mut self, text: &str) -> Result<()> {
        self.end.write_all(text.as_bytes()).context("terminal")
    }

    /// Types a command, and `more` behind it.
    pub fn type_command(&mut self, command: &Command, more: &str) -> Result<()> {
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let quoted: Vec<_> = words
            .map(|word| format!("'{}'", word.to_string_lossy().replace('\'', r"'\''")))
            .collect();
        self.type_text(&format!("{}{more}\n", quoted.join(" ")))
    }

    /// The group of processes that is in the terminal's foreground.
    pub fn foreground(&self) -> Result<Pid> {
        tcgetpgrp(&self.end).context("terminal")
    }

    /// Sets the terminal as a shell does that has handed it over to a job.
    pub fn cook(&self) -> Result<()> {
        let mut modes = tcgetattr(&self.end).context("terminal")?;
        modes.local_modes |= LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        tcsetattr(&self.end, OptionalActions::Now, &modes).context("terminal")
    }

    /// How the terminal is set at the moment.
    pub fn modes(&self) -> Result<LocalModes> {
        Ok(tcgetattr(&self.end).context("terminal")?.local_modes)
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        // The kernel hangs the terminal up: jobs get SIGHUP, and stopped ones SIGCONT as well.
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}
