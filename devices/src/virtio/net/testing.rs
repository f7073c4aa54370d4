//! A network for tests: two taps on a bridge, in a network namespace of the test's thread.

#![allow(unsafe_code, reason = "a thread leaves its network namespace")]

use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::{MacAddress, NetParameters, Tap, TapError, TapSource, VirtioNet};
use crate::rate::Limits;

/// How long what must happen may take; it only costs time where something is broken.
const PATIENCE: Duration = Duration::from_secs(30);
/// The far end's tap: what is written to it arrives at the devices, and the other way round.
const FAR: &str = "far";
/// The sender of the tests' frames; the kernel sends some of its own.
pub(crate) const SENDER: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// EtherType for local experiments (IEEE 802).
const EXPERIMENT: [u8; 2] = [0x88, 0xb5];

/// The network, seen from its far end.
pub(crate) struct Wire {
    far: Tap,
}

/// Leaves the machine's network for an empty one with this tap.
pub(crate) fn leave_for(tap: &str) {
    // SAFETY: only the thread's network namespace changes; its file descriptors stay shared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("root can make network namespaces");
    // Otherwise the kernel would send packets of its own, to find routers and neighbours.
    for which in ["default", "all"] {
        let path = format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6");
        if std::path::Path::new(&path).exists() {
            std::fs::write(path, "1").unwrap();
        }
    }
    add(tap);
}

/// Runs `ip` with these words; returns what it prints.
pub(crate) fn ip(words: &str) -> String {
    // The user's path may lack the directory of `ip`.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new("ip")
        .args(words.split(' '))
        .env("PATH", path)
        .output()
        .unwrap();
    assert!(output.status.success(), "ip {words}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Makes a tap; one with "many" in its name may have many queues.
fn add(tap: &str) {
    let queues = if tap.contains("many") { " multi_queue" } else { "" };
    ip(&format!("tuntap add dev {tap} mode tap{queues}"));
    ip(&format!("link set dev {tap} up"));
}

/// What cards of the tests are made with, except for their pairs of queues.
pub(crate) fn parameters(queue_pairs: u16) -> NetParameters {
    NetParameters {
        mac: MacAddress::try_from([2, 0, 0, 0, 0, 1]).unwrap(),
        mtu: 1500,
        queue_pairs,
        rx_limits: Limits::default(),
        tx_limits: Limits::default(),
    }
}

/// A card on a tap, which has two pairs of queues if the tap may have many.
pub(crate) fn card(tap: &str) -> VirtioNet {
    let queue_pairs = if tap.contains("many") { 2 } else { 1 };
    VirtioNet::new(open(tap), parameters(queue_pairs)).unwrap()
}

/// Opens a tap that was just closed: a program that another test starts may have it for a moment yet.
pub(crate) fn open(tap: &str) -> Tap {
    let begin = Instant::now();
    loop {
        match Tap::open(&TapSource::Name(tap.into())) {
            Err(TapError::Busy { .. }) if begin.elapsed() < PATIENCE => {}
            opened => return opened.unwrap(),
        }
    }
}

/// A frame with `body`, to all.
pub(crate) fn frame(body: &[u8]) -> Vec<u8> {
    [&[0xff; 6][..], &SENDER, &EXPERIMENT, body].concat()
}

/// Whether a test sent it.
pub(crate) fn is_ours(frame: &[u8]) -> bool {
    frame[6..12] == SENDER
}

impl Wire {
    /// A bridge between the far end and these taps.
    pub(crate) fn between(taps: &[&str]) -> Self {
        leave_for(FAR);
        ip("link add name bridge up type bridge mcast_snooping 0");
        ip(&format!("link set dev {FAR} master bridge"));
        for tap in taps {
            add(tap);
            ip(&format!("link set dev {tap} master bridge"));
        }
        let far = open(FAR);
        wait_until_forwarding(FAR);
        Self { far }
    }

    /// A card on one of the taps.
    pub(crate) fn card(&self, tap: &str) -> VirtioNet {
        self.put(card(tap), tap)
    }

    /// A card that is on one of the taps, once the bridge has seen it.
    pub(crate) fn put(&self, card: VirtioNet, tap: &str) -> VirtioNet {
        wait_until_forwarding(tap);
        card
    }

    /// Sends a packet with its header.
    pub(crate) fn send(&self, header: [u8; 12], frame: &[u8]) {
        self.far.write(&[&header, frame].concat()).unwrap();
    }

    /// The next packet whose frame is `wanted`, as its header and its frame, if one is there.
    pub(crate) fn try_receive(&self, wanted: impl Fn(&[u8]) -> bool) -> Option<(Vec<u8>, Vec<u8>)> {
        let mut packet = vec![0; 70_000];
        while let Ok(len) = rustix::io::read(self.far.queue(0), &mut packet[..]) {
            let (header, frame) = packet[..len].split_at(12);
            if wanted(frame) {
                return Some((header.to_vec(), frame.to_vec()));
            }
        }
        None
    }

    /// Waits for such a packet.
    pub(crate) fn receive(&self, wanted: impl Fn(&[u8]) -> bool) -> (Vec<u8>, Vec<u8>) {
        let patience = Timespec::try_from(PATIENCE).unwrap();
        loop {
            if let Some(packet) = self.try_receive(&wanted) {
                return packet;
            }
            let ready = poll(
                &mut [PollFd::new(&self.far.queue(0), PollFlags::IN)],
                Some(&patience),
            )
            .unwrap();
            assert!(ready > 0, "nothing came");
        }
    }

    /// From now on the kernel does not cut packets into segments for the far end.
    pub(crate) fn take_segments(&mut self) {
        self.far.set_features(self.far.features()).unwrap();
    }
}

/// Waits until the kernel has seen that a tap is open, which it does in its own time.
fn wait_until_forwarding(tap: &str) {
    let begin = Instant::now();
    while !ip(&format!("-d link show dev {tap}")).contains("state forwarding") {
        assert!(
            begin.elapsed() < Duration::from_secs(30),
            "the bridge ignores {tap}"
        );
    }
}
