//! Streams between programs on the host and in a guest, across moves.

use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use fault_proxy::{Direction, FaultPlan, FaultPoint, Proxy, ProxyConnection, ProxyFault};
use migration::Outcome;
use tests::saved::{Backends, tiny_guest};
use tests::{ECHO_PORT, Echo, GuestEvent, Journey, Network, PATIENCE, TestHost, Vm};

/// Several times what the device holds.
const MUCH: usize = 256 << 10;
const ANY_DOWNTIME: [&str; 2] = ["--on-miss", "switch"];
/// The host's port that the guest dials.
const HOST_PORT: u32 = 52;

fn backends(host: &TestHost, tap: &'static str, name: &str) -> Backends {
    Backends {
        tap,
        uds: host.path(name),
    }
}

/// Has the guest connect to the host, where its socket is at `uds`.
fn dial(vm: &mut Vm, uds: &Path) -> Result<Echo> {
    let listener = UnixListener::bind(format!("{}_{HOST_PORT}", uds.display()))?;
    vm.process.send(format!("dial {HOST_PORT}\n").as_bytes())?;
    Echo::accept(&listener)
}

/// Waits until the guest has said that often how a stream ended.
fn wait_for_ends(vm: &Vm, end: &str, count: usize) -> Result<()> {
    let mut seen = 0;
    let says = format!("end={end}");
    vm.process
        .stdout()
        .wait(&format!("{count} streams with {says}"), 0, PATIENCE, |line| {
            seen += usize::from(GuestEvent::named(line, "echo").is_some() && line.ends_with(&says));
            (seen == count).then_some(())
        })
}

#[test]
fn streams_end_with_a_move_and_listeners_live_on() -> Result<()> {
    let (network, host) = (Network::enter()?, TestHost::new()?);
    let first = backends(&host, "tap0", "first.vsock");
    let mut journey = tiny_guest(host.clone(), &network, &first)?;
    let first = first.uds;

    let mut from_host = Echo::connect(&first, ECHO_PORT)?;
    from_host.check(MUCH).context("from the host")?;
    let mut from_guest = dial(&mut journey.vm, &first)?;
    from_guest.check(MUCH).context("from the guest")?;
    let refused = Echo::connect(&first, 9)
        .err()
        .context("a port on which no program listens")?;
    ensure!(!format!("{refused:#}").contains("OK"), "{refused:#}");

    refusals_leave_streams_alone(&mut journey, &mut [&mut from_host, &mut from_guest])?;

    let second = backends(&host, "tap1", "second.vsock");
    let (receiver, endpoint) = second.receiver(&journey)?;
    let second = second.uds;
    ensure!(!second.exists(), "the socket is there before the guest is");
    journey.hop_to(receiver, &endpoint, &["--verify", "--on-miss", "switch"])?;
    ensure!(!first.exists(), "the source has left its socket behind");
    from_host.wait_end().context("the stream from the host")?;
    from_guest.wait_end().context("the stream from the guest")?;
    let mut again = Echo::connect(&second, ECHO_PORT).context("after the move")?;
    again.check(MUCH).context("from the host, after the move")?;
    wait_for_ends(&journey.vm, "connection-reset", 2)?;
    dial(&mut journey.vm, &second)?
        .check(MUCH)
        .context("from the guest, after the move")?;
    again.check(MUCH).context("once more")?;

    through_files(&mut journey, again)?;
    journey.vm.check_running()?;
    let last = host.path("third.vsock");
    journey.end()?;
    ensure!(!last.exists(), "the end has left the socket behind");
    Ok(())
}

/// Moves that do not happen.
fn refusals_leave_streams_alone(journey: &mut Journey, streams: &mut [&mut Echo]) -> Result<()> {
    let (without, endpoint) = journey.receiver_with("tcp:127.0.0.1:0", &["--net", "net0=tap1"])?;
    let line = journey.vm.migrate(&endpoint, &[])?.stayed(Outcome::Failed)?;
    for word in ["vsock", "--vsock uds="] {
        ensure!(line.contains(word), "expected {word:?} in {line:?}");
    }
    drop(without);
    let unused = backends(&journey.host, "tap1", "unused.vsock");
    let (receiver, endpoint) = unused.receiver(journey)?;
    // The connection is lost when the guest stands still and its state is on its way.
    let point = FaultPoint {
        connection: ProxyConnection::Control,
        direction: Direction::ToDestination,
        message: "state".into(),
        occurrence: 0,
    };
    let fault = ProxyFault::Reset;
    let proxy = Proxy::start(
        &"tcp:127.0.0.1:0".parse()?,
        &endpoint.parse()?,
        vec![FaultPlan { point, fault }],
    )?;
    let migration = journey.vm.migrate(&proxy.address().to_string(), &ANY_DOWNTIME)?;
    migration.stayed(Outcome::Failed)?;
    ensure!(
        proxy.struck() == 1,
        "expected a lost connection, saw {:?}",
        proxy.seen()
    );
    drop(receiver);
    ensure!(!unused.uds.exists(), "the socket is there and the guest is not");
    for stream in streams {
        stream.check(MUCH).context("after moves that failed")?;
    }
    Ok(())
}

/// A snapshot, and a guest restored from it.
fn through_files(journey: &mut Journey, stream: Echo) -> Result<()> {
    let directory = journey.host.path("saved");
    journey.vm.snapshot(&directory, &[])?;
    let third = backends(&journey.host, "tap0", "third.vsock");
    journey.arrive(third.restore(&journey.host, &directory)?)?;
    stream.wait_end().context("the stream of before the snapshot")?;
    Echo::connect(&third.uds, ECHO_PORT)
        .context("after the restore")?
        .check(MUCH)
        .context("after the restore")
}
