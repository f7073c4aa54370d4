//! The bare guest: no Linux, one image, entered through PVH. A little assembly runs at CPL 0 (`boot.s`), all of
//! this at CPL 3, where every host runs it at native speed.

#![no_std]
#![no_main]

mod balloon;
mod console;
mod cpu;
mod disk;
mod machine;
mod mem;
mod once;
mod plan;
mod reads;
mod serial;
mod virtio;
mod work;

use core::fmt::Write;
use core::panic::PanicInfo;

use serial::SerialLine;

/// Where every CPU arrives at CPL 3, with its index and its own stack.
#[allow(unsafe_code, reason = "called by name from boot.s")]
// SAFETY: the name exists once in this image.
#[unsafe(no_mangle)]
extern "C" fn bare_main(cpu: u64) -> ! {
    match cpu as u32 {
        0 => first_cpu(),
        cpu => work::other_cpu(cpu),
    }
}

fn first_cpu() -> ! {
    serial::set_up();
    cpu::mask_legacy_interrupts();
    match machine::discover() {
        Ok(machine) => work::first_cpu(machine),
        Err(problem) => {
            let mut line = SerialLine::new();
            let _ = write!(line, "fault {problem}");
            line.print(|| {});
            cpu::stop()
        }
    }
}

/// Where an exception goes on, at CPL 3: nothing here is expected to fault.
#[allow(unsafe_code, reason = "called by name from boot.s")]
// SAFETY: the name exists once in this image.
#[unsafe(no_mangle)]
extern "C" fn bare_fault(vector: u64, rip: u64, cr2: u64, code: u64) -> ! {
    serial::only_once();
    let mut line = SerialLine::new();
    let _ = write!(
        line,
        "fault vector={vector} rip={rip:#x} cr2={cr2:#x} code={code:#x}"
    );
    line.print(|| {});
    cpu::report_panic();
    cpu::stop()
}

#[panic_handler]
fn panicked(info: &PanicInfo<'_>) -> ! {
    serial::only_once();
    let mut line = SerialLine::new();
    let place = info
        .location()
        .map_or(("?", 0), |place| (place.file(), place.line()));
    let _ = write!(line, "fault panic={}:{}", place.0, place.1);
    line.print(|| {});
    cpu::report_panic();
    cpu::stop()
}
