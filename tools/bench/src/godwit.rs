//! A guest that moves from godwit to godwit, and what each move costs.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use migration::Report;
use rustix::process::Signal;
use tests::{Fixtures, Journey, Migration, PATIENCE, TestHost, TestProcess, Tick, Vm};

use crate::cpu;
use crate::guest::{BenchGuest, PAGE, gap_after_arrival, reset_gap, ticks, wait_ready};
use crate::sentinel::Window;
use crate::warm::Warm;

/// A guest on its way from process to process.
pub(crate) struct Godwit {
    pub(crate) guest: BenchGuest,
    pub(crate) journey: Journey,
}

/// How a migration is asked for.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Asked<'a> {
    /// More options of `godwit migrate`.
    pub(crate) migrate: &'a [&'a str],
    /// Whether the destination touches all of its memory before it starts.
    pub(crate) reserve: bool,
    /// Over a unix socket, to a destination that maps the guest's shared memory and needs none of its own.
    pub(crate) handover: bool,
    /// Whether all that counts is that the promise is kept. A stall can only break it, so a run that kept it in
    /// spite of one says enough.
    pub(crate) promise: bool,
}

/// How a migration ended.
#[derive(Clone, Debug)]
pub(crate) struct MigrationEnd {
    /// What it says itself.
    pub(crate) report: Report,
    /// Whether the guest is somewhere else now.
    pub(crate) moved: bool,
    /// The longest gap that the guest saw, in milliseconds, where it moved.
    pub(crate) gap_ms: Option<f64>,
    /// CPU time of both processes.
    pub(crate) cpu: Duration,
    /// The guest's ticks at the source, the last one right before it left.
    pub(crate) ticks: Vec<Tick>,
    /// How many of them there were when it began.
    pub(crate) ticks_before: usize,
    /// When it was measured.
    pub(crate) window: Window,
}

impl Godwit {
    /// Boots the guest; `more` are options of `godwit run`.
    pub(crate) fn start(fixtures: &Fixtures, guest: BenchGuest, more: &[&str]) -> Result<Self> {
        let _warm = Warm::lend(guest.memory_mib)?;
        let host = TestHost::with(fixtures.clone())?;
        let (kernel, cmdline) = (fixtures.bare(), guest.cmdline(fixtures)?);
        let memory = format!("{}M", guest.memory_mib);
        let cpus = guest.cpus.to_string();
        let options = [
            "--cmdline",
            &cmdline,
            "--cpus",
            &cpus,
            "--memory",
            &memory,
            "--kernel",
            text(&kernel)?,
        ];
        let vm = host.run("vm-0", options.iter().chain(more))?;
        wait_ready(&vm.process)?;
        Ok(Self {
            guest,
            journey: Journey::of(host, vm),
        })
    }

    /// The process that the guest runs in.
    pub(crate) fn process(&self) -> &TestProcess {
        &self.journey.vm.process
    }

    /// Stops the whole process, so that it takes no CPU time from the contender that is measured now.
    pub(crate) fn freeze(&self) -> Result<()> {
        self.process().signal(Signal::STOP)
    }

    /// Lets it go on.
    pub(crate) fn thaw(&self) -> Result<()> {
        self.process().signal(Signal::CONT)
    }

    /// A process that waits for the guest, and where it listens.
    pub(crate) fn receiver(&mut self, asked: &Asked<'_>) -> Result<(Vm, String)> {
        let name = self.journey.host.free_name();
        let memory = format!("{}M", self.guest.memory_mib);
        let reserve: &[&str] = if asked.reserve {
            &["--reserve", &memory]
        } else {
            &[]
        };
        let listen = if asked.handover {
            format!(
                "unix:{}",
                text(&self.journey.host.path(&format!("{name}.migrate")))?
            )
        } else {
            "tcp:127.0.0.1:0".into()
        };
        self.journey.host.receive(&name, &listen, reserve)
    }

    /// Tries to move the guest to a new process. It is an error only if it is unknown where the guest is.
    pub(crate) fn hop(&mut self, asked: &Asked<'_>) -> Result<MigrationEnd> {
        self.guest.settle(self.process())?;
        let _warm = if asked.handover {
            None
        } else {
            Some(Warm::lend(self.guest.memory_mib)?)
        };
        let (receiver, endpoint) = self.receiver(asked)?;
        reset_gap(&mut self.journey.vm.process)?;
        let (source, destination) = (self.process().id(), receiver.process.id());
        let cpu_of_both = || Ok::<_, anyhow::Error>(cpu::time_of(source)? + cpu::time_of(destination)?);
        let output = self.process().stdout().clone();
        let ticks_before = ticks(&output).len();
        let cpu_before = cpu_of_both()?;
        let (migration, window) = Window::of(|| self.journey.vm.migrate(&endpoint, asked.migrate));
        let migration = migration?;
        // A source whose guest has gone has ended, but its parent has not waited for it: its CPU time is still there.
        let cpu = cpu_of_both()?.saturating_sub(cpu_before);
        let (report, moved) = report_of(migration)?;
        let mut gap_ms = None;
        if moved {
            self.journey.arrive(receiver)?;
            gap_ms = Some(gap_after_arrival(self.process())?);
        }
        Ok(MigrationEnd {
            report,
            moved,
            gap_ms,
            cpu,
            ticks: ticks(&output),
            ticks_before,
            window,
        })
    }
}

/// The report, and whether the guest moved.
pub(crate) fn report_of(migration: Migration) -> Result<(Report, bool)> {
    match migration.code {
        Some(0) => Ok((migration.moved()?, true)),
        Some(1) => Ok((migration.report.context("failed without a report")?, false)),
        code => bail!("godwit migrate ended with {code:?}: {}", migration.stderr),
    }
}

/// Waits for the end of a `godwit migrate`.
pub(crate) fn finished(process: TestProcess) -> Result<Migration> {
    Migration::of(process.finish(PATIENCE)?)
}

impl MigrationEnd {
    /// Bytes of memory content that were sent.
    pub(crate) fn data_bytes(&self) -> f64 {
        (self.report.pages_sent * PAGE) as f64
    }

    /// Bytes of memory per second in the first pass over all of it, from its first page to its last.
    pub(crate) fn first_pass_rate(&self) -> Option<f64> {
        let first = self.report.rounds.first()?;
        // What was sent in later rounds must not count, nor what is on the wire besides pages.
        let bytes = self.data_bytes().min(first.bytes as f64);
        (first.ms > 0.0).then(|| bytes / first.ms * 1e3)
    }

    /// One line about it.
    pub(crate) fn summary(&self) -> String {
        let Report {
            total_ms,
            rounds,
            error,
            ..
        } = &self.report;
        match self.report.downtime_ms {
            Some(downtime) if self.moved => format!(
                "moved in {total_ms:.0} ms ({} rounds, {:.0} MB/s at first), downtime {downtime:.2} ms (the guest saw {:.2}), predicted {:.2} and {:.0} ms",
                rounds.len(),
                self.first_pass_rate().unwrap_or_default() / 1e6,
                self.gap_ms.unwrap_or_default(),
                self.report.predicted_downtime_ms.unwrap_or_default(),
                self.report.predicted_total_ms.unwrap_or_default(),
            ),
            _ => format!(
                "not moved after {total_ms:.0} ms: {}",
                error.as_deref().unwrap_or("no reason")
            ),
        }
    }
}

fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is no UTF-8", path.display()))
}
