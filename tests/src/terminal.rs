//! A terminal with `godwit console` on it.

use std::fs::File;
use std::process::{Child, Stdio};

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::{TestHost, Vm};

/// `godwit console` on a terminal of its own, until it is dropped.
pub struct TestTerminal {
    /// The other end of the terminal.
    end: File,
    program: Child,
}

impl TestTerminal {
    /// Attaches to `vm` of `host`, with a terminal of this size.
    pub fn attach(host: &TestHost, vm: &Vm, columns: u16, rows: u16) -> Result<Self> {
        let (end, terminal) = open_terminal(columns, rows)?;
        let mut command = host.command(["console", &vm.name]);
        command
            .stdin(terminal)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let program = command.spawn().context("godwit console")?;
        Ok(Self { end, program })
    }

    /// Gives the terminal another size.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        resize(&self.end, columns, rows)?;
        // It is no process's controlling terminal, so the kernel sends no SIGWINCH.
        kill_process(Pid::from_child(&self.program), Signal::WINCH).context("SIGWINCH")
    }
}

impl Drop for TestTerminal {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

/// A new terminal of this size: its other end, and itself.
pub(crate) fn open_terminal(columns: u16, rows: u16) -> Result<(File, File)> {
    let end = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).context("a terminal")?;
    grantpt(&end)?;
    unlockpt(&end)?;
    let path = ptsname(&end, Vec::new())?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let terminal = File::from(open(path, flags, Mode::empty())?);
    let end = File::from(end);
    resize(&end, columns, rows)?;
    Ok((end, terminal))
}

fn resize(end: &File, columns: u16, rows: u16) -> Result<()> {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(end, size).context("the terminal's size")
}
