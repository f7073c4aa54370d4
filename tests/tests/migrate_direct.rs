//! Guests move between two processes of this machine.

use std::ffi::OsString;
use std::net::{Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use migration::Outcome;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};
use tests::{BareGuest, Journey, PATIENCE, TestHost, TestProcess, count, memory};

/// Moves a guest under load back and forth, digests and gaps checked each time, and says what it cost.
fn back_and_forth(cpus: u32) -> Result<()> {
    let (moves, memory_mib) = (count(5)?, memory(512)?);
    let guest = BareGuest {
        memory_mib,
        cpus,
        workset: "",
        rate: "100M",
        fill: true,
        ..Default::default()
    };
    let mut journey = Journey::start(TestHost::new()?, &guest, &[])?;
    let mut downtimes = Vec::new();
    for number in 1..=moves {
        let report = journey
            .hop_and_check_gap(&["--verify"])
            .with_context(|| format!("move {number} of {moves}"))?;
        ensure!(
            report.memory_digest.is_some(),
            "no digest with --verify: {report:?}"
        );
        ensure!(
            report.pages_sent + report.pages_zero >= memory_mib << 8,
            "fewer pages than the guest has: {report:?}"
        );
        downtimes.push(report.downtime_ms.context("no downtime")?);
    }
    let pages = journey.verify()?;
    journey.end()?;
    downtimes.sort_by(f64::total_cmp);
    println!(
        "{moves} moves of {memory_mib} MiB, {cpus} vCPUs, {pages} pages verified: downtime median {:.1} ms, longest {:.1} ms",
        downtimes[downtimes.len() / 2],
        downtimes[downtimes.len() - 1]
    );
    Ok(())
}

#[test]
fn back_and_forth_with_one_vcpu() -> Result<()> {
    back_and_forth(1)
}

#[test]
fn back_and_forth_with_four_vcpus() -> Result<()> {
    back_and_forth(4)
}

#[test]
fn over_a_unix_socket() -> Result<()> {
    let mut journey = Journey::start(TestHost::new()?, &BareGuest::default(), &[])?;
    let path = journey.host.path("migrate.sock");
    let (receiver, endpoint) = journey.receiver(&format!("unix:{}", path.display()))?;
    journey.hop_to(receiver, &endpoint, &["--verify"])?;
    journey.vm.check_running()?;
    ensure!(!path.exists(), "the socket's file is still there");
    journey.end()
}

#[test]
fn shared_memory_and_a_machine_with_the_hole() -> Result<()> {
    let guest = BareGuest {
        memory_mib: 4 << 10,
        workset: "32M",
        fill: false,
        ..Default::default()
    };
    let mut journey = Journey::start(TestHost::new()?, &guest, &["--shared-memory"])?;
    journey.hop_and_check_gap(&["--verify"])?;
    journey.verify()?;
    journey.end()
}

#[test]
fn a_paused_guest_arrives_paused() -> Result<()> {
    let mut journey = Journey::start(TestHost::new()?, &BareGuest::default(), &[])?;
    journey.vm.godwit("pause", &[])?.expect_code(0)?;
    journey.hop(&["--verify"])?;
    ensure!(
        journey.vm.state()? == "Paused",
        "expected Paused, got {}",
        journey.vm.state()?
    );
    let printed = journey.vm.process.stdout().text();
    ensure!(printed.is_empty(), "a paused guest printed {printed:?}");
    journey.vm.godwit("resume", &[])?.expect_code(0)?;
    journey.vm.check_running()?;
    journey.verify()?;
    journey.end()
}

#[test]
fn a_missed_budget_fails_with_numbers_or_switches() -> Result<()> {
    let guest = BareGuest {
        memory_mib: 512,
        workset: "256M",
        rate: "max",
        ..Default::default()
    };
    let mut journey = Journey::start(TestHost::new()?, &guest, &[])?;
    let (receiver, endpoint) = journey.receiver("tcp:127.0.0.1:0")?;
    let error = journey
        .vm
        .migrate(&endpoint, &["--max-downtime", "100us"])?
        .stayed(Outcome::Failed)?;
    let numbers = error
        .split_whitespace()
        .filter(|word| word.starts_with(|c: char| c.is_ascii_digit()))
        .count();
    ensure!(
        numbers >= 2,
        "expected the budget and the prediction in {error:?}"
    );
    journey.vm.check_running()?;

    let arguments = ["--max-downtime", "100us", "--on-miss", "switch", "--verify"];
    let report = journey.hop_to(receiver, &endpoint, &arguments)?;
    ensure!(
        !report.budget_kept,
        "a budget of 0.1 ms kept by a guest at full rate: {report:?}"
    );
    journey.verify()?;
    journey.end()
}

#[test]
fn the_report_has_the_promised_fields() -> Result<()> {
    let mut journey = Journey::start(TestHost::new()?, &BareGuest::default(), &[])?;
    let (receiver, endpoint) = journey.receiver("tcp:127.0.0.1:0")?;
    let finished = journey
        .vm
        .start_migration(&endpoint, &["--verify"])?
        .finish(PATIENCE)?;
    let report: serde_json::Value = serde_json::from_str(&finished.expect_code(0)?.stdout)?;
    let fields = |value: &serde_json::Value| {
        let mut names: Vec<_> = value
            .as_object()
            .into_iter()
            .flat_map(|map| map.keys().cloned())
            .collect();
        names.sort();
        names.join(" ")
    };
    let top = "budget_kept budget_ms bytes_sent data_path disk_bytes disks downtime downtime_ms error memory_digest \
               mirror_ms mode outcome pages_sent pages_unused pages_zero predicted_downtime_interval_ms \
               predicted_downtime_ms predicted_total_interval_ms predicted_total_ms \
               rehearsal_pause_ms rounds streams total_ms verify_ms";
    ensure!(fields(&report) == top, "expected {top}, got {}", fields(&report));
    let terms = "commit_ms drain_ms final_copy_ms final_log_ms pause_ms restore_ms resume_ms state_ms";
    ensure!(
        fields(&report["downtime"]) == terms,
        "got {}",
        fields(&report["downtime"])
    );
    let round = "bandwidth_bytes_per_s bytes dirty_bytes_per_s ms n pages throttle_percent";
    ensure!(
        fields(&report["rounds"][0]) == round,
        "got {}",
        fields(&report["rounds"][0])
    );
    journey.arrive(receiver)?;
    journey.end()
}

/// A `godwit` command that alone sees these lines as /etc/hosts.
fn with_hosts(host: &TestHost, lines: &str, arguments: &[&str]) -> Result<Command> {
    let hosts = host.path("hosts");
    std::fs::write(&hosts, lines)?;
    let script = "mount --bind \"$0\" /etc/hosts && exec \"$@\"";
    let mut program: Vec<OsString> = ["unshare", "--mount", "sh", "-c", script].map(Into::into).into();
    program.push(hosts.into());
    host.under(&program, &host.command(arguments))
}

/// Both addresses of this host, the one that is tried first in front.
const BOTH: &str = "::1 both\n127.0.0.1 both\n";

/// Takes a port whose queue of connections is full: a client gets no answer while what is returned lives.
fn swallow(address: SocketAddr) -> Result<(TcpListener, Vec<OwnedFd>)> {
    let listener = TcpListener::bind(address)?;
    rustix::net::listen(&listener, 0)?;
    let mut knocking = Vec::new();
    loop {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::INET6, SocketType::STREAM, flags, None)?;
        match connect(&socket, &address) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        let mut events = [PollFd::new(&socket, PollFlags::OUT)];
        let answered = poll(
            &mut events,
            Some(&Timespec {
                tv_sec: 0,
                tv_nsec: 200_000_000,
            }),
        )?;
        knocking.push(socket);
        if answered == 0 {
            return Ok((listener, knocking));
        }
    }
}

#[test]
fn a_name_whose_first_address_does_not_answer_is_reached() -> Result<()> {
    let host = TestHost::new()?;
    let _vm = BareGuest::default().boot(&host, "web", &[])?;
    let (receiver, endpoint) = host.receive("there", "tcp:127.0.0.1:0", [""; 0])?;
    let port = endpoint.rsplit(':').next().context("a port")?;
    let _dead = swallow(SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port.parse()?))?;
    let destination = format!("tcp:both:{port}");
    let migrate = ["migrate", "web", &destination, "--verify"];
    // Only the command can resolve the name: the VM could not.
    TestProcess::run(with_hosts(&host, BOTH, &migrate)?, PATIENCE)?.expect_code(0)?;
    receiver.check_running()?;
    Ok(())
}

#[test]
fn every_address_of_a_name_is_listened_on() -> Result<()> {
    let host = TestHost::new()?;
    let vm = BareGuest::default().boot(&host, "web", &[])?;
    let receive = ["receive", "--name", "there", "--listen", "tcp:both:0"];
    let (receiver, endpoint) = host.start_receiver("there", with_hosts(&host, BOTH, &receive)?)?;
    let port = endpoint.rsplit(':').next().context("a port")?;
    ensure!(
        endpoint == format!("tcp:[::1]:{port},127.0.0.1:{port}"),
        "got {endpoint}"
    );
    let report = vm.migrate(&format!("tcp:127.0.0.1:{port}"), &[])?.moved()?;
    ensure!(report.error.is_none(), "got {report:?}");
    receiver.check_running()?;
    Ok(())
}
