//! Sockets of socket devices and of consoles' ports: where they cannot be, machines without, and whose they are.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use migration::Outcome;
use tests::{BareGuest, PATIENCE, TestHost};

use super::{FAILED, check, file, run};

#[test]
fn paths_at_which_no_socket_can_be() -> Result<()> {
    let host = TestHost::new()?;
    let vsock = |path: &Path| format!("cid=3,uds={}", path.display());
    let taken = host.path("taken");
    let listener = UnixListener::bind(&taken)?;
    let precious = PathBuf::from(file(&host, "precious", b"data")?);
    for (path, words) in [
        (taken.clone(), &["vsock", "taken", "in use"][..]),
        (
            precious.clone(),
            &["precious", "expected a free path or a stale socket"],
        ),
        (host.path("no/where"), &["no/where", "expected its folder"]),
        (host.path(&"x".repeat(100)), &["vsock", "expected a path of 1 to"]),
    ] {
        let finished = run(&host, &["--vsock", &vsock(&path)])?;
        check(&host, &finished, FAILED, words).with_context(|| path.display().to_string())?;
    }
    let port = |name: &str| format!("{name}={}", taken.display());
    for (options, words) in [
        (&["--port", &port("a")][..], &["console", "taken", "in use"][..]),
        (
            &["--port", &port("a"), "--port", &port("b")],
            &["port \"b\"", "expected a socket of its own"],
        ),
    ] {
        check(&host, &run(&host, options)?, FAILED, words)?;
    }
    ensure!(std::fs::read(&precious)? == b"data", "a file was touched");
    drop(listener);
    // No process listens there any more: the VM takes the path over, and removes it with the guest.
    let mut vm = BareGuest::default().boot(&host, "vm-0", &["--vsock", &vsock(&taken)])?;
    UnixStream::connect(&taken)?;
    vm.process.send(b"q")?;
    vm.wait_success(PATIENCE)?;
    ensure!(!taken.exists(), "the end has left the socket behind");
    host.check_clean()
}

#[test]
fn sockets_for_machines_without_and_machines_without_sockets() -> Result<()> {
    let host = TestHost::new()?;
    let path = host.path("v.sock");
    let (with, without) = (format!("cid=3,uds={}", path.display()), BareGuest::default());
    let here = format!("uds={}", host.path("here").display());
    let port = format!("a={}", path.display());
    for (run, receive, word) in [
        (&["--vsock", &with][..], &[][..], "use --vsock uds=PATH"),
        (&[], &["--vsock", &here], "no such device"),
        (&["--port", &port], &[], "use --port a=PATH"),
        (&[], &["--port", &port], "no such port"),
    ] {
        let mut vm = without.boot(&host, "vm-0", run)?;
        let (receiver, endpoint) = host.receive("vm-1", "tcp:127.0.0.1:0", receive)?;
        let line = vm.migrate(&endpoint, &[])?.stayed(Outcome::Failed)?;
        ensure!(line.contains(word), "expected {word:?} in {line:?}");
        vm.check_running()?;
        ensure!(
            path.exists() != run.is_empty(),
            "the socket comes and goes with the guest"
        );
        drop(receiver);
        vm.process.send(b"q")?;
        vm.wait_success(PATIENCE)?;
    }
    Ok(())
}

/// A path may be the source's until the commit, so the destination finds out after it that another process listens
/// there. Neither side runs the guest then, until `resolve --run` lets the source do so.
#[test]
fn a_socket_that_is_in_use_where_the_guest_moves_to() -> Result<()> {
    let host = TestHost::new()?;
    let (path, taken) = (host.path("v.sock"), host.path("taken"));
    let _listener = UnixListener::bind(&taken)?;
    let vsock = format!("cid=3,uds={}", path.display());
    let mut vm = BareGuest::default().boot(&host, "vm-0", &["--vsock", &vsock])?;
    let there = format!("uds={}", taken.display());
    let (receiver, endpoint) = host.receive("vm-1", "tcp:127.0.0.1:0", ["--vsock", &there])?;
    let migration = vm.migrate(&endpoint, &["--on-miss", "switch"])?;
    ensure!(migration.code == Some(3), "expected doubt, got {migration:?}");
    for word in ["vsock", "taken", "in use"] {
        ensure!(
            migration.stderr.contains(word),
            "expected {word:?} in {migration:?}"
        );
    }
    ensure!(
        !path.exists(),
        "no process runs the guest, and its socket is there"
    );
    vm.godwit("resolve", &["--run"])?.expect_code(0)?;
    vm.check_running()?;
    UnixStream::connect(&path).context("the socket of a guest that goes on")?;
    drop(receiver);
    vm.process.send(b"q")?;
    vm.wait_success(PATIENCE)
}

#[test]
fn a_socket_goes_where_its_guest_goes() -> Result<()> {
    let host = TestHost::new()?;
    let path = host.path("v.sock");
    let here = format!("uds={}", path.display());
    let vsock = format!("cid=3,{here}");
    let mut vm = BareGuest::default().boot(&host, "vm-0", &["--vsock", &vsock])?;
    let (mut receiver, endpoint) = host.receive("vm-1", "tcp:127.0.0.1:0", ["--vsock", &here])?;
    vm.migrate(&endpoint, &["--on-miss", "switch"])?.moved()?;
    vm.wait_success(PATIENCE)?;
    UnixStream::connect(&path).context("the socket that the source had")?;
    receiver.process.send(b"q")?;
    receiver.wait_success(PATIENCE)?;
    ensure!(!path.exists(), "the end has left the socket behind");
    host.check_clean()
}
