//! Commands from the console, one per line: `verify`, `reset`, `churn MIB`, `sync`, `dial PORT`, `size`, `poweroff`,
//! `reboot`.

use std::io::BufRead;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Sender, sync_channel};
use std::sync::{Arc, Mutex};

use rustix::system::{RebootCommand, reboot};
use rustix::termios::tcgetwinsize;

use crate::disk::DiskWorkloadRequest;
use crate::echo;
use crate::memory::Verify;
use crate::network;
use crate::report::AgentReport;

/// The workloads that commands act on.
pub(crate) struct Workloads {
    memory: Mutex<Sender<Verify>>,
    disk: Mutex<Option<Sender<DiskWorkloadRequest>>>,
}

impl Workloads {
    /// Both workloads; there may be no disk.
    pub(crate) fn new(memory: Sender<Verify>, disk: Option<Sender<DiskWorkloadRequest>>) -> Self {
        Self {
            memory: Mutex::new(memory),
            disk: Mutex::new(disk),
        }
    }

    /// Whether there is a disk under load.
    pub(crate) fn has_disk(&self) -> bool {
        self.disk.lock().is_ok_and(|disk| disk.is_some())
    }

    /// Waits until all memory is filled.
    pub(crate) fn wait_until_filled(&self) {
        self.verify_memory();
    }

    /// Verified pages and files.
    fn verify(&self) -> (u64, u64) {
        let files = self.disk.lock().ok().and_then(|disk| {
            let (answer, answered) = sync_channel(1);
            disk.as_ref()?.send(DiskWorkloadRequest::Verify(answer)).ok()?;
            answered.recv().ok()
        });
        (self.verify_memory(), files.unwrap_or(0))
    }

    fn verify_memory(&self) -> u64 {
        let (answer, answered) = sync_channel(1);
        let sent = self.memory.lock().is_ok_and(|memory| memory.send(answer).is_ok());
        if sent { answered.recv().unwrap_or(0) } else { 0 }
    }

    /// Stops the disk workload and unmounts; done at once if there is none.
    pub(crate) fn unmount(&self) {
        let disk = self.disk.lock().ok().and_then(|mut disk| disk.take());
        if let Some(disk) = disk {
            let (answer, answered) = sync_channel(1);
            if disk.send(DiskWorkloadRequest::Stop(answer)).is_ok() {
                let _ = answered.recv();
            }
        }
    }

    /// Unmounts and ends the machine.
    pub(crate) fn end(&self, how: RebootCommand, report: &AgentReport) {
        self.unmount();
        rustix::fs::sync();
        // Fails in a guest that has no card.
        let _ = network::take_down();
        if let Err(error) = reboot(how) {
            report.error(format_args!("reboot expected=end got={error:?}"));
        }
    }
}

/// Reads commands until the console ends.
pub(crate) fn serve(input: impl BufRead, report: &Arc<AgentReport>, workloads: &Workloads) {
    for line in input.lines().map_while(Result::ok) {
        match line.trim() {
            "" => {}
            "verify" => {
                let (pages, files) = workloads.verify();
                report.line(format_args!(
                    "verified pages={pages} files={files} errors={}",
                    report.errors()
                ));
            }
            "reset" => report.reset.store(true, Ordering::Relaxed),
            "sync" => {
                workloads.unmount();
                report.line(format_args!("unmounted"));
            }
            "size" => size(report),
            "poweroff" => workloads.end(RebootCommand::PowerOff, report),
            "reboot" => workloads.end(RebootCommand::Restart, report),
            line if line.starts_with("churn ") => churn(&line["churn ".len()..], report),
            line if line.starts_with("dial ") => echo::dial(&line["dial ".len()..], report),
            other => report.line(format_args!("unknown command={other}")),
        }
    }
}

/// Takes that many MiB of memory, writes to all of it, and gives it back to the kernel.
fn churn(mebibytes: &str, report: &AgentReport) {
    let Ok(mebibytes) = mebibytes.parse::<usize>() else {
        return report.error(format_args!("churn={mebibytes} expected=a number got=nonsense"));
    };
    let mut memory = vec![0u8; mebibytes << 20];
    // Content that does not compress, and is no page of zeroes.
    for (page, bytes) in memory.chunks_mut(4096).enumerate() {
        bytes.fill(page as u8 | 1);
    }
    std::hint::black_box(&memory);
    drop(memory);
    report.line(format_args!("churned mib={mebibytes}"));
}

/// Prints what size the terminal has.
fn size(report: &AgentReport) {
    match tcgetwinsize(std::io::stdin()) {
        Ok(size) => report.line(format_args!("size columns={} rows={}", size.ws_col, size.ws_row)),
        Err(error) => report.error(format_args!("size expected=some got={error}")),
    }
}
