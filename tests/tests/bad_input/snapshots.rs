//! Snapshots that are not as they were written.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};
use tests::{BareGuest, TestHost};

use super::{FAILED, check};

/// What happens to a file.
#[derive(Clone, Copy, Debug)]
enum Damage {
    Missing,
    Shorter,
    Longer,
    Empty,
    /// A bit of the byte at this offset, counted from the end if it is negative.
    Bit(i64),
    /// Its content.
    Is(&'static [u8]),
}

impl Damage {
    fn apply(self, path: &Path) -> Result<()> {
        let len = path.metadata()?.len();
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        match self {
            Damage::Missing => std::fs::remove_file(path)?,
            Damage::Shorter => file.set_len(len - 1)?,
            Damage::Longer => file.set_len(len + 4096)?,
            Damage::Empty => file.set_len(0)?,
            Damage::Bit(at) => {
                let at = if at < 0 { len as i64 + at } else { at } as u64;
                let mut byte = [0];
                file.read_exact_at(&mut byte, at)?;
                file.write_all_at(&[byte[0] ^ 4], at)?;
            }
            Damage::Is(content) => std::fs::write(path, content)?,
        }
        Ok(())
    }
}

#[test]
fn damaged_snapshots() -> Result<()> {
    let host = TestHost::new()?;
    let guest = BareGuest {
        memory_mib: 16,
        workset: "4M",
        ..Default::default()
    };
    let mut vm = guest.boot(&host, "vm-0", &[])?;
    let whole = host.path("whole");
    let path = whole.display().to_string();
    vm.godwit("snapshot", &[&path])?.expect_code(0)?;
    vm.wait_success(tests::PATIENCE)?;
    let newer = br#"{"format":4,"of":"the future"}"#;
    for (file, damage, words) in [
        ("manifest.json", Damage::Missing, &["No such file"][..]),
        (
            "manifest.json",
            Damage::Empty,
            &["expected a snapshot's manifest"],
        ),
        ("manifest.json", Damage::Bit(-40), &["manifest.json", "expected"]),
        (
            "manifest.json",
            Damage::Is(newer),
            &["expected a snapshot of format 3", "got format 4"],
        ),
        (
            "manifest.json",
            Damage::Is(b"{}"),
            &["expected a snapshot's manifest"],
        ),
        ("state", Damage::Missing, &["No such file"]),
        ("state", Damage::Shorter, &["expected", "bytes, got"]),
        ("state", Damage::Longer, &["expected", "bytes, got"]),
        ("state", Damage::Bit(1000), &["expected checksum", "damaged"]),
        ("checksums", Damage::Missing, &["No such file"]),
        ("checksums", Damage::Empty, &["expected", "bytes, got 0"]),
        ("checksums", Damage::Bit(0), &["expected checksum", "damaged"]),
        ("memory", Damage::Missing, &["No such file"]),
        (
            "memory",
            Damage::Shorter,
            &["expected 16777216 bytes", "got 16777215"],
        ),
        (
            "memory",
            Damage::Longer,
            &["expected 16777216 bytes", "got 16781312"],
        ),
        // Its first page with content is the kernel's.
        (
            "memory",
            Damage::Bit(0x10_0000),
            &["expected checksum", "at 0", "damaged"],
        ),
    ] {
        let copy = host.path("copy");
        copy_directory(&whole, &copy)?;
        damage.apply(&copy.join(file))?;
        let finished = host.godwit(["restore", &copy.display().to_string(), "--preload"])?;
        check(&host, &finished, FAILED, &[&[file], words].concat())
            .with_context(|| format!("{file}: {damage:?}"))?;
        std::fs::remove_dir_all(&copy)?;
    }
    // The base itself was never touched.
    let restored = host.restore(&whole, &["--resume", "--preload"])?;
    restored.check_running().map(drop)
}

fn copy_directory(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        std::fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}
