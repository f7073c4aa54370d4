//! Whatever a guest writes to registers, rings and descriptors: no panic, no hang, and a reset always helps.

use std::cell::RefCell;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;

use crate::bus::BusDevice;
use crate::cases::cases;
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::{Balloon, Control};
use crate::virtio::block::{Access, Backend, Block, Parameters};
use crate::virtio::console::{self, Console, Terminal};
use crate::virtio::net::testing::{Wire, card, frame, ip, leave_for};
use crate::virtio::rng::Rng;
use crate::virtio::testing::{AVAILABLE, DATA, DESCRIPTORS, Driver, END, reads, writes};
use crate::virtio::vsock::{self, Vsock};

#[derive(Clone, Debug)]
enum Act {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Set(u64, u32),
    Fill(u64, Vec<u8>),
    BringUp,
    Run,
}

fn act() -> impl Strategy<Value = Act> {
    let bytes = |max| prop::collection::vec(any::<u8>(), 0..max);
    let word = prop_oneof![
        0u32..16,
        Just(256),
        Just(0x1000),
        Just(0x3000),
        Just(0x4000),
        any::<u32>()
    ];
    prop_oneof![
        1 => (0u64..0x140, 0usize..10).prop_map(|(offset, len)| Act::Read(offset, len)),
        1 => (prop_oneof![0u64..0x140, any::<u64>()], bytes(10)).prop_map(|(offset, data)| Act::Write(offset, data)),
        6 => ((0u64..0x40).prop_map(|n| 4 * n), word).prop_map(|(offset, value)| Act::Set(offset, value)),
        1 => (DESCRIPTORS..0xd000, bytes(600)).prop_map(|(at, data)| Act::Fill(at, data)),
        1 => Just(Act::BringUp),
        1 => Just(Act::Run),
    ]
}

fn perform(driver: &mut Driver, act: Act) {
    match act {
        Act::Read(offset, len) => driver.transport.read(offset, &mut vec![0; len]),
        Act::Write(offset, data) => driver.transport.write(offset, &data),
        Act::Set(offset, value) => driver.set(offset, value),
        Act::Fill(at, data) => driver.fill(at, &data),
        Act::BringUp => driver.bring_up(),
        Act::Run => driver.kick(),
    }
}

/// A driver that did all that, after which its device could be moved, and starts anew.
fn outlived<D: VirtioDevice + 'static>(device: impl Fn() -> D, acts: Vec<Act>) -> Driver {
    let mut driver = Driver::new(device());
    acts.into_iter().for_each(|act| perform(&mut driver, act));
    let saved = driver.save();
    let moved = driver.move_to(device(), saved);
    assert!(moved.is_ok(), "{:?}", moved.err());
    driver.transport.resume();
    driver.run();
    driver.bring_up();
    driver
}

fn block(dir: &Path) -> Block {
    let path = dir.join("disk");
    std::fs::File::create(&path)
        .unwrap()
        .write_all(&[0x5a; 64 * 512])
        .unwrap();
    let backend = Backend::open(&path, Access::default()).unwrap();
    Block::new(Arc::new(backend), "fuzz", Parameters::default()).unwrap()
}

fn vsock(dir: &Path) -> Vsock {
    let backend = vsock::Backend::open(&dir.join("socket")).unwrap();
    Vsock::new(Arc::new(backend), 3)
}

fn balloon() -> Balloon {
    Balloon::new(Arc::new(Control::new(1 << 20).unwrap()), true)
}

/// With two named ports: eight queues.
fn console(dir: &Path) -> Console {
    let ports = ["a", "b"].map(|name| (name.into(), dir.join(name)));
    let backend = console::Backend::open(&ports).unwrap();
    Console::new(Arc::new(Terminal::new().unwrap()), Arc::new(backend), true)
}

/// A descriptor: mostly plausible, sometimes not.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![
        6 => DATA..DATA + 0x4000,
        1 => Just(DESCRIPTORS),
        1 => END - 600..END + 600,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => Just(16u32), 4 => Just(512), 2 => Just(1), 1 => 0u32..5000, 1 => any::<u32>()];
    let flags = prop_oneof![4 => Just(1u16), 3 => Just(3), 3 => Just(2), 1 => Just(0), 1 => 0u16..8];
    (address, len, flags, prop_oneof![9 => 0u16..12, 1 => any::<u16>()])
}

fn chains(driver: &mut Driver, descriptors: &[(u64, u32, u16, u16)], heads: &[u16]) {
    for (index, &(address, len, flags, next)) in (0..).zip(descriptors) {
        driver.describe(index, address, len, flags, next);
    }
    // Headers that say IN, OUT, FLUSH, GET_ID and nonsense at a few sectors.
    let headers: Vec<u8> = (0..0x4000u32)
        .map(|n| if n % 16 == 0 { (n / 16 % 11) as u8 } else { 0 })
        .collect();
    driver.fill(DATA, &headers);
    for &head in heads {
        driver.publish(head);
    }
    driver.kick();
    let _ = driver.used();
}

proptest! {
    #![proptest_config(cases(3000))]

    #[test]
    fn any_registers_and_memory(acts in prop::collection::vec(act(), 0..60)) {
        let mut driver = outlived(Rng::new, acts);
        prop_assert_eq!(driver.submit(&[writes(DATA, 8)]), 8);
    }

    #[test]
    fn any_registers_and_memory_of_several_queues(acts in prop::collection::vec(act(), 0..60)) {
        let dir = tempfile::tempdir().unwrap();
        let mut driver = outlived(|| vsock(dir.path()), acts);
        // A packet of zeroes: dropped.
        prop_assert_eq!(driver.select(1).submit(&[reads(DATA, 64)]), 0);
    }

    #[test]
    fn any_registers_and_memory_of_ports(acts in prop::collection::vec(act(), 0..60)) {
        let dir = tempfile::tempdir().unwrap();
        let mut driver = outlived(|| console(dir.path()), acts);
        prop_assert_eq!(driver.select(1).submit(&[reads(DATA, 64)]), 0);
    }

    #[test]
    fn any_descriptor_chains(
        descriptors in prop::collection::vec(descriptor(), 1..12),
        heads in prop::collection::vec(prop_oneof![9 => 0u16..12, 1 => any::<u16>()], 1..8),
        noise in prop::collection::vec(any::<u8>(), 0..8),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let drivers = [
            Driver::ready(Rng::new()),
            Driver::ready(block(dir.path())),
            Driver::ready(vsock(dir.path())),
            Driver::ready(balloon()),
            Driver::ready(console(dir.path())),
        ];
        for mut driver in drivers {
            for queue in 0..driver.queue_count() {
                chains(driver.select(queue), &descriptors, &heads);
                driver.fill(AVAILABLE, &noise);
                driver.kick();
                driver.bring_up();
                prop_assert_eq!(driver.get(0x070), 15);
            }
        }
        prop_assert_eq!(std::fs::metadata(dir.path().join("disk")).unwrap().len(), 64 * 512);
    }
}

#[test]
fn any_registers_and_memory_of_a_card() {
    leave_for("many0");
    ip("tuntap add dev many1 mode tap multi_queue");
    proptest!(cases(3000), |(acts in prop::collection::vec(act(), 0..60))| {
        let mut driver = Driver::new(card("many0"));
        acts.into_iter().for_each(|act| perform(&mut driver, act));
        let saved = driver.save();
        let moved = driver.move_to(card("many1"), saved);
        prop_assert!(moved.is_ok(), "{:?}", moved.err());
        driver.transport.resume();
        driver.run();
        check_control(&mut driver);
    });
}

#[test]
fn any_descriptor_chains_of_a_card() {
    let wire = Wire::between(&["many0"]);
    // One for all cases: a bridge takes its time to see that a tap is open again.
    let driver = RefCell::new(Driver::new(wire.card("many0")));
    let heads = prop::collection::vec(prop_oneof![9 => 0u16..12, 1 => any::<u16>()], 1..8);
    proptest!(cases(3000), |(
        descriptors in prop::collection::vec(descriptor(), 1..12),
        heads in heads,
        queue in 0usize..5,
        // All features, or neither mergeable buffers nor segments.
        modest in any::<bool>(),
        // Two are all that there are.
        pairs in prop::option::of(0u16..4),
    )| {
        let mut driver = driver.borrow_mut();
        let modest = if modest { 1 << 15 | 0x3 << 7 | 0x3 << 54 } else { 0 };
        let features = driver.offered() & !modest;
        driver.bring_up_with(features);
        if let Some(pairs) = pairs {
            driver.fill(DATA, &[&[4, 0][..], &pairs.to_le_bytes()].concat());
            driver.select(4).submit(&[reads(DATA, 4), writes(DATA + 4, 1)]);
            prop_assert_eq!(driver.bytes(DATA + 4, 1) == [0], (1..=2).contains(&pairs));
        }
        wire.send([0; 12], &frame(&[1; 100]));
        chains(driver.select(queue), &descriptors, &heads);
        check_control(&mut driver);
    });
}

/// After a reset a card answers.
fn check_control(driver: &mut Driver) {
    driver.bring_up();
    driver.fill(DATA, &[3, 0]);
    let parts = [reads(DATA, 2), writes(DATA + 2, 1)];
    assert_eq!(driver.select(4).submit(&parts), 1);
}
