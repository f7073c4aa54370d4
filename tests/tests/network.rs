//! A guest's network on the machine's own KVM: what is lost in a move.

use std::io::{self, ErrorKind};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tests::saved::{ADDRESS, Backends, tiny_guest};
use tests::{GuestEvent, Network, PATIENCE, Pings, TapQueues, TestHost, TinyGuest, Vm};

/// Where kernel code is interpreted, an answer takes the guest some milliseconds. Measured without any move: of pings
/// at 1 ms two thirds are lost; of those at 5 ms some are once another program keeps a CPU busy; of those at 10 ms,
/// none. On a machine that is busier still the guest can answer fewer.
const SHORTEST: Duration = Duration::from_millis(5);
const LONGEST: Duration = Duration::from_millis(160);
/// Pings by which it is found out.
const TRIAL: u32 = 100;
/// Of those, so many may be answered after the next is sent: more of them means a queue that does not empty.
const LATE: usize = 3;
/// However busy the machine is.
const ANY_DOWNTIME: [&str; 2] = ["--on-miss", "switch"];
/// Pings that may be lost besides those of the downtime: on their way when the guest stops, and one that is late.
const AROUND: f64 = 3.0;
/// Pairs of queues of a card that has several.
const PAIRS: usize = 2;
/// Flows that are spread over them by chance: that one gets none happens once in 2³¹ times.
const FLOWS: u16 = 32;

#[test]
fn pings_are_lost_in_the_downtime_alone() -> Result<()> {
    let network = Network::enter()?;
    let host = TestHost::new()?;
    let backends = |tap| Backends {
        tap,
        uds: host.path(tap),
    };
    let mut journey = tiny_guest(host.clone(), &network, &backends("tap0"))?;
    for tap in ["tap1", "tap0"] {
        let interval = answered_interval()?;
        let pings = Pings::start(ADDRESS, interval)?;
        journey.vm.check_running()?;
        let (receiver, endpoint) = backends(tap).receiver(&journey)?;
        network.wait_until_forwarding(tap)?;
        let report = journey.hop_to(receiver, &endpoint, &ANY_DOWNTIME)?;
        journey.vm.check_running()?;
        let pinged = pings.stop()?;
        let downtime = report.downtime_ms.context("no downtime")?;
        println!(
            "to {tap}: {} pings at {interval:?}, downtime {downtime:.1} ms, lost {:?}",
            pinged.sent, pinged.lost
        );
        let explained = downtime / interval.as_millis() as f64 + AROUND;
        ensure!(
            pinged.lost.len() as f64 <= explained && pinged.lost.len() < usize::from(pinged.sent) / 2,
            "a downtime of {downtime} ms does not explain this: {pinged:?}"
        );
    }
    journey.end()
}

/// Twice the shortest interval at which the guest answers every ping without a move, and keeps up with them: a move takes
/// CPU time, too.
fn answered_interval() -> Result<Duration> {
    let mut interval = SHORTEST;
    while interval <= LONGEST {
        let pings = Pings::start(ADDRESS, interval)?;
        thread::sleep(TRIAL * interval);
        let pinged = pings.stop()?;
        if pinged.lost.is_empty() && pinged.late <= LATE {
            return Ok(2 * interval);
        }
        println!(
            "of {} pings at {interval:?} {} were late, lost {:?}",
            pinged.sent, pinged.late, pinged.lost
        );
        interval *= 2;
    }
    bail!("the guest does not answer pings at {LONGEST:?} where it is")
}

#[test]
fn a_card_with_several_queues_moves() -> Result<()> {
    let network = Network::enter()?;
    let host = TestHost::new()?;
    for tap in ["many0", "many1"] {
        network.add_tap_of_many(tap)?;
    }
    let listener = TcpListener::bind("10.9.0.1:7")?;
    thread::spawn(move || echo(&listener));

    let guest = TinyGuest {
        rate: "1M",
        words: "godwit.address=10.9.0.2/24 godwit.echo=10.9.0.1:7",
        ..Default::default()
    };
    let queues = TapQueues::open("many0", PAIRS)?;
    let net = format!("fd={}", queues.list());
    let mut journey = guest.start_with(host.clone(), &["--net", &net], |command| queues.leave_to(command))?;
    check_all_queues(&network, "many0", &journey.vm)?;

    let queues = TapQueues::open("many1", PAIRS)?;
    let name = host.free_name();
    let mut command = host.command(["receive", "--name", &name, "--listen", "tcp:127.0.0.1:0"]);
    command.args(["--net", &format!("net0=fd:{}", queues.list())]);
    queues.leave_to(&mut command);
    let (receiver, endpoint) = host.start_receiver(&name, command)?;
    network.wait_until_forwarding("many1")?;
    journey.hop_to(receiver, &endpoint, &ANY_DOWNTIME)?;
    check_all_queues(&network, "many1", &journey.vm).context("after a move to descriptors")?;

    let (receiver, endpoint) = journey.receiver_with("tcp:127.0.0.1:0", &["--net", "net0=many0"])?;
    network.wait_until_forwarding("many0")?;
    journey.hop_to(receiver, &endpoint, &ANY_DOWNTIME)?;
    check_all_queues(&network, "many0", &journey.vm).context("after a move to a name")?;
    journey.end()
}

/// Sends everything back.
fn echo(listener: &TcpListener) {
    for stream in listener.incoming().flatten() {
        // The guest prints what it misses.
        let _ = io::copy(&mut &stream, &mut &stream);
    }
}

/// The guest's stream goes on, its driver has asked for all queues, and packets through each of them are answered.
fn check_all_queues(network: &Network, tap: &str, vm: &Vm) -> Result<()> {
    let streamed = |from| {
        let output = vm.process.stdout();
        output.wait("the stream to go on", output.mark(), PATIENCE, |line| {
            let streamed = GuestEvent::named(line, "tick")?.number("streamed").ok()?;
            (streamed > from).then_some(streamed)
        })
    };
    streamed(streamed(0)?)?;
    let active = network.active_queues(tap)?;
    ensure!(active == PAIRS, "{active} of {PAIRS} queues of {tap} take part");
    let before = network.packets_by_queue(tap, PAIRS)?;
    for port in 1..=FLOWS {
        // No program listens there: the guest's kernel says so.
        let answer = TcpStream::connect_timeout(&(ADDRESS, port).into(), PATIENCE.longest);
        let error = answer
            .err()
            .with_context(|| format!("a program listens on port {port}"))?;
        ensure!(
            error.kind() == ErrorKind::ConnectionRefused,
            "port {port}: {error}"
        );
    }
    let after = network.packets_by_queue(tap, PAIRS)?;
    println!("{tap}: packets by queue {before:?}, {after:?} after {FLOWS} flows");
    ensure!(
        before.iter().zip(&after).all(|(before, after)| before < after),
        "no packets in one of the queues of {tap}: {before:?}, {after:?} after {FLOWS} flows"
    );
    Ok(())
}
