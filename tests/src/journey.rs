//! A guest on its way from process to process.

use anyhow::{Context, Result, ensure};
use migration::Report;

use crate::{GuestEvent, PATIENCE, TestHost, Vm, check_ticks};

/// The share of the reported downtime that the guest must have seen: less would be a clock that hides the gap.
const SEEN: f64 = 0.9;

/// A bare guest's machine and work.
#[derive(Clone, Copy, Debug)]
pub struct BareGuest<'a> {
    /// Memory in MiB.
    pub memory_mib: u64,
    /// vCPUs, all of them at work.
    pub cpus: u32,
    /// Bytes to dirty, as the guest reads them, e.g. `256M`; empty: all memory.
    pub workset: &'a str,
    /// Bytes per second, e.g. `100M` or `max`.
    pub rate: &'a str,
    /// Whether memory outside the working set is stamped as well.
    pub fill: bool,
    /// Pages that it reads from its disk at a time, at most 32; 0: it has none.
    pub reads: u32,
    /// Whether it writes each of them before.
    pub writes: bool,
    /// Whether its disk may answer with I/O errors.
    pub io_errors: bool,
}

impl Default for BareGuest<'_> {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl BareGuest<'_> {
    /// The default, for constants.
    pub const DEFAULT: Self = Self {
        memory_mib: 64,
        cpus: 1,
        workset: "16M",
        rate: "10M",
        fill: true,
        reads: 0,
        writes: false,
        io_errors: false,
    };

    /// The options of `godwit run` for it.
    pub fn options(&self, host: &TestHost) -> Result<Vec<String>> {
        let tsc_khz = host.fixtures().probe()?["tsc_khz"]
            .as_u64()
            .context("the probe knows no TSC frequency")?;
        let Self {
            memory_mib,
            cpus,
            workset,
            rate,
            fill,
            reads,
            writes,
            io_errors,
        } = *self;
        let [fill, writes, io_errors] = [fill, writes, io_errors].map(u8::from);
        let mut cmdline = format!(
            "cpus={cpus} rate={rate} reads={reads} writes={writes} io_errors={io_errors} fill={fill} \
             tsc_khz={tsc_khz}"
        );
        if !workset.is_empty() {
            cmdline.push_str(&format!(" workset={workset}"));
        }
        let kernel = host.fixtures().bare().display().to_string();
        let (cpus, memory) = (cpus.to_string(), format!("{memory_mib}M"));
        let options = [
            "--kernel",
            &kernel,
            "--cmdline",
            &cmdline,
            "--cpus",
            &cpus,
            "--memory",
            &memory,
        ];
        Ok(options.map(str::to_owned).to_vec())
    }

    /// Boots it and waits until it works.
    pub fn boot(&self, host: &TestHost, name: &str, more: &[&str]) -> Result<Vm> {
        let options = self.options(host)?;
        let vm = host.run(
            name,
            options.iter().map(String::as_str).chain(more.iter().copied()),
        )?;
        vm.process.stdout().wait("bare: ready", 0, PATIENCE, |line| {
            GuestEvent::named(line, "ready")
        })?;
        vm.next_tick()?;
        Ok(vm)
    }
}

/// The commands that a guest takes, and how its counter goes from line to line (`None`: forward).
#[derive(Clone, Copy, Debug)]
struct Commands {
    reset: &'static [u8],
    verify: &'static [u8],
    end: &'static [u8],
    step: Option<u64>,
}

impl Commands {
    const BARE: Self = Self {
        reset: b"r",
        verify: b"v",
        end: b"q",
        step: Some(1),
    };
    const AGENT: Self = Self {
        reset: b"reset\n",
        verify: b"verify\n",
        end: b"poweroff\n",
        step: None,
    };
}

/// A guest that moves from one process to the next.
pub struct Journey {
    /// The host that it moves on.
    pub host: TestHost,
    /// Where it is now.
    pub vm: Vm,
    /// What it printed in the processes before, to the last byte: a line may begin in one and end in the next.
    before: String,
    commands: Commands,
}

impl Journey {
    /// Starts with a guest that is up.
    pub fn start(host: TestHost, guest: &BareGuest<'_>, more: &[&str]) -> Result<Self> {
        let vm = guest.boot(&host, "vm-0", more)?;
        Ok(Self::of(host, vm))
    }

    /// Starts with any bare guest in a VM of the name `vm-0`.
    pub fn of(host: TestHost, vm: Vm) -> Self {
        Self::with_commands(Commands::BARE, host, vm)
    }

    /// Starts with a guest whose agent works, in a VM of the name `vm-0`.
    pub fn agent(host: TestHost, vm: Vm) -> Self {
        Self::with_commands(Commands::AGENT, host, vm)
    }

    fn with_commands(commands: Commands, host: TestHost, vm: Vm) -> Self {
        Self {
            host,
            vm,
            before: String::new(),
            commands,
        }
    }

    /// A receiver for the next move, and where it listens.
    pub fn receiver(&self, listen: &str) -> Result<(Vm, String)> {
        self.receiver_with(listen, &[])
    }

    /// The same with further options of `godwit receive`.
    pub fn receiver_with(&self, listen: &str, options: &[&str]) -> Result<(Vm, String)> {
        self.host.receive(&self.host.free_name(), listen, options)
    }

    /// Moves the guest to a new process that listens on a free port.
    pub fn hop(&mut self, arguments: &[&str]) -> Result<Report> {
        let (receiver, endpoint) = self.receiver("tcp:127.0.0.1:0")?;
        self.hop_to(receiver, &endpoint, arguments)
    }

    /// Moves the guest to `receiver`.
    pub fn hop_to(&mut self, receiver: Vm, endpoint: &str, arguments: &[&str]) -> Result<Report> {
        let report = self.vm.migrate(endpoint, arguments)?.moved()?;
        self.arrive(receiver)?;
        Ok(report)
    }

    /// Takes over what `receiver` received: the source must end by itself, with status 0.
    pub fn arrive(&mut self, receiver: Vm) -> Result<()> {
        self.vm.wait_success(PATIENCE)?;
        self.take_over(receiver)
    }

    fn take_over(&mut self, receiver: Vm) -> Result<()> {
        self.vm.process.stdout().wait_end(PATIENCE)?;
        self.before.push_str(&self.vm.process.stdout().text());
        self.vm = receiver;
        Ok(())
    }

    /// Takes over what `receiver` received from a source that died before it could end by itself.
    pub fn orphan(mut self, receiver: Vm) -> Result<Self> {
        self.vm.process.wait(PATIENCE)?;
        self.take_over(receiver)?;
        Ok(self)
    }

    /// As [`Journey::hop`], and compares the gap that the guest lived through with the report.
    pub fn hop_and_check_gap(&mut self, arguments: &[&str]) -> Result<Report> {
        self.reset_gap()?;
        let report = self.hop(arguments)?;
        // The first whole tick may have been made before the pause and printed after it.
        self.vm.tick_from(0)?;
        let seen = self.vm.next_tick()?.max_gap_us as f64 / 1e3;
        let stood = report.downtime_ms.context("no downtime")? + report.verify_ms;
        ensure!(
            seen >= SEEN * stood,
            "the guest stood still for {stood} ms and saw a gap of {seen} ms: {report:?}"
        );
        Ok(report)
    }

    /// Has the guest measure its longest gap anew.
    pub fn reset_gap(&mut self) -> Result<()> {
        self.command(self.commands.reset, "reset").map(|_| ())
    }

    /// Lets the guest check every page; returns how many it checked.
    pub fn verify(&mut self) -> Result<u64> {
        let verified = self.command(self.commands.verify, "verified")?;
        ensure!(verified.number("errors")? == 0, "the guest found {verified:?}");
        verified.number("pages")
    }

    /// Checks every tick of its life so far, across all processes: of a bare guest they follow one another without
    /// a gap.
    pub fn check_life(&self) -> Result<u64> {
        check_ticks(&self.life()?, self.commands.step)
    }

    /// All whole lines that it has printed, in all processes.
    pub fn life(&self) -> Result<String> {
        let mut life = self.before.clone() + &self.vm.process.stdout().text();
        // The last line may be on its way.
        let end = life.rfind('\n').context("the guest printed nothing")?;
        life.truncate(end);
        Ok(life)
    }

    /// Ends the guest from inside.
    pub fn end(mut self) -> Result<()> {
        self.check_life()?;
        self.vm.process.send(self.commands.end)?;
        self.vm.wait_success(PATIENCE)?;
        self.host.check_clean()
    }

    fn command(&mut self, command: &[u8], answer: &str) -> Result<GuestEvent> {
        let mark = self.vm.process.stdout().mark();
        self.vm.process.send(command)?;
        self.vm
            .process
            .stdout()
            .wait(answer, mark, PATIENCE, |line| GuestEvent::named(line, answer))
    }
}
