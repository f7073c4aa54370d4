//! A guest's network on the machine's own KVM: what is lost in a move.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::saved::{ADDRESS, Backends, tiny_guest};
use tests::{Host, Network, Pings};

/// Where kernel code is interpreted, an answer takes the guest some milliseconds.
const INTERVAL: Duration = Duration::from_millis(10);
/// However busy the machine is.
const ANY_DOWNTIME: [&str; 2] = ["--on-miss", "switch"];
/// Pings that may be lost besides those of the downtime: on their way when the guest stops, and one that is late.
const AROUND: f64 = 3.0;

#[test]
fn pings_are_lost_in_the_downtime_alone() -> Result<()> {
    let network = Network::enter()?;
    let host = Host::new()?;
    let backends = |tap| Backends {
        tap,
        uds: host.path(tap),
    };
    let mut journey = tiny_guest(host.clone(), &network, &backends("tap0"))?;
    for tap in ["tap1", "tap0"] {
        let pings = Pings::start(ADDRESS, INTERVAL)?;
        journey.vm.check_running()?;
        let (receiver, endpoint) = backends(tap).receiver(&journey)?;
        network.wait_until_forwarding(tap)?;
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
            "a downtime of {downtime} ms does not explain this: {pinged:?}"
        );
    }
    journey.end()
}
