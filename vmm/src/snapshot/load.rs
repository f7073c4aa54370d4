//! A snapshot that a machine starts from. All of it is untrusted.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, SystemTime};

use devices::GuestMemory;
use migration::{MachineDescription, MemoryKind, MemoryRange, PageSet};

use super::blocks;
use super::directory::SnapshotDirectory;
use super::manifest::{FileRecord, check_len};
use super::{
    CHANGED, CHECKSUMS, MANIFEST, MEMORY, Manifest, Prefetch, STATE, SnapshotError, SnapshotId, SnapshotWatch,
};
use crate::memory;

/// Bytes of a run of changed pages: its first byte and its length.
const RUN: usize = 16;

/// The most bytes of a file that is read as a whole: many times what the largest machine needs.
const MAX_BYTES: u64 = 64 << 20;

/// A whole snapshot, whose small files were read and found to be undamaged.
#[derive(Debug)]
pub struct Snapshot(SnapshotFiles);

/// A snapshot that is a difference to another one.
#[derive(Debug)]
pub struct SnapshotDifference {
    files: SnapshotFiles,
    base: SnapshotId,
    changed: PageSet,
}

impl Snapshot {
    /// Opens the snapshot in `directory`. The file with its memory need not be there, and is not read.
    pub fn open(directory: &Path) -> Result<Self, SnapshotError> {
        let files = SnapshotFiles::open(directory)?;
        match &files.manifest.difference {
            None => Ok(Self(files)),
            Some(difference) => Err(SnapshotError::IsDifference {
                path: directory.into(),
                base: difference.base.clone(),
            }),
        }
    }

    /// The snapshot's own name.
    pub fn id(&self) -> &SnapshotId {
        &self.0.manifest.id
    }

    /// What the machine is.
    pub fn machine(&self) -> &MachineDescription {
        &self.0.manifest.machine
    }

    /// The machine's saved state.
    pub fn state(&self) -> &[u8] {
        &self.0.state
    }

    /// How long ago, by this host's wall clock, the guest came to stand still. Zero if by that clock it is still to come.
    pub fn age(&self) -> Duration {
        self.0.stopped().elapsed().unwrap_or_default()
    }

    /// Memory whose pages come from the file when they are needed, and are the machine's own once it writes to
    /// them. Nothing is read yet, nothing compared with checksums, and the file must stay as it is.
    pub fn map(&self) -> Result<GuestMemory, SnapshotError> {
        if self.machine().memory_kind == MemoryKind::HugePages {
            return Err(SnapshotError::HugePages);
        }
        let file = self.0.memory()?;
        Ok(memory::map_private(&self.0.ranges(), &file)?)
    }

    /// Memory that is filled later: by a page-fault handler, which does not need the file, or from it.
    pub fn without_pages(&self) -> Result<GuestMemory, SnapshotError> {
        Ok(memory::create(&self.0.ranges(), self.machine().memory_kind)?)
    }

    /// Memory that is read while the machine runs already, and compared with its checksums; see [`Prefetch`]. `on_failed`
    /// gets the reason if that cannot go on. Not for memory that other processes share.
    pub fn prefetch(
        &self,
        on_failed: impl FnOnce(String) + Send + 'static,
    ) -> Result<(GuestMemory, Prefetch), SnapshotError> {
        let memory = self.without_pages()?;
        let path = self.0.directory.path_of(MEMORY);
        let checksums = self.0.checksums.clone();
        let prefetch = Prefetch::start(&memory, self.0.memory()?, path, checksums, on_failed)?;
        Ok((memory, prefetch))
    }

    /// Memory of that kind which is read as a whole, and compared with its checksums.
    pub fn read(&self, kind: MemoryKind, watch: &SnapshotWatch) -> Result<GuestMemory, SnapshotError> {
        let memory = memory::create(&self.0.ranges(), kind)?;
        self.0.read(&memory, None, watch)?;
        Ok(memory)
    }
}

impl SnapshotDifference {
    /// Opens the difference in `directory`, as [`Snapshot::open`] does.
    pub fn open(directory: &Path) -> Result<Self, SnapshotError> {
        let files = SnapshotFiles::open(directory)?;
        let Some(difference) = files.manifest.difference.clone() else {
            return Err(SnapshotError::IsWhole(directory.into()));
        };
        let path = files.directory.path_of(CHANGED);
        let bytes = read_checked(files.file(&files.changed, CHANGED)?, &path, &difference.changed)?;
        let (runs, rest) = bytes.as_chunks::<RUN>();
        check_len(
            &path,
            (runs.len() * RUN) as u64,
            (runs.len() * RUN + rest.len()) as u64,
        )?;
        let regions = |source| SnapshotError::Regions {
            path: path.clone(),
            source,
        };
        let mut changed = PageSet::new(&files.manifest.machine.memory).map_err(regions)?;
        for run in runs {
            let number = |at: usize| {
                run[at..]
                    .first_chunk()
                    .map_or(0, |bytes| u64::from_le_bytes(*bytes))
            };
            let range = MemoryRange {
                gpa: number(0),
                len: number(8),
            };
            // Each page once, so that all of them together are no more work than memory has pages.
            if !changed.insert_new(range).map_err(regions)? {
                return Err(SnapshotError::TwiceChanged(path));
            }
        }
        Ok(Self {
            base: difference.base,
            files,
            changed,
        })
    }

    /// What it is a difference to.
    pub(super) fn base(&self) -> &SnapshotId {
        &self.base
    }

    pub(super) fn files(&self) -> &SnapshotFiles {
        &self.files
    }

    /// Makes `memory`, which is as in the base, what it is here. Compares what is read with its checksums.
    pub(super) fn apply(&self, memory: &GuestMemory, watch: &SnapshotWatch) -> Result<(), SnapshotError> {
        self.files.read(memory, Some(&self.changed), watch)
    }
}

/// The files of a snapshot, whether it is whole or a difference.
#[derive(Debug)]
pub(super) struct SnapshotFiles {
    directory: SnapshotDirectory,
    pub(super) manifest: Manifest,
    pub(super) state: Vec<u8>,
    checksums: Vec<u64>,
    /// The files that not every use needs, if they exist.
    memory: Option<File>,
    changed: Option<File>,
}

impl SnapshotFiles {
    fn open(directory: &Path) -> Result<Self, SnapshotError> {
        let directory = SnapshotDirectory::open(directory)?;
        // All at once: what a directory has may change while they are read.
        let [manifest, state, checksums] = [MANIFEST, STATE, CHECKSUMS].map(|name| directory.file(name));
        let [memory, changed] = [MEMORY, CHANGED].map(|name| directory.file(name).ok());

        let path = directory.path_of(MANIFEST);
        let manifest = Manifest::unseal(&read_file(manifest?, &path)?, &path)?;
        let regions = &manifest.machine.memory;
        PageSet::check_regions(regions).map_err(|source| SnapshotError::Regions {
            path: path.clone(),
            source,
        })?;
        let state = read_checked(state?, &directory.path_of(STATE), &manifest.state)?;
        let path = directory.path_of(CHECKSUMS);
        let bytes = read_checked(checksums?, &path, &manifest.checksums)?;
        check_len(
            &path,
            blocks::count(regions).saturating_mul(8),
            bytes.len() as u64,
        )?;
        let (checksums, _) = bytes.as_chunks();
        let checksums = checksums.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
        Ok(Self {
            directory,
            manifest,
            state,
            checksums,
            memory,
            changed,
        })
    }

    /// Where they are.
    pub(super) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A file that was opened; if it was not there, the reason.
    fn file(&self, opened: &Option<File>, name: &str) -> Result<File, SnapshotError> {
        match opened {
            Some(file) => file
                .try_clone()
                .map_err(SnapshotError::io(&self.directory.path_of(name))),
            None => self.directory.file(name),
        }
    }

    /// The file with the memory, if it has as much of it as the machine.
    fn memory(&self) -> Result<File, SnapshotError> {
        let path = self.directory.path_of(MEMORY);
        let memory = self.file(&self.memory, MEMORY)?;
        let metadata = memory.metadata().map_err(SnapshotError::io(&path))?;
        // More than there can be is no file's length.
        let expected = blocks::file_len(&self.manifest.machine.memory).unwrap_or(u64::MAX);
        check_len(&path, expected, metadata.len())?;
        Ok(memory)
    }

    pub(super) fn stopped(&self) -> SystemTime {
        // 2^64 nanoseconds are 584 years.
        SystemTime::UNIX_EPOCH + Duration::from_nanos(self.manifest.stopped_unix_ns)
    }

    fn read(
        &self,
        memory: &GuestMemory,
        changed: Option<&PageSet>,
        watch: &SnapshotWatch,
    ) -> Result<(), SnapshotError> {
        let path = self.directory.path_of(MEMORY);
        blocks::read(memory, &self.memory()?, &path, changed, &self.checksums, watch)
    }

    fn ranges(&self) -> Vec<(u64, u64)> {
        let regions = &self.manifest.machine.memory;
        regions.iter().map(|region| (region.gpa, region.len)).collect()
    }
}

fn read_checked(file: File, path: &Path, record: &FileRecord) -> Result<Vec<u8>, SnapshotError> {
    let bytes = read_file(file, path)?;
    record.check(&bytes, path)?;
    Ok(bytes)
}

fn read_file(file: File, path: &Path) -> Result<Vec<u8>, SnapshotError> {
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(SnapshotError::io(path))?;
    if bytes.len() as u64 > MAX_BYTES {
        let got = bytes.len() as u64;
        return Err(SnapshotError::TooLong {
            path: path.into(),
            most: MAX_BYTES,
            got,
        });
    }
    Ok(bytes)
}
