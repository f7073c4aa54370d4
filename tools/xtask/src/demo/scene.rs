//! Where the demo plays, by what the machine can do, and what has to be there for that.

use anyhow::{Result, bail};
use serde_json::Value;

use crate::guests::Artifact;

/// Where the guest moves, which decides what has to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scene {
    /// Two processes on a KVM with VMX or SVM below it.
    HardwareKvm,
    /// Two processes on a KVM that interprets guest kernels.
    PvmKvm,
    /// Two emulated hosts: the machine has no KVM.
    EmulatedHosts,
}

impl Scene {
    /// The scene for a machine of which `godwit probe` has found this. A KVM that is there and does not work is an
    /// error with the probe's reasons.
    pub(super) fn of(probe: &Value, has_kvm: bool) -> Result<Self> {
        match probe["kvm"].as_str() {
            Some("hardware") => Ok(Self::HardwareKvm),
            Some("pvm") => Ok(Self::PvmKvm),
            _ if !has_kvm => Ok(Self::EmulatedHosts),
            _ => {
                let checks = probe["checks"].as_array().into_iter().flatten();
                let missing = checks.filter(|check| check["required"] == true && check["present"] == false);
                let reasons: Vec<_> = missing
                    .map(|check| format!("{}: {}", check["name"], check["detail"]).replace('"', ""))
                    .collect();
                bail!(
                    "this machine has a /dev/kvm that does not work: {}",
                    reasons.join("; ")
                )
            }
        }
    }

    /// The parts of `target/guests` that it needs.
    pub(super) fn artifacts(self) -> &'static [Artifact] {
        match self {
            Self::HardwareKvm => &[Artifact::Stock],
            Self::PvmKvm => &[Artifact::Tiny],
            Self::EmulatedHosts => &Artifact::LAB,
        }
    }

    /// The Debian packages that it needs installed.
    pub(super) fn packages(self) -> &'static [&'static str] {
        match self {
            Self::HardwareKvm | Self::PvmKvm => &[],
            Self::EmulatedHosts => &["e2fsprogs", "qemu-system-x86"],
        }
    }

    /// What it is, and why this one.
    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::HardwareKvm => {
                "KVM here runs guest kernels natively: a Debian guest moves between two processes of this machine."
            }
            Self::PvmKvm => {
                "KVM here is kvm-pvm, which interprets guest kernels instruction by instruction: a small Linux made for \
                 that moves between two processes of this machine."
            }
            Self::EmulatedHosts => {
                "There is no KVM here: a Debian guest moves between two emulated hosts with their own KVM.\n\
                 Emulation is slow, so the times below are not godwit's; what they add up to is."
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn scene(kvm: &str, has_kvm: bool) -> Result<Scene> {
        let check = |name: &str, present| json!({"name": name, "required": true, "present": present, "detail": "EIO"});
        let probe = json!({"kvm": kvm, "checks": [check("/dev/kvm", true), check("vm", kvm != "none")]});
        Scene::of(&probe, has_kvm)
    }

    #[test]
    fn hardware_kvm_needs_no_kernel_built_and_nothing_installed() {
        let scene = scene("hardware", true).unwrap();
        assert_eq!(scene.artifacts(), [Artifact::Stock]);
        assert!(scene.packages().is_empty());
    }

    #[test]
    fn pvm_kvm_needs_the_tiny_guest_alone() {
        let scene = scene("pvm", true).unwrap();
        assert_eq!(scene.artifacts(), [Artifact::Tiny]);
        assert!(scene.packages().is_empty());
    }

    #[test]
    fn no_kvm_needs_the_lab_and_no_kernel_built() {
        let scene = scene("none", false).unwrap();
        assert_eq!(scene, Scene::EmulatedHosts);
        assert!(!scene.artifacts().contains(&Artifact::Tiny));
        assert_eq!(scene.packages(), ["e2fsprogs", "qemu-system-x86"]);
    }

    #[test]
    fn a_kvm_that_does_not_work_is_an_error_with_the_reason() {
        let error = scene("none", true).unwrap_err().to_string();
        assert!(error.ends_with("does not work: vm: EIO"), "{error}");
    }
}
