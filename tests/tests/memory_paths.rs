//! The ways that guest memory can take to its destination, and the logs that say which of it is dirty.

use anyhow::{Context, Result, ensure};
use migration::{DataPath, Outcome, Report};
use tests::{BareGuest, Journey, MemoryGroup, PATIENCE, TestHost, TestProcess, Vm};

/// Bytes of a page.
const PAGE: u64 = 4096;

/// Bytes that a process has resident.
fn resident(vm: &Vm) -> Result<u64> {
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", vm.process.id()))?;
    let pages = statm.split_whitespace().nth(1).context("no resident pages")?;
    Ok(pages.parse::<u64>()? * PAGE)
}

/// Moves a guest and lets it check itself afterwards.
fn hop_and_verify(journey: &mut Journey, arguments: &[&str]) -> Result<Report> {
    let report = journey.hop(arguments)?;
    journey.vm.check_running()?;
    journey.verify()?;
    Ok(report)
}

#[test]
fn reserved_memory_is_there_before_the_guest() -> Result<()> {
    let guest = BareGuest {
        memory_mib: 128,
        ..Default::default()
    };
    let mut journey = Journey::start(TestHost::new()?, &guest, &[])?;
    // Reserved memory is used if it is as large as the guest's; otherwise it is released and allocated anew.
    for reserve in ["128M", "256M", "32M"] {
        let mib: u64 = reserve.trim_end_matches('M').parse()?;
        let (receiver, endpoint) = journey.receiver_with("tcp:127.0.0.1:0", &["--reserve", reserve])?;
        let before = resident(&receiver)?;
        ensure!(
            before >= mib << 20,
            "{reserve} reserved, and {before} bytes resident"
        );
        journey.hop_to(receiver, &endpoint, &["--verify"])?;
        journey.vm.check_running()?;
        let after = resident(&journey.vm)?;
        ensure!(
            after < (128 + 64) << 20,
            "{reserve} reserved for 128 MiB, and {after} bytes resident"
        );
    }
    journey.verify()?;
    journey.end()
}

#[test]
fn the_dirty_ring_loses_no_page_of_any_vcpu() -> Result<()> {
    let guest = BareGuest {
        memory_mib: 256,
        cpus: 2,
        workset: "96M",
        rate: "400M",
        fill: true,
        ..Default::default()
    };
    let mut journey = Journey::start(TestHost::new()?, &guest, &["--dirty-ring"])?;
    // Fast, and over a link that the guest is too fast for, so that rings fill up and vCPUs are slowed down.
    hop_and_verify(&mut journey, &["--verify"])?;
    let capped = [
        "--verify",
        "--bandwidth",
        "150MB/s",
        "--final-bandwidth",
        "150MB/s",
        // Half of what the working set takes, and much more than all else does on a busy machine.
        "--max-downtime",
        "300ms",
    ];
    let report = hop_and_verify(&mut journey, &capped)?;
    ensure!(
        report.rounds.iter().any(|round| round.throttle_percent > 0.0),
        "a guest that dirties more than the link carries was not slowed down: {report:?}"
    );
    journey.end()
}

#[test]
fn shared_memory_is_handed_over_and_not_copied() -> Result<()> {
    let guest = BareGuest {
        memory_mib: 256,
        cpus: 2,
        ..Default::default()
    };
    let mut journey = Journey::start(TestHost::new()?, &guest, &["--shared-memory"])?;
    for socket in ["first.sock", "second.sock"] {
        let path = journey.host.path(socket);
        let (receiver, endpoint) = journey.receiver(&format!("unix:{}", path.display()))?;
        let report = journey.hop_to(receiver, &endpoint, &["--verify"])?;
        ensure!(
            report.data_path == DataPath::Handover && report.pages_sent == 0 && report.bytes_sent < 1 << 20,
            "memory was sent, not handed over: {report:?}"
        );
        journey.vm.check_running()?;
        journey.verify()?;
    }
    journey.end()
}

#[test]
fn what_cannot_be_compressed_goes_as_it_is() -> Result<()> {
    let guest = BareGuest {
        memory_mib: 128,
        workset: "32M",
        ..Default::default()
    };
    let mut journey = Journey::start(TestHost::new()?, &guest, &[])?;
    for method in ["lz4", "zstd"] {
        let arguments = ["--verify", "--compression", method, "--bandwidth", "200MB/s"];
        let report = hop_and_verify(&mut journey, &arguments)?;
        let content = report.pages_sent * PAGE;
        ensure!(
            report.bytes_sent <= content + content / 50,
            "{method}: {} bytes for {content} bytes of pages",
            report.bytes_sent
        );
    }
    journey.end()
}

#[test]
fn memory_is_there_before_the_guest_starts() -> Result<()> {
    let guest = BareGuest {
        memory_mib: 128,
        workset: "16M",
        fill: false,
        ..Default::default()
    };
    for (options, expected) in [(&[][..], false), (&["--prealloc"][..], true)] {
        let journey = Journey::start(TestHost::new()?, &guest, options)?;
        let got = resident(&journey.vm)?;
        ensure!(
            (got >= 128 << 20) == expected,
            "{options:?}: {got} bytes resident"
        );
        journey.end()?;
    }
    Ok(())
}

#[test]
fn a_cgroup_that_is_smaller_than_the_guest_refuses_it_before_it_is_touched() -> Result<()> {
    let guest = BareGuest {
        memory_mib: 256,
        workset: "16M",
        ..Default::default()
    };
    let mut journey = Journey::start(TestHost::new()?, &guest, &[])?;
    let host = journey.host.clone();
    let group = MemoryGroup::limited(192)?;
    let refused = |arguments: &[&str]| -> Result<()> {
        let command = host.under(&group.program(), &host.command(arguments))?;
        let finished = TestProcess::run(command, PATIENCE)?;
        ensure!(
            finished.code != Some(0) && finished.stderr.contains("has left, got 268435456"),
            "{arguments:?} in a cgroup of 192 MiB: {finished:?}"
        );
        Ok(())
    };
    let kernel = host.fixtures().bare();
    let kernel = kernel.to_str().context("a path that is no UTF-8")?;
    refused(&["run", "--kernel", kernel, "--memory", "256M"])?;
    let listen = ["receive", "--listen", "tcp:127.0.0.1:0"];
    refused(&[&listen[..], &["--reserve", "256M"]].concat())?;

    let small = |name: &str| {
        let arguments = [&listen[..], &["--name", name]].concat();
        host.start_receiver(name, host.under(&group.program(), &host.command(arguments))?)
    };
    let (mut receiver, endpoint) = small("small")?;
    let error = journey.vm.migrate(&endpoint, &[])?.stayed(Outcome::Failed)?;
    ensure!(error.contains("the cgroup"), "got {error}");
    journey.vm.check_running()?;
    receiver.godwit("stop", &[])?.expect_code(0)?;
    receiver.wait_success(PATIENCE)?;

    let directory = host.path("snapshot");
    journey.vm.snapshot(&directory, &["--keep-running"])?;
    let directory = directory.to_str().context("a path that is no UTF-8")?;
    for how in ["--lazy", "--preload"] {
        refused(&["restore", how, directory])?;
    }
    hop_and_verify(&mut journey, &[])?;

    // What fits is taken.
    let fits = BareGuest {
        memory_mib: 64,
        workset: "16M",
        ..Default::default()
    };
    let mut other = Journey::start(TestHost::new()?, &fits, &[])?;
    let arguments = [&listen[..], &["--name", "fits"]].concat();
    let command = other.host.command(arguments);
    let (receiver, endpoint) = other
        .host
        .start_receiver("fits", other.host.under(&group.program(), &command)?)?;
    other.hop_to(receiver, &endpoint, &["--verify"])?;
    other.verify()?;
    other.end()?;
    group.check_nothing_killed()?;
    journey.end()
}
