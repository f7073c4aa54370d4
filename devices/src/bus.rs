//! A bus: address ranges and the devices behind them. One instance serves port I/O, another MMIO.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// A device on a bus. The guest chooses offset and size: any combination must be harmless.
pub trait BusDevice: Send {
    /// Fills `data` with what the guest reads at `offset` from the device's base.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes what the guest wrote at `offset` from the device's base.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Why a device cannot be put on a bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The range is empty or wraps around the end of the address space.
    #[error("bus range of {len:#x} bytes at {base:#x}: expected at least one byte and no wrap-around")]
    BadRange {
        /// First address.
        base: u64,
        /// Bytes.
        len: u64,
    },
    /// Another device is there.
    #[error("bus range of {len:#x} bytes at {base:#x} overlaps the device at {other:#x}")]
    Overlap {
        /// First address of the new range.
        base: u64,
        /// Bytes of the new range.
        len: u64,
        /// First address of the device that is there.
        other: u64,
    },
}

/// Devices by address.
#[derive(Default)]
pub struct Bus {
    ranges: BTreeMap<u64, BusRange>,
}

struct BusRange {
    len: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

impl Bus {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `base..base + len`.
    pub fn insert(&mut self, base: u64, len: u64, device: Arc<Mutex<dyn BusDevice>>) -> Result<(), BusError> {
        let Some(last) = len.checked_sub(1).and_then(|rest| base.checked_add(rest)) else {
            return Err(BusError::BadRange { base, len });
        };
        // Only the nearest range that starts at or before our last byte can reach into ours.
        if let Some((&other, range)) = self.ranges.range(..=last).next_back()
            && other + (range.len - 1) >= base
        {
            return Err(BusError::Overlap { base, len, other });
        }
        self.ranges.insert(base, BusRange { len, device });
        Ok(())
    }

    /// Reads for the guest; all ones where there is no device. Returns whether there is one.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address) {
            Some((offset, device)) => {
                device
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes for the guest; ignored where there is no device. Returns whether there is one.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address) {
            Some((offset, device)) => {
                device
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .write(offset, data);
                true
            }
            None => false,
        }
    }

    fn find(&self, address: u64) -> Option<(u64, &Mutex<dyn BusDevice>)> {
        let (base, range) = self.ranges.range(..=address).next_back()?;
        let offset = address - base;
        (offset < range.len).then(|| (offset, &*range.device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct EchoDevice(Vec<(u64, Vec<u8>)>);

    impl BusDevice for EchoDevice {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    fn echo() -> Arc<Mutex<EchoDevice>> {
        Arc::new(Mutex::new(EchoDevice(Vec::new())))
    }

    #[test]
    fn accesses_reach_the_device_that_owns_the_address() {
        let (low, high) = (echo(), echo());
        let mut bus = Bus::new();
        bus.insert(0x1000, 0x10, low.clone()).unwrap();
        bus.insert(0x1010, 0x10, high.clone()).unwrap();
        let mut data = [0; 2];
        assert!(bus.read(0x1013, &mut data));
        assert_eq!(data, [3, 3]);
        assert!(bus.write(0x100f, &[1, 2, 3, 4]));
        assert_eq!(low.lock().unwrap().0, [(0xf, vec![1, 2, 3, 4])]);
        assert!(high.lock().unwrap().0.is_empty());
    }

    #[test]
    fn addresses_without_a_device_read_as_ones() {
        let mut bus = Bus::new();
        bus.insert(0x1000, 0x10, echo()).unwrap();
        for address in [0, 0xfff, 0x1010, u64::MAX] {
            let mut data = [0; 3];
            assert!(!bus.read(address, &mut data));
            assert_eq!(data, [0xff; 3]);
            assert!(!bus.write(address, &data));
        }
    }

    #[test]
    fn overlaps_and_bad_ranges_are_refused() {
        let mut bus = Bus::new();
        bus.insert(0x1000, 0x10, echo()).unwrap();
        for (base, len) in [(0x1000, 1), (0xfff, 2), (0x100f, 1), (0xf00, 0x1000), (0x1004, 4)] {
            let got = bus.insert(base, len, echo());
            assert_eq!(
                got,
                Err(BusError::Overlap {
                    base,
                    len,
                    other: 0x1000
                })
            );
        }
        assert_eq!(
            bus.insert(0, 0, echo()),
            Err(BusError::BadRange { base: 0, len: 0 })
        );
        assert!(bus.insert(u64::MAX, 2, echo()).is_err());
        bus.insert(u64::MAX, 1, echo()).unwrap();
        bus.insert(0xfff, 1, echo()).unwrap();
    }
}
