//! `cargo xtask lab`: emulated hosts by hand, with a shell on the first.

use std::io::{Read, Write};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use ::lab::{Lab, LabProcess, Payload};
use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

use crate::guests::{self, Artifact};
use crate::packages;
use crate::runner::build_godwit;
use crate::workspace::print_status;

#[derive(clap::Args)]
pub(crate) struct LabOptions {
    /// Number of hosts
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=250))]
    hosts: u8,
    /// MiB of a disk that all hosts share as /dev/vda
    #[arg(long, default_value_t = 64)]
    disk: u64,
}

/// Starts the hosts and lends the first one this terminal.
pub(crate) fn shell(options: &LabOptions) -> Result<()> {
    let artifacts = guests::build(&Artifact::LAB)?;
    packages::ensure(&["qemu-system-x86"])?;
    print_status("building godwit");
    let godwit = build_godwit()?;
    print_status(format_args!("starting {} hosts", options.hosts));
    let payload = Payload::new(artifacts).with("bin/godwit", godwit);
    let lab = Lab::builder(payload)
        .hosts(options.hosts.into())
        .shared_disk(options.disk << 20)
        .start()?;
    let addresses: Vec<_> = (0..options.hosts)
        .map(|host| lab.host(host.into()).address().to_string())
        .collect();
    print_status(format_args!(
        "hosts at {}; this is the first; leave it with \"exit\"",
        addresses.join(", ")
    ));

    let size = tcgetwinsize(std::io::stdout()).map_or((24, 80), |size| (size.ws_row, size.ws_col));
    let command = format!("stty rows {} cols {}; exec sh", size.0, size.1);
    let process = Arc::new(lab.host(0).terminal(&["sh", "-c", &command])?);
    let _raw = Raw::enter();
    let input = process.clone();
    // Ends with the program: a read from a terminal cannot be taken back.
    thread::spawn(move || carry_input(&input));
    carry_output(&process)
}

fn carry_input(to: &LabProcess) {
    /// Control-D: the end of input, for a program on a terminal.
    const END: &[u8] = b"\x04";
    let mut buffer = [0; 4096];
    while let Ok(len) = std::io::stdin().read(&mut buffer) {
        let bytes = if len == 0 { END } else { &buffer[..len] };
        if to.write_stdin(bytes).is_err() || len == 0 {
            return;
        }
    }
}

fn carry_output(from: &LabProcess) -> Result<()> {
    /// A shell may be silent for long.
    const DAY: Duration = Duration::from_secs(24 * 3600);
    let mut done = 0;
    loop {
        let bytes = from.read_stdout(done, DAY)?;
        if bytes.is_empty() {
            return Ok(());
        }
        done += bytes.len();
        let mut stdout = std::io::stdout().lock();
        stdout
            .write_all(&bytes)
            .and_then(|()| stdout.flush())
            .context("cannot write to the terminal")?;
    }
}

/// A terminal in raw mode until this is dropped; nothing where there is no terminal.
struct Raw(Option<Termios>);

impl Raw {
    fn enter() -> Self {
        let stdin = std::io::stdin();
        if !isatty(&stdin) {
            return Self(None);
        }
        let Ok(before) = tcgetattr(&stdin) else {
            return Self(None);
        };
        let mut raw = before.clone();
        raw.make_raw();
        Self(
            tcsetattr(&stdin, OptionalActions::Now, &raw)
                .ok()
                .map(|()| before),
        )
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // The terminal may be gone.
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, before);
        }
    }
}
