//! `cargo xtask guests`: everything that runs inside virtual machines, built into `target/guests`.

mod cache;
mod kernel;
mod modules;
mod programs;
mod stock;
mod tiny;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::packages::{self, Unpacked};
use crate::workspace::{root, say};
use cache::Cache;

/// What the guests are made of, besides our own sources.
const KERNEL: &str = "linux-image-cloud-amd64";
const BUSYBOX: &str = "busybox-static";

/// Modules of an emulated host, besides what they depend on: KVM, its devices, its guests' network.
const LAB_MODULES: [&str; 9] = [
    "kvm-amd",
    "kvm-intel",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "tun",
    "bridge",
];

#[derive(clap::Args, Default)]
pub(crate) struct Options {
    /// Ask the package index for newer packages instead of using those that were unpacked before
    #[arg(long)]
    update: bool,
}

/// Builds what is not up to date and returns the folder.
///
/// `stock/{vmlinux,vmlinuz,initrd}` is a Debian guest, `tiny/{vmlinux,initrd}` a Linux guest with a kernel of our own,
/// `bare/bare` the guest without Linux, `lab/` what emulated hosts are made of: `vmlinuz`, `init`, `busybox`,
/// `modules/` with the order of loading in `modules/order`.
pub(crate) fn build(options: &Options) -> Result<PathBuf> {
    let root = root()?;
    let target = root.join("target/guests");
    let cache = Cache::open(&target)?;
    let packages = Packages::find(&target, options.update)?;
    let kernel = kernel::Kernel::of(&packages.kernel)?;

    programs::bare(&root, &cache)?;
    let agent = programs::agent(&root, &cache)?;
    programs::lab_host(&root, &cache)?;

    kernel.build(&cache)?;
    stock::initrd(&root, &cache, &kernel, &packages.busybox, &agent)?;
    tiny::kernel(&root, &cache, &packages.source)?;
    tiny::initrd(&cache, &agent)?;
    cache.make(
        "lab",
        &cache::Key::new("lab 1")
            .text(&packages.kernel.version)
            .text(&packages.busybox.version)
            .text(LAB_MODULES.join(" ")),
        &["lab/vmlinuz", "lab/busybox", "lab/modules/order"],
        || {
            cache.copy(&kernel.vmlinuz(), "lab/vmlinuz")?;
            cache.copy(&busybox(&packages.busybox), "lab/busybox")?;
            let order = kernel.modules(&LAB_MODULES)?;
            let mut names = String::new();
            for module in &order {
                names.push_str(&module.name);
                names.push('\n');
                cache.write(&format!("lab/modules/{}", module.name), &module.content()?)?;
            }
            cache.write("lab/modules/order", names.as_bytes())
        },
    )?;
    say(format_args!("guests are in {}", target.display()));
    Ok(target)
}

/// The path of the program in its unpacked package.
fn busybox(package: &Unpacked) -> PathBuf {
    package.root.join("bin/busybox")
}

/// The Debian packages that everything here comes from.
struct Packages {
    kernel: Unpacked,
    busybox: Unpacked,
    /// The kernel's source: known by its version, on the disk only while it is built.
    source: Unpacked,
}

impl Packages {
    /// Those of the last time if they are still there, else what the index offers.
    fn find(target: &Path, update: bool) -> Result<Self> {
        let record = target.join("cache/packages.json");
        if update {
            packages::update()?;
        } else if let Some(known) = Self::recorded(&record) {
            return Ok(known);
        }
        let folder = target.join("cache/packages");
        // An index older than the archive names versions that are gone.
        let found = Self::fetch(&folder).or_else(|_| {
            packages::update()?;
            Self::fetch(&folder)
        })?;
        let text = serde_json::to_vec_pretty(&[&found.kernel, &found.busybox, &found.source])?;
        std::fs::write(&record, text).with_context(|| format!("cannot write {}", record.display()))?;
        Ok(found)
    }

    fn recorded(record: &Path) -> Option<Self> {
        let known: [Unpacked; 3] = serde_json::from_slice(&std::fs::read(record).ok()?).ok()?;
        let [kernel, busybox, source] = known;
        (kernel.root.is_dir() && busybox.root.is_dir()).then_some(Self {
            kernel,
            busybox,
            source,
        })
    }

    fn fetch(folder: &Path) -> Result<Self> {
        let image = packages::candidate(KERNEL)?.dependency("linux-image-")?;
        let kernel = packages::unpack(&packages::candidate(&image)?, folder)?;
        let busybox = packages::unpack(&packages::candidate(BUSYBOX)?, folder)?;
        let source = packages::candidate(tiny::SOURCE)?.unpacked(folder);
        Ok(Self {
            kernel,
            busybox,
            source,
        })
    }
}
