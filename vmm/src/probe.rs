//! What this host offers for booting and moving guests, and what it lacks.

use std::fs;
use std::path::Path;

use kvm_ioctls::{Cap, Kvm, VmFd};
use serde::Serialize;

use crate::cpu::Template;

/// What the probe found.
#[derive(Clone, Debug, Serialize)]
pub struct Findings {
    /// Whether guests boot here.
    pub boot: bool,
    /// Whether guests can move from and to here.
    pub migration: bool,
    /// Whether memory can be fetched after a switch.
    pub postcopy: bool,
    /// `hardware` (VMX, SVM), `pvm`, or `none`.
    pub kvm: &'static str,
    /// The CPU template that `godwit run` chooses here.
    pub cpu_template: Template,
    /// Guest TSC frequency in kHz; 0 without KVM.
    pub tsc_khz: u32,
    /// Host memory in bytes.
    pub memory_bytes: u64,
    /// Every check.
    pub checks: Vec<Check>,
}

/// One thing that is there or is not.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// Its name.
    pub name: &'static str,
    /// What it is for: `boot`, `migration` or `postcopy`.
    pub purpose: &'static str,
    /// Whether that purpose fails without it.
    pub required: bool,
    /// Whether it is there.
    pub present: bool,
    /// What was found, or what to do.
    pub detail: String,
}

const BOOT: &str = "boot";
const MIGRATION: &str = "migration";
const POSTCOPY: &str = "postcopy";

/// Capabilities of KVM: name, purpose, whether required, what it is good for.
const CAPABILITIES: &[(Cap, &str, &str, bool, &str)] = &[
    (
        Cap::Irqchip,
        "irqchip",
        BOOT,
        true,
        "interrupt controllers in the kernel",
    ),
    (Cap::Pit2, "pit", BOOT, true, "timer in the kernel"),
    (Cap::UserMemory, "user-memory", BOOT, true, "guest memory"),
    (
        Cap::ExtCpuid,
        "cpuid",
        BOOT,
        true,
        "what the guest's CPUs announce",
    ),
    (Cap::Irqfd, "irqfd", BOOT, true, "device interrupts"),
    (Cap::Ioeventfd, "ioeventfd", BOOT, true, "device kicks"),
    (Cap::SetTssAddr, "tss-address", BOOT, true, "real mode"),
    (
        Cap::ImmediateExit,
        "immediate-exit",
        BOOT,
        true,
        "pausing vCPUs without a race",
    ),
    (
        Cap::MpState,
        "mp-state",
        MIGRATION,
        true,
        "state of application processors",
    ),
    (
        Cap::VcpuEvents,
        "vcpu-events",
        MIGRATION,
        true,
        "exceptions and interrupts in flight",
    ),
    (
        Cap::Debugregs,
        "debug-registers",
        MIGRATION,
        true,
        "debug registers",
    ),
    (Cap::Xsave, "xsave", MIGRATION, true, "extended state"),
    (Cap::Xcrs, "xcrs", MIGRATION, true, "extended control registers"),
    (
        Cap::AdjustClock,
        "kvmclock",
        MIGRATION,
        true,
        "a paravirtual clock that goes on",
    ),
    (
        Cap::TscDeadlineTimer,
        "tsc-deadline",
        BOOT,
        false,
        "precise timers",
    ),
    (
        Cap::TscControl,
        "tsc-scaling",
        MIGRATION,
        false,
        "moves between hosts of different TSC frequency",
    ),
];

/// Looks at this host.
pub fn findings() -> Findings {
    let mut checks = Vec::new();
    let kvm = check_kvm(&mut checks);
    let vm = kvm.as_ref().and_then(|kvm| check_vm(kvm, &mut checks));
    let mut tsc_khz = 0;
    if let Some(vm) = &vm {
        check_capabilities(vm, &mut checks);
        tsc_khz = check_vcpu(vm, &mut checks);
    }
    check_userfaultfd(&mut checks);
    let (cpu_template, _) = Template::probe();
    let info = rustix::system::sysinfo();
    let satisfied = |purposes: &[&str]| {
        vm.is_some()
            && checks
                .iter()
                .filter(|check| check.required && purposes.contains(&check.purpose))
                .all(|check| check.present)
    };
    Findings {
        boot: satisfied(&[BOOT]),
        migration: satisfied(&[BOOT, MIGRATION]),
        postcopy: satisfied(&[BOOT, MIGRATION, POSTCOPY]),
        kvm: match (&vm, cpu_template) {
            (None, _) => "none",
            (Some(_), Template::Pvm) => "pvm",
            (Some(_), _) => "hardware",
        },
        cpu_template,
        tsc_khz,
        memory_bytes: (info.totalram as u64).saturating_mul(info.mem_unit.into()),
        checks,
    }
}

fn check_kvm(checks: &mut Vec<Check>) -> Option<Kvm> {
    let (kvm, detail) = match Kvm::new() {
        Ok(kvm) => (Some(kvm), "can be opened".to_owned()),
        Err(error) if error.errno() == libc::ENOENT => (
            None,
            "not there: enable virtualisation in the firmware and load kvm-intel or kvm-amd".to_owned(),
        ),
        Err(error) if error.errno() == libc::EACCES => (
            None,
            "no permission: join the group kvm, or run as root".to_owned(),
        ),
        Err(error) => (None, error.to_string()),
    };
    checks.push(Check {
        name: "/dev/kvm",
        purpose: BOOT,
        required: true,
        present: kvm.is_some(),
        detail,
    });
    kvm
}

fn check_vm(kvm: &Kvm, checks: &mut Vec<Check>) -> Option<VmFd> {
    let vm = kvm.create_vm();
    let detail = vm.as_ref().map_or_else(
        |error| format!("KVM_CREATE_VM: {error}"),
        |_| "can be created".into(),
    );
    checks.push(Check {
        name: "vm",
        purpose: BOOT,
        required: true,
        present: vm.is_ok(),
        detail,
    });
    vm.ok()
}

fn check_capabilities(vm: &VmFd, checks: &mut Vec<Check>) {
    checks.push(Check {
        name: "dirty-ring",
        purpose: MIGRATION,
        required: false,
        present: crate::kvm::max_dirty_ring(vm).is_some(),
        detail: "which vCPU dirties (Linux 6.1 or later)".into(),
    });
    checks.push(Check {
        name: "manual-protect",
        purpose: BOOT,
        required: true,
        present: crate::kvm::has_manual_protect(vm),
        detail: "a dirty log that costs nothing to start (Linux 5.7 or later)".into(),
    });
    for (cap, name, purpose, required, detail) in CAPABILITIES {
        let present = vm.check_extension(*cap);
        checks.push(Check {
            name,
            purpose,
            required: *required,
            present,
            detail: (*detail).into(),
        });
    }
}

/// Returns the TSC frequency in kHz.
fn check_vcpu(vm: &VmFd, checks: &mut Vec<Check>) -> u32 {
    let vcpu = vm.create_irq_chip().and_then(|()| vm.create_vcpu(0));
    let tsc_khz = vcpu.as_ref().map_or(0, |vcpu| vcpu.get_tsc_khz().unwrap_or(0));
    let detail = format!("guest TSC at {tsc_khz} kHz");
    checks.push(Check {
        name: "tsc",
        purpose: MIGRATION,
        required: true,
        present: tsc_khz > 0,
        detail,
    });
    let offset = vcpu.as_ref().ok().map(crate::kvm::tsc_offset);
    let detail = match &offset {
        Some(Ok(_)) => "clocks that go on".to_owned(),
        Some(Err(error)) => format!("needs Linux 5.16 or later: {error}"),
        None => "no vCPU".to_owned(),
    };
    let present = matches!(offset, Some(Ok(_)));
    checks.push(Check {
        name: "tsc-offset",
        purpose: MIGRATION,
        required: true,
        present,
        detail,
    });
    tsc_khz
}

fn check_userfaultfd(checks: &mut Vec<Check>) {
    let device = Path::new("/dev/userfaultfd").exists();
    let open = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    let root = rustix::process::geteuid().is_root();
    let present = device || open.as_ref().is_ok_and(|value| value.trim() == "1" || root);
    let detail = if present {
        "page faults in user space"
    } else {
        "no userfaultfd, or no permission for it"
    };
    checks.push(Check {
        name: "userfaultfd",
        purpose: POSTCOPY,
        required: true,
        present,
        detail: detail.into(),
    });
}
