//! Whatever a guest writes to registers, rings and descriptors: no panic, no hang, and a reset always helps.

use std::cell::RefCell;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;

use crate::bus::BusDevice;
use crate::cases::cases;
use crate::rate::Limits;
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::{BalloonControl, VirtioBalloon};
use crate::virtio::block::{Access, BlockBackend, BlockParameters, VirtioBlock};
use crate::virtio::console::{ConsoleBackend, ConsoleTerminal, VirtioConsole};
use crate::virtio::net::testing::{Wire, card, frame, ip, leave_for};
use crate::virtio::testing::{AVAILABLE, DATA, DESCRIPTORS, Driver, END, folder, reads, rng, writes};
use crate::virtio::vsock::{VirtioVsock, VsockBackend, VsockParameters};

#[derive(Clone, Debug)]
enum MmioAct {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Set(u64, u32),
    Fill(u64, Vec<u8>),
    BringUp,
    Run,
}

/// From plain numbers: proptest's unions keep a generator for each alternative, which costs more than most cases.
fn act() -> impl Strategy<Value = MmioAct> {
    let numbers = (0u8..11, any::<u64>(), any::<u32>(), any::<u16>());
    numbers.prop_map(|(kind, place, value, choice)| match kind {
        0 => MmioAct::Read(place % 0x140, usize::from(choice % 10)),
        1 => {
            let offset = if choice.is_multiple_of(2) {
                place % 0x140
            } else {
                place
            };
            MmioAct::Write(offset, noise(value, choice % 10))
        }
        2..8 => MmioAct::Set(4 * (place % 0x40), word(choice, value)),
        8 => MmioAct::Fill(
            DESCRIPTORS + place % (0xd000 - DESCRIPTORS),
            noise(value, choice % 600),
        ),
        9 => MmioAct::BringUp,
        _ => MmioAct::Run,
    })
}

/// A word that may make sense in some register.
fn word(choice: u16, value: u32) -> u32 {
    match choice % 6 {
        0 => value % 16,
        1 => 256,
        2 => 0x1000,
        3 => 0x3000,
        4 => 0x4000,
        _ => value,
    }
}

/// So many bytes of anything.
fn noise(seed: u32, len: u16) -> Vec<u8> {
    let mut state = u64::from(seed) << 1 | 1;
    let mut next = || {
        // A step of xorshift64 (Marsaglia 2003).
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}

fn perform(driver: &mut Driver, act: MmioAct) {
    match act {
        MmioAct::Read(offset, len) => driver.transport.read(offset, &mut vec![0; len]),
        MmioAct::Write(offset, data) => driver.transport.write(offset, &data),
        MmioAct::Set(offset, value) => driver.set(offset, value),
        MmioAct::Fill(at, data) => driver.fill(at, &data),
        MmioAct::BringUp => driver.bring_up(),
        MmioAct::Run => driver.kick(),
    }
}

/// A driver that did all that, whose device was then moved and reset.
fn outlived<D: VirtioDevice + 'static>(device: impl Fn() -> D, acts: Vec<MmioAct>) -> Driver {
    let mut driver = Driver::new(device());
    acts.into_iter().for_each(|act| perform(&mut driver, act));
    let saved = driver.save();
    let moved = driver.move_to(device(), saved);
    let mut driver = moved.unwrap_or_else(|error| panic!("{error:?}"));
    driver.transport.resume();
    driver.run();
    driver.bring_up();
    driver
}

/// Bytes of the disk.
const DISK: u64 = 64 * 512;

/// A disk whose file is as at first, whatever the case before did to it.
fn block(dir: &Path) -> VirtioBlock {
    let path = dir.join("disk");
    let mut options = File::options();
    let file = options.write(true).create(true).truncate(false).open(&path);
    file.unwrap().write_all(&[0x5a; DISK as usize]).unwrap();
    let backend = BlockBackend::open(&path, Access::default()).unwrap();
    VirtioBlock::new(Arc::new(backend), "fuzz", BlockParameters::default()).unwrap()
}

fn vsock(dir: &Path) -> VirtioVsock {
    let backend = VsockBackend::open(&dir.join("socket")).unwrap();
    let parameters = VsockParameters {
        guest_cid: 3,
        limits: Limits::default(),
    };
    VirtioVsock::new(Arc::new(backend), parameters).unwrap()
}

fn balloon() -> VirtioBalloon {
    VirtioBalloon::new(Arc::new(BalloonControl::new(1 << 20).unwrap()), true).unwrap()
}

/// With two named ports: eight queues.
fn console(dir: &Path) -> VirtioConsole {
    let ports = ["a", "b"].map(|name| (name.into(), dir.join(name)));
    let backend = ConsoleBackend::open(&ports).unwrap();
    VirtioConsole::new(Arc::new(ConsoleTerminal::new().unwrap()), Arc::new(backend), true)
}

/// A descriptor: mostly plausible, sometimes not.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let choices = (0u8..9, 0u8..12, 0u8..12, 0u8..10);
    (choices, any::<(u64, u32, u16, u16)>()).prop_map(|(choices, (address, len, flags, next))| {
        let address = match choices.0 {
            0..6 => DATA + address % 0x4000,
            6 => DESCRIPTORS,
            7 => END - 600 + address % 1200,
            _ => address,
        };
        let len = match choices.1 {
            0..4 => 16,
            4..8 => 512,
            8..10 => 1,
            10 => len % 5000,
            _ => len,
        };
        let flags = match choices.2 {
            0..4 => 1,
            4..7 => 3,
            7..10 => 2,
            10 => 0,
            _ => flags % 8,
        };
        (address, len, flags, head(choices.3, next))
    })
}

/// The index of a descriptor, mostly of one that there is.
fn head(choice: u8, index: u16) -> u16 {
    if choice < 9 { index % 12 } else { index }
}

fn heads() -> impl Strategy<Value = Vec<u16>> {
    let head = (0u8..10, any::<u16>()).prop_map(|(choice, index)| head(choice, index));
    prop::collection::vec(head, 1..8)
}

/// Headers that say IN, OUT, FLUSH, GET_ID and nonsense at a few sectors.
static HEADERS: [u8; 0x4000] = {
    let mut headers = [0; 0x4000];
    let mut at = 0;
    while at < headers.len() {
        headers[at] = (at / 16 % 11) as u8;
        at += 16;
    }
    headers
};

fn chains(driver: &mut Driver, descriptors: &[(u64, u32, u16, u16)], heads: &[u16]) {
    for (index, &(address, len, flags, next)) in (0..).zip(descriptors) {
        driver.describe(index, address, len, flags, next);
    }
    driver.fill(DATA, &HEADERS);
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
        let mut driver = outlived(rng, acts);
        prop_assert_eq!(driver.submit(&[writes(DATA, 8)]), 8);
    }

    #[test]
    fn any_registers_and_memory_of_a_balloon(acts in prop::collection::vec(act(), 0..60)) {
        let mut driver = outlived(balloon, acts);
        // The first page, given up.
        driver.fill(DATA, &[0; 4]);
        prop_assert_eq!(driver.submit(&[reads(DATA, 4)]), 0);
    }
}

#[test]
fn any_registers_and_memory_of_a_disk() {
    let dir = folder();
    proptest!(cases(3000), |(acts in prop::collection::vec(act(), 0..60))| {
        let mut driver = outlived(|| block(dir.path()), acts);
        // GET_ID.
        driver.fill(DATA, &[8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let parts = [reads(DATA, 16), writes(DATA + 0x100, 20), writes(DATA + 0x200, 1)];
        prop_assert_eq!(driver.submit(&parts), 21);
    });
}

#[test]
fn any_registers_and_memory_of_several_queues() {
    let dir = folder();
    proptest!(cases(3000), |(acts in prop::collection::vec(act(), 0..60))| {
        let mut driver = outlived(|| vsock(dir.path()), acts);
        // A packet of zeroes: dropped.
        prop_assert_eq!(driver.select(1).submit(&[reads(DATA, 64)]), 0);
    });
}

#[test]
fn any_registers_and_memory_of_ports() {
    let dir = folder();
    proptest!(cases(3000), |(acts in prop::collection::vec(act(), 0..60))| {
        let mut driver = outlived(|| console(dir.path()), acts);
        prop_assert_eq!(driver.select(1).submit(&[reads(DATA, 64)]), 0);
    });
}

#[test]
fn any_descriptor_chains() {
    let dir = folder();
    proptest!(cases(3000), |(
        descriptors in prop::collection::vec(descriptor(), 1..12),
        heads in heads(),
        noise in prop::collection::vec(any::<u8>(), 0..8),
    )| {
        let drivers = [
            Driver::ready(rng()),
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
        prop_assert_eq!(std::fs::metadata(dir.path().join("disk")).unwrap().len(), DISK);
    });
}

#[test]
fn any_registers_and_memory_of_a_card() {
    leave_for("many0");
    ip("tuntap add dev many1 mode tap multi_queue");
    proptest!(cases(3000), |(acts in prop::collection::vec(act(), 0..60))| {
        let mut driver = Driver::new(card("many0").without_command_limit());
        acts.into_iter().for_each(|act| perform(&mut driver, act));
        let saved = driver.save();
        let moved = driver.move_to(card("many1").without_command_limit(), saved);
        let mut driver = moved.unwrap_or_else(|error| panic!("{error:?}"));
        driver.transport.resume();
        driver.run();
        check_control(&mut driver);
    });
}

#[test]
fn any_descriptor_chains_of_a_card() {
    let wire = Wire::between(&["many0"]);
    // One for all cases: a bridge takes its time to see that a tap is open again.
    let driver = RefCell::new(Driver::new(wire.card("many0").without_command_limit()));
    proptest!(cases(3000), |(
        descriptors in prop::collection::vec(descriptor(), 1..12),
        heads in heads(),
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
