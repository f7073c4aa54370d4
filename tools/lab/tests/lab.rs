//! A real lab: needs QEMU and what `cargo xtask guests` makes.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test from end to end")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lab::{Lab, LabError, Payload, Signal, WaitLimit};

const SOON: WaitLimit = WaitLimit::DEFAULT;

fn artifacts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guests")
}

/// Process ids of the QEMUs that this process has started.
fn qemus() -> Vec<u32> {
    let ours = format!("PPid:\t{}\n", std::process::id());
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.filter(|id: &u32| {
        let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        status.starts_with("Name:\tqemu-system") && status.contains(&ours)
    })
    .collect()
}

#[test]
fn two_hosts_and_their_end() {
    let payload = Payload::new(artifacts()).with("bin/hello", artifacts().join("lab/busybox"));
    let lab = Lab::builder(payload)
        .hosts(2)
        .cpu(1, "EPYC,+svm,+npt,-avx2")
        .shared_disk(8 << 20)
        .start()
        .unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(qemus().len(), 2);
    programs_run(&lab);
    hosts_differ_and_have_kvm(&lab);
    the_network_works_until_it_is_cut(&lab);
    the_disk_is_shared(&lab);
    a_power_cut_takes_everything(&lab);
    drop(lab);
    assert_eq!(qemus(), []);
}

fn programs_run(lab: &Lab) {
    let output = lab
        .host(0)
        .run(&["sh", "-c", "echo out; echo err >&2; exit 3"])
        .unwrap();
    assert_eq!(
        (output.stdout.as_str(), output.stderr.as_str()),
        ("out\n", "err\n")
    );
    assert_eq!(output.status.code(), Some(3));
    let missing = lab.host(0).run(&["no-such-program"]).unwrap_err();
    assert!(matches!(missing, LabError::Refused { host: 0, .. }), "{missing}");

    // Two at once, with input and output as they come.
    let mut echo = lab.host(0).spawn(&["cat"]).unwrap();
    let mut sleeper = lab.host(0).spawn(&["sleep", "1000"]).unwrap();
    echo.write_stdin(b"one\ntwo\n").unwrap();
    assert_eq!(echo.wait_line(|line| line == "two", SOON).unwrap(), "two");
    echo.write_stdin(b"three\n").unwrap();
    assert_eq!(echo.wait_line(|_| true, SOON).unwrap(), "three");
    echo.close_stdin().unwrap();
    assert_eq!(echo.wait(SOON).unwrap().stdout, "one\ntwo\nthree\n");
    let early = sleeper.wait(Duration::from_millis(10)).unwrap_err();
    assert!(matches!(early, LabError::TimedOut { host: 0, .. }), "{early}");
    sleeper.signal(Signal::Terminate).unwrap();
    let end = sleeper.wait(SOON).unwrap().status;
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&end), Some(15));

    // A terminal is one.
    let mut shell = lab.host(0).terminal(&["sh"]).unwrap();
    shell
        .write_stdin(b"test -t 0 && echo is a ${X}terminal; exit 7\n")
        .unwrap();
    shell.wait_line(|line| line == "is a terminal", SOON).unwrap();
    assert_eq!(shell.wait(SOON).unwrap().status.code(), Some(7));

    // Much output arrives whole.
    let output = lab.host(0).run(&["seq", "1", "100000"]).unwrap();
    let expected: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    assert!(
        output.stdout == expected,
        "{} bytes instead of {}",
        output.stdout.len(),
        expected.len()
    );
}

fn hosts_differ_and_have_kvm(lab: &Lab) {
    let flags = |host: usize| {
        let text = lab.host(host).run(&["cat", "/proc/cpuinfo"]).unwrap().stdout;
        ["svm", "avx2"].map(|flag| text.split_whitespace().any(|word| word == flag))
    };
    assert_eq!((flags(0), flags(1)), ([true, true], [true, false]));
    // Each host is given the TSC's frequency. It measures the CPU's, and rejects the given one if they differ by 10 %.
    let after = |host: usize, file: &str, key: &str| -> f64 {
        let text = lab.host(host).run(&["cat", file]).unwrap().stdout;
        let value = text
            .split_once(key)
            .unwrap()
            .1
            .trim_start_matches(['\t', ':', ' ']);
        value.split_whitespace().next().unwrap().parse().unwrap()
    };
    for host in 0..2 {
        let given = after(host, "/proc/cmdline", "tsc_early_khz=") / 1000.0;
        let measured = after(host, "/proc/cpuinfo", "cpu MHz");
        assert!(
            (given / measured - 1.0).abs() < 0.11,
            "given {given}, measured {measured}"
        );
        let kvm = lab.host(host).run(&["test", "-c", "/dev/kvm"]).unwrap();
        assert!(kvm.status.success(), "{}", lab.host(host).console());
    }
}

fn the_network_works_until_it_is_cut(lab: &Lab) {
    let address = lab.host(1).address().to_string();
    let ping = || {
        lab.host(0)
            .run(&["ping", "-c", "1", "-W", "2", &address])
            .unwrap()
            .status
            .success()
    };
    assert!(ping());
    lab.set_cut(1, true);
    assert!(!ping());
    lab.set_cut(1, false);
    assert!(ping());
}

fn the_disk_is_shared(lab: &Lab) {
    let write = "printf written | dd of=/dev/vda bs=512 seek=5 conv=sync,fsync 2>/dev/null";
    assert!(lab.host(0).run(&["sh", "-c", write]).unwrap().status.success());
    let read = lab
        .host(1)
        .run(&["dd", "if=/dev/vda", "bs=512", "skip=5", "count=1", "status=none"])
        .unwrap();
    assert!(read.stdout.starts_with("written\0"), "{read:?}");
    let image = fs::read(lab.disk().unwrap()).unwrap();
    assert_eq!(
        (image.len(), &image[5 * 512..5 * 512 + 7]),
        (8 << 20, &b"written"[..])
    );
}

fn a_power_cut_takes_everything(lab: &Lab) {
    let mut sleeper = lab.host(1).spawn(&["sleep", "1000"]).unwrap();
    lab.host(1).kill();
    assert_eq!(qemus().len(), 1);
    let gone = sleeper.wait(SOON).unwrap_err();
    assert!(matches!(gone, LabError::HostGone { host: 1, .. }), "{gone}");
    assert!(lab.host(1).run(&["true"]).is_err());
    lab.host(1).restart().unwrap_or_else(|error| panic!("{error}"));
    assert!(lab.host(1).run(&["true"]).unwrap().status.success());
    assert!(lab.host(0).run(&["true"]).unwrap().status.success());
}
