//! The saved state of a vCPU, and its way in and out of KVM.
#![allow(unsafe_code)] // KVM_SET_XSAVE is unsafe where extended state can exceed 4096 bytes.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use kvm_bindings::{KVM_MP_STATE_SIPI_RECEIVED, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use migration_state::Record;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// IA32_TSC: moved by its offset instead, see [`crate::clock`].
const MSR_TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE: armed when the clocks have been moved on.
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// MSR_KVM_WALL_CLOCK and MSR_KVM_WALL_CLOCK_NEW: to set them writes guest memory, see
/// `Machine::run_restored`.
const MSR_WALL_CLOCKS: [u32; 2] = [0x11, 0x4b56_4d00];
/// MSRs that say where KVM is to write for the guest (Documentation/virt/kvm/x86/msr.rst): both system
/// times, asynchronous page faults, steal time, end-of-interrupt. To set one may write guest memory, which before
/// the guest runs is not this side's to write.
const MSR_SHARED_PAGES: [u32; 6] = [
    0x12,
    0x4b56_4d01,
    0x4b56_4d02,
    0x4b56_4d03,
    0x4b56_4d04,
    0x4b56_4d06,
];
/// KVM takes no more MSRs in one call.
const MSR_BATCH: usize = 256;

/// A vCPU's state could not be saved or restored.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum VcpuStateError {
    #[error("{what}")]
    Kvm {
        what: &'static str,
        source: kvm_ioctls::Error,
    },
    #[error("{what}: expected {expected} bytes, got {got}")]
    Length {
        what: &'static str,
        expected: usize,
        got: usize,
    },
    #[error("kvm_mp_state: expected 0 to {KVM_MP_STATE_SIPI_RECEIVED}, got {got}")]
    MpState { got: u32 },
    #[error("MSR {index:#x}: KVM refuses the value {value:#x}")]
    Msr { index: u32, value: u64 },
    #[error("{0} MSRs: more than the kernel knows")]
    TooManyMsrs(usize),
    #[error("MSR {0:#x}: this host's KVM does not know it")]
    UnknownMsr(u32),
}

/// A vCPU as saved. Each byte string is the KVM structure of that name, whose layout is kernel ABI.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuRecord {
    /// `kvm_regs`.
    #[serde(with = "serde_bytes")]
    pub regs: Vec<u8>,
    /// `kvm_sregs`.
    #[serde(with = "serde_bytes")]
    pub sregs: Vec<u8>,
    /// `kvm_xsave`, 4096 bytes.
    #[serde(with = "serde_bytes")]
    pub xsave: Vec<u8>,
    /// `kvm_xcrs`.
    #[serde(with = "serde_bytes")]
    pub xcrs: Vec<u8>,
    /// `kvm_debugregs`.
    #[serde(with = "serde_bytes")]
    pub debugregs: Vec<u8>,
    /// `kvm_lapic_state`.
    #[serde(with = "serde_bytes")]
    pub lapic: Vec<u8>,
    /// `kvm_vcpu_events`.
    #[serde(with = "serde_bytes")]
    pub events: Vec<u8>,
    /// `kvm_mp_state`.
    pub mp_state: u32,
    /// Index and value of every MSR that KVM lists and can read, but for the TSC.
    pub msrs: Vec<(u32, u64)>,
    /// The guest's TSC when the machine's clock was read.
    pub tsc: u64,
}

impl Record for VcpuRecord {
    const KIND: &'static str = "vcpu";
    const VERSION: u16 = 1;
}

impl VcpuRecord {
    /// The saved IA32_TSC_DEADLINE; 0 means that none is armed.
    pub fn tsc_deadline(&self) -> u64 {
        self.msrs
            .iter()
            .find(|(index, _)| *index == MSR_TSC_DEADLINE)
            .map_or(0, |(_, value)| *value)
    }

    /// The saved MSRs that say where the guest's wall clock lies, if it has one: index and value.
    pub fn wall_clocks(&self) -> impl Iterator<Item = (u32, u64)> + '_ {
        let is_set = |(index, value): &(u32, u64)| MSR_WALL_CLOCKS.contains(index) && *value != 0;
        self.msrs.iter().copied().filter(is_set)
    }
}

/// Sets the saved MSRs that [`restore`] leaves out because they let KVM write guest memory; the wall clock's are
/// [`VcpuRecord::wall_clocks`].
pub fn restore_shared_pages(vcpu: &VcpuFd, record: &VcpuRecord) -> Result<(), VcpuStateError> {
    let set: Vec<_> = record
        .msrs
        .iter()
        .filter(|(index, value)| MSR_SHARED_PAGES.contains(index) && *value != 0)
        .map(|(index, value)| kvm_msr_entry {
            index: *index,
            data: *value,
            ..Default::default()
        })
        .collect();
    if set.is_empty() {
        Ok(())
    } else {
        set_msrs(vcpu, &set)
    }
}

/// What a state is restored for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The vCPU is going to run from this state.
    Run,
    /// To find out whether it can be done and how long it takes: another state will follow. No processor (mp)
    /// state is set.
    Rehearsal,
}

/// The MSRs that belong to a vCPU's state on this host: all that KVM lists, and the deadline, but for the TSC.
#[derive(Clone, Debug)]
pub struct MsrList(Arc<[u32]>);

impl MsrList {
    /// Asks KVM, which takes two calls: once for a machine.
    pub fn of(kvm: &Kvm) -> Result<Self, VcpuStateError> {
        let list = kvm
            .get_msr_index_list()
            .map_err(kvm_error("KVM_GET_MSR_INDEX_LIST"))?;
        let listed = list.as_slice().iter().copied();
        let listed = listed.filter(|index| ![MSR_TSC, MSR_TSC_DEADLINE].contains(index));
        Ok(Self(listed.chain([MSR_TSC_DEADLINE]).collect()))
    }
}

/// Saves a vCPU that is out of the guest. `tsc` is its guest's TSC at the time for which the machine's
/// clock is saved.
pub fn save(msrs: &MsrList, vcpu: &VcpuFd, tsc: u64) -> Result<VcpuRecord, VcpuStateError> {
    // mp_state first: KVM_GET_MP_STATE applies pending INITs and SIPIs, which change the rest.
    let mp_state = vcpu
        .get_mp_state()
        .map_err(kvm_error("KVM_GET_MP_STATE"))?
        .mp_state;
    Ok(VcpuRecord {
        regs: bytes(&vcpu.get_regs().map_err(kvm_error("KVM_GET_REGS"))?),
        sregs: bytes(&vcpu.get_sregs().map_err(kvm_error("KVM_GET_SREGS"))?),
        xsave: bytes(&vcpu.get_xsave().map_err(kvm_error("KVM_GET_XSAVE"))?),
        xcrs: bytes(&vcpu.get_xcrs().map_err(kvm_error("KVM_GET_XCRS"))?),
        debugregs: bytes(&vcpu.get_debug_regs().map_err(kvm_error("KVM_GET_DEBUGREGS"))?),
        lapic: bytes(&vcpu.get_lapic().map_err(kvm_error("KVM_GET_LAPIC"))?),
        msrs: save_msrs(msrs, vcpu)?,
        events: bytes(&vcpu.get_vcpu_events().map_err(kvm_error("KVM_GET_VCPU_EVENTS"))?),
        mp_state,
        tsc,
    })
}

/// Gives a saved state to a vCPU that has not run, everything but the TSC, the deadline timer and the wall
/// clock. Untrusted input. Can be done again with another state.
pub fn restore(
    msrs: &MsrList,
    vcpu: &VcpuFd,
    record: &VcpuRecord,
    purpose: Purpose,
) -> Result<(), VcpuStateError> {
    let mp_state = kvm_bindings::kvm_mp_state {
        mp_state: check_mp_state(record.mp_state)?,
    };
    // A processor that waits for its start-up interrupt would be left with one pending, which no later state
    // takes back.
    if purpose == Purpose::Run {
        vcpu.set_mp_state(mp_state)
            .map_err(kvm_error("KVM_SET_MP_STATE"))?;
    }
    vcpu.set_regs(&parse("kvm_regs", &record.regs)?)
        .map_err(kvm_error("KVM_SET_REGS"))?;
    vcpu.set_sregs(&parse("kvm_sregs", &record.sregs)?)
        .map_err(kvm_error("KVM_SET_SREGS"))?;
    let xsave = parse("kvm_xsave", &record.xsave)?;
    // SAFETY: no extended state beyond 4096 bytes exists: that takes a request through arch_prctl, which
    // this program never makes.
    unsafe { vcpu.set_xsave(&xsave) }.map_err(kvm_error("KVM_SET_XSAVE"))?;
    vcpu.set_xcrs(&parse("kvm_xcrs", &record.xcrs)?)
        .map_err(kvm_error("KVM_SET_XCRS"))?;
    vcpu.set_debug_regs(&parse("kvm_debugregs", &record.debugregs)?)
        .map_err(kvm_error("KVM_SET_DEBUGREGS"))?;
    // Before the MSRs: the LAPIC's mode decides whether the deadline MSR can be armed.
    vcpu.set_lapic(&parse("kvm_lapic_state", &record.lapic)?)
        .map_err(kvm_error("KVM_SET_LAPIC"))?;
    restore_msrs(msrs, vcpu, &record.msrs)?;
    // Last: everything above can queue or clear events.
    vcpu.set_vcpu_events(&parse("kvm_vcpu_events", &record.events)?)
        .map_err(kvm_error("KVM_SET_VCPU_EVENTS"))?;
    Ok(())
}

/// The states of a processor with a local APIC (api.rst, 4.38). KVM takes others too, and then does not know
/// how to run them.
fn check_mp_state(got: u32) -> Result<u32, VcpuStateError> {
    if got > KVM_MP_STATE_SIPI_RECEIVED {
        return Err(VcpuStateError::MpState { got });
    }
    Ok(got)
}

/// Sets one MSR.
pub fn set_msr(vcpu: &VcpuFd, index: u32, value: u64) -> Result<(), VcpuStateError> {
    let entry = kvm_msr_entry {
        index,
        data: value,
        ..Default::default()
    };
    set_msrs(vcpu, &[entry])
}

/// What the guest would read as its TSC now.
pub fn read_tsc(vcpu: &VcpuFd) -> Result<u64, VcpuStateError> {
    read_msr(vcpu, MSR_TSC)?.ok_or(VcpuStateError::UnknownMsr(MSR_TSC))
}

fn save_msrs(list: &MsrList, vcpu: &VcpuFd) -> Result<Vec<(u32, u64)>, VcpuStateError> {
    let wanted = &list.0;
    let mut saved = Vec::with_capacity(wanted.len());
    let mut rest = &wanted[..];
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(MSR_BATCH)];
        let entries: Vec<_> = batch
            .iter()
            .map(|index| kvm_msr_entry {
                index: *index,
                ..Default::default()
            })
            .collect();
        let mut msrs =
            Msrs::from_entries(&entries).map_err(|_| VcpuStateError::TooManyMsrs(entries.len()))?;
        let read = vcpu.get_msrs(&mut msrs).map_err(kvm_error("KVM_GET_MSRS"))?;
        saved.extend(
            msrs.as_slice()[..read]
                .iter()
                .map(|entry| (entry.index, entry.data)),
        );
        // KVM stops at the first MSR that this guest's CPUID does not have: it has no value to save.
        rest = &rest[(read + usize::from(read < batch.len()))..];
    }
    Ok(saved)
}

fn restore_msrs(list: &MsrList, vcpu: &VcpuFd, msrs: &[(u32, u64)]) -> Result<(), VcpuStateError> {
    let known: HashSet<u32> = list.0.iter().copied().chain([MSR_TSC]).collect();
    if msrs.len() > known.len() {
        return Err(VcpuStateError::TooManyMsrs(msrs.len()));
    }
    let present: HashMap<u32, u64> = save_msrs(list, vcpu)?.into_iter().collect();
    let later = |index: &u32| {
        *index == MSR_TSC_DEADLINE || MSR_WALL_CLOCKS.contains(index) || MSR_SHARED_PAGES.contains(index)
    };
    let mut changed = Vec::new();
    // After "go" it would be too late to find out that this host has no such MSR.
    let missing = |(index, value): &&(u32, u64)| later(index) && *value != 0 && !known.contains(index);
    if let Some((index, _)) = msrs.iter().find(missing) {
        return Err(VcpuStateError::UnknownMsr(*index));
    }
    for (index, value) in msrs.iter().filter(|(index, _)| !later(index)) {
        let now = match present.get(index) {
            Some(now) => Some(*now),
            None => read_msr(vcpu, *index)?,
        };
        // What the vCPU already holds needs no write; some of those KVM would refuse to take.
        if now == Some(*value) {
            continue;
        }
        if !known.contains(index) {
            return Err(VcpuStateError::UnknownMsr(*index));
        }
        changed.push(kvm_msr_entry {
            index: *index,
            data: *value,
            ..Default::default()
        });
    }
    changed
        .chunks(MSR_BATCH)
        .try_for_each(|batch| set_msrs(vcpu, batch))
}

/// `None` if KVM has no such MSR for this guest.
fn read_msr(vcpu: &VcpuFd, index: u32) -> Result<Option<u64>, VcpuStateError> {
    let entry = kvm_msr_entry {
        index,
        ..Default::default()
    };
    let mut msrs = Msrs::from_entries(&[entry]).map_err(|_| VcpuStateError::TooManyMsrs(1))?;
    let read = vcpu.get_msrs(&mut msrs).map_err(kvm_error("KVM_GET_MSRS"))?;
    Ok((read == 1).then(|| msrs.as_slice()[0].data))
}

/// At most [`MSR_BATCH`] of them. KVM stops at the first that it refuses.
fn set_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), VcpuStateError> {
    let msrs = Msrs::from_entries(entries).map_err(|_| VcpuStateError::TooManyMsrs(entries.len()))?;
    let set = vcpu.set_msrs(&msrs).map_err(kvm_error("KVM_SET_MSRS"))?;
    entries.get(set).map_or(Ok(()), |refused| {
        let (index, value) = (refused.index, refused.data);
        Err(VcpuStateError::Msr { index, value })
    })
}

/// The structure's bytes as the kernel lays it out.
pub fn bytes<T: IntoBytes + Immutable>(value: &T) -> Vec<u8> {
    value.as_bytes().to_vec()
}

/// The structure from exactly as many bytes as it has.
pub fn parse<T: FromBytes>(what: &'static str, bytes: &[u8]) -> Result<T, VcpuStateError> {
    T::read_from_bytes(bytes).map_err(|_| VcpuStateError::Length {
        what,
        expected: size_of::<T>(),
        got: bytes.len(),
    })
}

fn kvm_error(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VcpuStateError {
    move |source| VcpuStateError::Kvm { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_record() {
        let record = VcpuRecord {
            regs: vec![1, 2],
            sregs: vec![3],
            xsave: vec![4],
            xcrs: vec![5],
            debugregs: vec![6],
            lapic: vec![7],
            events: vec![8],
            mp_state: 3,
            msrs: vec![(0x6e0, 300)],
            tsc: 1 << 40,
        };
        migration_state::assert_golden(
            1,
            "0201020103010401050106010701080301e00dac02808080808020",
            &record,
        );
        assert_eq!(record.tsc_deadline(), 300);
    }

    #[test]
    fn unknown_processor_states_are_refused() {
        assert!((0..=4).all(|known| check_mp_state(known).is_ok()));
        for unknown in [5, 9, u32::MAX] {
            assert!(matches!(
                check_mp_state(unknown),
                Err(VcpuStateError::MpState { .. })
            ));
        }
    }

    #[test]
    fn structures_of_another_length_are_refused() {
        let whole = bytes(&kvm_bindings::kvm_regs::default());
        assert!(parse::<kvm_bindings::kvm_regs>("kvm_regs", &whole).is_ok());
        for wrong in [&whole[1..], &[whole.as_slice(), &[0]].concat()] {
            let error = parse::<kvm_bindings::kvm_regs>("kvm_regs", wrong).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("kvm_regs: expected 144 bytes, got {}", wrong.len())
            );
        }
    }
}
