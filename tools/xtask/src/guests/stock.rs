//! The initramfs of the stock guest: busybox, modules, the agent.

use std::fs;
use std::io::Write;
use std::path::Path;

use ::lab::cpio::Archive;
use anyhow::{Context, Result};
use flate2::{Compression, GzBuilder};

use super::cache::{ArtifactCache, Key};
use super::kernel::Kernel;
use crate::packages::Unpacked;

/// Drivers of godwit's devices, and those through which the agent gets the power button.
const MODULES: [&str; 10] = [
    "virtio_mmio",
    "virtio_blk",
    "virtio_rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "virtio_net",
    "virtio_console",
    "button",
    "evdev",
    "pvpanic-mmio",
];

const INIT: &str = "guests/stock/init";

/// Makes `stock/initrd`.
pub(super) fn initrd(
    root: &Path,
    cache: &ArtifactCache,
    kernel: &Kernel,
    busybox: &Unpacked,
    agent: &Path,
) -> Result<()> {
    let key = Key::new("initrd 1")
        .text(kernel.version())
        .text(&busybox.version)
        .text(MODULES.join(" "))
        .path(&root.join(INIT))?
        .path(agent)?;
    cache.make("initrd", &key, &["stock/initrd"], || {
        let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        let mut archive = Archive::new();
        for folder in ["dev", "proc", "sys", "run", "mnt", "tmp"] {
            archive.folder(folder)?;
        }
        // The kernel opens it for the first program before anything is mounted.
        archive.character_device("dev/console", 5, 1)?;
        archive.file("bin/busybox", 0o755, &read(&super::busybox_program(busybox))?)?;
        archive.symlink("bin/sh", "busybox")?;
        archive.file("init", 0o755, &read(&root.join(INIT))?)?;
        archive.file("agent", 0o755, &read(agent)?)?;
        let mut order = String::new();
        for module in kernel.modules(&MODULES)? {
            archive.file(&format!("modules/{}", module.name), 0o644, &module.content()?)?;
            order.push_str(&format!("{}\n", module.name));
        }
        archive.file("modules/order", 0o644, order.as_bytes())?;
        let mut packed = GzBuilder::new().write(Vec::new(), Compression::default());
        packed.write_all(&archive.finish()?)?;
        cache.write("stock/initrd", &packed.finish()?)
    })
}
