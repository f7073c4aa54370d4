//! The machine's generation ID: new whenever the guest may live a past of its own once more, so that clones of one
//! snapshot do not share their random numbers. A migration has one guest before and after, and leaves it.

use devices::GuestMemory;
use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress};

use super::{Machine, MachineError};
use crate::boot::{BootError, layout};

/// Bytes of an ID.
const LEN: usize = 16;

/// Puts a new ID where the guest looks for it. Raises no interrupt.
pub(super) fn write_new(memory: &GuestMemory) -> Result<(), MachineError> {
    let failed = |source: std::io::Error| MachineError::Io {
        what: "generation ID",
        source,
    };
    let mut id = [0; LEN];
    let got = getrandom(&mut id, GetRandomFlags::empty()).map_err(|error| failed(error.into()))?;
    if got != LEN {
        return Err(failed(std::io::ErrorKind::UnexpectedEof.into()));
    }
    let at = GuestAddress(layout::GENERATION_ID);
    Ok(memory.write_slice(&id, at).map_err(BootError::from)?)
}

impl Machine {
    /// Gives it a new ID and tells the guest. Before the guest goes on, and after its interrupt controllers were
    /// restored.
    pub(super) fn renew_generation(&self) -> Result<(), MachineError> {
        write_new(&self.memory)?;
        self.devices
            .generation
            .write(1)
            .map_err(|source| MachineError::Io {
                what: "interrupt for a new generation ID",
                source,
            })
    }
}
