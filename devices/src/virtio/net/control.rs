//! What the driver asks for on the control queue (virtio 1.2, 5.1.6.5).

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use vm_memory::{Bytes, GuestMemoryError};

use crate::GuestMemory;
use crate::virtio::{Chain, ChainError};

/// Bytes of class and command.
const HEADER_LEN: usize = 2;
const ANNOUNCE_ACK: [u8; HEADER_LEN] = [VIRTIO_NET_CTRL_ANNOUNCE as u8, VIRTIO_NET_CTRL_ANNOUNCE_ACK as u8];

/// What a driver can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// It has heard that it is to announce itself.
    AnnounceAck,
}

/// Why a command is not done.
#[derive(Debug, thiserror::Error)]
pub(super) enum ControlError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("control command: expected a class, a command and a byte for the answer, got less")]
    Short,
    #[error("control command: class {0}, command {1} is not supported")]
    Unsupported(u8, u8),
    #[error("control command: guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// Finds out what a chain asks for, and answers; returns the command, if there is one, and the bytes written.
pub(super) fn answer(
    memory: &GuestMemory,
    chain: Result<Chain, ChainError>,
) -> (Result<Command, ControlError>, u32) {
    let mut chain = match chain {
        Ok(chain) => chain,
        Err(error) => return (Err(error.into()), 0),
    };
    let Some(status) = chain.writable.take_last_byte() else {
        return (Err(ControlError::Short), 0);
    };
    let command = parse(memory, chain);
    let value = if command.is_ok() {
        VIRTIO_NET_OK
    } else {
        VIRTIO_NET_ERR
    };
    match memory.write_obj(value as u8, status) {
        Ok(()) => (command, 1),
        Err(error) => (command.and(Err(error.into())), 0),
    }
}

fn parse(memory: &GuestMemory, mut chain: Chain) -> Result<Command, ControlError> {
    let mut header = [0; HEADER_LEN];
    if chain.readable.read(memory, &mut header)? < HEADER_LEN {
        return Err(ControlError::Short);
    }
    match header {
        ANNOUNCE_ACK => Ok(Command::AnnounceAck),
        [class, command] => Err(ControlError::Unsupported(class, command)),
    }
}
