//! The guest's TSC: the host's, scaled where the guest's has another frequency, plus an offset for each vCPU.
//!
//! KVM computes `guest = scale(host) + offset` (`kvm_read_l1_tsc`), with a ratio whose precision differs from processor
//! to processor, and a host frequency that it has more exactly than it tells. So the formula is not computed here: what
//! one vCPU's TSC reads as, less that vCPU's offset, is `scale(host)`, the same for all vCPUs of a machine.

use std::ops::Deref;

use kvm_ioctls::VcpuFd;

use super::ClockError;
use crate::kvm;
use crate::vcpu;

/// What KVM reports of a vCPU's TSC.
pub(super) trait VcpuTsc {
    /// Its offset.
    fn offset(&self) -> Result<u64, vmm_sys_util::errno::Error>;
    /// Sets its offset.
    fn set_offset(&self, offset: u64) -> Result<(), vmm_sys_util::errno::Error>;
    /// What the guest would read now.
    fn read(&self) -> Result<u64, vcpu::VcpuStateError>;
}

impl VcpuTsc for VcpuFd {
    fn offset(&self) -> Result<u64, vmm_sys_util::errno::Error> {
        kvm::tsc_offset(self)
    }

    fn set_offset(&self, offset: u64) -> Result<(), vmm_sys_util::errno::Error> {
        kvm::set_tsc_offset(self, offset)
    }

    fn read(&self) -> Result<u64, vcpu::VcpuStateError> {
        vcpu::read_tsc(self)
    }
}

/// The TSC of vCPU `id` at the instant at which it would be `without_offset` else.
pub(super) fn at(id: usize, vcpu: &impl VcpuTsc, without_offset: u64) -> Result<u64, ClockError> {
    let offset = vcpu
        .offset()
        .map_err(|source| ClockError::TscOffset { id, source })?;
    Ok(without_offset.wrapping_add(offset))
}

/// What the guest's TSC would be now without an offset. `scaled`: whether it has another frequency than the host's;
/// where it has not, that is the host's own.
pub(super) fn without_offset(
    vcpus: &[impl Deref<Target = impl VcpuTsc>],
    scaled: bool,
) -> Result<u64, ClockError> {
    match vcpus.first() {
        Some(vcpu) if scaled => {
            let offset = vcpu
                .offset()
                .map_err(|source| ClockError::TscOffset { id: 0, source })?;
            let read = vcpu.read().map_err(ClockError::Tsc)?;
            Ok(read.wrapping_sub(offset))
        }
        _ => Ok(kvm::host_tsc()),
    }
}

/// Sets the offsets with which each vCPU's TSC is what it `was` and so many `ticks` more, at the instant at which it
/// would be `without_offset` else.
pub(super) fn advance(
    vcpus: &[impl Deref<Target = impl VcpuTsc>],
    was: impl Iterator<Item = u64>,
    ticks: u64,
    without_offset: u64,
) -> Result<(), ClockError> {
    for (id, (vcpu, was)) in vcpus.iter().zip(was).enumerate() {
        let offset = was.wrapping_add(ticks).wrapping_sub(without_offset);
        vcpu.set_offset(offset)
            .map_err(|source| ClockError::TscOffset { id, source })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::path::Path;
    use std::rc::Rc;

    use kvm_ioctls::Kvm;

    use super::*;

    /// How KVM scales: Intel's ratios have 48 binary digits behind the point, AMD's 32.
    #[derive(Clone, Copy)]
    struct Scaling {
        ratio: u64,
        digits: u32,
    }

    impl Scaling {
        /// `__set_tsc_khz`: `mul_u64_u32_div(1 << digits, guest, host)`.
        fn new(guest_khz: u32, host_khz: u32, digits: u32) -> Self {
            let ratio = (u128::from(guest_khz) << digits) / u128::from(host_khz);
            let ratio = u64::try_from(ratio).unwrap();
            Self { ratio, digits }
        }

        /// `kvm_scale_tsc`: `mul_u64_u64_shr(host, ratio, digits)`.
        fn apply(self, host: u64) -> u64 {
            ((u128::from(host) * u128::from(self.ratio)) >> self.digits) as u64
        }
    }

    /// A vCPU as KVM makes its TSC, on a host whose TSC stands where the test puts it.
    struct ScaledVcpu {
        host: Rc<Cell<u64>>,
        scaling: Scaling,
        offset: Cell<u64>,
    }

    impl VcpuTsc for ScaledVcpu {
        fn offset(&self) -> Result<u64, vmm_sys_util::errno::Error> {
            Ok(self.offset.get())
        }

        fn set_offset(&self, offset: u64) -> Result<(), vmm_sys_util::errno::Error> {
            self.offset.set(offset);
            Ok(())
        }

        fn read(&self) -> Result<u64, vcpu::VcpuStateError> {
            Ok(self
                .scaling
                .apply(self.host.get())
                .wrapping_add(self.offset.get()))
        }
    }

    /// Two vCPUs, whose TSCs differ by 1000, on a host that has been up for so many ticks.
    fn machine(scaling: Scaling, host: u64, offset: u64) -> (Rc<Cell<u64>>, Vec<Rc<ScaledVcpu>>) {
        let host = Rc::new(Cell::new(host));
        let vcpu = |offset| {
            let (host, offset) = (host.clone(), Cell::new(offset));
            Rc::new(ScaledVcpu {
                host,
                scaling,
                offset,
            })
        };
        let vcpus = vec![vcpu(offset), vcpu(offset.wrapping_add(1000))];
        (host, vcpus)
    }

    fn saved(vcpus: &[Rc<ScaledVcpu>]) -> Vec<u64> {
        let now = without_offset(vcpus, true).unwrap();
        let tsc = |(id, vcpu): (usize, &Rc<ScaledVcpu>)| at(id, &**vcpu, now).unwrap();
        vcpus.iter().enumerate().map(tsc).collect()
    }

    const DAY: u64 = 86_400;
    const HOUR: u64 = 3600;

    #[test]
    fn the_formula_is_the_kernels() {
        // From 2.5 to 3.0 GHz and back, in both precisions: ratios as the kernel computes them.
        for (guest, host, digits, ratio) in [
            (2_500_000, 3_000_000, 48, 0xd555_5555_5555),
            (2_500_000, 3_000_000, 32, 0xd555_5555),
            (3_000_000, 2_500_000, 48, 0x1_3333_3333_3333),
            (3_000_000, 2_500_000, 32, 0x1_3333_3333),
        ] {
            assert_eq!(Scaling::new(guest, host, digits).ratio, ratio);
        }
    }

    #[test]
    fn a_guest_of_another_frequency_goes_on_from_what_it_was() {
        for (guest_khz, host_khz, digits) in [
            (2_500_000u32, 3_000_000u32, 48),
            (2_500_000, 3_000_000, 32),
            (3_000_000, 2_500_000, 48),
            (2_893_202, 2_194_843, 32),
        ] {
            let scaling = Scaling::new(guest_khz, host_khz, digits);
            // The host has been up for ten days, the guest for one; half a second has passed on its way.
            let uptime = 10 * DAY * u64::from(host_khz) * 1000;
            let (host, vcpus) = machine(scaling, uptime, 0);
            let was = [DAY * u64::from(guest_khz) * 1000; 2].map(|tsc| tsc + 7);
            let (was, ticks) = ([was[0], was[1] + 1000], u64::from(guest_khz) * 500);
            advance(
                &vcpus,
                was.into_iter(),
                ticks,
                without_offset(&vcpus, true).unwrap(),
            )
            .unwrap();
            for (vcpu, was) in vcpus.iter().zip(was) {
                assert_eq!(vcpu.read().unwrap(), was + ticks);
            }
            // With the host's own TSC for the scaled one it would have been off by days.
            let by = uptime.abs_diff(scaling.apply(uptime)) / (u64::from(guest_khz) * 1000);
            assert!(by > 24 * HOUR, "{by} s");
            // A second later: a guest's second, up to what its ratio rounds away.
            host.set(uptime + u64::from(host_khz) * 1000);
            let went = vcpus[0].read().unwrap() - was[0] - ticks;
            assert!(went.abs_diff(u64::from(guest_khz) * 1000) <= 2, "{went}");
        }
    }

    #[test]
    fn a_scaled_guest_moves_on() {
        let (_, before) = machine(
            Scaling::new(2_500_000, 3_000_000, 48),
            10 * DAY * 3_000_000_000,
            5,
        );
        let was = saved(&before);
        for (vcpu, was) in before.iter().zip(&was) {
            assert_eq!(vcpu.read().unwrap(), *was);
        }
        let (_, after) = machine(
            Scaling::new(2_500_000, 2_000_000, 32),
            HOUR * 2_000_000_000,
            u64::MAX,
        );
        advance(
            &after,
            was.iter().copied(),
            0,
            without_offset(&after, true).unwrap(),
        )
        .unwrap();
        assert_eq!(saved(&after), was);
        assert_eq!(was[1] - was[0], 1000);
    }

    /// KVM itself, as far as a host without scaling goes: a vCPU's TSC less its offset is the host's.
    #[test]
    fn the_tsc_without_an_offset_is_read_back_from_kvm() {
        if !Path::new("/dev/kvm").exists() {
            return;
        }
        let vm = Kvm::new().unwrap().create_vm().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        for offset in [0, 1 << 40, u64::MAX - 5] {
            vcpu.set_offset(offset).unwrap();
            let vcpus = [&vcpu];
            let (before, now, after) = (
                kvm::host_tsc(),
                without_offset(&vcpus, true).unwrap(),
                kvm::host_tsc(),
            );
            assert!((before..=after).contains(&now), "{before} {now} {after}");
        }
    }
}
