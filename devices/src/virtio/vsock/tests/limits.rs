//! Packets that wait for tokens.

use std::io::Write;
use std::time::{Duration, Instant};

use super::super::VsockParameters;
use super::super::packet::PacketOp;
use super::rig::*;
use crate::rate::{Bucket, Limits};

/// A hundred bytes a millisecond.
const LIMITS: Limits = Limits {
    bandwidth: Some(Bucket {
        size: 3000,
        one_time_burst: 0,
        refill_time_ms: 30,
    }),
    operations: None,
};
const TOTAL: usize = 30_000;
/// What the bucket does not have, but for a packet that may be larger than what is in it.
const AT_LEAST: Duration = Duration::from_millis((TOTAL as u64 - 3000 - ROOM as u64) / 100 - 1);

#[test]
fn packets_to_the_guest_wait_in_the_hosts_socket() {
    let mut rig = VsockRig::with_limits(LIMITS);
    let (mut client, _) = rig.open();
    let sent = pattern(TOTAL);
    let begin = Instant::now();
    client.write_all(&sent).unwrap();
    let mut got = Vec::new();
    while got.len() < TOTAL {
        got.extend(rig.received().into_iter().flat_map(|(_, data)| data));
    }
    assert!(begin.elapsed() >= AT_LEAST, "{:?}", begin.elapsed());
    assert_eq!(got, sent);
    assert!(rig.driver.count("rx_throttled") > 0);
    assert_eq!(rig.driver.count("tx_throttled"), 0);
}

#[test]
fn packets_of_the_guest_wait_in_its_queue() {
    let mut rig = VsockRig::with_limits(LIMITS);
    let (mut client, port) = rig.open();
    let sent = pattern(TOTAL);
    let begin = Instant::now();
    let mut got = Vec::new();
    for part in sent.chunks(ROOM as usize) {
        rig.send(packet(PacketOp::Data, port), part);
        got.extend(read(&mut client));
    }
    assert!(begin.elapsed() >= AT_LEAST, "{:?}", begin.elapsed());
    assert_eq!(got, sent);
    assert!(rig.driver.count("tx_throttled") > 0);
}

/// Whatever a packet says of itself, it is an operation.
#[test]
fn packets_that_make_no_sense_wait_as_well() {
    let operations = Bucket {
        size: 2,
        one_time_burst: 0,
        refill_time_ms: 20,
    };
    let mut rig = VsockRig::with_limits(Limits {
        bandwidth: None,
        operations: Some(operations),
    });
    let begin = Instant::now();
    (0..6).for_each(|_| rig.send_bytes(&[0; 7]));
    assert!(
        begin.elapsed() >= Duration::from_millis(39),
        "{:?}",
        begin.elapsed()
    );
}

#[test]
fn the_limits_are_part_of_what_a_device_is_made_with() {
    let rig = VsockRig::with_limits(LIMITS);
    let parameters = rig.driver.transport.describe().parameters;
    let parameters = VsockParameters::from_bytes(&parameters).unwrap();
    assert_eq!((parameters.guest_cid, parameters.limits), (GUEST_CID, LIMITS));
}
