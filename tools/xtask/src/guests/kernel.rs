//! Debian's kernel package: its image as it is and as the ELF file inside, its modules.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

use super::cache::{ArtifactCache, Key};
use super::modules::{self, Module};
use crate::packages::Unpacked;

/// An unpacked kernel package.
pub(super) struct Kernel {
    package: Unpacked,
    /// What `uname -r` prints.
    release: String,
}

impl Kernel {
    /// Finds the one kernel in the package.
    pub(super) fn of(package: &Unpacked) -> Result<Self> {
        let folder = package.root.join("lib/modules");
        let entries = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
        let mut names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let release = names
            .next()
            .with_context(|| format!("{} is empty", folder.display()))?;
        Ok(Self {
            package: package.clone(),
            release,
        })
    }

    /// Version of the package, for keys.
    pub(super) fn version(&self) -> &str {
        &self.package.version
    }

    /// The bzImage.
    pub(super) fn vmlinuz(&self) -> PathBuf {
        self.package.root.join(format!("boot/vmlinuz-{}", self.release))
    }

    /// The named modules and what they need, in an order of loading.
    pub(super) fn modules(&self, names: &[&str]) -> Result<Vec<Module>> {
        modules::closure(&self.package.root.join("lib/modules").join(&self.release), names)
    }

    /// Makes `stock/vmlinuz` and `stock/vmlinux`.
    pub(super) fn build(&self, cache: &ArtifactCache) -> Result<()> {
        let key = Key::new("kernel 1").text(self.version());
        cache.make("kernel", &key, &["stock/vmlinuz", "stock/vmlinux"], || {
            let image =
                fs::read(self.vmlinuz()).with_context(|| format!("cannot read {:?}", self.vmlinuz()))?;
            cache.write("stock/vmlinux", &vmlinux(&image)?)?;
            cache.write("stock/vmlinuz", &image)
        })
    }
}

/// LZ4's legacy frame (lz4_Frame_format.md): magic, then blocks with a length, each of at most 8 MiB.
const LZ4_LEGACY: u32 = 0x184c_2102;
const LZ4_BLOCK: usize = 8 << 20;
/// Larger than any kernel, so that a hostile length cannot ask for more memory.
const LARGEST_KERNEL: usize = 1 << 30;

/// The ELF kernel in a bzImage (Linux, Documentation/x86/boot.rst: setup_sects, payload_offset, payload_length).
fn vmlinux(image: &[u8]) -> Result<Vec<u8>> {
    ensure!(
        image.get(0x202..0x206) == Some(b"HdrS"),
        "expected a bzImage with a \"HdrS\" header"
    );
    let setup = match image[0x1f1] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (setup + 1) * 512 + word(image, 0x248)?;
    let payload = image
        .get(start..)
        .and_then(|rest| rest.get(..word(image, 0x24c).ok()?));
    let payload = payload.context("the bzImage is shorter than its payload")?;
    ensure!(
        word(payload, 0)? == LZ4_LEGACY as usize,
        "expected a payload compressed with LZ4 (legacy frame)"
    );
    // The kernel's build appends the length of what is inside.
    let (blocks, len) = payload.split_at(payload.len().saturating_sub(4));
    let len = word(len, 0)?;
    ensure!(
        len <= LARGEST_KERNEL,
        "the payload claims {len} bytes, more than {LARGEST_KERNEL}"
    );
    let kernel = decompress(&blocks[4..], len)?;
    ensure!(
        kernel.starts_with(b"\x7fELF"),
        "expected an ELF file in the payload"
    );
    Ok(kernel)
}

fn decompress(mut blocks: &[u8], len: usize) -> Result<Vec<u8>> {
    let mut kernel = vec![0; len];
    let mut done = 0;
    while !blocks.is_empty() {
        let size = word(blocks, 0)?;
        blocks = &blocks[4..];
        if size == LZ4_LEGACY as usize {
            continue;
        }
        let Some((block, rest)) = blocks.split_at_checked(size) else {
            bail!("an LZ4 block of {size} bytes where {} are left", blocks.len());
        };
        blocks = rest;
        let end = len.min(done + LZ4_BLOCK);
        done +=
            lz4_flex::block::decompress_into(block, &mut kernel[done..end]).context("a broken LZ4 block")?;
    }
    ensure!(done == len, "the payload holds {done} bytes, expected {len}");
    Ok(kernel)
}

/// A little-endian 32-bit word.
fn word(bytes: &[u8], at: usize) -> Result<usize> {
    let four = bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk::<4>())
        .context("the image ends too early")?;
    Ok(u32::from_le_bytes(*four) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(content: &[u8]) -> Vec<u8> {
        let mut payload = LZ4_LEGACY.to_le_bytes().to_vec();
        for chunk in content.chunks(LZ4_BLOCK) {
            let block = lz4_flex::block::compress(chunk);
            payload.extend((block.len() as u32).to_le_bytes());
            payload.extend(block);
        }
        payload.extend((content.len() as u32).to_le_bytes());
        let mut image = vec![0; 1024 + 16];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend(payload);
        image
    }

    fn elf() -> Vec<u8> {
        let mut content = b"\x7fELF".to_vec();
        content.extend((0..3_000_000u32).flat_map(|n| (n / 7).to_le_bytes()));
        content
    }

    #[test]
    fn the_kernel_comes_out_over_several_blocks() {
        assert_eq!(vmlinux(&image(&elf())).unwrap(), elf());
    }

    #[test]
    fn broken_images_are_refused() {
        let whole = image(&elf());
        for (broken, reason) in [
            (whole[..whole.len() - 1].to_vec(), "shorter than its payload"),
            (whole[..100].to_vec(), "HdrS"),
            (image(b"no elf"), "expected an ELF file"),
        ] {
            let error = vmlinux(&broken).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
