//! The page by which the guest learns that its clocks, or its past, are not what they were (VMClock, specification
//! UAPI.13). It announces disruptions alone: this host knows no time that would be more precise than the guest's own.

use std::sync::atomic::{Ordering, fence};

use devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{Machine, MachineError};
use crate::boot::{BootError, layout};

const MAGIC: u32 = u32::from_le_bytes(*b"VCLK");
const VERSION: u16 = 1;
/// No counter goes with it.
const COUNTER_INVALID: u8 = 0xff;
const TIME_TAI: u8 = 1;
/// Its flags: there is a generation counter, and an interrupt announces every change.
const GENERATION_COUNTER: u64 = 1 << 7;
const NOTIFICATION: u64 = 1 << 8;

/// Where its fields are.
const SEQUENCE: u64 = 0x0c;
const DISRUPTION: u64 = 0x10;
const FLAGS: u64 = 0x18;
const GENERATION: u64 = 0x68;

/// What has happened to a guest that goes on here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Disruption {
    /// It was on another host.
    Moved,
    /// It has come out of a snapshot, as others may have.
    Cloned,
}

/// Makes the page for a guest that boots.
pub(super) fn write_new(memory: &GuestMemory) -> Result<(), MachineError> {
    let mut page = [0; layout::PAGE_SIZE as usize];
    let mut put = |at: u64, bytes: &[u8]| page[at as usize..][..bytes.len()].copy_from_slice(bytes);
    put(0x00, &MAGIC.to_le_bytes());
    put(0x04, &(layout::PAGE_SIZE as u32).to_le_bytes());
    put(0x08, &VERSION.to_le_bytes());
    put(0x0a, &[COUNTER_INVALID, TIME_TAI]);
    put(FLAGS, &(GENERATION_COUNTER | NOTIFICATION).to_le_bytes());
    let at = GuestAddress(layout::VMCLOCK);
    Ok(memory.write_slice(&page, at).map_err(BootError::from)?)
}

/// Writes a disruption to the page. Returns whether there is such a page: a guest from an older version has none. The
/// guest may have overwritten its fields; that harms only itself.
fn write_disruption(memory: &GuestMemory, disruption: Disruption) -> Result<bool, GuestMemoryError> {
    if memory.read_obj::<u32>(GuestAddress(layout::VMCLOCK))? != MAGIC {
        return Ok(false);
    }
    let field = |at| GuestAddress(layout::VMCLOCK + at);
    let advance = |at| -> Result<(), GuestMemoryError> {
        let value: u64 = memory.read_obj(field(at))?;
        memory.write_obj(value.wrapping_add(1), field(at))
    };
    // Odd while the fields do not fit together.
    let before: u32 = memory.read_obj(field(SEQUENCE))?;
    memory.store((before | 1).to_le(), field(SEQUENCE), Ordering::Relaxed)?;
    fence(Ordering::SeqCst);
    advance(DISRUPTION)?;
    if disruption == Disruption::Cloned {
        advance(GENERATION)?;
    }
    memory.store(
        (before | 1).wrapping_add(1).to_le(),
        field(SEQUENCE),
        Ordering::Release,
    )?;
    Ok(true)
}

impl Machine {
    /// Announces a disruption to the guest. Before it runs on, and after its interrupt controllers were restored.
    pub(super) fn announce_disruption(&self, disruption: Disruption) -> Result<(), MachineError> {
        if write_disruption(&self.memory, disruption).map_err(BootError::from)? {
            self.devices.vmclock.write(1).map_err(|source| MachineError::Io {
                what: "interrupt for the VMClock",
                source,
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use migration::MemoryKind;

    use super::*;
    use crate::memory;

    fn fields(memory: &GuestMemory) -> (u32, u64, u64) {
        let at = |at| GuestAddress(layout::VMCLOCK + at);
        (
            memory.read_obj(at(SEQUENCE)).unwrap(),
            memory.read_obj(at(DISRUPTION)).unwrap(),
            memory.read_obj(at(GENERATION)).unwrap(),
        )
    }

    #[test]
    fn a_disruption_is_written_in_whole_steps() {
        let memory = memory::create(&[(0, 2 << 20)], MemoryKind::Anonymous).unwrap();
        assert!(
            !write_disruption(&memory, Disruption::Moved).unwrap(),
            "there is no page yet"
        );
        assert_eq!(fields(&memory), (0, 0, 0));
        write_new(&memory).unwrap();
        assert_eq!(fields(&memory), (0, 0, 0));
        assert!(write_disruption(&memory, Disruption::Moved).unwrap());
        assert_eq!(fields(&memory), (2, 1, 0));
        assert!(write_disruption(&memory, Disruption::Cloned).unwrap());
        assert_eq!(fields(&memory), (4, 2, 1));
        let head: [u8; 12] = memory.read_obj(GuestAddress(layout::VMCLOCK)).unwrap();
        assert_eq!(&head, b"VCLK\0\x10\0\0\x01\0\xff\x01");
    }

    #[test]
    fn whatever_the_guest_left_there_does_no_harm() {
        let memory = memory::create(&[(0, 2 << 20)], MemoryKind::Anonymous).unwrap();
        write_new(&memory).unwrap();
        let rest = [0xff; 4084];
        memory
            .write_slice(&rest, GuestAddress(layout::VMCLOCK + 12))
            .unwrap();
        assert!(write_disruption(&memory, Disruption::Cloned).unwrap());
        assert_eq!(fields(&memory), (0, 0, 0));
    }
}
