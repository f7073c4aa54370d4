//! Snapshots of memory without a machine.

use std::path::Path;

use devices::GuestMemory;
use migration::{MachineDescription, MemoryRegion, PageSet};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::manifest::FileRecord;
use super::{Draft, MANIFEST, Manifest, Snapshot, SnapshotError, Watch};
use crate::memory;

const HIGH: u64 = 1 << 32;
/// More than a block, and no multiple of one; a region of its own above 4 GiB.
const RANGES: [(u64, u64); 2] = [(0, (2 << 20) + (70 << 12)), (HIGH, 3 << 12)];

fn machine() -> MachineDescription {
    MachineDescription {
        memory: RANGES.map(|(gpa, len)| MemoryRegion { gpa, len }).to_vec(),
        shared_memory: false,
        cpus: 1,
        cpu_template: "host".into(),
        cpuid: Vec::new(),
        tsc_khz: 1,
        devices: Vec::new(),
    }
}

fn write(memory: &GuestMemory, target: &Path) -> Result<Manifest, SnapshotError> {
    let mut populated = PageSet::of(memory).unwrap();
    memory::populated(memory, &mut populated).unwrap();
    let watch = Watch::default();
    let mut draft = Draft::begin(target)?;
    let manifest = draft.write(machine(), b"state", memory, &populated, &watch)?;
    draft.publish(&watch)?;
    Ok(manifest)
}

/// What is in the directory around the snapshots.
fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    entries.map(name).collect()
}

fn manifest() -> Manifest {
    Manifest {
        godwit_version: "0.1.0".into(),
        created_unix_ms: 1_700_000_000_000,
        machine: machine(),
        state: FileRecord::of(b"state"),
        checksums: FileRecord::of(&[0; 24]),
        pages: 3,
    }
}

#[test]
fn golden_manifest() {
    let text = String::from_utf8(manifest().seal().unwrap()).unwrap();
    assert_eq!(text, include_str!("golden-manifest.json"));
    assert_eq!(
        Manifest::unseal(text.as_bytes(), Path::new("m")).unwrap(),
        manifest()
    );
}

#[test]
fn no_bit_of_a_manifest_can_change_what_it_says() {
    let text = manifest().seal().unwrap();
    for at in 0..text.len() * 8 {
        let mut flipped = text.clone();
        flipped[at / 8] ^= 1 << (at % 8);
        if let Ok(read) = Manifest::unseal(&flipped, Path::new("m")) {
            assert_eq!(read, manifest(), "bit {at}");
        }
    }
}

#[test]
fn a_draft_that_is_dropped_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let memory = memory::create(&RANGES, false).unwrap();
    let watch = Watch::default();
    watch.cancel();
    let mut draft = Draft::begin(&directory.path().join("saved")).unwrap();
    let populated = PageSet::of(&memory).unwrap();
    let ended = draft.write(machine(), b"state", &memory, &populated, &watch);
    assert!(matches!(ended, Err(SnapshotError::Cancelled)), "{ended:?}");
    assert_eq!(names(directory.path()).len(), 1);
    drop(draft);
    assert!(names(directory.path()).is_empty());
}

#[test]
fn who_comes_second_does_not_replace_the_first() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("saved");
    let memory = memory::create(&RANGES, false).unwrap();
    let populated = PageSet::of(&memory).unwrap();
    let (mut late, watch) = (Draft::begin(&target).unwrap(), Watch::default());
    late.write(machine(), b"late", &memory, &populated, &watch)
        .unwrap();
    write(&memory, &target).unwrap();
    assert!(matches!(late.publish(&watch), Err(SnapshotError::Exists(_))));
    assert_eq!(Snapshot::open(&target).unwrap().state(), b"state");
    assert_eq!(names(directory.path()), ["saved"]);
}

#[test]
fn a_cancelled_snapshot_is_not_published() {
    let directory = tempfile::tempdir().unwrap();
    let memory = memory::create(&RANGES, false).unwrap();
    let (mut draft, watch) = (
        Draft::begin(&directory.path().join("saved")).unwrap(),
        Watch::default(),
    );
    let populated = PageSet::of(&memory).unwrap();
    draft
        .write(machine(), b"state", &memory, &populated, &watch)
        .unwrap();
    watch.cancel();
    assert!(matches!(draft.publish(&watch), Err(SnapshotError::Cancelled)));
    assert!(names(directory.path()).is_empty());
}

/// What somebody can seal who knows how.
#[test]
fn sealed_nonsense_is_refused() {
    let region = |gpa, len| MemoryRegion { gpa, len };
    for regions in [
        vec![region(0, 1)],
        vec![region(0, 0)],
        vec![region(4096, 8192), region(8192, 4096)],
        vec![region(0, !4095), region(!4095, 4096)],
        vec![region(0, 1 << 60)],
        vec![region(0, 4096)],
    ] {
        let directory = tempfile::tempdir().unwrap();
        let write = |name, bytes: &[u8]| std::fs::write(directory.path().join(name), bytes).unwrap();
        let mut manifest = manifest();
        manifest.machine.memory = regions.clone();
        write(MANIFEST, &manifest.seal().unwrap());
        write("state", b"state");
        write("checksums", &[0; 24]);
        write("memory", b"");
        let error = Snapshot::open(directory.path()).unwrap_err();
        let refused = matches!(
            error,
            SnapshotError::Regions { .. } | SnapshotError::Length { .. }
        );
        assert!(refused, "{regions:?}: {error}");
    }
}

#[test]
fn what_is_no_file_is_not_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(MANIFEST);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    let error = Snapshot::open(directory.path()).unwrap_err();
    assert!(matches!(error, SnapshotError::NoFile(_)), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn memory_comes_back_as_it_was(
        writes in prop::collection::vec((0usize..2, 0u64..(2 << 20) + (70 << 12), 0u64..3), 0..200),
        unsparse: bool,
    ) {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("saved");
        let memory = memory::create(&RANGES, false).unwrap();
        for (region, at, value) in writes {
            let (gpa, len) = RANGES[region];
            memory.write_obj(value as u8, GuestAddress(gpa + at % len)).unwrap();
        }
        let manifest = write(&memory, &target).unwrap();
        if unsparse {
            let path = target.join("memory");
            let bytes = std::fs::read(&path).unwrap();
            std::fs::write(&path, bytes).unwrap();
        }
        let snapshot = Snapshot::open(&target).unwrap();
        prop_assert_eq!(snapshot.machine(), &machine());
        let digest = migration_io::digest(&memory).unwrap();
        let mapped = snapshot.map().unwrap();
        prop_assert_eq!(migration_io::digest(&mapped).unwrap(), digest);
        let read = snapshot.read(&Watch::default()).unwrap();
        prop_assert_eq!(migration_io::digest(&read).unwrap(), digest);
        // And again from what was mapped.
        let second = write(&mapped, &directory.path().join("again")).unwrap();
        prop_assert_eq!((second.pages, second.checksums), (manifest.pages, manifest.checksums));
    }

    #[test]
    fn any_damage_to_memory_is_found(at in 0u64..(2 << 20) + (73 << 12), bit in 0u32..8) {
        use std::os::unix::fs::FileExt;
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("saved");
        let memory = memory::create(&RANGES, false).unwrap();
        memory.write_slice(&[1; 8192], GuestAddress(0x1000)).unwrap();
        write(&memory, &target).unwrap();
        let file = std::fs::OpenOptions::new().read(true).write(true).open(target.join("memory")).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1 << bit], at).unwrap();
        let error = Snapshot::open(&target).unwrap().read(&Watch::default()).unwrap_err();
        prop_assert!(matches!(error, SnapshotError::Block { .. }), "{error}");
    }

    #[test]
    fn nonsense_is_no_manifest(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(MANIFEST), bytes).unwrap();
        prop_assert!(Snapshot::open(directory.path()).is_err());
    }
}
