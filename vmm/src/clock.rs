//! Clocks that go on: TSC, kvmclock and the TSC deadline advance by the time that a machine stood still.
//!
//! The guest's TSC is the host's, scaled where the frequencies differ, plus an offset per vCPU
//! (Documentation/virt/kvm/devices/vcpu.rst, 4). The source saves what the guest's clocks say at one instant; the
//! destination adds the time since then, as its own clock measured it, and computes offsets against its own TSC at one
//! instant, so that vCPUs whose clocks were equal stay equal.

mod tsc;

use std::ops::Deref;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_clock_data;
use kvm_ioctls::{VcpuFd, VmFd};
use migration_state::Record;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::vcpu::{MSR_TSC_DEADLINE, VcpuRecord, VcpuStateError, set_msr};

/// A clock could not be read or set.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum ClockError {
    #[error("TSC offset of vCPU {id}")]
    TscOffset {
        id: usize,
        source: vmm_sys_util::errno::Error,
    },
    #[error("TSC")]
    Tsc(#[source] VcpuStateError),
    #[error("KVM_GET_CLOCK: {0}")]
    Get(kvm_ioctls::Error),
    #[error("KVM_SET_CLOCK: {0}")]
    Set(kvm_ioctls::Error),
    #[error("TSC deadline")]
    Deadline(#[from] VcpuStateError),
}

/// A machine's clocks at one instant; each vCPU's TSC of that instant is in its own record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockRecord {
    /// kvmclock, in nanoseconds.
    pub kvmclock_ns: u64,
    /// From the pause of the vCPUs to that instant, in nanoseconds.
    pub since_pause_ns: u64,
    /// Frequency of the guest's TSC in kHz.
    pub tsc_khz: u32,
}

impl Record for ClockRecord {
    const KIND: &'static str = "clock";
    const VERSION: u16 = 1;
}

/// A guest's TSC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscFrequency {
    /// In kHz.
    pub khz: u32,
    /// Whether KVM scales the host's to it.
    pub scaled: bool,
}

/// How the clocks of a machine go on that stood still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClockStart {
    /// As if they had run since that instant, at which the machine was stopped.
    StoppedAt(Instant),
    /// From where they stood.
    Kept,
}

/// Reads the clocks of a machine that was paused at `paused_at`. Returns its record and what the guest's TSC would be
/// without an offset, from which [`tsc_at`] computes each vCPU's.
pub fn save(
    vm: &VmFd,
    vcpus: &[impl Deref<Target = VcpuFd>],
    frequency: TscFrequency,
    paused_at: Instant,
) -> Result<(ClockRecord, u64), ClockError> {
    let clock = vm.get_clock().map_err(ClockError::Get)?;
    let tsc = tsc::without_offset(vcpus, frequency.scaled)?;
    let since_pause = paused_at.elapsed();
    let record = ClockRecord {
        kvmclock_ns: clock.clock,
        since_pause_ns: since_pause.as_nanos() as u64,
        tsc_khz: frequency.khz,
    };
    Ok((record, tsc))
}

/// The TSC of vCPU `id` at the instant at which it would be `without_offset` else.
pub fn tsc_at(id: usize, vcpu: &VcpuFd, without_offset: u64) -> Result<u64, ClockError> {
    tsc::at(id, vcpu, without_offset)
}

/// Sets the clocks of a machine that stood still to where they `start`, and arms the deadline timers. `scaled`: whether
/// KVM scales its TSC here.
pub fn advance(
    vm: &VmFd,
    vcpus: &[impl Deref<Target = VcpuFd>],
    scaled: bool,
    clock: &ClockRecord,
    records: &[VcpuRecord],
    start: ClockStart,
) -> Result<(), ClockError> {
    let gap = match start {
        // Both sides estimate the same pause; an estimate that is too short must not turn a clock back.
        ClockStart::StoppedAt(stopped_at) => stopped_at
            .elapsed()
            .saturating_sub(Duration::from_nanos(clock.since_pause_ns)),
        ClockStart::Kept => Duration::ZERO,
    };
    let now = tsc::without_offset(vcpus, scaled)?;
    let ticks = (gap.as_nanos().saturating_mul(u128::from(clock.tsc_khz)) / 1_000_000) as u64;
    tsc::advance(vcpus, records.iter().map(|record| record.tsc), ticks, now)?;
    let now = kvm_clock_data {
        clock: clock.kvmclock_ns.saturating_add(gap.as_nanos() as u64),
        ..Default::default()
    };
    vm.set_clock(&now).map_err(ClockError::Set)?;
    for (vcpu, record) in vcpus.iter().zip(records) {
        if record.tsc_deadline() != 0 {
            set_msr(vcpu, MSR_TSC_DEADLINE, record.tsc_deadline())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_record() {
        let record = ClockRecord {
            kvmclock_ns: 1 << 40,
            since_pause_ns: 1000,
            tsc_khz: 2_300_000,
        };
        migration_state::assert_golden(1, "808080808020e807e0b08c01", &record);
    }
}
