//! A writer of initramfs archives: cpio in the "newc" format (Linux, Documentation/driver-api/early-userspace).

use std::collections::BTreeSet;

/// Something that the format cannot hold.
#[derive(Debug, thiserror::Error)]
pub enum CpioError {
    /// A file of 4 GiB or more.
    #[error("{path}: {len} bytes, more than an initramfs file can have (4294967295)")]
    TooLarge {
        /// Path in the archive.
        path: String,
        /// Its length.
        len: usize,
    },
}

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

/// An archive under construction. Paths are relative, without a leading `/`; the folders above a path are made
/// as needed. Equal input gives equal bytes: no times, no owners but root.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    folders: BTreeSet<String>,
    next_inode: u32,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a folder and those above it.
    pub fn folder(&mut self, path: &str) -> Result<(), CpioError> {
        self.parents(path)?;
        if self.folders.insert(path.to_owned()) {
            self.entry(path, DIRECTORY | 0o755, (0, 0), &[])?;
        }
        Ok(())
    }

    /// Adds a file with permission bits `mode`.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<(), CpioError> {
        self.parents(path)?;
        self.entry(path, REGULAR | mode, (0, 0), content)
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, to: &str) -> Result<(), CpioError> {
        self.parents(path)?;
        self.entry(path, SYMLINK | 0o777, (0, 0), to.as_bytes())
    }

    /// Adds a character device.
    pub fn character_device(&mut self, path: &str, major: u32, minor: u32) -> Result<(), CpioError> {
        self.parents(path)?;
        self.entry(path, CHARACTER | 0o600, (major, minor), &[])
    }

    /// Ends the archive.
    pub fn finish(mut self) -> Result<Vec<u8>, CpioError> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        Ok(self.bytes)
    }

    fn parents(&mut self, path: &str) -> Result<(), CpioError> {
        match path.rsplit_once('/') {
            Some((parent, _)) => self.folder(parent),
            None => Ok(()),
        }
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) -> Result<(), CpioError> {
        let len = u32::try_from(content.len()).map_err(|_| CpioError::TooLarge {
            path: path.to_owned(),
            len: content.len(),
        })?;
        self.next_inode += 1;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        // Inode, mode, uid, gid, links, mtime, size, device of the file system, device, name with its zero, no checksum.
        let name = path.len() as u32 + 1;
        let fields = [
            self.next_inode,
            mode,
            0,
            0,
            links,
            0,
            len,
            0,
            0,
            device.0,
            device.1,
            name,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
        Ok(())
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (name, mode, content) of each entry, read back by the format's rules.
    fn read(bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        let mut at = 0;
        loop {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let field = |n: usize| {
                let from = at + 6 + n * 8;
                u32::from_str_radix(std::str::from_utf8(&bytes[from..from + 8]).unwrap(), 16).unwrap()
            };
            let (mode, len, name_len) = (field(1), field(6) as usize, field(11) as usize);
            let name = String::from_utf8(bytes[at + 110..at + 110 + name_len - 1].to_vec()).unwrap();
            let content = (at + 110 + name_len).next_multiple_of(4);
            if name == "TRAILER!!!" {
                return entries;
            }
            entries.push((name, mode, bytes[content..content + len].to_vec()));
            at = (content + len).next_multiple_of(4);
        }
    }

    #[test]
    fn what_goes_in_comes_out_with_its_folders() {
        let mut archive = Archive::new();
        archive.file("bin/tool", 0o755, b"12345").unwrap();
        archive.symlink("bin/sh", "tool").unwrap();
        archive.character_device("dev/console", 5, 1).unwrap();
        archive.folder("bin").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 512, 0);
        let expected = [
            ("bin", 0o040_755, &b""[..]),
            ("bin/tool", 0o100_755, b"12345"),
            ("bin/sh", 0o120_777, b"tool"),
            ("dev", 0o040_755, b""),
            ("dev/console", 0o020_600, b""),
        ];
        let expected: Vec<_> = expected
            .iter()
            .map(|(n, m, c)| ((*n).to_owned(), *m, c.to_vec()))
            .collect();
        assert_eq!(read(&bytes), expected);
    }

    #[test]
    fn nested_folders_come_before_their_files() {
        let mut archive = Archive::new();
        archive.file("a/b/c", 0o644, &[7; 1001]).unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(
            read(&bytes).iter().map(|e| e.0.as_str()).collect::<Vec<_>>(),
            ["a", "a/b", "a/b/c"]
        );
    }
}
