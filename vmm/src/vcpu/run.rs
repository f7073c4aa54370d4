//! What a vCPU thread does: gate, guest, exit, again.

use std::sync::{Arc, Mutex, PoisonError};

use devices::bus::Bus;
use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_ioctls::{VcpuExit, VcpuFd};
use thiserror::Error;

use super::gate::{Gate, NextStep};
use super::kick::{Kickable, VcpuThreads, port_access_size};
use crate::memory::{MemoryError, RingLog};

/// What a vCPU's exits go to.
#[derive(Clone)]
pub struct Buses {
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Dirty rings, where the machine has them.
    pub rings: Option<Arc<RingLog>>,
}

/// Why a vCPU stopped for good.
#[derive(Clone, Debug, Error)]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum VcpuFailure {
    #[error("vCPU {0}: triple fault")]
    TripleFault(u8),
    #[error("vCPU {id}: KVM could not go on (internal error {suberror}) at rip {rip:#x}, cs {cs:#x}: {hint}")]
    Internal {
        id: u8,
        suberror: u32,
        rip: u64,
        cs: u16,
        hint: &'static str,
    },
    #[error("vCPU {id}: KVM could not enter the guest, hardware reason {reason:#x}")]
    Entry { id: u8, reason: u64 },
    #[error("vCPU {id}: unexpected exit {exit}")]
    Unexpected { id: u8, exit: String },
    #[error("vCPU {id}: its dirty ring is full")]
    DirtyRing { id: u8, source: Arc<MemoryError> },
    #[error("vCPU {0}: its thread panicked, see above")]
    Panicked(u8),
    #[error(
        "vCPU {0}: a page of the guest's memory is lost: the snapshot's file that it was mapped from has become shorter, \
         or its disk fails"
    )]
    LostPage(u8),
    #[error("vCPU {id}: KVM_RUN")]
    Run { id: u8, source: kvm_ioctls::Error },
}

const INTERNAL_ERROR_EMULATION: u32 = 1;

/// Until the gate sends the thread home, or the vCPU fails.
pub(super) fn run(
    id: u8,
    vcpu: &Arc<Mutex<VcpuFd>>,
    gate: &Gate,
    threads: &VcpuThreads,
    buses: &Buses,
) -> Result<(), VcpuFailure> {
    let _kickable = Kickable::new(vcpu.clone());
    while gate.pass(id.into()) == NextStep::Enter {
        // Held while the vCPU is in the guest and free while the thread is parked, so that a holder of the gate
        // can save and restore the vCPU.
        let mut vcpu = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        run_until_kicked(id, &mut vcpu, buses)?;
        drop(vcpu);
        threads.kick_rest();
    }
    Ok(())
}

fn run_until_kicked(id: u8, vcpu: &mut VcpuFd, buses: &Buses) -> Result<(), VcpuFailure> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                read_port(&buses.pio, port, data, port_access_size());
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                write_port(&buses.pio, port, data, port_access_size());
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                buses.mmio.read(address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                buses.mmio.write(address, data);
            }
            Ok(VcpuExit::Intr) => {}
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => make_room(id, buses)?,
            Ok(VcpuExit::Shutdown) => return Err(VcpuFailure::TripleFault(id)),
            Ok(VcpuExit::InternalError) => return Err(internal_error(id, vcpu)),
            Ok(VcpuExit::FailEntry(reason, _)) => return Err(VcpuFailure::Entry { id, reason }),
            Ok(exit) => {
                return Err(VcpuFailure::Unexpected {
                    id,
                    exit: format!("{exit:?}"),
                });
            }
            Err(error) if error.errno() == libc::EINTR => {
                // KVM_RUN has finished what was pending (api.rst, 5: immediate_exit), so the state is whole.
                vcpu.set_kvm_immediate_exit(0);
                return Ok(());
            }
            Err(error) if error.errno() == libc::EAGAIN => {}
            Err(error) if error.errno() == libc::EFAULT => return Err(VcpuFailure::LostPage(id)),
            Err(source) => return Err(VcpuFailure::Run { id, source }),
        }
    }
}

/// Accesses of `size` bytes each, one after the other at the same port.
fn read_port(bus: &Bus, port: u16, data: &mut [u8], size: usize) {
    for one in data.chunks_mut(size) {
        bus.read(port.into(), one);
    }
}

/// The same the other way.
fn write_port(bus: &Bus, port: u16, data: &[u8], size: usize) {
    for one in data.chunks(size) {
        bus.write(port.into(), one);
    }
}

/// Empties the dirty rings: the vCPU cannot go on while its own is full.
fn make_room(id: u8, buses: &Buses) -> Result<(), VcpuFailure> {
    let harvested = buses.rings.as_ref().map_or(Ok(()), |rings| rings.harvest());
    harvested.map_err(|source| VcpuFailure::DirtyRing {
        id,
        source: Arc::new(source),
    })
}

fn internal_error(id: u8, vcpu: &mut VcpuFd) -> VcpuFailure {
    let (rip, cs) = match (vcpu.get_regs(), vcpu.get_sregs()) {
        (Ok(regs), Ok(sregs)) => (regs.rip, sregs.cs.selector),
        _ => (0, 0),
    };
    let suberror = crate::kvm::internal_suberror(vcpu);
    let hint = if suberror == INTERNAL_ERROR_EMULATION {
        "an instruction that KVM's emulator does not know; another --cpu-template may keep the guest from using it"
    } else {
        "the kernel's log may say more"
    };
    VcpuFailure::Internal {
        id,
        suberror,
        rip,
        cs,
        hint,
    }
}

#[cfg(test)]
mod tests {
    use devices::bus::BusDevice;

    use super::*;

    /// Writes down what is written to it; reads count.
    #[derive(Default)]
    struct Recorder {
        written: Vec<(u64, Vec<u8>)>,
        reads: u8,
    }

    impl BusDevice for Recorder {
        fn read(&mut self, _: u64, data: &mut [u8]) {
            self.reads += 1;
            data.fill(self.reads);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.written.push((offset, data.to_vec()));
        }
    }

    #[test]
    fn a_string_goes_to_one_port_and_a_word_is_one_access() {
        let recorder = Arc::new(Mutex::new(Recorder::default()));
        let mut bus = Bus::new();
        bus.insert(0x3f8, 8, recorder.clone()).unwrap();
        write_port(&bus, 0x3f8, b"abc", 1);
        write_port(&bus, 0x3f8, &[1, 2, 3, 4], 2);
        let expected = [
            (0, vec![b'a']),
            (0, vec![b'b']),
            (0, vec![b'c']),
            (0, vec![1, 2]),
            (0, vec![3, 4]),
        ];
        assert_eq!(recorder.lock().unwrap().written, expected);
        let mut data = [0; 4];
        read_port(&bus, 0x3f8, &mut data, 2);
        assert_eq!(data, [1, 1, 2, 2]);
    }
}
