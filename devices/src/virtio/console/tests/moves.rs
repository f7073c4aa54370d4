//! Pauses, moves, and when the sockets exist.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use migration_state::Envelope;

use super::super::{
    ConsoleBackendError, ConsoleParameters, ConsoleState, INPUT_LIMIT, PortState, TerminalSize,
};
use super::rig::*;
use crate::virtio::mmio::MmioTransportError;
use crate::virtio::{HostBackend, VirtioDevice};
use named_socket::NamedListenerError;

use crate::HostSocketError;

/// The machine on another host, which runs it.
pub(super) fn moved(rig: &ConsoleRig, saved: Envelope) -> ConsoleRig {
    rig.backend.release_locks().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let (backend, terminal, device) = device(directory.path(), &["a", "b"]);
    let screen = Screen::default();
    terminal.connect(Box::new(screen.clone()));
    let driver = rig.driver.move_to(device, saved).unwrap();
    backend.take_locks().unwrap();
    driver.transport.resume();
    ConsoleRig {
        directory,
        backend,
        terminal,
        screen,
        driver,
    }
}

#[test]
fn a_move_that_fails_leaves_programs_alone() {
    let mut rig = ConsoleRig::open();
    let mut client = rig.client("a");
    let long = vec![b'x'; 700_000];
    rig.send(1, &long);
    rig.driver.save();
    rig.backend.release_locks().unwrap();
    client.write_all(b"meanwhile").unwrap();
    rig.post(1, 1);
    assert_eq!(rig.received(1), b"", "nothing reaches a guest that stands still");
    rig.backend.take_locks().unwrap();
    rig.driver.transport.resume();
    assert_eq!(rig.received(1), b"meanwhile");
    let mut got = 0;
    while got < long.len() {
        got += read(&mut client).len();
        rig.driver.run();
    }
    assert_eq!((got, rig.taken(1)), (long.len(), 1));
}

#[test]
fn after_a_move_the_guest_is_told_that_programs_have_gone() {
    let mut rig = ConsoleRig::open();
    let mut old = rig.client("a");
    rig.messages();
    rig.terminal.resize(TerminalSize {
        columns: 100,
        rows: 30,
    });
    rig.messages();
    rig.terminal.enqueue(b"typed");
    rig.send(1, &vec![b'x'; 700_000]);
    rig.send(2, b"nobody has read this");
    let saved = rig.driver.save();
    let mut there = moved(&rig, saved);
    drop(rig);
    while old.read(&mut [0; 4096]).is_ok_and(|count| count > 0) {}
    let mut client = there.client("a");
    assert_eq!(
        there.messages(),
        [(1, PORT_OPEN, 0, vec![]), (1, PORT_OPEN, 1, vec![])]
    );
    assert_eq!(
        (there.taken(1), read(&mut client)),
        (1, vec![]),
        "the rest is gone"
    );
    let mut other = there.client("b");
    assert_eq!(read(&mut other), b"nobody has read this");
    there.send(1, b"new");
    assert_eq!(read(&mut client), b"new");
    there.post(0, 1);
    assert_eq!(there.received(0), b"typed");
    // The guest knows the size from the source, and is sent only another one.
    assert_eq!(there.driver.get(0x100), 30 << 16 | 100);
    there.messages();
    there.terminal.resize(TerminalSize {
        columns: 100,
        rows: 30,
    });
    assert_eq!(there.messages(), []);
}

#[test]
fn a_guest_without_buffers_gets_its_messages_later() {
    let mut rig = ConsoleRig::new(&["a", "b"]);
    rig.send_message(0, DEVICE_READY, 1);
    let saved = rig.driver.save();
    let mut there = moved(&rig, saved);
    there.post_messages(8);
    assert_eq!(there.messages().len(), 3);
}

#[test]
fn the_saved_state_must_fit() {
    let rig = ConsoleRig::open();
    let refused = |envelope, names: &[&str]| {
        let (_, _, other) = device(rig.directory.path(), names);
        rig.driver.move_to(other, envelope).err().unwrap()
    };
    let error = refused(rig.driver.save(), &["a", "c"]);
    assert!(matches!(error, MmioTransportError::Device { .. }), "{error}");
    let expected = "ports: expected [\"\", \"a\", \"c\"], got [\"\", \"a\", \"b\"]";
    assert!(error.to_string().contains(expected), "{error}");
    let error = refused(rig.driver.save(), &["a"]);
    assert!(matches!(error, MmioTransportError::Mismatch { .. }), "{error}");
    let mut saved = rig.driver.save();
    let mut state: ConsoleState = saved.take("dev0").unwrap();
    state.input = vec![0; INPUT_LIMIT + 1];
    saved.put("dev0", &state).unwrap();
    let error = refused(saved, &["a", "b"]).to_string();
    assert!(error.contains("waiting input: expected at most 65536"), "{error}");
}

#[test]
fn a_device_tells_what_its_like_is_made_with() {
    let directory = tempfile::tempdir().unwrap();
    let (_, _, device) = device(directory.path(), &["a", "b"]);
    let parameters = ConsoleParameters::from_bytes(&device.describe().parameters).unwrap();
    assert!(parameters.has_terminal);
    assert_eq!(parameters.ports, ["a", "b"]);
}

#[test]
fn the_sockets_exist_while_the_locks_are_held() {
    let directory = tempfile::tempdir().unwrap();
    let (backend, _, _device) = device(directory.path(), &["a", "b"]);
    let paths = ["a", "b"].map(|name| directory.path().join(name));
    assert!(paths.iter().all(|path| !path.exists()));
    backend.take_locks().unwrap();
    backend.take_locks().unwrap();
    assert!(paths.iter().all(|path| UnixStream::connect(path).is_ok()));
    let (other, _, _other) = device(directory.path(), &["c", "b"]);
    let error = other.take_locks().unwrap_err();
    let error = error.downcast_ref::<HostSocketError>().unwrap();
    let in_use = matches!(error, HostSocketError::Listener(NamedListenerError::InUse { .. }));
    assert!(in_use, "{error:?}");
    assert!(!directory.path().join("c").exists(), "all of them or none");
    backend.release_locks().unwrap();
    assert!(paths.iter().all(|path| !path.exists()));
}

#[test]
fn ports_that_cannot_be_had() {
    let directory = tempfile::tempdir().unwrap();
    let open = |ports: &[(&str, &str)]| {
        let at = |(name, file): &(&str, &str)| ((*name).to_owned(), directory.path().join(file));
        let ports: Vec<_> = ports.iter().map(at).collect();
        super::super::ConsoleBackend::open(&ports).unwrap_err()
    };
    assert!(matches!(
        open(&[("a b", "x")]),
        ConsoleBackendError::Parameters(_)
    ));
    assert!(matches!(
        open(&[("a", "x"), ("a", "y")]),
        ConsoleBackendError::Parameters(_)
    ));
    assert!(matches!(
        open(&[("a", "x"), ("b", "x")]),
        ConsoleBackendError::Shared { .. }
    ));
    assert!(matches!(
        open(&[("a", "none/x")]),
        ConsoleBackendError::Socket {
            source: HostSocketError::NoFolder { .. },
            ..
        }
    ));
}

#[test]
fn golden_record() {
    let console = PortState {
        ready: true,
        guest_open: true,
        host_open: true,
        ..Default::default()
    };
    let port = PortState {
        name: "a".into(),
        add: true,
        introduce: true,
        cut: true,
        ..Default::default()
    };
    let state = ConsoleState {
        ports: vec![console, port],
        size: Some(TerminalSize {
            columns: 80,
            rows: 300,
        }),
        input: vec![7],
    };
    let bytes = concat!("02", "00000001010100", "016101010000", "0001", "0150ac02", "0107");
    migration_state::assert_golden(1, bytes, &state);
}
