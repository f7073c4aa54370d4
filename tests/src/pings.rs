//! Pings at short intervals, and which of them were not answered.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recv, sendto, socket_with,
};

/// Echo requests and their answers (RFC 792).
const REQUEST: u8 = 8;
const ANSWER: u8 = 0;
/// The identifier of this program's pings, not another program's.
const ID: [u8; 2] = *b"gw";
/// How long the last answers may take.
const LAST: Duration = Duration::from_secs(5);

/// A thread that pings.
pub struct Pings {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Pinged>>,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Pinged {
    /// Requests.
    pub sent: u16,
    /// How many of them had no answer yet when the last was sent.
    pub late: usize,
    /// The numbers of those without an answer.
    pub lost: BTreeSet<u16>,
}

impl Pings {
    /// Starts to ping from this thread's network.
    pub fn start(to: Ipv4Addr, interval: Duration) -> Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::INET, SocketType::RAW, flags, Some(ipproto::ICMP))
            .context("a socket for pings")?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || run(&socket, to, interval, &stopped));
        Ok(Self { stop, thread })
    }

    /// Stops, and waits for the last answers.
    pub fn stop(self) -> Result<Pinged> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the pings panicked"))?
    }
}

fn run(socket: &OwnedFd, to: Ipv4Addr, interval: Duration, stop: &AtomicBool) -> Result<Pinged> {
    let address = SocketAddrV4::new(to, 0);
    let mut pinged = Pinged::default();
    let mut due = Instant::now();
    // One at least, however late this thread starts.
    while pinged.sent == 0 || !stop.load(Ordering::Relaxed) {
        // No host answers for the guest yet, or the network does not know its place: lost as any other.
        let _ = sendto(socket, &request(pinged.sent), SendFlags::empty(), &address);
        pinged.lost.insert(pinged.sent);
        pinged.sent += 1;
        due += interval;
        while take_answers(socket, to, due, &mut pinged)? {}
    }
    pinged.late = pinged.lost.len();
    let end = Instant::now() + LAST;
    while !pinged.lost.is_empty() && take_answers(socket, to, end, &mut pinged)? {}
    Ok(pinged)
}

/// Waits for answers; `false` if it is time for something else.
fn take_answers(socket: &OwnedFd, from: Ipv4Addr, until: Instant, pinged: &mut Pinged) -> Result<bool> {
    let left = Timespec::try_from(until.saturating_duration_since(Instant::now()))?;
    if poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&left))? == 0 {
        return Ok(false);
    }
    let mut packet = [0; 128];
    loop {
        match recv(socket, &mut packet[..], RecvFlags::empty()) {
            Ok((len, _)) => {
                if let Some(number) = answer(&packet[..len], from) {
                    pinged.lost.remove(&number);
                }
            }
            Err(Errno::AGAIN) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
}

fn request(number: u16) -> [u8; 8] {
    let [high, low] = number.to_be_bytes();
    let mut packet = [REQUEST, 0, 0, 0, ID[0], ID[1], high, low];
    let words = packet
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let sum: u32 = words.sum();
    let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
    packet[2..4].copy_from_slice(&checksum.to_be_bytes());
    packet
}

/// The number of an answer to one of these pings. A raw socket receives the answers to all pings of the machine: the
/// identifier and the IP header say to which.
fn answer(packet: &[u8], from: Ipv4Addr) -> Option<u16> {
    if packet.get(12..16)? != from.octets() {
        return None;
    }
    let header = usize::from(packet.first()? & 0xf) * 4;
    match packet.get(header..)? {
        [ANSWER, _, _, _, a, b, high, low, ..] if [*a, *b] == ID => Some(u16::from_be_bytes([*high, *low])),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Network;

    #[test]
    fn the_machine_answers_itself_and_nobody_else_does() {
        let _network = Network::enter().unwrap();
        let interval = Duration::from_millis(1);
        let pings = Pings::start(Ipv4Addr::LOCALHOST, interval).unwrap();
        let nobody = Pings::start(Ipv4Addr::new(10, 9, 0, 9), LAST).unwrap();
        let nobody = nobody.stop().unwrap();
        assert_eq!(nobody.lost.len(), usize::from(nobody.sent));
        let pinged = pings.stop().unwrap();
        assert!(pinged.sent > 0 && pinged.lost.is_empty(), "{pinged:?}");
    }
}
