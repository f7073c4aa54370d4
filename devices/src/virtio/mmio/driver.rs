//! The driver's side of a transport: what reading and writing its registers does.

use std::sync::atomic::Ordering;

use super::registers as reg;
use super::state::QueueRecord;
use super::transport::MmioTransport;
use crate::bus::BusDevice;

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(reg::CONFIG) {
            return self.shared.core().device.read_config(offset, data);
        }
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(word) if offset.is_multiple_of(4) => *word = self.read_register(offset).to_le_bytes(),
            _ => {
                data.fill(0);
                self.warn("registers are read as aligned 32-bit words", offset, 0);
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(reg::CONFIG) {
            return self.shared.core().device.write_config(offset, data);
        }
        match <[u8; 4]>::try_from(data) {
            Ok(word) if offset.is_multiple_of(4) => self.write_register(offset, u32::from_le_bytes(word)),
            _ => self.warn("registers are written as aligned 32-bit words", offset, 0),
        }
    }
}

impl MmioTransport {
    fn read_register(&self, offset: u64) -> u32 {
        let queue = usize::try_from(self.queue_select)
            .ok()
            .and_then(|index| self.queues.get(index));
        match offset {
            reg::MAGIC_VALUE => reg::MAGIC,
            reg::VERSION_NUMBER => reg::VERSION,
            reg::DEVICE_ID => self.device_type,
            reg::VENDOR_ID => reg::VENDOR,
            reg::DEVICE_FEATURES => half(self.offered, self.device_features_select),
            reg::QUEUE_NUM_MAX => queue.map_or(0, |queue| u32::from(queue.max_size)),
            reg::QUEUE_READY => queue.map_or(0, |queue| u32::from(queue.ready)),
            reg::INTERRUPT_STATUS => self.shared.interrupt.status(),
            reg::STATUS => u32::from(self.shared.status()),
            reg::SHM_LEN_LOW..=reg::SHM_BASE_HIGH => u32::MAX,
            reg::CONFIG_GENERATION => self.shared.interrupt.config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            reg::DEVICE_FEATURES_SEL => self.device_features_select = value,
            reg::DRIVER_FEATURES_SEL => self.driver_features_select = value,
            reg::DRIVER_FEATURES => self.write_features(value),
            reg::QUEUE_SEL => self.queue_select = value,
            reg::QUEUE_NOTIFY => match usize::try_from(value) {
                Ok(index) if index < self.queues.len() => self.shared.kick(index),
                _ => self.warn("kick of a queue that there is not", offset, value),
            },
            reg::INTERRUPT_ACK => self.shared.interrupt.acknowledge(value),
            reg::STATUS => self.write_status(value),
            reg::QUEUE_NUM
            | reg::QUEUE_READY
            | reg::QUEUE_DESC_LOW
            | reg::QUEUE_DESC_HIGH
            | reg::QUEUE_DRIVER_LOW
            | reg::QUEUE_DRIVER_HIGH
            | reg::QUEUE_DEVICE_LOW
            | reg::QUEUE_DEVICE_HIGH => self.write_queue(offset, value),
            _ => self.warn("write to a register that cannot be written", offset, value),
        }
    }

    fn write_features(&mut self, value: u32) {
        if self.shared.status() & (reg::DRIVER | reg::FEATURES_OK | reg::FAILED) != reg::DRIVER {
            return self.warn("features written at the wrong time", reg::DRIVER_FEATURES, value);
        }
        match self.driver_features_select {
            0 => self.driver_features = self.driver_features >> 32 << 32 | u64::from(value),
            1 => self.driver_features = u64::from(value) << 32 | self.driver_features & u64::from(u32::MAX),
            _ if value == 0 => {}
            _ => self.warn("features above bit 63", reg::DRIVER_FEATURES, value),
        }
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        let setting_up = reg::DRIVER | reg::FEATURES_OK;
        let done = reg::DRIVER_OK | reg::FAILED;
        if self.shared.status() & (setting_up | done) != setting_up {
            return self.warn("queue set up at the wrong time", offset, value);
        }
        let selected = usize::try_from(self.queue_select).ok();
        let Some(queue) = selected.and_then(|index| self.queues.get_mut(index)) else {
            return self.warn("set-up of a queue that there is not", offset, value);
        };
        if queue.ready && offset != reg::QUEUE_READY {
            return self.warn("set-up of a queue that is ready", offset, value);
        }
        match offset {
            reg::QUEUE_NUM => match u16::try_from(value) {
                Ok(size) if size.is_power_of_two() && size <= queue.max_size => queue.size = size,
                _ => self.warn("impossible queue size", offset, value),
            },
            reg::QUEUE_READY => queue.ready = value & 1 != 0,
            reg::QUEUE_DESC_LOW => set_low(&mut queue.descriptor_table, value),
            reg::QUEUE_DESC_HIGH => set_high(&mut queue.descriptor_table, value),
            reg::QUEUE_DRIVER_LOW => set_low(&mut queue.available_ring, value),
            reg::QUEUE_DRIVER_HIGH => set_high(&mut queue.available_ring, value),
            reg::QUEUE_DEVICE_LOW => set_low(&mut queue.used_ring, value),
            reg::QUEUE_DEVICE_HIGH => set_high(&mut queue.used_ring, value),
            _ => {}
        }
    }

    /// Follows the driver's initialization sequence (virtio 1.2, 3.1.1). A step out of order is refused, which the
    /// driver sees when it reads the status back.
    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.shared.resets.add(1);
            return self.reset();
        }
        if self.shared.is_resetting() {
            return self.warn("a status before the reset is over", reg::STATUS, value);
        }
        let status = self.shared.status();
        let Ok(wanted) = u8::try_from(value) else {
            return self.warn("unknown status bits", reg::STATUS, value);
        };
        let added = wanted & !status & !reg::NEEDS_RESET;
        if status & !wanted & !reg::NEEDS_RESET != 0 || status & reg::FAILED != 0 {
            return self.warn("status bits taken back without a reset", reg::STATUS, value);
        }
        for bit in [
            reg::ACKNOWLEDGE,
            reg::DRIVER,
            reg::FEATURES_OK,
            reg::DRIVER_OK,
            reg::FAILED,
        ] {
            if added & bit != 0 {
                self.add_status(bit, value);
            }
        }
    }

    fn add_status(&mut self, bit: u8, value: u32) {
        let status = self.shared.status();
        let features_fit =
            self.driver_features & !self.offered == 0 && self.driver_features & reg::VERSION_1 != 0;
        let allowed = match bit {
            reg::DRIVER => status & reg::ACKNOWLEDGE != 0,
            reg::FEATURES_OK => status & reg::DRIVER != 0 && features_fit,
            reg::DRIVER_OK => status & reg::FEATURES_OK != 0,
            _ => true,
        };
        if !allowed {
            return self.warn("status step refused", reg::STATUS, value);
        }
        self.shared.status.fetch_or(bit, Ordering::SeqCst);
        match bit {
            reg::DRIVER_OK => self.activate(),
            reg::FAILED => self.shared.core().active = false,
            _ => {}
        }
    }

    fn activate(&mut self) {
        let open = |queue: &QueueRecord| queue.open(self.driver_features, &self.shared.memory);
        let queues: Result<Vec<_>, _> = self.queues.iter().map(open).collect();
        let mut core = self.shared.core();
        match queues {
            Ok(queues) => {
                core.queues = queues;
                core.active = self.shared.status() & reg::NEEDS_RESET == 0;
                core.device.activate(self.driver_features);
                self.shared.raise_host_event();
                // Linux's balloon driver kicks before DRIVER_OK, and not again after it.
                for index in 0..self.queues.len() {
                    self.shared.kick(index);
                }
            }
            Err(error) => self.shared.needs_reset(&mut core, &error),
        }
    }

    fn warn(&self, what: &str, offset: u64, value: u32) {
        if let Some(count) = self.shared.warnings.count() {
            let device = self.device_type;
            tracing::warn!(device, offset, value, count, "virtio: {what}");
        }
    }
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address >> 32 << 32 | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = u64::from(value) << 32 | *address & u64::from(u32::MAX);
}
