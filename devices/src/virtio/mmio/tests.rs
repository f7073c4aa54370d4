//! The transport as a driver sees it: registers, life cycle, saved state.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use event_manager::{EventManager, SubscriberOps};
use migration_state::Envelope;
use vm_memory::{Bytes, GuestAddress};

use super::registers::{DRIVER_OK, FEATURES_OK, NEEDS_RESET};
use super::*;
use crate::bus::BusDevice;
use crate::metrics::Counters;
use crate::virtio::rng::VirtioRng;
use crate::virtio::testing::{AVAILABLE, DATA, DESCRIPTORS, Driver, END, USED, VERSION_1, rng, writes};
use crate::virtio::{Description, DeviceError, HostBackend, QueueError, QueueProgress, Queues, VirtioDevice};

const NEEDS_RESET_SEEN: u32 = 15 | NEEDS_RESET as u32;

#[test]
fn identification() {
    let mut driver = Driver::new(rng());
    assert_eq!(driver.get(0x000).to_le_bytes(), *b"virt");
    assert_eq!(driver.get(0x004), 2);
    assert_eq!(driver.get(0x034), 256);
    assert_eq!(driver.get(0x0b0), u32::MAX);
    driver.set(0x030, 1);
    assert_eq!(driver.get(0x034), 0);
    driver.set(0x014, 7);
    assert_eq!(driver.get(0x010), 0);
}

#[test]
fn features_must_be_offered_and_modern() {
    let mut driver = Driver::new(rng());
    let offered = driver.offered();
    assert_eq!(offered & VERSION_1, VERSION_1);
    assert!(!driver.negotiate(0));
    assert!(!driver.negotiate(VERSION_1 | 1));
    assert!(!driver.negotiate(VERSION_1 | 1 << 60));
    assert!(driver.negotiate(VERSION_1));
    // Too late for another choice.
    driver.set(0x024, 0);
    driver.set(0x020, 1);
    driver.set(0x070, 15);
    assert_eq!(driver.get(0x070), 15);
}

#[test]
fn steps_out_of_order_are_refused() {
    let mut driver = Driver::new(rng());
    for (write, read) in [
        (2, 0),
        (4, 0),
        (8, 0),
        (1, 1),
        (4, 1),
        (3, 3),
        (2, 3),
        (7, 3),
        (0x100, 3),
        (0, 0),
    ] {
        driver.set(0x070, write);
        assert_eq!(driver.get(0x070), read, "after {write}");
    }
    driver.set_up_queue(DESCRIPTORS, AVAILABLE, USED);
    assert_eq!(driver.get(0x044), 0);
    // A device that the driver gave up only takes a reset.
    driver.set(0x070, 0x81);
    driver.set(0x070, 0x83);
    assert_eq!(driver.get(0x070), 0x81);
    driver.set(0x070, 0);
    assert_eq!(driver.get(0x070), 0);
}

#[test]
fn queues_are_fixed_once_in_use() {
    let mut driver = Driver::ready(rng());
    driver.set(0x044, 0);
    assert_eq!(driver.get(0x044), 1);
    driver.set(0x080, 0xdead_0000);
    assert_eq!(driver.submit(&[writes(DATA, 8)]), 8);
}

#[test]
fn impossible_queues_need_a_reset() {
    let cases = [
        (END, AVAILABLE, USED),
        (DESCRIPTORS, u64::MAX - 1, USED),
        (DESCRIPTORS, AVAILABLE, END - 8),
        (DESCRIPTORS + 8, AVAILABLE, USED),
        (DESCRIPTORS, AVAILABLE + 1, USED),
        (DESCRIPTORS, AVAILABLE, USED + 2),
        (DESCRIPTORS, 0, USED),
    ];
    for (descriptors, available, used) in cases {
        let mut driver = Driver::new(rng());
        assert!(driver.negotiate(VERSION_1));
        driver.set_up_queue(descriptors, available, used);
        driver.set(0x070, 15);
        assert_eq!(driver.get(0x070), NEEDS_RESET_SEEN);
        assert_eq!((driver.interrupts(), driver.get(0x060)), (1, 2));
        driver.kick();
        driver.bring_up();
        assert_eq!(driver.submit(&[writes(DATA, 8)]), 8);
    }
}

#[test]
fn a_broken_ring_needs_a_reset() {
    let mut driver = Driver::ready(rng());
    driver
        .memory
        .write_obj(300u16, GuestAddress(AVAILABLE + 2))
        .unwrap();
    driver.kick();
    assert_eq!(driver.get(0x070), NEEDS_RESET_SEEN);
    driver.bring_up();
    driver.publish(256);
    driver.kick();
    assert_eq!(driver.get(0x070), NEEDS_RESET_SEEN);
    driver.bring_up();
    assert_eq!(driver.submit(&[writes(DATA, 8)]), 8);
    let counted = ["needs_reset", "resets", "queue_events", "interrupts"].map(|name| driver.count(name));
    assert_eq!(counted, [2, 3, 3, 3]);
}

#[test]
fn a_device_that_panicked_needs_a_reset() {
    let mut driver = Driver::ready(rng());
    let shared = driver.transport.shared.clone();
    let panicked = std::thread::spawn(move || {
        let _core = shared.core();
        panic!("planted");
    });
    assert!(panicked.join().is_err());
    driver.kick();
    assert_eq!(driver.get(0x070), NEEDS_RESET_SEEN);
    driver.bring_up();
    assert_eq!(driver.submit(&[writes(DATA, 8)]), 8);
}

#[test]
fn interrupts_are_acknowledged() {
    let mut driver = Driver::ready(rng());
    driver.submit(&[writes(DATA, 8)]);
    assert_eq!((driver.interrupts(), driver.get(0x060)), (1, 1));
    driver.set(0x064, 2);
    assert_eq!(driver.get(0x060), 1);
    driver.set(0x064, 1);
    assert_eq!(driver.get(0x060), 0);
}

#[test]
fn event_idx_suppresses_interrupts() {
    let mut driver = Driver::ready(rng());
    // used_event far ahead: no interrupt until then.
    driver
        .memory
        .write_obj(100u16, GuestAddress(AVAILABLE + 4 + 512))
        .unwrap();
    driver.add(&[writes(DATA, 8)]);
    driver.kick();
    assert_eq!((driver.interrupts(), driver.get(0x060)), (0, 0));
}

#[test]
fn a_driver_that_polls_gets_no_interrupts() {
    let mut driver = Driver::new(rng());
    driver.bring_up_with(VERSION_1);
    for (flags, interrupts) in [(1u16, 0), (0, 1), (1, 0)] {
        driver.memory.write_obj(flags, GuestAddress(AVAILABLE)).unwrap();
        assert_eq!(driver.submit(&[writes(DATA, 8)]), 8);
        assert_eq!(driver.interrupts(), interrupts, "flags {flags}");
    }
    // With EVENT_IDX the flag means nothing.
    driver.bring_up();
    driver.memory.write_obj(1u16, GuestAddress(AVAILABLE)).unwrap();
    driver.submit(&[writes(DATA, 8)]);
    assert_eq!(driver.interrupts(), 1);
}

#[test]
fn a_full_ring_is_served_in_turns() {
    let mut driver = Driver::ready(rng());
    // A driver that is ready is looked at in any case.
    driver.run();
    for _ in 0..256 {
        driver.add(&[writes(DATA, 8)]);
    }
    driver.set(0x050, 0);
    driver.turn();
    assert_eq!(driver.used().len(), 64, "a turn is 64 chains");
    driver.run();
    assert_eq!(driver.used().len(), 192);
    for _ in 0..10 {
        driver.add(&[writes(DATA, 0x10_0000)]);
    }
    driver.set(0x050, 0);
    driver.turn();
    assert_eq!(driver.used().len(), 4, "or 4 MiB");
    driver.run();
    assert_eq!(driver.used().len(), 6);
    // Indices wrap.
    for _ in 0..1000 {
        driver.submit(&[writes(DATA, 8)]);
    }
}

#[test]
fn a_queue_that_is_being_served_needs_no_kick() {
    let mut driver = Driver::new(rng());
    driver.bring_up_with(VERSION_1);
    driver.run();
    let no_notify = |driver: &Driver| driver.memory.read_obj::<u16>(GuestAddress(USED)).unwrap();
    for _ in 0..3 {
        for _ in 0..65 {
            driver.add(&[writes(DATA, 8)]);
        }
        driver.set(0x050, 0);
        driver.turn();
        assert_eq!((driver.used().len(), no_notify(&driver)), (64, 1));
        // Without a kick.
        driver.add(&[writes(DATA, 8)]);
        driver.run();
        assert_eq!((driver.used().len(), no_notify(&driver)), (2, 0));
    }
}

#[test]
fn accesses_of_any_size() {
    let mut driver = Driver::new(rng());
    for offset in [0, 2, 4, 0xfc, 0xfe, 0x100, 0x10c, 0xfff, u64::MAX] {
        for len in 0..17 {
            let mut data = vec![0xaa; len];
            driver.transport.read(offset, &mut data);
            if offset != 0 && offset != 4 {
                assert!(data.iter().all(|&byte| byte == 0), "{len} bytes at {offset:#x}");
            }
            driver.transport.write(offset, &data);
        }
    }
}

#[test]
fn a_paused_device_leaves_memory_alone_and_resume_serves_once() {
    let mut driver = Driver::ready(rng());
    driver.transport.pause();
    driver.add(&[writes(DATA, 8)]);
    driver.kick();
    assert!(driver.used().is_empty());
    driver.transport.resume();
    driver.run();
    assert_eq!(driver.used(), [(0, 8)]);
}

#[test]
fn a_reset_ends_all_writes_whatever_is_in_flight() {
    let mut driver = Driver::new(rng());
    let done = Arc::new(AtomicBool::new(false));
    let thread = {
        let (worker, done) = (driver.transport.worker(), done.clone());
        std::thread::spawn(move || {
            let mut manager = EventManager::new().unwrap();
            manager.add_subscriber(worker);
            let mut turns = 0;
            while !done.load(Ordering::SeqCst) {
                turns += manager.run_with_timeout(1).unwrap();
            }
            turns
        })
    };
    for round in 0..500u32 {
        driver.bring_up();
        for _ in 0..50 {
            driver.add(&[writes(DATA, 4096)]);
        }
        driver.set(0x050, 0);
        (0..round % 64).for_each(|_| std::thread::yield_now());
        driver.set(0x070, 0);
        driver.fill(DATA, &[0; 4096]);
        (0..10).for_each(|_| std::thread::yield_now());
        assert_eq!(driver.bytes(DATA, 4096), [0; 4096]);
    }
    done.store(true, Ordering::SeqCst);
    assert!(thread.join().unwrap() > 0);
}

#[test]
fn requests_and_interrupts_under_way_move() {
    let mut source = Driver::ready(rng());
    source.submit(&[writes(DATA, 8)]);
    let head = source.add(&[writes(DATA, 9)]);
    source.set(0x014, 1);
    // Kicked, not served: the kick is lost with the source.
    source.set(0x050, 0);
    let envelope = source.save();

    let mut destination = source.move_to(rng(), envelope).unwrap();
    destination.run();
    assert!(destination.used().is_empty());
    destination.transport.resume();
    assert_eq!(
        destination.interrupts(),
        1,
        "the first request's, not acknowledged"
    );
    destination.run();
    assert_eq!(destination.used(), [(u32::from(head), 9)]);
    assert_eq!(destination.get(0x014), 0, "a write-only register");
    assert_eq!(
        destination.get(0x010),
        1,
        "the features' upper half is still selected"
    );
    assert_eq!(destination.get(0x0fc), 1);
    assert_eq!(destination.submit(&[writes(DATA, 10)]), 10);
    // And the source could have gone on.
    source.transport.resume();
}

#[test]
fn a_half_set_up_device_moves() {
    let mut source = Driver::new(rng());
    assert!(source.negotiate(VERSION_1));
    source.set_up_queue(DESCRIPTORS, AVAILABLE, USED);
    let envelope = source.save();
    let mut destination = source.move_to(rng(), envelope).unwrap();
    destination.transport.resume();
    destination.set(0x070, 15);
    assert_eq!(destination.get(0x070), 15);
    destination.kick();
}

#[test]
fn a_running_device_is_not_saved() {
    let driver = Driver::ready(rng());
    let error = driver.transport.save(&mut Envelope::new(), "dev0").unwrap_err();
    assert!(
        matches!(error, MmioTransportError::NotPaused { device: 4 }),
        "{error}"
    );
}

/// Makes one thing in a good state bad.
type Spoil = fn(&mut MmioTransportState);

#[test]
fn hostile_state_is_refused_by_name() {
    let cases: [(&str, Spoil); 14] = [
        ("device ID", |state| state.device_type = 2),
        ("device status", |state| state.status = 0x10),
        ("device status", |state| state.status = DRIVER_OK),
        ("features", |state| state.driver_features = u64::MAX),
        ("features", |state| state.driver_features = 0),
        ("interrupt status", |state| state.interrupt_status = 4),
        ("queue sizes", |state| state.queues.clear()),
        ("queue sizes", |state| state.queues.push(state.queues[0])),
        ("queue sizes", |state| state.queues[0].max_size = 512),
        ("queue 0", |state| state.queues[0].size = 0),
        ("queue 0", |state| state.queues[0].size = 3),
        ("queue 0", |state| state.queues[0].size = 512),
        ("queue 0", |state| state.queues[0].used_ring = 1),
        ("queue 0", |state| state.queues[0].descriptor_table = END),
    ];
    let source = Driver::ready(rng());
    for (name, spoil) in cases {
        let mut envelope = source.save();
        let mut state: MmioTransportState = envelope.take("dev0").unwrap();
        spoil(&mut state);
        envelope.put("dev0", &state).unwrap();
        let error = source.move_to(rng(), envelope).err().expect(name).to_string();
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn golden_record() {
    let queue = QueueRecord {
        max_size: 256,
        size: 128,
        ready: true,
        next_avail: 3,
        next_used: 2,
        descriptor_table: 0x1000,
        available_ring: 0x2000,
        used_ring: 0x3000,
    };
    let state = MmioTransportState {
        device_type: 2,
        status: 15,
        driver_features: 1 << 32 | u64::from(FEATURES_OK),
        device_features_select: 1,
        driver_features_select: 0,
        queue_select: 5,
        interrupt_status: 1,
        config_generation: 9,
        queues: vec![queue],
    };
    let golden = "02 0f 8880808010 01 00 05 01 09 01 8002 8001 01 03 02 8020 8040 8060";
    migration_state::assert_golden(1, golden, &state);
}

/// An entropy device that panics so often.
struct Panics(VirtioRng, Arc<AtomicU32>);

impl VirtioDevice for Panics {
    fn device_type(&self) -> u32 {
        self.0.device_type()
    }

    fn features(&self) -> u64 {
        self.0.features()
    }

    fn queue_sizes(&self) -> &[u16] {
        self.0.queue_sizes()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.0.read_config(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.0.write_config(offset, data);
    }

    fn activate(&mut self, features: u64) {
        self.0.activate(features);
    }

    fn process_queue(&mut self, index: usize, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError> {
        let left = self.1.load(Ordering::SeqCst);
        self.1.store(left.saturating_sub(1), Ordering::SeqCst);
        assert_eq!(left, 0, "a planted panic");
        self.0.process_queue(index, queues)
    }

    fn host_events(&self) -> Vec<BorrowedFd<'_>> {
        self.0.host_events()
    }

    fn process_host(&mut self, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError> {
        self.0.process_host(queues)
    }

    fn reset(&mut self) -> bool {
        self.0.reset()
    }

    fn drain(&mut self, queues: &mut Queues<'_>, until: Instant) -> Result<(), DeviceError> {
        self.0.drain(queues, until)
    }

    fn save(&self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError> {
        self.0.save(envelope, instance)
    }

    fn restore(&mut self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError> {
        self.0.restore(envelope, instance)
    }

    fn describe(&self) -> Description {
        self.0.describe()
    }

    fn host_backend(&self) -> Option<Arc<dyn HostBackend>> {
        self.0.host_backend()
    }

    fn metrics(&self) -> Arc<dyn Counters> {
        self.0.metrics()
    }
}

#[test]
fn a_device_that_panics_needs_a_reset() {
    let panics: Arc<AtomicU32> = Arc::default();
    let mut driver = Driver::ready(Panics(rng(), panics.clone()));
    driver.run();
    driver.interrupts();
    panics.store(1, Ordering::SeqCst);
    driver.add(&[writes(DATA, 8)]);
    driver.kick();
    assert_eq!(driver.get(0x070), NEEDS_RESET_SEEN);
    assert_eq!((driver.interrupts(), driver.get(0x060) & 2), (1, 2));
    driver.bring_up();
    assert_eq!(driver.submit(&[writes(DATA, 8)]), 8);
}
