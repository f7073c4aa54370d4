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

struct Mask {
    function: u32,
    index: u32,
    /// Bits to clear in EAX, EBX, ECX, EDX.
    clear: [u32; 4],
}

/// Instructions that the emulator does not know: CMPXCHG16B, MONITOR, POPCNT, RDRAND, FMA, MOVBE, AVX and
/// everything that needs XSAVE in kernel code, STAC/CLAC, INVPCID, FSGSBASE in kernel code, RDTSCP, RDPID,
/// RDSEED, ADX, CLWB, CLFLUSHOPT, UMIP. PKU and LA57 would need kernel code that is not emulated either.
const PVM: &[Mask] = &[
    Mask {
        function: 1,
        index: 0,
        clear: [
            0,
            0,
            1 << 3 | 1 << 12 | 1 << 13 | 1 << 17 | 1 << 22 | 1 << 23 | 1 << 26 | 1 << 28 | 1 << 29 | 1 << 30,
            0,
        ],
    },
    Mask {
        function: 7,
        index: 0,
        clear: [
            0,
            1 << 0
                | 1 << 3
                | 1 << 5
                | 1 << 7
                | 1 << 8
                | 1 << 9
                | 1 << 10
                | 1 << 18
                | 1 << 19
                | 1 << 20
                | 1 << 23
                | 1 << 24
                | AVX512_EBX,
            u32::MAX,
            1 << 4 | AVX512_EDX | 1 << 29,
        ],
    },
    Mask {
        function: 7,
        index: 1,
        clear: [u32::MAX; 4],
    },
    Mask {
        function: 0xd,
        index: 0,
        clear: [u32::MAX; 4],
    },
    Mask {
        function: 0xd,
        index: 1,
        clear: [u32::MAX; 4],
    },
    Mask {
        function: 0x8000_0001,
        index: 0,
        clear: [0, 0, 0, 1 << 27],
    },
];

/// Keeps x86-64-v2: clears AVX and later, and every extended feature of leaf 7.
const BASELINE: &[Mask] = &[
    Mask {
        function: 1,
        index: 0,
        clear: [0, 0, 1 << 12 | 1 << 22 | 1 << 26 | 1 << 28 | 1 << 29 | 1 << 30, 0],
    },
    Mask {
        function: 7,
        index: 0,
        clear: [u32::MAX, u32::MAX, u32::MAX, !SPECULATION_EDX],
    },
    Mask {
        function: 7,
        index: 1,
        clear: [u32::MAX; 4],
    },
    Mask {
        function: 7,
        index: 2,
        clear: [u32::MAX; 4],
    },
    Mask {
        function: 0xd,
        index: 0,
        clear: [u32::MAX; 4],
    },
    Mask {
        function: 0xd,
        index: 1,
        clear: [u32::MAX; 4],
    },
    Mask {
        function: 0x8000_0001,
        index: 0,
        clear: [0, 1 << 6 | 1 << 11 | 1 << 15 | 1 << 16, 0, 0],
    },
];

/// AVX512 F, DQ, IFMA, PF, ER, CD, BW, VL.
const AVX512_EBX: u32 = 1 << 16 | 1 << 17 | 1 << 21 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 30 | 1 << 31;
/// AVX512 4VNNIW, 4FMAPS, VP2INTERSECT, FP16; AMX.
const AVX512_EDX: u32 = 1 << 2 | 1 << 3 | 1 << 8 | 1 << 22 | 1 << 23 | 1 << 24 | 1 << 25;
/// IBRS/IBPB, STIBP, L1D_FLUSH, ARCH_CAPABILITIES, SSBD: mitigations, not features.
const SPECULATION_EDX: u32 = 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 31;

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
            let of_entry = |mask: &&Mask| mask.function == entry.function && mask.index == entry.index;
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
