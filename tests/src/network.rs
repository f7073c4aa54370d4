//! A network of a test's own: a bridge with two taps.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::Command;

use anyhow::{Context, Result};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::tool::tool;
use crate::{PATIENCE, TestProcess, wait_until};

/// The network that the thread which made it is in, with the taps `tap0` and `tap1`; it ends with the process.
pub struct Network {
    _holder: TestProcess,
}

impl Network {
    /// Leaves the machine's network for one that has nothing but a bridge at 10.9.0.1/24 and its taps.
    pub fn enter() -> Result<Self> {
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", "echo up; read line"]);
        let holder = TestProcess::spawn(command)?;
        holder
            .stdout()
            .wait("a network", 0, PATIENCE, |line| (line == "up").then_some(()))?;
        let network = File::open(format!("/proc/{}/ns/net", holder.id()))?;
        move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))?;
        ip("link set dev lo up")?;
        ip("link add name bridge up type bridge")?;
        ip("address add 10.9.0.1/24 dev bridge")?;
        for tap in ["tap0", "tap1"] {
            add_tap(tap, "mode tap")?;
        }
        Ok(Self { _holder: holder })
    }

    /// Adds a tap that may have several queues.
    pub fn add_tap_of_many(&self, tap: &str) -> Result<()> {
        add_tap(tap, "mode tap multi_queue")
    }

    /// How many queues of such a tap take part: the network card's driver has asked for so many.
    pub fn active_queues(&self, tap: &str) -> Result<usize> {
        let shown = ip(&format!("-details link show dev {tap}"))?;
        let mut words = shown.split_whitespace();
        let count = words.find(|word| *word == "numqueues").and(words.next());
        let count = count.with_context(|| format!("{tap} does not say how many queues it has: {shown}"))?;
        Ok(count.parse()?)
    }

    /// Packets that were put in each of the first `count` queues of such a tap.
    pub fn packets_by_queue(&self, tap: &str, count: usize) -> Result<Vec<u64>> {
        let shown = tool("tc", ["-statistics", "qdisc", "show", "dev", tap])?;
        let packets = |number: usize| {
            let (_, queue) = shown.split_once(&format!(" parent :{number} "))?;
            let (_, sent) = queue.split_once("Sent ")?;
            sent.split_whitespace().nth(2)?.parse().ok()
        };
        let counts: Option<_> = (1..=count).map(packets).collect();
        counts.with_context(|| format!("{tap} has no {count} queues: {shown}"))
    }

    /// Waits until the bridge forwards to a tap: it takes up to a second to see that a receiver has it open.
    pub fn wait_until_forwarding(&self, tap: &str) -> Result<()> {
        wait_until(&format!("the bridge to forward to {tap}"), || {
            Ok(ip(&format!("-details link show dev {tap}"))?.contains("state forwarding"))
        })
    }
}

fn add_tap(tap: &str, kind: &str) -> Result<()> {
    ip(&format!("tuntap add dev {tap} {kind}"))?;
    ip(&format!("link set dev {tap} master bridge"))?;
    ip(&format!("link set dev {tap} up")).map(drop)
}

fn ip(words: &str) -> Result<String> {
    tool("ip", words.split(' '))
}
