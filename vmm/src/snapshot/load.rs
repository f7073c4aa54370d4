//! A snapshot that a machine starts from. All of it is untrusted.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use devices::GuestMemory;
use migration::{MachineDescription, PageSet};

use super::blocks;
use super::manifest::{FileRecord, check_len};
use super::{CHECKSUMS, MANIFEST, MEMORY, Manifest, STATE, SnapshotError, Watch};
use crate::memory;

/// Most bytes of a file that is read as a whole: many times what the largest machine has.
const MOST_BYTES: u64 = 64 << 20;

/// A snapshot whose small files were read and found to be whole.
#[derive(Debug)]
pub struct Snapshot {
    manifest: Manifest,
    state: Vec<u8>,
    checksums: Vec<u64>,
    memory: File,
    memory_path: PathBuf,
}

impl Snapshot {
    /// Opens the snapshot in `directory`. What its memory holds is not looked at, only how much of it there is.
    pub fn open(directory: &Path) -> Result<Self, SnapshotError> {
        let path = directory.join(MANIFEST);
        let manifest = Manifest::unseal(&read_file(&path)?, &path)?;
        let regions = &manifest.machine.memory;
        PageSet::check_regions(regions).map_err(|source| SnapshotError::Regions {
            path: path.clone(),
            source,
        })?;
        let state = read_checked(&directory.join(STATE), &manifest.state)?;
        let path = directory.join(CHECKSUMS);
        let bytes = read_checked(&path, &manifest.checksums)?;
        check_len(
            &path,
            blocks::count(regions).saturating_mul(8),
            bytes.len() as u64,
        )?;
        let (checksums, _) = bytes.as_chunks();
        let checksums = checksums.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
        let memory_path = directory.join(MEMORY);
        let memory = open(&memory_path)?;
        let metadata = memory.metadata().map_err(SnapshotError::io(&memory_path))?;
        // More than there can be is no file's length.
        let expected = blocks::file_len(regions).unwrap_or(u64::MAX);
        check_len(&memory_path, expected, metadata.len())?;
        Ok(Self {
            manifest,
            state,
            checksums,
            memory,
            memory_path,
        })
    }

    /// What the machine is.
    pub fn machine(&self) -> &MachineDescription {
        &self.manifest.machine
    }

    /// The machine's saved state.
    pub fn state(&self) -> &[u8] {
        &self.state
    }

    /// Memory whose pages come from the file when they are needed, and are the machine's own once it writes to
    /// them. Nothing is read yet, nothing compared with checksums, and the file must stay as it is.
    pub fn map(&self) -> Result<GuestMemory, SnapshotError> {
        Ok(memory::map_private(&self.ranges(), &self.memory)?)
    }

    /// Memory that is read as a whole, and compared with its checksums.
    pub fn read(&self, watch: &Watch) -> Result<GuestMemory, SnapshotError> {
        let memory = memory::create(&self.ranges(), self.machine().shared_memory)?;
        blocks::read(&memory, &self.memory, &self.memory_path, &self.checksums, watch)?;
        Ok(memory)
    }

    fn ranges(&self) -> Vec<(u64, u64)> {
        self.machine()
            .memory
            .iter()
            .map(|region| (region.gpa, region.len))
            .collect()
    }
}

fn read_checked(path: &Path, record: &FileRecord) -> Result<Vec<u8>, SnapshotError> {
    let bytes = read_file(path)?;
    record.check(&bytes, path)?;
    Ok(bytes)
}

fn read_file(path: &Path) -> Result<Vec<u8>, SnapshotError> {
    let mut bytes = Vec::new();
    open(path)?
        .take(MOST_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(SnapshotError::io(path))?;
    if bytes.len() as u64 > MOST_BYTES {
        let got = bytes.len() as u64;
        return Err(SnapshotError::TooLong {
            path: path.into(),
            most: MOST_BYTES,
            got,
        });
    }
    Ok(bytes)
}

/// A regular file; nothing else is waited for, or even touched more than it takes to find out.
fn open(path: &Path) -> Result<File, SnapshotError> {
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(SnapshotError::io(path))?;
    if file.metadata().map_err(SnapshotError::io(path))?.is_file() {
        return Ok(file);
    }
    Err(SnapshotError::NoFile(path.into()))
}
