//! Artifacts by the content of what they are made from.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};

use crate::workspace::print_status;

/// A digest of everything that an artifact depends on.
pub(super) struct Key(Sha256);

impl Key {
    /// Starts from a name for the way of making it; change it when the way changes.
    pub(super) fn new(recipe: &str) -> Self {
        Self(Sha256::new()).text(recipe)
    }

    /// Adds a text.
    pub(super) fn text(mut self, text: impl AsRef<str>) -> Self {
        self.add(text.as_ref().as_bytes());
        self
    }

    /// Adds a file, or all files below a folder, with their names.
    pub(super) fn path(mut self, path: &Path) -> Result<Self> {
        if path.is_dir() {
            let entries = fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))?;
            let mut entries = entries.collect::<Result<Vec<_>, _>>()?;
            entries.sort_by_key(|entry| entry.file_name());
            for entry in entries.into_iter().filter(|entry| entry.file_name() != "target") {
                self = self.path(&entry.path())?;
            }
            return Ok(self);
        }
        let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        self.add(path.to_string_lossy().as_bytes());
        self.add(&content);
        Ok(self)
    }

    fn add(&mut self, bytes: &[u8]) {
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    fn hex(&self) -> String {
        self.0
            .clone()
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

/// The folder of artifacts, locked against other runs while this lives.
pub(super) struct ArtifactCache {
    target: PathBuf,
    _lock: File,
}

impl ArtifactCache {
    /// Opens the folder; waits until no other run builds in it.
    pub(super) fn open(target: &Path) -> Result<Self> {
        let stamps = target.join("cache/stamps");
        fs::create_dir_all(&stamps).with_context(|| format!("cannot create {}", stamps.display()))?;
        let lock =
            File::create(target.join("cache/lock")).context("cannot create the lock of target/guests")?;
        flock(&lock, FlockOperation::LockExclusive).context("cannot lock target/guests")?;
        Ok(Self {
            target: target.to_path_buf(),
            _lock: lock,
        })
    }

    /// Where an artifact is.
    pub(super) fn path(&self, artifact: &str) -> PathBuf {
        self.target.join(artifact)
    }

    /// Calls `make` unless it was done before with the same key and all that it made is there.
    pub(super) fn make(
        &self,
        name: &str,
        key: &Key,
        makes: &[&str],
        make: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let stamp = self.target.join("cache/stamps").join(name);
        let key = key.hex();
        let there = makes.iter().all(|artifact| self.path(artifact).is_file());
        if there && fs::read_to_string(&stamp).is_ok_and(|made| made == key) {
            return Ok(());
        }
        print_status(format_args!("making {name}"));
        // A failure half-way must not leave the old stamp beside new files.
        let _ = fs::remove_file(&stamp);
        make().with_context(|| format!("cannot make {name}"))?;
        if let Some(missing) = makes.iter().find(|artifact| !self.path(artifact).is_file()) {
            bail!("{name} was made but {missing} is not there");
        }
        fs::write(&stamp, key).with_context(|| format!("cannot write {}", stamp.display()))
    }

    /// Writes an artifact in one step: a reader sees the old or the new one.
    pub(super) fn write(&self, artifact: &str, content: &[u8]) -> Result<()> {
        let path = self.path(artifact);
        let folder = path.parent().context("an artifact has a folder")?;
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let part = path.with_extension("part");
        fs::write(&part, content).with_context(|| format!("cannot write {}", part.display()))?;
        fs::rename(&part, &path).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Copies a file to an artifact, with its permissions.
    pub(super) fn copy(&self, from: &Path, artifact: &str) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.write(artifact, &content)?;
        fs::set_permissions(self.path(artifact), fs::metadata(from)?.permissions())?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_keys_make_once() {
        let folder = tempfile::tempdir().unwrap();
        let cache = ArtifactCache::open(folder.path()).unwrap();
        let made = std::cell::Cell::new(0);
        let make = |key: &Key| {
            cache.make("thing", key, &["thing/file"], || {
                made.set(made.get() + 1);
                cache.write("thing/file", b"content")
            })
        };
        make(&Key::new("a").text("b")).unwrap();
        make(&Key::new("a").text("b")).unwrap();
        assert_eq!(made.get(), 1);
        make(&Key::new("ab").text("")).unwrap();
        assert_eq!(made.get(), 2);
        fs::remove_file(cache.path("thing/file")).unwrap();
        make(&Key::new("ab").text("")).unwrap();
        assert_eq!(made.get(), 3);
    }

    #[test]
    fn a_failure_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let cache = ArtifactCache::open(folder.path()).unwrap();
        let key = Key::new("a");
        cache
            .make("thing", &key, &["file"], || cache.write("file", b""))
            .unwrap();
        cache
            .make("thing", &Key::new("b"), &["file"], || bail!("half-way"))
            .unwrap_err();
        let mut again = false;
        cache
            .make("thing", &key, &["file"], || {
                again = true;
                Ok(())
            })
            .unwrap();
        assert!(again);
    }

    #[test]
    fn a_folder_counts_with_names_and_content() {
        let folder = tempfile::tempdir().unwrap();
        let key = || Key::new("").path(folder.path()).unwrap().hex();
        fs::write(folder.path().join("a"), "1").unwrap();
        let first = key();
        fs::write(folder.path().join("a"), "2").unwrap();
        let second = key();
        fs::rename(folder.path().join("a"), folder.path().join("b")).unwrap();
        let third = key();
        assert_ne!(first, second);
        assert_ne!(second, third);
        fs::create_dir(folder.path().join("target")).unwrap();
        fs::write(folder.path().join("target/x"), "built").unwrap();
        assert_eq!(key(), third);
    }
}
