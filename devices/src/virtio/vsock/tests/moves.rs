//! Pauses, moves, and when the socket exists.

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use migration_state::Envelope;

use super::super::packet::PacketOp;
use super::super::{VirtioVsock, VsockBackend, VsockParameters};
use super::rig::*;
use crate::rate::Limits;
use crate::virtio::HostBackend;
use crate::virtio::mmio::MmioTransportError;
use named_socket::NamedListenerError;

use crate::HostSocketError;

/// The machine on another host, which runs it.
fn moved(rig: &VsockRig, saved: Envelope) -> VsockRig {
    rig.backend.release_locks().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let (backend, device) = device(&directory.path().join("v.sock"));
    let driver = rig.driver.move_to(device, saved).unwrap();
    backend.take_locks().unwrap();
    driver.transport.resume();
    VsockRig {
        directory,
        backend,
        driver,
    }
}

#[test]
fn a_move_that_fails_leaves_connections_alone() {
    let mut rig = VsockRig::new();
    let (mut client, port) = rig.open();
    rig.driver.save();
    rig.backend.release_locks().unwrap();
    client.write_all(b"meanwhile").unwrap();
    assert_eq!(rig.ops(), [], "nothing reaches a guest that stands still");
    rig.backend.take_locks().unwrap();
    rig.driver.transport.resume();
    assert_eq!(rig.one().1, b"meanwhile");
    rig.send(packet(PacketOp::Data, port), b"back");
    assert_eq!(read(&mut client), b"back");
    rig.open();
}

#[test]
fn after_a_move_the_guest_gets_the_event_before_programs_connect() {
    let mut rig = VsockRig::new();
    let (_old, old_port) = rig.open();
    rig.post_event();
    rig.post_event();
    let saved = rig.driver.save();
    let mut rig = moved(&rig, saved);
    rig.driver.fill(EVENT, &[0xff; 4]);
    let _client = rig.dial();
    assert_eq!(
        rig.ops(),
        [],
        "the guest would throw a new connection away with the old ones"
    );
    let used = rig.driver.select(EVENTS).used();
    assert_eq!((used.len(), used[0].1), (1, 4), "{used:?}");
    assert_eq!(rig.driver.bytes(EVENT, 4), [0; 4]);
    assert!(rig.driver.interrupts() > 0);
    rig.driver.kick();
    assert_eq!(rig.ops(), [], "a kick alone says nothing");
    rig.post_event();
    let (request, _) = rig.one();
    assert_eq!(request.op, Some(PacketOp::Request));
    assert_ne!(
        request.source_port, old_port,
        "the guest may still know the old port"
    );
    // What the guest still sends on the old one is of no connection.
    rig.send(packet(PacketOp::Data, old_port), b"late");
    assert_eq!(rig.ops(), [PacketOp::Reset]);
}

#[test]
fn a_guest_without_a_buffer_gets_the_event_later() {
    let rig = VsockRig::new();
    let saved = rig.driver.save();
    let mut rig = moved(&rig, saved);
    let _client = rig.dial();
    assert_eq!(rig.ops(), []);
    rig.post_event();
    assert_eq!(rig.driver.select(EVENTS).used().len(), 1);
    assert_eq!(rig.ops(), []);
    rig.post_event();
    assert_eq!(rig.ops(), [PacketOp::Request]);
}

#[test]
fn a_reset_cancels_the_event() {
    let rig = VsockRig::new();
    let saved = rig.driver.save();
    let mut rig = moved(&rig, saved);
    rig.driver.bring_up();
    rig.post(4);
    rig.open();
}

#[test]
fn the_saved_state_must_fit() {
    let rig = VsockRig::new();
    let saved = rig.driver.save();
    let backend = Arc::new(VsockBackend::open(&rig.path("other.sock")).unwrap());
    let parameters = VsockParameters {
        guest_cid: GUEST_CID + 1,
        limits: Limits::default(),
    };
    let other = VirtioVsock::new(backend, parameters).unwrap();
    let error = rig.driver.move_to(other, saved).err().unwrap();
    assert!(matches!(error, MmioTransportError::Device { .. }), "{error}");
    assert!(error.to_string().contains("CID: expected 4, got 3"), "{error}");
}

#[test]
fn the_socket_exists_while_the_locks_are_held() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v.sock");
    let (backend, _device) = device(&path);
    assert!(!path.exists());
    backend.take_locks().unwrap();
    backend.take_locks().unwrap();
    UnixStream::connect(&path).unwrap();
    let (other, _other) = device(&path);
    let error = other.take_locks().unwrap_err();
    let error = error.downcast_ref::<HostSocketError>().unwrap();
    let in_use = matches!(error, HostSocketError::Listener(NamedListenerError::InUse { .. }));
    assert!(in_use, "{error:?}");
    backend.release_locks().unwrap();
    assert!(!path.exists());
    // What a killed process leaves behind.
    drop(UnixListener::bind(&path).unwrap());
    other.take_locks().unwrap();
    drop((other, _other));
    assert!(!path.exists());
}

#[test]
fn paths_that_cannot_be_a_sockets() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    let open = |path: &std::path::Path| VsockBackend::open(path).unwrap_err();
    let error = open(&file);
    let other = matches!(
        error,
        HostSocketError::Listener(NamedListenerError::NotASocket { .. })
    );
    assert!(other, "{error:?}");
    assert!(matches!(open(&file.join("x")), HostSocketError::NoFolder { .. }));
    assert!(matches!(
        open("x".repeat(97).as_ref()),
        HostSocketError::Length { got: 97, .. }
    ));
    assert!(matches!(
        open("".as_ref()),
        HostSocketError::Length { got: 0, .. }
    ));
}
