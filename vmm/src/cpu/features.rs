//! Names of CPUID feature bits, as `/proc/cpuinfo` spells them.

const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// The name of a bit, where it has a well-known one.
pub(super) fn name(function: u32, index: u32, register: usize, bit: u32) -> Option<&'static str> {
    let table: &[(u32, &str)] = match (function, index, register) {
        (1, 0, ECX) => LEAF1_ECX,
        (1, 0, EDX) => LEAF1_EDX,
        (7, 0, EBX) => LEAF7_EBX,
        (7, 0, ECX) => LEAF7_ECX,
        (7, 0, EDX) => LEAF7_EDX,
        (0x8000_0001, 0, ECX) => EXT1_ECX,
        (0x8000_0001, 0, EDX) => EXT1_EDX,
        _ => return None,
    };
    table
        .iter()
        .find(|(position, _)| *position == bit)
        .map(|(_, name)| *name)
}

#[rustfmt::skip]
const LEAF1_ECX: &[(u32, &str)] = &[
    (0, "sse3"), (1, "pclmulqdq"), (3, "monitor"), (9, "ssse3"), (12, "fma"), (13, "cx16"), (17, "pcid"),
    (19, "sse4_1"), (20, "sse4_2"), (21, "x2apic"), (22, "movbe"), (23, "popcnt"), (24, "tsc_deadline_timer"),
    (25, "aes"), (26, "xsave"), (27, "osxsave"), (28, "avx"), (29, "f16c"), (30, "rdrand"), (31, "hypervisor"),
];

#[rustfmt::skip]
const LEAF1_EDX: &[(u32, &str)] = &[
    (0, "fpu"), (1, "vme"), (2, "de"), (3, "pse"), (4, "tsc"), (5, "msr"), (6, "pae"), (7, "mce"), (8, "cx8"),
    (9, "apic"), (11, "sep"), (12, "mtrr"), (13, "pge"), (14, "mca"), (15, "cmov"), (16, "pat"), (17, "pse36"),
    (19, "clflush"), (23, "mmx"), (24, "fxsr"), (25, "sse"), (26, "sse2"), (27, "ss"),
];

#[rustfmt::skip]
const LEAF7_EBX: &[(u32, &str)] = &[
    (0, "fsgsbase"), (1, "tsc_adjust"), (3, "bmi1"), (4, "hle"), (5, "avx2"), (7, "smep"), (8, "bmi2"),
    (9, "erms"), (10, "invpcid"), (11, "rtm"), (14, "mpx"), (16, "avx512f"), (17, "avx512dq"), (18, "rdseed"),
    (19, "adx"), (20, "smap"), (21, "avx512ifma"), (23, "clflushopt"), (24, "clwb"), (28, "avx512cd"),
    (29, "sha_ni"), (30, "avx512bw"), (31, "avx512vl"),
];

#[rustfmt::skip]
const LEAF7_ECX: &[(u32, &str)] = &[
    (1, "avx512vbmi"), (2, "umip"), (3, "pku"), (6, "avx512_vbmi2"), (8, "gfni"), (9, "vaes"),
    (10, "vpclmulqdq"), (11, "avx512_vnni"), (12, "avx512_bitalg"), (14, "avx512_vpopcntdq"), (16, "la57"),
    (22, "rdpid"), (24, "bus_lock_detect"), (25, "cldemote"), (27, "movdiri"), (28, "movdir64b"),
];

#[rustfmt::skip]
const LEAF7_EDX: &[(u32, &str)] = &[
    (4, "fsrm"), (8, "avx512_vp2intersect"), (10, "md_clear"), (14, "serialize"), (16, "tsxldtrk"),
    (22, "amx_bf16"), (23, "avx512_fp16"), (24, "amx_tile"), (25, "amx_int8"), (26, "spec_ctrl"),
    (27, "intel_stibp"), (28, "flush_l1d"), (29, "arch_capabilities"), (31, "spec_ctrl_ssbd"),
];

#[rustfmt::skip]
const EXT1_ECX: &[(u32, &str)] = &[
    (0, "lahf_lm"), (1, "cmp_legacy"), (2, "svm"), (4, "cr8_legacy"), (5, "abm"), (6, "sse4a"),
    (7, "misalignsse"), (8, "3dnowprefetch"), (9, "osvw"), (11, "xop"), (16, "fma4"), (21, "tbm"),
    (22, "topoext"), (23, "perfctr_core"),
];

#[rustfmt::skip]
const EXT1_EDX: &[(u32, &str)] = &[
    (11, "syscall"), (20, "nx"), (22, "mmxext"), (25, "fxsr_opt"), (26, "pdpe1gb"), (27, "rdtscp"), (29, "lm"),
];
