//! A guest's network, from outside.

use super::*;
use tests::{GUEST, TAP};

/// Makes the hosts' cards and their taps parts of one network, as an administrator would; host 0 echoes streams.
pub(super) fn connect(lab: &Lab) -> Result<lab::LabProcess> {
    for index in 0..2 {
        let address = lab.host(index).address();
        let script = format!(
            "brctl addbr bridge; ip link set bridge up; ip address flush dev eth0; brctl addif bridge eth0; \
             ip address add {address}/24 dev bridge; \
             tunctl -t {TAP}; ip link set {TAP} up; brctl addif bridge {TAP}"
        );
        shell(lab, index, &script)?;
    }
    Ok(lab.host(0).spawn(&["nc", "-ll", "-p", "7007", "-e", "cat"])?)
}

/// Waits until the guest answers a ping of a host, on whichever host it runs. A busy guest may lose some.
pub(super) fn wait_for_answer(lab: &Lab, host: usize, options: &str) -> Result<()> {
    let ping = format!("ping {options} -c 1 -W 5 {GUEST}");
    wait_until("an answer to a ping", || {
        Ok(lab.host(host).run(&["sh", "-c", &ping])?.status.success())
    })
    .with_context(|| format!("host {host}: {ping}"))
}

#[test]
fn a_stream_goes_on_across_moves() -> Result<()> {
    let lab = two_hosts()?;
    let echo = connect(&lab)?;
    let guest = StockGuest {
        net: true,
        ..Default::default()
    };
    let mut journey = LabJourney::start(lab, guest)?;
    journey.check_stream()?;
    refused_without_a_tap(&mut journey)?;
    let moves = count(4)?;
    for number in 1..=moves {
        let on = || format!("move {number} of {moves}");
        journey.hop(&VERIFIED).with_context(on)?;
        let streamed = journey.check_stream().with_context(on)?;
        for host in 0..2 {
            wait_for_answer(&journey.lab, host, "").with_context(on)?;
        }
        println!("move {number} of {moves}: {streamed} bytes came back");
    }
    journey.verify()?;
    journey.power_off()?;
    drop(echo);
    Ok(())
}

/// A receiver that has no tap for the guest says so before anything happens to it; one whose tap is not there says so
/// before a guest comes.
fn refused_without_a_tap(journey: &mut LabJourney) -> Result<()> {
    let words = [
        "godwit",
        "receive",
        "--name",
        "poor",
        "--listen",
        "tcp:0.0.0.0:7001",
    ];
    let host = journey.lab.host(1);
    let missing = host.run(&[&words[..], &["--net", "net0=none"]].concat())?;
    ensure!(
        !missing.status.success() && missing.stderr.contains("ip tuntap add dev none"),
        "got {}: {}",
        missing.status,
        missing.stderr
    );
    let mut receiver = host.spawn(&words)?;
    receiver.wait_line(|line| line.contains(" is listening on "), PATIENCE)?;
    let endpoint = format!("tcp:{}:7001", host.address());
    let line = journey
        .migrate(&endpoint, &ANY_DOWNTIME)?
        .stayed(Outcome::Failed)?;
    ensure!(line.contains("use --net net0=TAP"), "got {line:?}");
    receiver.signal(Signal::Terminate)?;
    receiver.wait(PATIENCE)?;
    journey.check_stream().map(drop)
}
