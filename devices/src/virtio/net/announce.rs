//! How the network learns the new place of a guest that has moved.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::mac::MacAddress;
use super::{ETHERNET_LEN, HEADER_LEN};
use crate::timer::Timer;

/// How often a guest is announced: a packet may be lost, or a switch's port may not forward yet.
const ROUNDS: u32 = 5;
/// The gap between the first two rounds.
const GAP: Duration = Duration::from_millis(50);
/// How much longer each further gap is.
const STEP: Duration = Duration::from_millis(100);
/// The first round is due at once; zero would turn the timer off.
const AT_ONCE: Duration = Duration::from_nanos(1);

/// Bytes of the smallest Ethernet frame, without its checksum.
const FRAME_LEN: usize = 60;

/// The timer of the announcements, and how many were sent.
#[derive(Debug)]
pub(super) struct Announcer {
    timer: Timer,
    done: u32,
}

impl Announcer {
    /// An announcer with nothing to announce.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            timer: Timer::new()?,
            done: ROUNDS,
        })
    }

    /// Starts with the first round.
    pub(super) fn begin(&mut self) -> io::Result<()> {
        self.done = 0;
        self.timer.set(AT_ONCE)
    }

    /// Sends no further rounds.
    pub(super) fn stop(&mut self) -> io::Result<()> {
        self.done = ROUNDS;
        self.timer.set(Duration::ZERO)
    }

    /// The number of the round that is due, from 0; `None` if none is.
    pub(super) fn due(&mut self) -> io::Result<Option<u32>> {
        if !self.timer.has_gone_off()? || self.done == ROUNDS {
            return Ok(None);
        }
        let round = self.done;
        self.done += 1;
        if self.done < ROUNDS {
            self.timer.set(GAP + STEP * round)?;
        }
        Ok(Some(round))
    }
}

impl AsFd for Announcer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

/// A request of reverse ARP (RFC 903) from `mac` to all, with the header that a tap expects before it. The answer does
/// not matter; switches learn from the request which port leads to the address.
pub(super) fn rarp(mac: MacAddress) -> [u8; HEADER_LEN + FRAME_LEN] {
    const RARP: [u8; 2] = [0x80, 0x35];
    /// Ethernet, IPv4, the lengths of their addresses, "request reverse".
    const REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 3];
    let mac = mac.bytes();
    let mut packet = [0; HEADER_LEN + FRAME_LEN];
    let frame = &mut packet[HEADER_LEN..];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac);
    frame[12..ETHERNET_LEN].copy_from_slice(&RARP);
    let body = &mut frame[ETHERNET_LEN..];
    body[..8].copy_from_slice(&REQUEST);
    // Both hardware addresses are the guest's; the host does not know its IPv4 addresses.
    body[8..14].copy_from_slice(&mac);
    body[18..24].copy_from_slice(&mac);
    packet
}
