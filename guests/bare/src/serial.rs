//! COM1 (16550), polled: one line at a time, from whichever CPU.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use crate::cpu;

const COM1: u16 = 0x3f8;
const LSR: u16 = COM1 + 5;

static BUSY: AtomicBool = AtomicBool::new(false);
static FIFO: AtomicBool = AtomicBool::new(false);
static FAULTED: AtomicBool = AtomicBool::new(false);

/// A line under construction; what does not fit is cut off.
pub(crate) struct SerialLine {
    bytes: [u8; 240],
    used: usize,
}

impl SerialLine {
    /// A line that begins with the guest's prefix.
    pub(crate) fn new() -> Self {
        let mut line = Self {
            bytes: [0; 240],
            used: 0,
        };
        let _ = line.write_str("bare: ");
        line
    }

    /// Prints it and calls `between` every few characters: a line takes milliseconds on some hosts.
    pub(crate) fn print(mut self, between: impl Fn()) {
        let end = self.used.min(self.bytes.len() - 2);
        self.bytes[end..end + 2].copy_from_slice(b"\r\n");
        while BUSY.swap(true, Ordering::Acquire) {
            core::hint::spin_loop();
        }
        let chunk = if FIFO.load(Ordering::Relaxed) { 16 } else { 1 };
        for bytes in self.bytes[..end + 2].chunks(chunk) {
            while cpu::port_in(LSR) & 0x20 == 0 {
                core::hint::spin_loop();
            }
            cpu::port_write(COM1, bytes);
            between();
        }
        BUSY.store(false, Ordering::Release);
    }
}

impl Write for SerialLine {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if let Some(slot) = self.bytes.get_mut(self.used) {
                *slot = byte;
                self.used += 1;
            }
        }
        Ok(())
    }
}

/// 8 bits, no interrupts, FIFOs on where the UART has them.
pub(crate) fn set_up() {
    cpu::port_out(COM1 + 1, 0);
    cpu::port_out(COM1 + 3, 3);
    cpu::port_out(COM1 + 2, 1);
    FIFO.store(cpu::port_in(COM1 + 2) & 0xc0 == 0xc0, Ordering::Relaxed);
}

/// A received byte, if there is one.
pub(crate) fn receive() -> Option<u8> {
    (cpu::port_in(LSR) & 1 != 0).then(|| cpu::port_in(COM1))
}

/// For the report of a fault: lets the first CPU through, whichever CPU holds the port, and stops all others.
pub(crate) fn only_once() {
    if FAULTED.swap(true, Ordering::Relaxed) {
        cpu::stop();
    }
    BUSY.store(false, Ordering::Release);
}
