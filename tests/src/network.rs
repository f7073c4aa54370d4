//! A network of a test's own: a bridge with two taps.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::{PATIENCE, Process};

/// The network that the thread which made it is in, with the taps `tap0` and `tap1`; it ends with the process.
pub struct Network {
    _holder: Process,
}

impl Network {
    /// Leaves the machine's network for one that has nothing but a bridge at 10.9.0.1/24 and its taps.
    pub fn enter() -> Result<Self> {
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", "echo up; read line"]);
        let holder = Process::spawn(command)?;
        holder
            .stdout()
            .wait("a network", 0, PATIENCE, |line| (line == "up").then_some(()))?;
        let network = File::open(format!("/proc/{}/ns/net", holder.id()))?;
        move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))?;
        ip("link set dev lo up")?;
        ip("link add name bridge up type bridge")?;
        ip("address add 10.9.0.1/24 dev bridge")?;
        for tap in ["tap0", "tap1"] {
            ip(&format!("tuntap add dev {tap} mode tap"))?;
            ip(&format!("link set dev {tap} master bridge"))?;
            ip(&format!("link set dev {tap} up"))?;
        }
        Ok(Self { _holder: holder })
    }

    /// Waits until the bridge forwards to a tap: it takes up to a second to see that a receiver has it open.
    pub fn wait_until_forwarding(&self, tap: &str) -> Result<()> {
        let begin = Instant::now();
        while !ip(&format!("-details link show dev {tap}"))?.contains("state forwarding") {
            ensure!(begin.elapsed() < PATIENCE, "the bridge forwards nothing to {tap}");
        }
        Ok(())
    }
}

/// Runs `ip` in this thread's network; what it prints.
fn ip(words: &str) -> Result<String> {
    let mut command = Command::new("ip");
    command.args(words.split(' '));
    // Not everybody has it in the path.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    let finished = Process::run(command, PATIENCE)?;
    finished.expect_code(0).with_context(|| format!("ip {words}"))?;
    Ok(finished.stdout)
}
