//! What happens while the guest is paused, right before it would go: it never stands still for much longer than it may,
//! and a copy that runs twice is reported.

use anyhow::{Result, ensure};
use fault_proxy::{Direction, FaultPlan, FaultPoint, Proxy, ProxyConnection, ProxyFault};
use migration::Outcome;
use tests::{BareGuest, Journey, Migration, PATIENCE, TestHost, wait_until};

use super::ANY_PORT;

/// The guest may stand still for three times its budget, and a machine under load is late.
const BUDGET: [&str; 2] = ["--max-downtime", "100ms"];
const LIMIT_MS: f64 = 300.0;
const LATE_MS: f64 = 250.0;

fn guest() -> BareGuest<'static> {
    BareGuest {
        memory_mib: 64,
        workset: "16M",
        rate: "20M",
        ..Default::default()
    }
}

/// A fault at the first message of this name on the control connection.
fn at(direction: Direction, message: &str, fault: ProxyFault) -> FaultPlan {
    FaultPlan {
        point: FaultPoint {
            connection: ProxyConnection::Control,
            direction,
            message: message.into(),
            occurrence: 0,
        },
        fault,
    }
}

fn proxy(endpoint: &str, plan: FaultPlan) -> Result<Proxy> {
    Ok(Proxy::start(&ANY_PORT.parse()?, &endpoint.parse()?, vec![plan])?)
}

#[test]
fn a_network_that_dies_in_the_pause_does_not_keep_the_guest() -> Result<()> {
    let mut journey = Journey::start(TestHost::new()?, &guest(), &[])?;
    for (direction, message) in [
        (Direction::ToDestination, "state"),
        (Direction::ToSource, "ready"),
    ] {
        journey.reset_gap()?;
        let (receiver, endpoint) = journey.receiver(ANY_PORT)?;
        let proxy = proxy(&endpoint, at(direction, message, ProxyFault::Stall(None)))?;
        let to = proxy.address().to_string();
        let migration = Migration::of(journey.vm.start_migration(&to, &BUDGET)?.finish(PATIENCE)?)?;
        let error = migration.stayed(Outcome::Failed)?;
        ensure!(proxy.struck() == 1, "{message} never came: {error}");
        ensure!(error.contains("stood still for 300 ms"), "{message}: {error}");
        let tick = journey.vm.check_running()?;
        let gap_ms = tick.max_gap_us as f64 / 1e3;
        ensure!(
            (0.8 * LIMIT_MS..LIMIT_MS + LATE_MS).contains(&gap_ms),
            "{message}: the guest stood still for {gap_ms} ms"
        );
        println!("{message} does not pass: the guest stood still for {gap_ms} ms");
        drop(proxy);
        // The destination has given this attempt up, and takes the next one.
        journey.hop_to(receiver, &endpoint, &["--verify"])?;
    }
    journey.end()
}

#[test]
fn an_operator_who_lets_the_guest_run_in_both_places_is_reported() -> Result<()> {
    let journey = Journey::start(TestHost::new()?, &guest(), &[])?;
    let (receiver, endpoint) = journey.receiver(ANY_PORT)?;
    let proxy = proxy(&endpoint, at(Direction::ToSource, "ready", ProxyFault::CutAll))?;
    let to = proxy.address().to_string();
    let migration = Migration::of(journey.vm.start_migration(&to, &[])?.finish(PATIENCE)?)?;
    migration.stayed(Outcome::Failed)?;
    journey.vm.check_running()?;
    // The connection is lost, so the operator has to decide; here the decision is wrong.
    wait_until("the operator's decision to count", || {
        Ok(receiver.godwit("resolve", &["--run"])?.code == Some(0))
    })?;
    receiver.check_running()?;
    proxy.heal();
    wait_until("the source to notice", || Ok(journey.vm.state()? == "In doubt"))?;
    journey.vm.godwit("resume", &[])?.expect_code(1)?;
    // Asked, the destination says that it runs there, and so it does.
    journey.vm.godwit("resolve", &[])?.expect_code(0)?;
    let journey = journey.orphan(receiver)?;
    journey.vm.check_running()?;
    Ok(())
}
