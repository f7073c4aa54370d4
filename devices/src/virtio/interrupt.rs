//! A virtio device's interrupt: a line and the reasons for raising it.

use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::metrics::Counter;

/// The interrupt line of one device, its interrupt status register (virtio 1.2, 4.2.2), and how often its
/// configuration has changed.
///
/// A reason is recorded before the line is raised, so the guest never finds the register empty after an
/// interrupt that it has not seen the reason of.
#[derive(Debug)]
pub struct Interrupt {
    line: EventFd,
    status: AtomicU32,
    config_generation: AtomicU32,
    raised: Counter,
}

/// The device used a buffer.
pub(crate) const USED_BUFFER: u32 = 1 << 0;
/// The configuration or the device status changed.
pub(crate) const CONFIG_CHANGE: u32 = 1 << 1;

impl Interrupt {
    /// An interrupt that raises `line`, with no reason pending.
    pub fn new(line: EventFd) -> Self {
        Self {
            line,
            status: AtomicU32::new(0),
            config_generation: AtomicU32::new(0),
            raised: Counter::default(),
        }
    }

    /// Interrupts the guest because buffers were used.
    pub fn used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    /// Interrupts the guest because the configuration or the device status changed.
    pub fn config_change(&self) {
        self.config_generation.fetch_add(1, Ordering::SeqCst);
        self.raise(CONFIG_CHANGE);
    }

    /// The pending reasons.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// How often it has raised its line.
    pub(crate) fn raised(&self) -> u64 {
        self.raised.get()
    }

    /// Changes with every change of the configuration (virtio 1.2, 2.5.1).
    pub(crate) fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::SeqCst)
    }

    pub(crate) fn set_config_generation(&self, generation: u32) {
        self.config_generation.store(generation, Ordering::SeqCst);
    }

    /// Clears reasons that the guest has acknowledged.
    pub(crate) fn acknowledge(&self, reasons: u32) {
        self.status.fetch_and(!reasons, Ordering::SeqCst);
    }

    /// Makes `status` the reasons pending, without raising the line.
    pub(crate) fn set_status(&self, status: u32) {
        self.status.store(status, Ordering::SeqCst);
    }

    /// Raises the line again if a reason is pending.
    pub(crate) fn raise_again(&self) {
        if self.status() != 0 {
            self.raise(0);
        }
    }

    fn raise(&self, reason: u32) {
        self.raised.add(1);
        self.status.fetch_or(reason, Ordering::SeqCst);
        if let Err(error) = self.line.write(1) {
            tracing::error!(%error, "cannot raise a virtio interrupt");
        }
    }
}
