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
use crate::workspace::{print_status, root};
use cache::ArtifactCache;

/// What the guests are made of, besides the sources in this workspace.
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

#[derive(clap::Args)]
pub(crate) struct GuestsOptions {
    /// Ask the package index for newer packages instead of using those that were unpacked before
    #[arg(long)]
    update: bool,
}

/// A part of `target/guests` that can be built without the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Artifact {
    /// `stock/{vmlinux,vmlinuz,initrd}`: a Debian guest.
    Stock,
    /// `tiny/{vmlinux,initrd}`: a Linux guest with a kernel that is built for it, which takes minutes.
    Tiny,
    /// `bare/bare`: the guest without Linux.
    Bare,
    /// `lab/`: what emulated hosts are made of: `vmlinuz`, `init`, `busybox`, `modules/` with the order of loading in
    /// `modules/order`.
    LabHost,
}

impl Artifact {
    /// Everything that there is.
    pub(crate) const ALL: [Self; 4] = [Self::Bare, Self::LabHost, Self::Stock, Self::Tiny];
    /// What the hosts of a lab are made of and carry.
    pub(crate) const LAB: [Self; 3] = [Self::Bare, Self::LabHost, Self::Stock];

    fn build(self, builder: &mut GuestsBuilder) -> Result<()> {
        let GuestsBuilder {
            root,
            cache,
            packages,
        } = builder;
        match self {
            Self::Stock => {
                let kernel = kernel::Kernel::of(&packages.get(DebianPackage::Kernel)?)?;
                let busybox = packages.get(DebianPackage::Busybox)?;
                kernel.build(cache)?;
                stock::initrd(root, cache, &kernel, &busybox, &programs::agent(root, cache)?)
            }
            Self::Tiny => {
                tiny::kernel(root, cache, &packages.get(DebianPackage::Source)?)?;
                tiny::initrd(cache, &programs::agent(root, cache)?)
            }
            Self::Bare => programs::bare(root, cache),
            Self::LabHost => {
                let kernel = kernel::Kernel::of(&packages.get(DebianPackage::Kernel)?)?;
                let busybox = packages.get(DebianPackage::Busybox)?;
                programs::lab_host(root, cache)?;
                lab_host(cache, &kernel, &busybox)
            }
        }
    }
}

/// What artifacts are built with.
struct GuestsBuilder {
    root: PathBuf,
    cache: ArtifactCache,
    packages: Packages,
}

/// Builds everything, as `cargo xtask guests` does; returns the folder.
pub(crate) fn build_all(options: &GuestsOptions) -> Result<PathBuf> {
    build_with(options.update, &Artifact::ALL)
}

/// Builds those artifacts that are not up to date, and returns the folder of all.
pub(crate) fn build(artifacts: &[Artifact]) -> Result<PathBuf> {
    build_with(false, artifacts)
}

fn build_with(update: bool, artifacts: &[Artifact]) -> Result<PathBuf> {
    let root = root()?;
    let target = root.join("target/guests");
    let cache = ArtifactCache::open(&target)?;
    let packages = Packages::open(&target, update)?;
    let mut builder = GuestsBuilder {
        root,
        cache,
        packages,
    };
    for artifact in artifacts {
        artifact.build(&mut builder)?;
    }
    print_status(format_args!("guests are in {}", target.display()));
    Ok(target)
}

/// Makes `lab/` but for its first program, which [`programs::lab_host`] makes.
fn lab_host(cache: &ArtifactCache, kernel: &kernel::Kernel, busybox: &Unpacked) -> Result<()> {
    let key = cache::Key::new("lab 1")
        .text(kernel.version())
        .text(&busybox.version)
        .text(LAB_MODULES.join(" "));
    let makes = ["lab/vmlinuz", "lab/busybox", "lab/modules/order"];
    cache.make("lab", &key, &makes, || {
        cache.copy(&kernel.vmlinuz(), "lab/vmlinuz")?;
        cache.copy(&busybox_program(busybox), "lab/busybox")?;
        let order = kernel.modules(&LAB_MODULES)?;
        let mut names = String::new();
        for module in &order {
            names.push_str(&module.name);
            names.push('\n');
            cache.write(&format!("lab/modules/{}", module.name), &module.content()?)?;
        }
        cache.write("lab/modules/order", names.as_bytes())
    })
}

/// The path of the program in its unpacked package.
fn busybox_program(package: &Unpacked) -> PathBuf {
    package.root.join("bin/busybox")
}

/// A Debian package that artifacts are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DebianPackage {
    Kernel,
    Busybox,
    /// The kernel's source: known by its version, on the disk only while it is built.
    Source,
}

impl DebianPackage {
    /// Whether this is the package of that name.
    fn has_name(self, name: &str) -> bool {
        match self {
            Self::Kernel => name.starts_with("linux-image-"),
            Self::Busybox => name == BUSYBOX,
            Self::Source => name == tiny::SOURCE,
        }
    }

    /// Whether what was unpacked before is still there.
    fn is_there(self, unpacked: &Unpacked) -> bool {
        self == Self::Source || unpacked.root.is_dir()
    }

    fn fetch(self, folder: &Path) -> Result<Unpacked> {
        match self {
            Self::Kernel => {
                let image = packages::candidate(KERNEL)?.dependency("linux-image-")?;
                packages::unpack(&packages::candidate(&image)?, folder)
            }
            Self::Busybox => packages::unpack(&packages::candidate(BUSYBOX)?, folder),
            Self::Source => Ok(packages::candidate(tiny::SOURCE)?.unpacked(folder)),
        }
    }
}

/// The Debian packages that were fetched; a file in the cache records them.
struct Packages {
    record: PathBuf,
    folder: PathBuf,
    fetched: Vec<Unpacked>,
}

impl Packages {
    /// Those of the last time; with `update` none, so that each is the newest of the archive.
    fn open(target: &Path, update: bool) -> Result<Self> {
        let record = target.join("cache/packages.json");
        let fetched = if update {
            packages::update()?;
            Vec::new()
        } else {
            // A record that cannot be read is written anew.
            std::fs::read(&record)
                .ok()
                .and_then(|text| serde_json::from_slice(&text).ok())
                .unwrap_or_default()
        };
        Ok(Self {
            record,
            folder: target.join("cache/packages"),
            fetched,
        })
    }

    /// The package of the last time if it is still there, else the one that the index offers.
    fn get(&mut self, package: DebianPackage) -> Result<Unpacked> {
        let mut fetched = self.fetched.iter();
        if let Some(known) = fetched.find(|known| package.has_name(&known.name) && package.is_there(known)) {
            return Ok(known.clone());
        }
        // An index older than the archive names versions that are gone.
        let found = package.fetch(&self.folder).or_else(|_| {
            packages::update()?;
            package.fetch(&self.folder)
        })?;
        self.fetched.retain(|known| !package.has_name(&known.name));
        self.fetched.push(found.clone());
        let text = serde_json::to_vec_pretty(&self.fetched)?;
        std::fs::write(&self.record, text)
            .with_context(|| format!("cannot write {}", self.record.display()))?;
        Ok(found)
    }
}
