//! Telling the network where a guest is that came from elsewhere.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::mac::MacAddress;
use super::{ETHERNET_LEN, HEADER_LEN};

/// How often the network is told: a packet may be lost, or a port not forward yet.
const ROUNDS: u32 = 5;
/// Between the first two rounds; each further gap is longer by [`STEP`].
const GAP: Duration = Duration::from_millis(50);
const STEP: Duration = Duration::from_millis(100);
/// The first round is due at once; zero would turn the timer off.
const AT_ONCE: Duration = Duration::from_nanos(1);

/// Bytes of the smallest Ethernet frame, without its checksum.
const FRAME_LEN: usize = 60;

/// Says when it is time to announce.
#[derive(Debug)]
pub(super) struct Announcer {
    timer: OwnedFd,
    done: u32,
}

impl Announcer {
    /// With nothing to announce.
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self {
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            done: ROUNDS,
        })
    }

    /// Begins with the first round.
    pub(super) fn begin(&mut self) -> io::Result<()> {
        self.done = 0;
        self.set(AT_ONCE)
    }

    /// Ends it.
    pub(super) fn stop(&mut self) -> io::Result<()> {
        self.done = ROUNDS;
        self.set(Duration::ZERO)
    }

    /// The number of the round that is due, from 0; `None` if none is.
    pub(super) fn due(&mut self) -> io::Result<Option<u32>> {
        let mut expired = [0; 8];
        match rustix::io::read(&self.timer, &mut expired) {
            Ok(_) if self.done < ROUNDS => {}
            Ok(_) | Err(rustix::io::Errno::AGAIN) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let round = self.done;
        self.done += 1;
        if self.done < ROUNDS {
            self.set(GAP + STEP * round)?;
        }
        Ok(Some(round))
    }

    fn set(&self, after: Duration) -> io::Result<()> {
        let never = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let value = Timespec {
            // Less than a second.
            tv_sec: after.as_secs() as i64,
            tv_nsec: i64::from(after.subsec_nanos()),
        };
        let once = Itimerspec {
            it_interval: never,
            it_value: value,
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        Ok(())
    }
}

impl AsFd for Announcer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

/// A request of reverse ARP (RFC 903) from `mac` to all, with the header that a tap wants before it. It asks for
/// nothing; switches learn from it behind which port the address is.
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
    // Both hardware addresses are the guest's; of its IPv4 addresses the host knows nothing.
    body[8..14].copy_from_slice(&mac);
    body[18..24].copy_from_slice(&mac);
    packet
}
