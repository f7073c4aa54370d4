//! The ways that guest memory can take to its destination, and the logs that say which of it is dirty.

use anyhow::{Context, Result, ensure};
use migration::{DataPath, Outcome, Report};
use tests::{BareGuest, Host, HugePages, Journey, Vm};

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
    let mut journey = Journey::start(Host::new()?, &guest, &[])?;
    // As much as the guest has is used; anything else is let go and made anew.
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
fn the_dirty_ring_forgets_no_page_of_any_vcpu() -> Result<()> {
    let guest = BareGuest {
        memory_mib: 256,
        cpus: 2,
        workset: "96M",
        rate: "400M",
        fill: true,
        ..Default::default()
    };
    let mut journey = Journey::start(Host::new()?, &guest, &["--dirty-ring"])?;
    // Fast, and over a link that the guest is too fast for, so that rings fill up and vCPUs are slowed down.
    hop_and_verify(&mut journey, &["--verify"])?;
    let capped = [
        "--verify",
        "--bandwidth",
        "150MB/s",
        "--final-bandwidth",
        "150MB/s",
        "--max-downtime",
        "60ms",
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
    let mut journey = Journey::start(Host::new()?, &guest, &["--shared-memory"])?;
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
    let mut journey = Journey::start(Host::new()?, &guest, &[])?;
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
fn huge_pages_move_and_are_put_in_files() -> Result<()> {
    let guest = BareGuest {
        memory_mib: 64,
        cpus: 2,
        workset: "32M",
        rate: "50M",
        fill: true,
        reads: 0,
    };
    // Enough for the guest on both sides of a move.
    let pages = HugePages::set_aside(128)?;
    let mut journey = Journey::start(Host::new()?, &guest, &["--huge-pages", "--prealloc"])?;
    let used = huge_kib(&journey.vm)?;
    ensure!(
        used == 64 << 10,
        "expected all memory in huge pages, got {used} KiB"
    );
    hop_and_verify(&mut journey, &["--verify"])?;
    ensure!(huge_kib(&journey.vm)? > 0, "no huge pages at the destination");

    // Without them no destination takes it.
    pages.change(64)?;
    let (receiver, endpoint) = journey.receiver("tcp:127.0.0.1:0")?;
    let error = journey.vm.migrate(&endpoint, &[])?.stayed(Outcome::Failed)?;
    ensure!(
        error.contains("expected 32 of 2 MiB that are free, got 0"),
        "got {error}"
    );
    journey.vm.check_running()?;
    pages.change(128)?;
    journey.hop_to(receiver, &endpoint, &["--verify"])?;

    let base = journey.host.path("base");
    journey.vm.snapshot(&base, &["--keep-running"])?;
    journey.vm.check_running()?;
    let difference = journey.host.path("difference");
    journey.vm.snapshot(&difference, &["--diff"])?;
    let host = journey.host.clone();
    let whole = host.path("whole");
    let words = ["snapshot", "merge"].map(std::ffi::OsString::from).into_iter();
    let paths = [&base, &difference].map(|path| path.clone().into_os_string());
    let output = ["--output".into(), whole.clone().into_os_string()];
    host.godwit(words.chain(paths).chain(output))?.expect_code(0)?;
    let refused = host.godwit(["restore".as_ref(), whole.as_os_str()])?;
    refused.expect_code(1)?;
    ensure!(
        refused.stderr.contains("cannot be mapped from a file"),
        "got {refused:?}"
    );
    let restored = host.restore(&whole, &["--preload", "--resume"])?;
    journey.arrive(restored)?;
    ensure!(huge_kib(&journey.vm)? > 0, "no huge pages after a restore");
    journey.vm.check_running()?;
    journey.verify()?;
    journey.end()
}

/// KiB of huge pages that a process has.
fn huge_kib(vm: &Vm) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", vm.process.id()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("HugetlbPages:"));
    let line = line.context("no HugetlbPages")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse()?)
}

#[test]
fn huge_pages_that_cannot_be_had() -> Result<()> {
    let host = Host::new()?;
    let _pages = HugePages::set_aside(4)?;
    let kernel = host.fixtures().bare().display().to_string();
    for (options, code, words) in [
        (
            &["--memory", "64M"][..],
            1,
            &[
                "expected 32 of 2 MiB that are free, got 2",
                "/proc/sys/vm/nr_hugepages",
            ][..],
        ),
        (&["--memory", "65M"], 1, &["expected a multiple of 2097152 bytes"]),
        (&["--balloon"], 2, &["expected no balloon"]),
        (&["--shared-memory"], 2, &["shared memory"]),
    ] {
        let words_of = ["run", "--kernel", &kernel, "--huge-pages"];
        let refused = host.godwit(words_of.iter().chain(options))?;
        refused.expect_code(code)?;
        for word in words {
            ensure!(
                refused.stderr.contains(word),
                "{options:?}: expected {word:?} in {:?}",
                refused.stderr
            );
        }
        host.check_clean()?;
    }
    Ok(())
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
        let journey = Journey::start(Host::new()?, &guest, options)?;
        let got = resident(&journey.vm)?;
        ensure!(
            (got >= 128 << 20) == expected,
            "{options:?}: {got} bytes resident"
        );
        journey.end()?;
    }
    Ok(())
}
