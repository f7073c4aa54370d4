//! Guests in huge pages that the host has set aside. In a test program of its own: to set pages aside stalls the host,
//! and guests of other tests would have longer pauses than usual.

use anyhow::{Context, Result, ensure};
use migration::Outcome;
use tests::{BareGuest, Journey, ReservedHugePages, TestHost, Vm};

#[test]
fn huge_pages_move_and_are_put_in_files() -> Result<()> {
    let guest = BareGuest {
        cpus: 2,
        workset: "32M",
        rate: "50M",
        ..Default::default()
    };
    // Enough for the guest on both sides of a move.
    let pages = ReservedHugePages::set_aside(128)?;
    let mut journey = Journey::start(TestHost::new()?, &guest, &["--huge-pages", "--prealloc"])?;
    let used = huge_kib(&journey.vm)?;
    ensure!(
        used == 64 << 10,
        "expected all memory in huge pages, got {used} KiB"
    );
    journey.hop(&["--verify"])?;
    journey.vm.check_running()?;
    journey.verify()?;
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
    let host = TestHost::new()?;
    let _pages = ReservedHugePages::set_aside(4)?;
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
