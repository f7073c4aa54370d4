//! A guest's network on the machine's own KVM: what is lost in a move.

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;
use tests::{Host, Journey, PATIENCE, Pings, Process, TinyGuest};

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
/// Where kernel code is interpreted, an answer takes the guest some milliseconds.
const INTERVAL: Duration = Duration::from_millis(10);
/// However busy the machine is.
const ANY_DOWNTIME: [&str; 2] = ["--on-miss", "switch"];
/// Pings that may be lost besides those of the downtime: on their way when the guest stops, and one that is late.
const AROUND: f64 = 3.0;

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

/// Leaves the machine's network for one that has nothing but a bridge with two taps, and ends with the process.
fn leave() -> Result<Process> {
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
    Ok(holder)
}

/// Waits until the bridge forwards to a tap: it takes up to a second to see that a receiver has it open.
fn wait_until_forwarding(tap: &str) -> Result<()> {
    let begin = Instant::now();
    while !ip(&format!("-details link show dev {tap}"))?.contains("state forwarding") {
        ensure!(begin.elapsed() < PATIENCE, "the bridge forwards nothing to {tap}");
    }
    Ok(())
}

#[test]
fn pings_are_lost_in_the_downtime_alone() -> Result<()> {
    let _network = leave()?;
    let words = format!("godwit.address={GUEST}/24");
    let guest = TinyGuest {
        rate: "1M",
        words: &words,
        ..Default::default()
    };
    let mut journey = guest.start(Host::new()?, &["--net", "tap=tap0"])?;
    for tap in ["tap1", "tap0"] {
        let pings = Pings::start(GUEST, INTERVAL)?;
        journey.vm.check_running()?;
        let (receiver, endpoint) =
            journey.receiver_with("tcp:127.0.0.1:0", &["--net", &format!("net0={tap}")])?;
        wait_until_forwarding(tap)?;
        let report = journey.hop_to(receiver, &endpoint, &ANY_DOWNTIME)?;
        journey.vm.check_running()?;
        let pinged = pings.stop()?;
        let downtime = report.downtime_ms.context("no downtime")?;
        println!(
            "to {tap}: {} pings, downtime {downtime:.1} ms, lost {:?}",
            pinged.sent, pinged.lost
        );
        let explained = downtime / INTERVAL.as_millis() as f64 + AROUND;
        ensure!(
            pinged.lost.len() as f64 <= explained && pinged.lost.len() < usize::from(pinged.sent) / 2,
            "a downtime of {downtime} ms does not explain this: {pinged:?}; the card here counts {}",
            count(&journey)?
        );
    }
    let counted = count(&journey)?;
    ensure!(
        counted["tx_packets"].as_u64() > Some(0),
        "no packet was counted: {counted}"
    );
    let table = journey.vm.godwit("metrics", &[])?.expect_code(0)?.stdout.clone();
    ensure!(table.contains("net0\n"), "got {table}");
    journey.end()
}

/// What the guest's card has counted in this process.
fn count(journey: &Journey) -> Result<Value> {
    let metrics = journey
        .vm
        .godwit("metrics", &["--json"])?
        .expect_code(0)?
        .stdout
        .clone();
    Ok(serde_json::from_str::<Value>(&metrics)?["devices"]["net0"].take())
}
