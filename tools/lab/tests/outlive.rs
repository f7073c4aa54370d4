//! No host survives its caller, however that ends.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test from end to end")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};

use lab::{Lab, Payload};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Set in the process that plays the caller.
const CALLER: &str = "LAB_TEST_CALLER";

#[test]
fn a_killed_caller_takes_its_hosts_with_it() {
    if std::env::var_os(CALLER).is_some() {
        caller();
    }
    let temporary = tempfile::tempdir().unwrap();
    let mut caller = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "a_killed_caller_takes_its_hosts_with_it",
            "--nocapture",
        ])
        .env(CALLER, "1")
        .env("TMPDIR", temporary.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(caller.stdout.take().unwrap())
        .lines()
        .map(Result::unwrap);
    lines
        .find(|line| line.contains("host is up"))
        .expect("the caller has a host");
    let qemu = child_of(caller.id()).expect("the caller has a QEMU");
    let qemu = pidfd_open(Pid::from_raw(qemu).unwrap(), PidfdFlags::empty()).unwrap();

    caller.kill().unwrap();
    caller.wait().unwrap();
    let mut ended = [PollFd::from_borrowed_fd(qemu.as_fd(), PollFlags::IN)];
    poll(
        &mut ended,
        Some(&Timespec {
            tv_sec: 10,
            tv_nsec: 0,
        }),
    )
    .unwrap();
    assert!(ended[0].revents().contains(PollFlags::IN), "QEMU still runs");
}

/// Starts a host and waits to be killed.
fn caller() -> ! {
    let artifacts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guests");
    // From a thread that ends at once: a host must survive the thread that asked for it.
    let started = std::thread::spawn(move || Lab::builder(Payload::new(artifacts)).memory_mib(1024).start());
    let lab = started.join().unwrap().unwrap_or_else(|error| panic!("{error}"));
    assert!(lab.host(0).run(&["true"]).unwrap().status.success());
    println!("\nhost is up");
    loop {
        std::thread::park();
    }
}

/// A QEMU whose parent is `parent`.
fn child_of(parent: u32) -> Option<i32> {
    let parent = format!("PPid:\t{parent}\n");
    let ids = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.into_iter().find(|id: &i32| {
        let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        status.starts_with("Name:\tqemu-system") && status.contains(&parent)
    })
}
