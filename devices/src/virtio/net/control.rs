//! What the driver asks for on the control queue (virtio 1.2, 5.1.6.5).

use std::io;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use vm_memory::{Bytes, GuestMemoryError};

use crate::GuestMemory;
use crate::virtio::{Chain, ChainError};

/// Bytes of class and command.
const HEADER_LEN: usize = 2;
const ANNOUNCE_ACK: [u8; HEADER_LEN] = [VIRTIO_NET_CTRL_ANNOUNCE as u8, VIRTIO_NET_CTRL_ANNOUNCE_ACK as u8];
const QUEUE_PAIRS: [u8; HEADER_LEN] = [VIRTIO_NET_CTRL_MQ as u8, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET as u8];

/// What a driver can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NetCommand {
    /// The driver has seen that it is to announce itself.
    AnnounceAck,
    /// The driver will use so many pairs of queues.
    QueuePairs(u16),
}

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub(super) enum NetCommandError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error(
        "control command: expected a class, a command, what belongs to it and a byte for the answer, got less"
    )]
    Short,
    #[error("control command: class {0}, command {1} is not supported")]
    Unsupported(u8, u8),
    #[error("control command: expected 1 to {most} pairs of queues, got {got}")]
    QueuePairs { most: u16, got: u16 },
    #[error("control command: tap: {0}")]
    Tap(#[from] io::Error),
    #[error("control command: guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// Parses the command in a chain, applies it and writes the status byte; returns the outcome and the bytes written.
pub(super) fn process_command(
    memory: &GuestMemory,
    chain: Result<Chain, ChainError>,
    apply: impl FnOnce(NetCommand) -> Result<(), NetCommandError>,
) -> (Result<(), NetCommandError>, u32) {
    let mut chain = match chain {
        Ok(chain) => chain,
        Err(error) => return (Err(error.into()), 0),
    };
    let Some(status) = chain.writable.take_last_byte() else {
        return (Err(NetCommandError::Short), 0);
    };
    let done = parse(memory, chain).and_then(apply);
    let value = if done.is_ok() {
        VIRTIO_NET_OK
    } else {
        VIRTIO_NET_ERR
    };
    match memory.write_obj(value as u8, status) {
        Ok(()) => (done, 1),
        Err(error) => (done.and(Err(error.into())), 0),
    }
}

fn parse(memory: &GuestMemory, mut chain: Chain) -> Result<NetCommand, NetCommandError> {
    let mut header = [0; HEADER_LEN];
    if chain.readable.read(memory, &mut header)? < HEADER_LEN {
        return Err(NetCommandError::Short);
    }
    match header {
        ANNOUNCE_ACK => Ok(NetCommand::AnnounceAck),
        QUEUE_PAIRS => {
            let mut pairs = [0; 2];
            if chain.readable.read(memory, &mut pairs)? < pairs.len() {
                return Err(NetCommandError::Short);
            }
            Ok(NetCommand::QueuePairs(u16::from_le_bytes(pairs)))
        }
        [class, command] => Err(NetCommandError::Unsupported(class, command)),
    }
}
