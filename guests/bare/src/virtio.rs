//! Devices on virtio-mmio (virtio 1.2, 4.2), polled: no interrupt is wanted.

#![allow(unsafe_code, reason = "memory-mapped registers")]

use core::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

// Registers (virtio 1.2, 4.2.2).
const MAGIC: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SELECT: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SELECT: u64 = 0x024;
const QUEUE_SELECT: u64 = 0x030;
const QUEUE_SIZE_MAX: u64 = 0x034;
const QUEUE_SIZE: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const STATUS: u64 = 0x070;
const QUEUE_DESCRIPTORS: u64 = 0x080;
const QUEUE_AVAILABLE: u64 = 0x090;
const QUEUE_USED: u64 = 0x0a0;
const CONFIG: u64 = 0x100;

const MAGIC_VALUE: u32 = 0x7472_6976;
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

/// Bit 32, in the second half.
const F_VERSION_1: u32 = 1;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// Flags of a descriptor.
pub(crate) const NEXT: u64 = 1;
pub(crate) const WRITE: u64 = 2;

/// A device's registers.
#[derive(Clone, Copy)]
pub(crate) struct Device(u64);

/// Requests that the driver makes available.
#[repr(C, align(64))]
pub(crate) struct AvailableRing<const SIZE: usize> {
    flags: AtomicU16,
    index: AtomicU16,
    ring: [AtomicU16; SIZE],
}

/// Requests that the device gives back.
#[repr(C, align(64))]
pub(crate) struct UsedRing<const SIZE: usize> {
    flags: AtomicU16,
    index: AtomicU16,
    /// Number of the chain's first descriptor, bytes written.
    ring: [[AtomicU32; 2]; SIZE],
}

/// Where driver and device are in the rings of a queue, as these count.
#[derive(Default)]
pub(crate) struct RingPlace {
    available: u16,
    used: u16,
}

impl Device {
    /// The first device of that kind among those at these addresses.
    pub(crate) fn find(mut addresses: impl Iterator<Item = u64>, kind: u32) -> Option<Self> {
        let is_it = |address: &u64| {
            let identity = [MAGIC, VERSION, DEVICE_ID].map(|register| Self(*address).get(register));
            identity == [MAGIC_VALUE, 2, kind]
        };
        addresses.find(is_it).map(Self)
    }

    /// Agrees on those of the first 32 features that both want; `None` if the device does not.
    pub(crate) fn negotiate(self, wanted: u32) -> Option<u32> {
        self.set(STATUS, 0);
        self.set(STATUS, ACKNOWLEDGE | DRIVER);
        self.set(DEVICE_FEATURES_SELECT, 0);
        let features = self.get(DEVICE_FEATURES) & wanted;
        for (half, features) in [(0, features), (1, F_VERSION_1)] {
            self.set(DRIVER_FEATURES_SELECT, half);
            self.set(DRIVER_FEATURES, features);
        }
        self.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        (self.get(STATUS) & FEATURES_OK != 0).then_some(features)
    }

    /// Shows the device where a queue is: descriptors, and the rings.
    pub(crate) fn set_up_queue<const SIZE: usize>(
        self,
        index: u32,
        descriptors: u64,
        available: &AvailableRing<SIZE>,
        used: &UsedRing<SIZE>,
    ) -> Option<()> {
        self.set(QUEUE_SELECT, index);
        if self.get(QUEUE_SIZE_MAX) < SIZE as u32 {
            return None;
        }
        self.set(QUEUE_SIZE, SIZE as u32);
        for (register, address) in [
            (QUEUE_DESCRIPTORS, descriptors),
            (QUEUE_AVAILABLE, &raw const *available as u64),
            (QUEUE_USED, &raw const *used as u64),
        ] {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        available.flags.store(NO_INTERRUPT, Ordering::Release);
        self.set(QUEUE_READY, 1);
        Some(())
    }

    /// From here on requests are taken.
    pub(crate) fn start(self) {
        self.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// A word of the configuration space.
    pub(crate) fn config(self, offset: u64) -> u32 {
        self.get(CONFIG + offset)
    }

    /// Changes one.
    pub(crate) fn set_config(self, offset: u64, value: u32) {
        self.set(CONFIG + offset, value);
    }

    fn set(self, register: u64, value: u32) {
        // SAFETY: an aligned register of a device that the command line names, mapped by `boot.s`.
        unsafe { ((self.0 + register) as *mut u32).write_volatile(value) };
    }

    fn get(self, register: u64) -> u32 {
        // SAFETY: as above.
        unsafe { ((self.0 + register) as *const u32).read_volatile() }
    }
}

impl<const SIZE: usize> AvailableRing<SIZE> {
    pub(crate) const fn new() -> Self {
        Self {
            flags: AtomicU16::new(0),
            index: AtomicU16::new(0),
            ring: [const { AtomicU16::new(0) }; SIZE],
        }
    }
}

impl<const SIZE: usize> UsedRing<SIZE> {
    pub(crate) const fn new() -> Self {
        Self {
            flags: AtomicU16::new(0),
            index: AtomicU16::new(0),
            ring: [const { [const { AtomicU32::new(0) }; 2] }; SIZE],
        }
    }
}

impl RingPlace {
    /// Makes the chain that begins with that descriptor available. [`RingPlace::kick`] notifies the device.
    pub(crate) fn submit<const SIZE: usize>(&mut self, ring: &AvailableRing<SIZE>, head: u16) {
        ring.ring[usize::from(self.available) % SIZE].store(head, Ordering::Relaxed);
        self.available = self.available.wrapping_add(1);
    }

    /// Shows the device what was submitted, and writes its register unless it is at work anyway.
    pub(crate) fn kick<const SIZE: usize>(
        &self,
        device: Device,
        queue: u32,
        available: &AvailableRing<SIZE>,
        used: &UsedRing<SIZE>,
    ) {
        if available.index.load(Ordering::Relaxed) == self.available {
            return;
        }
        available.index.store(self.available, Ordering::Release);
        // Between that and reading which notifications the device wants (virtio 1.2, 2.7.13.4).
        fence(Ordering::SeqCst);
        if used.flags.load(Ordering::Relaxed) & NO_NOTIFY == 0 {
            device.set(QUEUE_NOTIFY, queue);
        }
    }

    /// The first descriptor of the next chain that came back.
    pub(crate) fn poll<const SIZE: usize>(&mut self, used: &UsedRing<SIZE>) -> Option<u32> {
        if used.index.load(Ordering::Acquire) == self.used {
            return None;
        }
        let [head, _] = &used.ring[usize::from(self.used) % SIZE];
        self.used = self.used.wrapping_add(1);
        Some(head.load(Ordering::Relaxed))
    }
}

/// The second half of a descriptor.
pub(crate) fn descriptor(len: u64, flags: u64, next: usize) -> u64 {
    len | flags << 32 | (next as u64) << 48
}
