//! This CPU as CPL 3 sees it: the services of `boot.s`, the TSC, the local APIC.

#![allow(
    unsafe_code,
    reason = "privileged services, the TSC, memory-mapped APIC registers"
)]

use core::arch::x86_64::_rdtsc;
use core::sync::atomic::{AtomicU32, Ordering};

unsafe extern "C" {
    fn service(number: u32, port: u32, value: u32, bytes: *const u8) -> u32;
    static ap_trampoline: u8;
    static ap_trampoline_end: u8;
    static ap_index: AtomicU32;
}

const OUT: u32 = 0;
const IN: u32 = 1;
const WRITE: u32 = 2;
const WAIT: u32 = 3;
const STOP: u32 = 4;
const TRIPLE_FAULT: u32 = 5;

/// QEMU's panic notifier (docs/specs/pvpanic.rst), and the event that says that there is no way on.
const PANIC_NOTIFIER: u16 = 0x505;
const PANICKED: u8 = 1;

/// A page below 1 MiB where the other CPUs begin, in real mode.
const TRAMPOLINE: u64 = 0x8000;

/// The local APIC in xAPIC mode (Intel SDM vol. 3A, 11.4).
const APIC: u64 = 0xfee0_0000;
const APIC_SPURIOUS: u64 = 0xf0;
const APIC_ICR_LOW: u64 = 0x300;
const APIC_ICR_HIGH: u64 = 0x310;
const APIC_LVT_TIMER: u64 = 0x320;
const APIC_LVT_LINT0: u64 = 0x350;
const APIC_LVT_LINT1: u64 = 0x360;
const APIC_TIMER_INITIAL: u64 = 0x380;
const APIC_TIMER_CURRENT: u64 = 0x390;
const APIC_TIMER_DIVIDE: u64 = 0x3e0;

const MASKED: u32 = 1 << 16;
/// As in `boot.s`.
const VECTOR_TIMER: u32 = 0x20;
const VECTOR_SPURIOUS: u32 = 0x2f;

/// The time-stamp counter.
pub(crate) fn tsc() -> u64 {
    // SAFETY: RDTSC has no precondition; CR4.TSD is clear.
    unsafe { _rdtsc() }
}

/// Writes a byte to an I/O port.
pub(crate) fn port_out(port: u16, value: u8) {
    // SAFETY: a port write cannot touch memory that Rust owns.
    unsafe { service(OUT, port.into(), value.into(), core::ptr::null()) };
}

/// Reads a byte from an I/O port.
pub(crate) fn port_in(port: u16) -> u8 {
    // SAFETY: a port read cannot touch memory that Rust owns.
    unsafe { service(IN, port.into(), 0, core::ptr::null()) as u8 }
}

/// Writes bytes to an I/O port, one after the other.
pub(crate) fn port_write(port: u16, bytes: &[u8]) {
    if !bytes.is_empty() {
        // SAFETY: the service reads exactly these bytes.
        unsafe { service(WRITE, port.into(), bytes.len() as u32, bytes.as_ptr()) };
    }
}

/// Stops this CPU for good.
pub(crate) fn stop() -> ! {
    loop {
        // SAFETY: halts with interrupts off.
        unsafe { service(STOP, 0, 0, core::ptr::null()) };
    }
}

/// Says to the machine's panic notifier that this guest has panicked.
pub(crate) fn report_panic() {
    port_out(PANIC_NOTIFIER, PANICKED);
}

/// Has this CPU shut down with a triple fault.
pub(crate) fn triple_fault() -> ! {
    // SAFETY: nothing is wanted of this machine any more.
    unsafe { service(TRIPLE_FAULT, 0, 0, core::ptr::null()) };
    stop()
}

/// Ends the machine: the keyboard controller's reset line, or a triple fault where there is no controller.
pub(crate) fn end() -> ! {
    port_out(0x64, 0xfe);
    triple_fault()
}

/// Masks the two PICs: no interrupt but this CPU's own timer is wanted.
pub(crate) fn mask_legacy_interrupts() {
    port_out(0x21, 0xff);
    port_out(0xa1, 0xff);
}

/// Makes this CPU's APIC ready for [`wait`].
pub(crate) fn set_up_apic() {
    apic_write(APIC_SPURIOUS, 0x100 | VECTOR_SPURIOUS);
    apic_write(APIC_LVT_LINT0, MASKED);
    apic_write(APIC_LVT_LINT1, MASKED);
    apic_write(APIC_TIMER_DIVIDE, 0b1011);
    apic_write(APIC_LVT_TIMER, VECTOR_TIMER);
}

/// Waits for `apic_ticks` of this CPU's APIC timer, at least 1.
pub(crate) fn wait(apic_ticks: u32) {
    apic_write(APIC_TIMER_INITIAL, apic_ticks.max(1));
    // SAFETY: the handler of the timer's vector touches nothing but the APIC.
    unsafe { service(WAIT, 0, 0, core::ptr::null()) };
}

/// TSC and APIC timer ticks in the same stretch of time, some 10 ms by the usual rates.
pub(crate) fn compare_clocks() -> (u64, u64) {
    apic_write(APIC_LVT_TIMER, MASKED | VECTOR_TIMER);
    apic_write(APIC_TIMER_INITIAL, u32::MAX);
    let (from, first) = (tsc(), apic_read(APIC_TIMER_CURRENT));
    let mut left = first;
    while first - left < 10_000_000 && tsc() - from < 200_000_000 {
        left = apic_read(APIC_TIMER_CURRENT);
    }
    let ticks = (tsc() - from, u64::from(first - left));
    apic_write(APIC_TIMER_INITIAL, 0);
    apic_write(APIC_LVT_TIMER, VECTOR_TIMER);
    ticks
}

/// Sends INIT and SIPI to CPU `cpu`, which arrives in `bare_main`. `delay` is asked to let 10 ms pass.
pub(crate) fn start_other(cpu: u32, delay: impl Fn()) {
    // SAFETY: the symbols bound the trampoline in this image; the page at TRAMPOLINE is RAM below the image
    // that nothing uses (what the VMM left there has been read), mapped by `boot.s`.
    unsafe {
        let from = &raw const ap_trampoline;
        let len = (&raw const ap_trampoline_end).offset_from_unsigned(from);
        core::ptr::copy_nonoverlapping(from, TRAMPOLINE as *mut u8, len);
        ap_index.store(cpu, Ordering::Release);
    }
    apic_write(APIC_ICR_HIGH, cpu << 24);
    apic_write(APIC_ICR_LOW, 0x0000_4500);
    delay();
    apic_write(APIC_ICR_HIGH, cpu << 24);
    apic_write(APIC_ICR_LOW, 0x0000_4600 | (TRAMPOLINE >> 12) as u32);
}

fn apic_write(register: u64, value: u32) {
    // SAFETY: an aligned register of this CPU's own APIC page, mapped by `boot.s`.
    unsafe { ((APIC + register) as *mut u32).write_volatile(value) };
}

fn apic_read(register: u64) -> u32 {
    // SAFETY: as above.
    unsafe { ((APIC + register) as *const u32).read_volatile() }
}
