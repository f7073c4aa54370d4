//! How a disk's I/O is done by system calls, on the helper thread.

use super::backend::BlockBackend;
use super::error::BlockRequestError;
use super::io::BlockIo;
use crate::GuestMemory;
use crate::helper::CancelFlag;
use crate::virtio::sys::Durability;

/// The most bytes that are discarded or zeroed in one call: a cancel takes effect between two calls.
const SLICE: u64 = 16 << 20;

/// Does what `io` asks for; blocks as long as the host's file system does.
pub(super) fn execute(
    memory: Option<&GuestMemory>,
    backend: &BlockBackend,
    io: &BlockIo,
    cancelled: &CancelFlag,
) -> Result<(), BlockRequestError> {
    match (io, memory) {
        (BlockIo::Read { into, offset }, Some(memory)) => backend.read(memory, into, *offset),
        (
            BlockIo::Write {
                from,
                offset,
                durability,
            },
            Some(memory),
        ) => backend.write(memory, from, *offset, *durability),
        // Only the guest's requests transfer data, and they come with the guest's memory.
        (BlockIo::Read { .. } | BlockIo::Write { .. }, None) => Ok(()),
        (
            BlockIo::Discard {
                offset,
                len,
                durability,
            },
            _,
        ) => {
            in_slices(*offset, *len, cancelled, |offset, len| {
                backend.discard(offset, len)
            })?;
            make_durable(backend, *durability)
        }
        (
            BlockIo::Zero {
                offset,
                len,
                unmap,
                durability,
            },
            _,
        ) => {
            in_slices(*offset, *len, cancelled, |offset, len| {
                backend.write_zeroes(offset, len, *unmap)
            })?;
            make_durable(backend, *durability)
        }
        (BlockIo::Flush, _) => Ok(backend.flush()?),
        (BlockIo::WriteOut, _) => Ok(backend.write_out()?),
    }
}

fn make_durable(backend: &BlockBackend, durability: Durability) -> Result<(), BlockRequestError> {
    if durability == Durability::Durable {
        backend.flush()?;
    }
    Ok(())
}

/// Calls `act` for one slice of the range after the other. Slices begin at multiples of their length, so that pages and
/// clusters stay whole.
fn in_slices<E>(
    offset: u64,
    len: u64,
    cancelled: &CancelFlag,
    mut act: impl FnMut(u64, u64) -> Result<(), E>,
) -> Result<(), E> {
    let (mut at, end) = (offset, offset.saturating_add(len));
    while at < end && !cancelled.is_set() {
        let part = (end - at).min(SLICE - at % SLICE);
        act(at, part)?;
        at += part;
    }
    Ok(())
}
