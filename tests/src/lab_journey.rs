//! A Debian guest on emulated hosts, on its way from host to host.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab::{Lab, LabProcess, Payload};
use migration::{Progress, Report};

use crate::{Finished, Fixtures, GuestEvent, Migration, PATIENCE, StockGuest, TAP, Tick, check_ticks};

/// Where hosts receive guests.
const PORT: u16 = 7000;
/// The share of the reported downtime that the guest must have seen.
const SEEN: f64 = 0.9;

/// Heartbeats that may be in the guest's terminal when it is paused.
const LATE_TICKS: u32 = 40;

/// A guest that moves between hosts 0 and 1 of a lab.
pub struct LabJourney {
    /// The hosts; other guests may be there too.
    pub lab: Arc<Lab>,
    /// The `godwit` process that has the guest.
    pub vm: LabProcess,
    guest: StockGuest,
    host: usize,
    /// The number in its VM's name.
    number: u32,
    /// What the guest printed on the hosts before, to the last byte.
    before: String,
}

/// What a lab's hosts carry.
pub fn payload(fixtures: &Fixtures) -> Payload {
    Payload::new(&fixtures.guests).with("bin/godwit", &fixtures.godwit)
}

impl LabJourney {
    /// Boots the guest on host 0 and waits until it works.
    pub fn start(lab: impl Into<Arc<Lab>>, guest: StockGuest) -> Result<Self> {
        let lab = lab.into();
        let options = guest.options("/guests");
        let words = ["godwit", "run", "--name", "vm-0"]
            .into_iter()
            .chain(options.iter().map(String::as_str));
        let vm = lab.host(0).spawn(&words.collect::<Vec<_>>())?;
        let mut journey = Self {
            lab,
            vm,
            guest,
            host: 0,
            number: 0,
            before: String::new(),
        };
        let ready = journey.event("ready")?;
        let cpus = u64::from(journey.guest.cpus);
        ensure!(
            ready.number("cpus")? == cpus,
            "expected {cpus} CPUs, got {ready:?}"
        );
        Ok(journey)
    }

    /// The index of the host that it is on.
    pub fn host(&self) -> usize {
        self.host
    }

    /// The index of the other one.
    pub fn other(&self) -> usize {
        1 - self.host
    }

    /// Waits for the next event of that name.
    pub fn event(&mut self, name: &str) -> Result<GuestEvent> {
        let line = self.line(|line| GuestEvent::named(line, name).is_some())?;
        GuestEvent::named(&line, name).context("not the event that was waited for")
    }

    /// Sends a command and waits for the answer.
    pub fn command(&mut self, command: &str, answer: &str) -> Result<GuestEvent> {
        self.vm.write_stdin(format!("{command}\n").as_bytes())?;
        self.event(answer)
    }

    /// Waits for the next tick.
    pub fn tick(&mut self) -> Result<Tick> {
        let line = self.line(|line| Tick::parse(line).is_some())?;
        Tick::parse(&line).context("not a tick")
    }

    /// Waits for a line of the guest's. If none comes, the error describes the host and its VM.
    fn line(&mut self, wanted: impl FnMut(&str) -> bool) -> Result<String> {
        let waited = self.vm.wait_line(wanted, PATIENCE);
        waited.map_err(|error| anyhow::Error::from(error).context(self.describe_host()))
    }

    /// What the VM says of itself, where its threads are, and what the host's kernel said last.
    fn describe_host(&self) -> String {
        let script = format!(
            "godwit status {}; for task in /proc/[0-9]*/task/*; do grep -q godwit $task/../../cmdline && \
             echo \"$(cat $task/comm): $(cat $task/wchan) $(cut -d' ' -f3,14,15 $task/stat)\"; done; \
             head -3 /proc/interrupts; grep -E 'LOC|virtio' /proc/interrupts; dmesg | tail -n 5",
            self.name()
        );
        match self.lab.host(self.host).run(&["sh", "-c", &script]) {
            Ok(seen) => format!("host {}: {}{}", self.host, seen.stdout, seen.stderr),
            Err(error) => format!("host {} does not answer: {error}", self.host),
        }
    }

    /// Shows that the guest runs and is well: ticks from now on, without errors.
    pub fn check_running(&mut self) -> Result<Tick> {
        // Skips the lines that are already there: they say nothing about now. No line fits, so the wait fails.
        let _ = self.vm.wait_line(|_| false, Duration::ZERO);
        let (first, second) = (self.tick()?, self.tick()?);
        ensure!(
            second.n > first.n && second.errors == 0,
            "expected ticks to go on, got {first:?} and {second:?}"
        );
        Ok(second)
    }

    /// Shows that the guest's stream goes on; returns the bytes that came back so far.
    pub fn check_stream(&mut self) -> Result<u64> {
        self.check_growing("streamed")
    }

    /// Shows that a count in the guest's ticks goes on; returns how far it is.
    pub fn check_growing(&mut self, count: &str) -> Result<u64> {
        let before = self.event("tick")?.number(count)?;
        // A stream whose peer's next try may take seconds is the slowest.
        let mut deadline = PATIENCE.begin();
        while deadline.left().is_some() {
            let tick = self.event("tick")?;
            ensure!(tick.number("errors")? == 0, "the guest counts errors: {tick:?}");
            let now = tick.number(count)?;
            if now > before {
                return Ok(now);
            }
        }
        bail!("{count} stays at {before}; {}", self.describe_host())
    }

    /// Waits until the guest has printed these words so often on the host that it is on, and no more often.
    pub fn wait_for_words(&mut self, words: &str, count: usize) -> Result<()> {
        let mut deadline = PATIENCE.begin();
        loop {
            let log = self.vm.log();
            let found = log.matches(words).count();
            if found == count {
                return Ok(());
            }
            ensure!(
                found < count && deadline.left().is_some(),
                "expected {count} times {words:?}, got {found}: {log}"
            );
            self.tick()?;
        }
    }

    /// Starts a receiver on the other host; also returns where it listens.
    pub fn receiver(&self) -> Result<(LabProcess, String)> {
        // Both hosts have the same disk, but neither sees the other's locks on it.
        self.receiver_with_disk("/dev/vda,shared=on")
    }

    /// The same with the guest's disk, if it has one, somewhere else than on what the hosts share.
    pub fn receiver_with_disk(&self, path: &str) -> Result<(LabProcess, String)> {
        let disk = format!("data={path}");
        let name = name(self.number + 1);
        let listen = format!("tcp:0.0.0.0:{PORT}");
        let mut words = vec!["godwit", "receive", "--name", &name, "--listen", &listen];
        if self.guest.disk {
            words.extend(["--disk", &disk]);
        }
        let vsock = format!("uds={}", StockGuest::VSOCK);
        if self.guest.vsock {
            words.extend(["--vsock", &vsock]);
        }
        let port = format!("echo={}", StockGuest::PORT);
        if self.guest.console {
            words.extend(["--port", &port]);
        }
        let net = format!("net0={TAP}");
        if self.guest.net {
            words.extend(["--net", &net]);
        }
        let host = self.lab.host(self.other());
        let mut receiver = host.spawn(&words)?;
        receiver.wait_line(|line| line.contains(" is listening on "), PATIENCE)?;
        Ok((receiver, format!("tcp:{}:{PORT}", host.address())))
    }

    /// Starts `godwit migrate --json`.
    pub fn start_migration(&self, endpoint: &str, arguments: &[&str]) -> Result<LabProcess> {
        let name = self.name();
        let words = [&["godwit", "migrate", &name, endpoint, "--json"], arguments].concat();
        Ok(self.lab.host(self.host).spawn(&words)?)
    }

    /// Migrates to an endpoint and waits for the end of that.
    pub fn migrate(&self, endpoint: &str, arguments: &[&str]) -> Result<Migration> {
        ended(self.start_migration(endpoint, arguments)?)
    }

    /// Moves the guest to the other host; it must see the gap that the report has, and its counter must go on.
    pub fn hop(&mut self, arguments: &[&str]) -> Result<Report> {
        let (receiver, endpoint) = self.receiver()?;
        self.hop_to(receiver, &endpoint, arguments)
    }

    /// As [`LabJourney::hop`], to a receiver that was started before.
    pub fn hop_to(&mut self, receiver: LabProcess, endpoint: &str, arguments: &[&str]) -> Result<Report> {
        self.command("reset", "reset")?;
        let report = self.migrate(endpoint, arguments)?.moved()?;
        self.arrive(receiver)?;
        self.host = self.other();
        let stood = report.downtime_ms.context("no downtime")? + report.verify_ms;
        self.check_gap(stood)?;
        Ok(report)
    }

    /// Goes on with the process that has the guest now; the one that had it must have ended well.
    fn arrive(&mut self, vm: LabProcess) -> Result<()> {
        let source = self.vm.wait(PATIENCE)?;
        ensure!(
            source.status.success(),
            "the source ended with {}: {}",
            source.status,
            source.stderr
        );
        self.before.push_str(&source.stdout);
        self.vm = vm;
        self.number += 1;
        Ok(())
    }

    /// Goes on with what comes out of a snapshot on the host where the guest went into it, with `options` of
    /// `godwit restore`.
    pub fn restore(&mut self, directory: &str, options: &[&str]) -> Result<()> {
        let vm = restore(&self.lab, (self.host, self.number + 1), directory, options)?;
        self.arrive(vm)
    }

    /// A guest of this kind that is restored from a snapshot which another guest goes on from as well, as VM `number` on
    /// a host of a lab. Its life begins with the snapshot.
    pub fn clone_of(
        guest: StockGuest,
        lab: &Arc<Lab>,
        (host, number): (usize, u32),
        directory: &str,
        options: &[&str],
    ) -> Result<Self> {
        Ok(Self {
            lab: lab.clone(),
            vm: restore(lab, (host, number), directory, options)?,
            guest,
            host,
            number,
            before: String::new(),
        })
    }

    /// The guest has seen that it stood still for so many milliseconds.
    fn check_gap(&mut self, stood: f64) -> Result<()> {
        let mut seen = 0.0;
        // Some ticks were made before the pause and are printed after it: the busier the guest, the more of them.
        for _ in 0..LATE_TICKS {
            seen = self.tick()?.max_gap_us as f64 / 1e3;
            if seen >= SEEN * stood {
                return Ok(());
            }
        }
        bail!("the guest stood still for {stood} ms and saw a gap of {seen} ms")
    }

    /// Where the guest's migration is, if there is one.
    pub fn progress(&self) -> Result<Option<Progress>> {
        let status = self.godwit_json("status", &[])?;
        Ok(serde_json::from_value(status["migration"].clone())?)
    }

    /// What a command of godwit about the VM prints with `--json`.
    pub fn godwit_json(&self, command: &str, arguments: &[&str]) -> Result<serde_json::Value> {
        let printed = self.godwit(command, &[&["--json"], arguments].concat())?;
        serde_json::from_str(&printed).with_context(|| format!("godwit {command}: {printed:?}"))
    }

    /// What a command of godwit about the VM prints; it must succeed.
    pub fn godwit(&self, command: &str, arguments: &[&str]) -> Result<String> {
        let name = self.name();
        let words = [&["godwit", command, &name], arguments].concat();
        let output = self.lab.host(self.host).run(&words)?;
        ensure!(output.status.success(), "{words:?}: {}", output.stderr);
        Ok(output.stdout)
    }

    /// Lets the guest check all its memory and files; returns what it says.
    pub fn verify(&mut self) -> Result<GuestEvent> {
        let verified = self.command("verify", "verified")?;
        ensure!(verified.number("errors")? == 0, "the guest found {verified:?}");
        ensure!(
            verified.number("pages")? > 0,
            "nothing was verified: {verified:?}"
        );
        ensure!(
            !self.guest.disk || verified.number("files")? > 0,
            "no file was verified: {verified:?}"
        );
        Ok(verified)
    }

    /// Ends the guest from inside and checks its whole life.
    pub fn power_off(self) -> Result<Arc<Lab>> {
        self.vm.write_stdin(b"poweroff\n")?;
        self.ended()
    }

    /// Waits for the guest's end and checks its whole life.
    pub fn ended(mut self) -> Result<Arc<Lab>> {
        let output = self.vm.wait(PATIENCE)?;
        ensure!(
            output.status.success(),
            "godwit ended with {}: {}",
            output.status,
            output.stderr
        );
        let life = (self.before + &output.stdout).replace('\r', "");
        check_ticks(until_farewell(&life), None)?;
        let left = self.lab.host(self.host).run(&["ls", "/run/godwit"])?.stdout;
        ensure!(
            left.trim().is_empty(),
            "left behind in the run-time directory: {left}"
        );
        Ok(self.lab)
    }

    fn name(&self) -> String {
        name(self.number)
    }
}

/// What a guest's VM is called.
fn name(number: u32) -> String {
    format!("vm-{number}")
}

/// Starts `godwit restore` on a host, as VM `number`, and waits until it has its guest.
fn restore(lab: &Lab, (host, number): (usize, u32), directory: &str, options: &[&str]) -> Result<LabProcess> {
    let name = name(number);
    let words = ["godwit", "restore", directory, "--name", &name, "--resume"];
    let mut vm = lab.host(host).spawn(&[&words[..], options].concat())?;
    let restored = format!("godwit: {name} is restored");
    vm.wait_line(|line| line.starts_with(&restored), PATIENCE)?;
    Ok(vm)
}

/// What a guest printed before its kernel said that it ends; that message may cut the agent's last line in two.
fn until_farewell(life: &str) -> &str {
    let whole = life.find("] reboot: ").and_then(|at| life[..at].rfind('\n'));
    whole.map_or(life, |end| &life[..end])
}

/// Waits for the end of `godwit migrate --json`.
pub fn ended(mut migration: LabProcess) -> Result<Migration> {
    let output = migration.wait(PATIENCE)?;
    let (code, stdout, stderr) = (output.status.code(), output.stdout, output.stderr);
    Migration::of(Finished { code, stdout, stderr })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_cut_by_the_kernels_last_message() {
        let life = "agent: tick n=1\nagent: tick n=2[   29.219266] reboot: Power down\n";
        assert_eq!(until_farewell(life), "agent: tick n=1");
        assert_eq!(until_farewell("agent: tick n=1\n"), "agent: tick n=1\n");
    }
}
