//! CPU templates: named masks over what KVM announces.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

use super::CpuError;

/// A named mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Template {
    /// Everything that KVM supports.
    Host,
    /// For KVM without hardware virtualisation below it (`kvm-pvm`): guest kernel code runs in KVM's
    /// instruction emulator, so what that cannot execute is not announced.
    Pvm,
    /// Nothing above SSE4.2 and POPCNT: moves between most processors of one vendor.
    Baseline,
}

const ALL: [Template; 3] = [Template::Host, Template::Pvm, Template::Baseline];

/// Where the kernel lists the loaded `kvm-pvm` module.
const PVM_MODULE: &str = "/sys/module/kvm_pvm";

/// Bits of one CPUID leaf that a template hides.
struct CpuidMask {
    function: u32,
    index: u32,
    /// Bits to clear in EAX, EBX, ECX, EDX.
    clear: [u32; 4],
}

const fn mask(function: u32, index: u32, clear: [u32; 4]) -> CpuidMask {
    CpuidMask {
        function,
        index,
        clear,
    }
}

const fn bits(positions: &[u32]) -> u32 {
    let mut mask = 0;
    let mut index = 0;
    while index < positions.len() {
        mask |= 1 << positions[index];
        index += 1;
    }
    mask
}

const ALL_BITS: u32 = u32::MAX;

/// Instructions that the emulator does not know: MONITOR, FMA, CMPXCHG16B, PCID, MOVBE, POPCNT, XSAVE and AVX,
/// F16C, RDRAND in leaf 1; FSGSBASE, BMI, AVX2, SMEP, ERMS, INVPCID, RDSEED, ADX, SMAP, CLFLUSHOPT, CLWB, AVX-512
/// and all of ECX (UMIP, PKU, RDPID, LA57 …) in leaf 7; RDTSCP.
const PVM: &[CpuidMask] = &[
    mask(1, 0, [0, 0, bits(&[3, 12, 13, 17, 22, 23, 26, 28, 29, 30]), 0]),
    mask(
        7,
        0,
        [
            0,
            bits(&[0, 3, 5, 7, 8, 9, 10, 18, 19, 20, 23, 24]) | AVX512_EBX,
            ALL_BITS,
            bits(&[4, 29]) | AVX512_EDX,
        ],
    ),
    mask(7, 1, [ALL_BITS; 4]),
    mask(0xd, 0, [ALL_BITS; 4]),
    mask(0xd, 1, [ALL_BITS; 4]),
    mask(0x8000_0001, 0, [0, 0, 0, bits(&[27])]),
];

/// Keeps x86-64-v2: clears FMA, MOVBE, XSAVE, AVX, F16C, RDRAND, every extended feature of leaf 7 but the
/// mitigations, and AMD's own (SSE4A, XOP, LWP, FMA4).
const BASELINE: &[CpuidMask] = &[
    mask(1, 0, [0, 0, bits(&[12, 22, 26, 28, 29, 30]), 0]),
    mask(7, 0, [ALL_BITS, ALL_BITS, ALL_BITS, !SPECULATION_EDX]),
    mask(7, 1, [ALL_BITS; 4]),
    mask(7, 2, [ALL_BITS; 4]),
    mask(0xd, 0, [ALL_BITS; 4]),
    mask(0xd, 1, [ALL_BITS; 4]),
    mask(0x8000_0001, 0, [0, 0, bits(&[6, 11, 15, 16]), 0]),
];

/// AVX-512 F, DQ, IFMA, PF, ER, CD, BW, VL.
const AVX512_EBX: u32 = bits(&[16, 17, 21, 26, 27, 28, 30, 31]);
/// AVX-512 4VNNIW, 4FMAPS, VP2INTERSECT, FP16; AMX.
const AVX512_EDX: u32 = bits(&[2, 3, 8, 22, 23, 24, 25]);
/// IBRS/IBPB, STIBP, L1D_FLUSH, ARCH_CAPABILITIES, SSBD: mitigations, not features.
const SPECULATION_EDX: u32 = bits(&[26, 27, 28, 29, 31]);

impl Template {
    /// The template that fits this host, and why.
    pub fn probe() -> (Self, &'static str) {
        if Path::new(PVM_MODULE).exists() {
            (
                Template::Pvm,
                "KVM here is kvm-pvm: guest kernel code is emulated",
            )
        } else {
            (Template::Host, "KVM here runs guest kernel code natively")
        }
    }

    /// The names of all templates.
    pub fn names() -> String {
        ALL.map(|template| template.to_string()).join(", ")
    }

    /// Clears the masked bits.
    pub(super) fn apply(self, entries: &mut [kvm_cpuid_entry2]) {
        let masks = match self {
            Template::Host => return,
            Template::Pvm => PVM,
            Template::Baseline => BASELINE,
        };
        for entry in entries {
            let of_entry = |mask: &&CpuidMask| mask.function == entry.function && mask.index == entry.index;
            let Some(mask) = masks.iter().find(of_entry) else {
                continue;
            };
            entry.eax &= !mask.clear[0];
            entry.ebx &= !mask.clear[1];
            entry.ecx &= !mask.clear[2];
            entry.edx &= !mask.clear[3];
        }
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Template::Host => "host",
            Template::Pvm => "pvm",
            Template::Baseline => "baseline",
        })
    }
}

impl FromStr for Template {
    type Err = CpuError;

    fn from_str(name: &str) -> Result<Self, CpuError> {
        ALL.into_iter()
            .find(|template| template.to_string() == name)
            .ok_or_else(|| CpuError::UnknownTemplate {
                got: name.into(),
                expected: Template::names(),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_and_unknown_ones_refused() {
        for template in ALL {
            assert_eq!(template.to_string().parse::<Template>().unwrap(), template);
        }
        let error = "T2".parse::<Template>().unwrap_err().to_string();
        assert_eq!(
            error,
            "unknown CPU template \"T2\", expected one of host, pvm, baseline"
        );
    }

    #[test]
    fn pvm_hides_cmpxchg16b() {
        let mut entries = [kvm_cpuid_entry2 {
            function: 1,
            ecx: u32::MAX,
            ..Default::default()
        }];
        Template::Pvm.apply(&mut entries);
        assert_eq!(entries[0].ecx & (1 << 13), 0);
        assert_ne!(entries[0].ecx & (1 << 31), 0);
    }
}
