//! From the guest to the tap.

use std::io;
use std::os::fd::BorrowedFd;

use vm_memory::GuestMemoryError;

use super::{ETHERNET_LEN, HEADER_LEN};
use crate::GuestMemory;
use crate::virtio::sys::PacketVectors;
use crate::virtio::{Chain, ChainError};

/// Shortest packet: its header and that of Ethernet.
const MIN_LEN: u64 = (HEADER_LEN + ETHERNET_LEN) as u64;
/// Longest packet with its headers: no IP packet is longer than 65535 bytes, and there may be VLAN tags.
const MAX_LEN: u64 = MIN_LEN + 8 + 65535;

/// Why a packet is dropped, or buffers for one are returned unused.
#[derive(Debug, thiserror::Error)]
pub(super) enum PacketError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("expected {MIN_LEN} to {MAX_LEN} bytes of a packet, got {got}")]
    Length { got: u64 },
    #[error("expected room for {expected} bytes of a packet, got {got}")]
    Room { expected: u64, got: u64 },
    #[error("expected at most {} buffers of a packet, got more", PacketVectors::MAX)]
    TooMany,
    #[error("guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
    #[error("tap: {0}")]
    Tap(#[from] io::Error),
}

/// Sends the packet in a chain, which begins with its header; returns the packet's bytes without the header.
pub(super) fn send_packet(
    memory: &GuestMemory,
    chain: Result<Chain, ChainError>,
    tap: BorrowedFd<'_>,
) -> Result<u64, PacketError> {
    let packet = chain?.readable;
    let got = packet.len();
    if !(MIN_LEN..=MAX_LEN).contains(&got) {
        return Err(PacketError::Length { got });
    }
    let mut vectors = PacketVectors::new(memory);
    vectors.push(&packet)?;
    vectors.write_to(tap)?;
    Ok(got - HEADER_LEN as u64)
}
