//! Snapshots of memory without a machine.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use devices::GuestMemory;
use migration::{MachineDescription, MemoryKind, MemoryRegion, PageSet};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::manifest::{DifferenceRecord, FileRecord};
use super::{
    CHANGED, MANIFEST, MEMORY, Manifest, Snapshot, SnapshotContent, SnapshotDifference, SnapshotDraft,
    SnapshotError, SnapshotId, SnapshotWatch, merge,
};
use crate::memory;

const HIGH: u64 = 1 << 32;
/// More than a block, and no multiple of one; a region of its own above 4 GiB.
const RANGES: [(u64, u64); 2] = [(0, (2 << 20) + (70 << 12)), (HIGH, 3 << 12)];

fn machine() -> MachineDescription {
    MachineDescription {
        memory: RANGES.map(|(gpa, len)| MemoryRegion { gpa, len }).to_vec(),
        memory_kind: MemoryKind::Anonymous,
        cpus: 1,
        cpu_template: "host".into(),
        cpuid: Vec::new(),
        tsc_khz: 1,
        devices: Vec::new(),
    }
}

fn content<'a>(memory: &'a GuestMemory, pages: &'a PageSet) -> SnapshotContent<'a> {
    SnapshotContent {
        id: SnapshotId::random().unwrap(),
        machine: machine(),
        state: b"state",
        memory,
        pages,
        base: None,
        stopped: SystemTime::now(),
    }
}

fn publish(content: SnapshotContent<'_>, target: &Path) -> Result<Manifest, SnapshotError> {
    let (mut draft, watch) = (SnapshotDraft::begin(target)?, SnapshotWatch::default());
    let manifest = draft.write(content, &watch)?;
    draft.publish(&watch)?;
    Ok(manifest)
}

fn write(memory: &GuestMemory, target: &Path) -> Result<Manifest, SnapshotError> {
    let mut populated = PageSet::of(memory).unwrap();
    memory::populated(memory, &[], &mut populated).unwrap();
    publish(content(memory, &populated), target)
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
        id: "00112233445566778899aabbccddeeff".to_owned().try_into().unwrap(),
        difference: Some(DifferenceRecord {
            base: "0".repeat(32).try_into().unwrap(),
            changed: FileRecord::of(&[0; 16]),
        }),
        stopped_unix_ns: 1_700_000_000_000_000_000,
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
    let memory = memory::create(&RANGES, MemoryKind::Anonymous).unwrap();
    let watch = SnapshotWatch::default();
    watch.cancel();
    let mut draft = SnapshotDraft::begin(&directory.path().join("saved")).unwrap();
    let populated = PageSet::of(&memory).unwrap();
    let ended = draft.write(content(&memory, &populated), &watch);
    assert!(matches!(ended, Err(SnapshotError::Cancelled)), "{ended:?}");
    assert_eq!(names(directory.path()).len(), 1);
    drop(draft);
    assert!(names(directory.path()).is_empty());
}

#[test]
fn a_snapshot_is_its_users_alone() {
    use std::os::unix::fs::PermissionsExt;

    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("s");
    let memory = memory::create(&RANGES, MemoryKind::Anonymous).unwrap();
    write(&memory, &target).unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&target), 0o700);
    for name in names(&target) {
        assert_eq!(mode(&target.join(&name)), 0o600, "{name}");
    }
}

#[test]
fn a_second_snapshot_does_not_replace_the_first() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("saved");
    let memory = memory::create(&RANGES, MemoryKind::Anonymous).unwrap();
    let populated = PageSet::of(&memory).unwrap();
    let (mut late, watch) = (SnapshotDraft::begin(&target).unwrap(), SnapshotWatch::default());
    let content = SnapshotContent {
        state: b"late",
        ..content(&memory, &populated)
    };
    late.write(content, &watch).unwrap();
    write(&memory, &target).unwrap();
    assert!(matches!(late.publish(&watch), Err(SnapshotError::Exists(_))));
    assert_eq!(Snapshot::open(&target).unwrap().state(), b"state");
    assert_eq!(names(directory.path()), ["saved"]);
}

#[test]
fn a_cancelled_snapshot_is_not_published() {
    let directory = tempfile::tempdir().unwrap();
    let memory = memory::create(&RANGES, MemoryKind::Anonymous).unwrap();
    let (mut draft, watch) = (
        SnapshotDraft::begin(&directory.path().join("saved")).unwrap(),
        SnapshotWatch::default(),
    );
    let populated = PageSet::of(&memory).unwrap();
    draft.write(content(&memory, &populated), &watch).unwrap();
    watch.cancel();
    assert!(matches!(draft.publish(&watch), Err(SnapshotError::Cancelled)));
    assert!(names(directory.path()).is_empty());
}

/// A whole snapshot, and two differences: each to the one before it.
struct SnapshotChain {
    directory: tempfile::TempDir,
    memory: GuestMemory,
}

impl SnapshotChain {
    fn begin(memory: GuestMemory) -> Self {
        let chain = Self {
            directory: tempfile::tempdir().unwrap(),
            memory,
        };
        write(&chain.memory, &chain.path("base")).unwrap();
        chain
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn id(&self, name: &str) -> SnapshotId {
        let path = self.path(name).join(MANIFEST);
        Manifest::unseal(&std::fs::read(&path).unwrap(), &path)
            .unwrap()
            .id
    }

    /// Writes those values to those addresses, and a difference to `base` with their pages.
    fn restore_and_save(&self, base: &str, name: &str, writes: &[(u64, u8)]) {
        let mut changed = PageSet::of(&self.memory).unwrap();
        for (gpa, value) in writes {
            self.memory.write_obj(*value, GuestAddress(*gpa)).unwrap();
            changed.insert_gpa(*gpa).unwrap();
        }
        let content = SnapshotContent {
            base: Some(self.id(base)),
            ..content(&self.memory, &changed)
        };
        publish(content, &self.path(name)).unwrap();
    }

    fn merge(&self, base: &str, differences: &[&str]) -> Result<Manifest, SnapshotError> {
        let base = Snapshot::open(&self.path(base))?;
        let differences: Vec<_> = differences
            .iter()
            .map(|name| SnapshotDifference::open(&self.path(name)))
            .collect::<Result<_, _>>()?;
        merge(
            &base,
            &differences,
            &self.path("merged"),
            &SnapshotWatch::default(),
        )
    }
}

fn a_chain() -> SnapshotChain {
    let memory = memory::create(&RANGES, MemoryKind::Anonymous).unwrap();
    for gpa in [0, 4096, HIGH] {
        memory.write_obj(1u8, GuestAddress(gpa)).unwrap();
    }
    let chain = SnapshotChain::begin(memory);
    // A page that becomes zero, one that is new, one that has changed.
    chain.restore_and_save("base", "first", &[(0, 0), (8192, 7), (HIGH, 2)]);
    chain.restore_and_save("first", "second", &[(HIGH, 3)]);
    chain
}

#[test]
fn differences_go_on_top_of_what_they_are_to_and_nothing_else() {
    let chain = a_chain();
    for (base, differences, expected) in [
        ("base", &["second"][..], "before it"),
        ("base", &["second", "first"], "before it"),
        ("base", &["first", "first"], "before it"),
        ("first", &["second"], "expected a whole snapshot"),
        ("base", &["base"], "expected a difference"),
        ("base", &[], "nothing to merge"),
    ] {
        let error = chain.merge(base, differences).unwrap_err().to_string();
        assert!(error.contains(expected), "{base} {differences:?}: {error}");
    }
    assert_eq!(names(chain.directory.path()).len(), 3);
    let merged = chain.merge("base", &["first", "second"]).unwrap();
    assert_eq!(merged.id, chain.id("second"));
    // What is a difference to the last one is one to all of them together.
    chain.restore_and_save("second", "third", &[(4096, 9)]);
    std::fs::rename(chain.path("merged"), chain.path("whole")).unwrap();
    chain.merge("whole", &["third"]).unwrap();
    let read = Snapshot::open(&chain.path("merged")).unwrap();
    let read = read
        .read(MemoryKind::Anonymous, &SnapshotWatch::default())
        .unwrap();
    assert_eq!(
        migration_io::digest(&read).unwrap(),
        migration_io::digest(&chain.memory).unwrap()
    );
}

#[test]
fn damage_to_a_difference_is_found() {
    for (file, at) in [
        (MEMORY, 8192),
        (MEMORY, 0),
        (CHANGED, 3),
        ("state", 1),
        ("checksums", 5),
    ] {
        let chain = a_chain();
        let path = chain.path("first").join(file);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let error = chain.merge("base", &["first"]).unwrap_err().to_string();
        assert!(error.contains("damaged"), "{file} {at}: {error}");
        assert!(!chain.path("merged").exists());
    }
}

/// Runs that cannot be, under a seal that is right.
#[test]
fn changed_pages_that_cannot_be_are_refused() {
    for run in [
        &[HIGH + (3 << 12), 4096][..],
        &[0, 0],
        &[0, u64::MAX],
        &[u64::MAX, 2],
        &[0, (2 << 20) + (71 << 12)],
        // A page twice: with enough of them to read them would never end.
        &[0, 8192, 4096, 4096],
    ] {
        let chain = a_chain();
        let changed: Vec<u8> = run.iter().flat_map(|number| number.to_le_bytes()).collect();
        let path = chain.path("first");
        let text = std::fs::read(path.join(MANIFEST)).unwrap();
        let mut manifest = Manifest::unseal(&text, Path::new("m")).unwrap();
        manifest.difference.as_mut().unwrap().changed = FileRecord::of(&changed);
        std::fs::write(path.join(MANIFEST), manifest.seal().unwrap()).unwrap();
        std::fs::write(path.join(CHANGED), changed).unwrap();
        let error = SnapshotDifference::open(&path).unwrap_err();
        let refused = match run.len() {
            2 => matches!(error, SnapshotError::Regions { .. }),
            _ => matches!(error, SnapshotError::TwiceChanged(_)),
        };
        assert!(refused, "{run:?}: {error}");
    }
}

#[test]
fn a_snapshot_knows_its_age() {
    let directory = tempfile::tempdir().unwrap();
    let memory = memory::create(&RANGES, MemoryKind::Anonymous).unwrap();
    let pages = PageSet::of(&memory).unwrap();
    let age = |name: &str, stopped| {
        let content = SnapshotContent {
            stopped,
            ..content(&memory, &pages)
        };
        publish(content, &directory.path().join(name)).unwrap();
        Snapshot::open(&directory.path().join(name)).unwrap().age()
    };
    let hour = Duration::from_secs(3600);
    let found = age("old", SystemTime::now() - hour);
    assert!(found >= hour && found < 2 * hour, "{found:?}");
    assert_eq!(age("from the future", SystemTime::now() + hour), Duration::ZERO);
}

/// Nonsense under a seal that is right.
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
        manifest.difference = None;
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
        let memory = memory::create(&RANGES, MemoryKind::Anonymous).unwrap();
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
        let read = snapshot.read(MemoryKind::Anonymous, &SnapshotWatch::default()).unwrap();
        prop_assert_eq!(migration_io::digest(&read).unwrap(), digest);
        // And again from what was mapped.
        let second = write(&mapped, &directory.path().join("again")).unwrap();
        prop_assert_eq!((second.pages, second.checksums), (manifest.pages, manifest.checksums));
    }

    #[test]
    fn a_base_and_its_differences_are_the_memory_that_they_came_from(
        written in prop::collection::vec(
            prop::collection::vec((0usize..2, 0u64..(2 << 20) + (70 << 12), 0u8..3), 0..100), 2..4),
    ) {
        let writes: Vec<Vec<(u64, u8)>> = written
            .into_iter()
            .map(|writes| {
                let gpa = |region: usize, at| RANGES[region].0 + at % RANGES[region].1;
                writes.into_iter().map(|(region, at, value)| (gpa(region, at), value)).collect()
            })
            .collect();
        let memory = memory::create(&RANGES, MemoryKind::Anonymous).unwrap();
        for (gpa, value) in &writes[0] {
            memory.write_obj(*value, GuestAddress(*gpa)).unwrap();
        }
        let chain = SnapshotChain::begin(memory);
        let mut names = vec!["base".to_owned()];
        for (number, writes) in writes[1..].iter().enumerate() {
            let name = number.to_string();
            chain.restore_and_save(&names[number], &name, writes);
            names.push(name);
        }
        let differences: Vec<&str> = names[1..].iter().map(String::as_str).collect();
        let merged = chain.merge("base", &differences).unwrap();
        let whole = write(&chain.memory, &chain.path("whole")).unwrap();
        prop_assert_eq!((merged.pages, merged.checksums), (whole.pages, whole.checksums));
        let mapped = Snapshot::open(&chain.path("merged")).unwrap().map().unwrap();
        prop_assert_eq!(migration_io::digest(&mapped).unwrap(), migration_io::digest(&chain.memory).unwrap());
    }

    #[test]
    fn any_damage_to_memory_is_found(at in 0u64..(2 << 20) + (73 << 12), bit in 0u32..8) {
        use std::os::unix::fs::FileExt;
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("saved");
        let memory = memory::create(&RANGES, MemoryKind::Anonymous).unwrap();
        memory.write_slice(&[1; 8192], GuestAddress(0x1000)).unwrap();
        write(&memory, &target).unwrap();
        let file = std::fs::OpenOptions::new().read(true).write(true).open(target.join("memory")).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1 << bit], at).unwrap();
        let error = Snapshot::open(&target).unwrap().read(MemoryKind::Anonymous, &SnapshotWatch::default()).unwrap_err();
        prop_assert!(matches!(error, SnapshotError::MemoryBlock { .. }), "{error}");
    }

    #[test]
    fn nonsense_is_no_manifest(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(MANIFEST), bytes).unwrap();
        prop_assert!(Snapshot::open(directory.path()).is_err());
    }
}

/// The memory, state or pages of another user, of just the right length, are not this snapshot's.
#[test]
fn links_are_not_followed() {
    let open = |path: &Path, is_difference: bool| match is_difference {
        true => SnapshotDifference::open(path).map(drop),
        false => Snapshot::open(path).and_then(|snapshot| snapshot.map()).map(drop),
    };
    for (name, files) in [
        ("base", &[MANIFEST, super::STATE, super::CHECKSUMS, MEMORY][..]),
        ("first", &[MANIFEST, super::STATE, super::CHECKSUMS, CHANGED]),
    ] {
        for file in files {
            let chain = a_chain();
            let (path, elsewhere) = (chain.path(name).join(file), chain.path("elsewhere"));
            let is_difference = name != "base";
            open(&chain.path(name), is_difference).unwrap();
            std::fs::rename(&path, &elsewhere).unwrap();
            std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
            let error = open(&chain.path(name), is_difference).unwrap_err();
            assert!(
                matches!(&error, SnapshotError::NoFile(at) if *at == path),
                "{file}: {error}"
            );
        }
    }
    // The directory may be one: it is what the operator names.
    let chain = a_chain();
    std::os::unix::fs::symlink(chain.path("base"), chain.path("current")).unwrap();
    open(&chain.path("current"), false).unwrap();
}

#[test]
fn what_was_opened_is_what_is_read() {
    let chain = a_chain();
    let snapshot = Snapshot::open(&chain.path("base")).unwrap();
    let digest = migration_io::digest(&snapshot.map().unwrap()).unwrap();
    let path = chain.path("base").join(MEMORY);
    let len = path.metadata().unwrap().len();
    std::fs::rename(&path, chain.path("elsewhere")).unwrap();
    std::fs::File::create(&path).unwrap().set_len(len).unwrap();
    assert_eq!(migration_io::digest(&snapshot.map().unwrap()).unwrap(), digest);
}
