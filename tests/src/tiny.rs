//! A Linux guest that comes up on every host, one that interprets kernel code included.

use std::process::Command;

use anyhow::{Result, ensure};

use crate::{GuestEvent, Journey, PATIENCE, TestHost};

/// Memory of the kernel, in MiB. What is beyond belongs to the workload: the kernel initialises each of its
/// pages when it boots, which is slow where it is interpreted.
const KERNEL_MIB: u64 = 64;

/// A tiny guest's machine and work.
#[derive(Clone, Copy, Debug)]
pub struct TinyGuest<'a> {
    /// vCPUs.
    pub cpus: u32,
    /// MiB that the workload has.
    pub workset_mib: u64,
    /// Bytes per second, e.g. `20M` or `max`.
    pub rate: &'a str,
    /// More words for the kernel.
    pub words: &'a str,
}

impl Default for TinyGuest<'_> {
    fn default() -> Self {
        Self {
            cpus: 2,
            workset_mib: 64,
            rate: "20M",
            words: "",
        }
    }
}

impl TinyGuest<'_> {
    /// The machine's memory in MiB.
    pub fn memory_mib(&self) -> u64 {
        KERNEL_MIB + self.workset_mib
    }

    /// The options of `godwit run` for it.
    pub fn options(&self, host: &TestHost) -> Vec<String> {
        let Self {
            cpus,
            workset_mib,
            rate,
            words,
        } = *self;
        // Kernel messages would end up in the middle of the agent's lines.
        let cmdline = format!(
            "console=ttyS0 reboot=k panic=-1 pci=off quiet loglevel=1 mem={KERNEL_MIB}M godwit.base={KERNEL_MIB}M \
             godwit.dirty={workset_mib}M godwit.rate={rate} {words}"
        );
        let file = |name| host.fixtures().tiny(name).display().to_string();
        let options = [
            ("--kernel", file("vmlinux")),
            ("--initrd", file("initrd")),
            ("--cmdline", cmdline),
            ("--cpus", cpus.to_string()),
            ("--memory", format!("{}M", self.memory_mib())),
        ];
        options
            .into_iter()
            .flat_map(|(option, value)| [option.to_owned(), value])
            .collect()
    }

    /// Boots it and waits until it works.
    pub fn start(&self, host: TestHost, more: &[&str]) -> Result<Journey> {
        self.start_with(host, more, |_| ())
    }

    /// The same after `prepare` has changed the command that runs it.
    pub fn start_with(
        &self,
        host: TestHost,
        more: &[&str],
        prepare: impl FnOnce(&mut Command),
    ) -> Result<Journey> {
        let mut command = host.command(["run", "--name", "vm-0"]);
        command.args(self.options(&host)).args(more);
        prepare(&mut command);
        let vm = host.start("vm-0", command)?;
        let ready = vm.process.stdout().wait("agent: ready", 0, PATIENCE, |line| {
            GuestEvent::named(line, "ready")
        })?;
        for (field, expected) in [("cpus", u64::from(self.cpus)), ("dirty_mib", self.workset_mib)] {
            ensure!(
                ready.number(field)? == expected,
                "expected {field}={expected}, got {ready:?}"
            );
        }
        vm.next_tick()?;
        Ok(Journey::agent(host, vm))
    }
}
