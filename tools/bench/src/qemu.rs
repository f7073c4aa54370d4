//! QEMU with the same guest, and its migration to another QEMU.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;
use tests::{Fixtures, PATIENCE, TestProcess, Tick};

use crate::cpu;
use crate::guest::{BenchGuest, gap_after_arrival, reset_gap, ticks, wait_ready};
use crate::qmp::{Qmp, time_ms};
use crate::sentinel::Window;
use crate::warm::Warm;

/// More than any link: QEMU has no word for "as fast as possible".
const NO_CAP: u64 = 100_000_000_000;

/// How QEMU migrates.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QemuSettings {
    /// The downtime that it may plan with.
    pub(crate) limit: Duration,
    /// Bytes per second; it lifts the cap for the final copy.
    pub(crate) bandwidth: Option<u64>,
    /// Channels besides the main one.
    pub(crate) multifd: Option<u32>,
    /// Whether it slows down vCPUs that dirty too fast.
    pub(crate) auto_converge: bool,
    /// Whether the destination touches all of its memory before it starts.
    pub(crate) prealloc: bool,
}

/// What one migration was.
#[derive(Clone, Debug)]
pub(crate) struct Moved {
    /// From the first to about the last byte of memory, and the downtime, which lies within.
    pub(crate) total_ms: f64,
    /// From the source's stop to the destination's start, by the times of QEMU's own events.
    pub(crate) downtime_ms: f64,
    /// The longest gap that the guest saw.
    pub(crate) gap_ms: f64,
    /// Bytes of guest memory put on the wire.
    pub(crate) bytes: f64,
    /// Bytes of pages that were not zero.
    pub(crate) data_bytes: f64,
    /// CPU time of both processes.
    pub(crate) cpu: Duration,
    /// The guest's ticks at the source, the last one right before it left.
    pub(crate) ticks: Vec<Tick>,
    /// How many of them there were when it began.
    pub(crate) ticks_before: usize,
    /// When it was measured.
    pub(crate) window: Window,
}

/// A guest that moves from QEMU to QEMU.
pub(crate) struct QemuJourney {
    fixtures: Fixtures,
    guest: BenchGuest,
    /// More options of each process.
    more: Vec<String>,
    directory: TempDir,
    vm: Instance,
    count: u32,
}

struct Instance {
    process: TestProcess,
    qmp: Qmp,
}

impl QemuJourney {
    /// Boots the guest; `more` are options of QEMU.
    pub(crate) fn start(fixtures: &Fixtures, guest: BenchGuest, more: &[String]) -> Result<Self> {
        let _warm = Warm::lend(guest.memory_mib)?;
        let directory = tempfile::Builder::new().prefix("godwit-bench-").tempdir()?;
        let arguments = [instance_arguments(fixtures, guest, false)?, more.to_vec()].concat();
        let vm = Instance::start(arguments, directory.path(), 0, &[])?;
        wait_ready(&vm.process)?;
        Ok(Self {
            fixtures: fixtures.clone(),
            guest,
            more: more.to_vec(),
            directory,
            vm,
            count: 0,
        })
    }

    /// Its process.
    pub(crate) fn process(&self) -> &TestProcess {
        &self.vm.process
    }

    /// Stops the whole process, so that it takes no CPU time from the contender that is measured now.
    pub(crate) fn freeze(&self) -> Result<()> {
        self.vm.process.signal(Signal::STOP)
    }

    /// Lets it go on.
    pub(crate) fn thaw(&self) -> Result<()> {
        self.vm.process.signal(Signal::CONT)
    }

    /// Moves the guest to a new process and ends the old one.
    pub(crate) fn hop(&mut self, settings: &QemuSettings) -> Result<Moved> {
        self.guest.settle(&self.vm.process)?;
        let _warm = Warm::lend(self.guest.memory_mib)?;
        self.count += 1;
        let mut receiver = self.receiver(settings)?;
        receiver.configure(settings)?;
        receiver
            .qmp
            .execute("migrate-incoming", json!({"uri": "tcp:127.0.0.1:0"}))?;
        let answer = receiver.qmp.execute("query-migrate", json!({}))?;
        let port = answer["socket-address"][0]["port"]
            .as_str()
            .context("QEMU does not say where it listens")?;
        self.vm.configure(settings)?;
        reset_gap(&mut self.vm.process)?;
        let output = self.vm.process.stdout().clone();
        let ticks_before = ticks(&output).len();
        let cpu_before = self.cpu_time(&receiver)?;
        let uri = format!("tcp:127.0.0.1:{port}");
        let (result, window) = Window::of(|| self.vm.migrate_to(&uri, &mut receiver));
        let downtime_ms = result.with_context(|| {
            let why = self.vm.qmp.execute("query-migrate", json!({}));
            let why = why.map_or_else(|error| error.to_string(), |why| why["error-desc"].to_string());
            format!(
                "{why}; {}{}",
                self.vm.process.stderr().text(),
                receiver.process.stderr().text()
            )
        })?;
        let cpu = self.cpu_time(&receiver)?.saturating_sub(cpu_before);
        let report = self.vm.qmp.execute("query-migrate", json!({}))?;
        let gap_ms = gap_after_arrival(&receiver.process)?;
        let source = std::mem::replace(&mut self.vm, receiver);
        source.quit()?;
        let number = |value: &Value, name: &str| {
            value[name]
                .as_f64()
                .with_context(|| format!("QEMU's report has no {name}: {report}"))
        };
        Ok(Moved {
            total_ms: number(&report, "total-time")? - number(&report, "setup-time")?,
            downtime_ms,
            gap_ms,
            bytes: number(&report["ram"], "transferred")?,
            data_bytes: number(&report["ram"], "normal-bytes")?,
            cpu,
            ticks: ticks(&output),
            ticks_before,
            window,
        })
    }

    fn receiver(&self, settings: &QemuSettings) -> Result<Instance> {
        let arguments = instance_arguments(&self.fixtures, self.guest, settings.prealloc)?;
        let arguments = [arguments, self.more.clone()].concat();
        let incoming = ["-incoming", "defer"];
        Instance::start(arguments, self.directory.path(), self.count, &incoming)
    }

    fn cpu_time(&self, receiver: &Instance) -> Result<Duration> {
        Ok(cpu::time_of(self.vm.process.id())? + cpu::time_of(receiver.process.id())?)
    }
}

impl Instance {
    fn start(arguments: Vec<String>, directory: &Path, number: u32, more: &[&str]) -> Result<Self> {
        let socket: PathBuf = directory.join(format!("qmp-{number}"));
        let mut command = Command::new("qemu-system-x86_64");
        command.args(arguments).args(more);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
        let process = TestProcess::spawn(command)?;
        let qmp = Qmp::connect(&socket).with_context(|| process.stderr().text())?;
        Ok(Self { process, qmp })
    }

    fn configure(&mut self, settings: &QemuSettings) -> Result<()> {
        let capability = |name: &str, state: bool| json!({"capability": name, "state": state});
        let capabilities = json!([
            capability("events", true),
            capability("multifd", settings.multifd.is_some()),
            capability("auto-converge", settings.auto_converge),
        ]);
        self.qmp
            .execute("migrate-set-capabilities", json!({"capabilities": capabilities}))?;
        let parameters = json!({
            "downtime-limit": settings.limit.as_millis() as u64,
            "max-bandwidth": settings.bandwidth.unwrap_or(NO_CAP),
            "multifd-channels": settings.multifd.unwrap_or(2),
        });
        self.qmp.execute("migrate-set-parameters", parameters)?;
        Ok(())
    }

    /// Returns the downtime.
    fn migrate_to(&mut self, uri: &str, receiver: &mut Self) -> Result<f64> {
        self.qmp.clear_events();
        self.qmp.execute("migrate", json!({"uri": uri}))?;
        let mut stopped = None;
        self.qmp.wait("end of the migration", |event| {
            if event["event"] == "STOP" {
                stopped = Some(time_ms(event)?);
            }
            match event["data"]["status"].as_str() {
                Some("completed") => Ok(Some(())),
                Some(status @ ("failed" | "cancelled")) => bail!("QEMU's migration {status}"),
                _ => Ok(None),
            }
        })?;
        let resumed = receiver.qmp.wait("start at the destination", |event| {
            if event["event"] == "RESUME" {
                time_ms(event).map(Some)
            } else {
                Ok(None)
            }
        })?;
        Ok(resumed - stopped.context("QEMU migrated without a stop")?)
    }

    fn quit(mut self) -> Result<()> {
        self.qmp.execute("quit", json!({}))?;
        let status = self.process.wait(PATIENCE)?;
        ensure!(
            status.success(),
            "QEMU ended with {status}: {}",
            self.process.stderr().text()
        );
        Ok(())
    }
}

/// A machine with the guest. Its memory is an object of its own at both ends, since QEMU moves memory by name.
fn instance_arguments(fixtures: &Fixtures, guest: BenchGuest, prealloc: bool) -> Result<Vec<String>> {
    let kernel = fixtures.bare();
    let memory = format!("{}M", guest.memory_mib);
    let prealloc = if prealloc { "on" } else { "off" };
    let object = format!("memory-backend-ram,id=ram,size={memory},prealloc={prealloc}");
    let cmdline = guest.cmdline(fixtures)?;
    // Without ACPI it names its virtio devices on the command line, where the guest looks for them.
    let machine = "microvm,acpi=off,pit=on,pic=on,rtc=on,memory-backend=ram";
    // Both features are host state that some KVMs cannot give to a guest.
    let cpu = "host,-arch-capabilities,-cx16";
    let text = "-enable-kvm -smp 1 -nodefaults -no-user-config -display none -serial stdio";
    let fixed = text.split(' ').map(str::to_owned);
    let pairs = [
        ("-object", object.as_str()),
        ("-machine", machine),
        ("-cpu", cpu),
        ("-m", &memory),
        ("-append", &cmdline),
        (
            "-kernel",
            kernel.to_str().context("the guest's path is no UTF-8")?,
        ),
    ];
    let pairs = pairs
        .into_iter()
        .flat_map(|(option, value)| [option.to_owned(), value.to_owned()]);
    Ok(fixed.chain(pairs).collect())
}
