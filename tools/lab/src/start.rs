//! A lab: its hosts, their network, their disk.

use std::fs::File;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::LabError;
use crate::host::{LabHost, LabMachine};
use crate::payload::Payload;
use crate::switch::Switch;

/// What hosts have unless the caller says otherwise: KVM works in them.
const CPU: &str = "EPYC,+svm,+npt";
const MEMORY_MIB: u32 = 3072;

/// A running lab. Dropping it ends its hosts and removes what it left on the disk.
#[derive(Debug)]
pub struct Lab {
    // Dropped in this order: hosts before the network, all before the folder.
    hosts: Vec<LabHost>,
    switch: Switch,
    disk: Option<PathBuf>,
    _folder: TempDir,
}

/// Describes a lab before it starts.
#[derive(Debug)]
pub struct LabBuilder {
    payload: Payload,
    hosts: usize,
    memory_mib: u32,
    cpus: Vec<(usize, String)>,
    disk: Option<LabDisk>,
}

#[derive(Debug)]
enum LabDisk {
    Empty(u64),
    Image(PathBuf),
}

impl Lab {
    /// Begins to describe a lab: one host, no disk.
    pub fn builder(payload: Payload) -> LabBuilder {
        LabBuilder {
            payload,
            hosts: 1,
            memory_mib: MEMORY_MIB,
            cpus: Vec::new(),
            disk: None,
        }
    }

    /// Host `index`, counted from 0.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn host(&self, index: usize) -> &LabHost {
        &self.hosts[index]
    }

    /// The image of the shared disk, for checks from outside.
    pub fn disk(&self) -> Option<&Path> {
        self.disk.as_deref()
    }

    /// Cuts (or mends) the cable of a host: frames in either direction are lost meanwhile.
    ///
    /// # Panics
    /// If there is no such host.
    pub fn set_cut(&self, host: usize, cut: bool) {
        self.switch.set_cut(host, cut);
    }
}

impl LabBuilder {
    /// How many hosts, 250 at most.
    pub fn hosts(mut self, hosts: usize) -> Self {
        self.hosts = hosts.min(250);
        self
    }

    /// Memory of each host, in MiB.
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Another CPU for one host, in QEMU's words, e.g. `EPYC,+svm,+npt,-avx2`.
    pub fn cpu(mut self, host: usize, model: impl Into<String>) -> Self {
        self.cpus.push((host, model.into()));
        self
    }

    /// A new, empty disk of so many bytes that every host sees as `/dev/vda`.
    pub fn shared_disk(mut self, bytes: u64) -> Self {
        self.disk = Some(LabDisk::Empty(bytes));
        self
    }

    /// A raw image that every host sees as `/dev/vda`; it is changed in place.
    pub fn shared_image(mut self, image: impl Into<PathBuf>) -> Self {
        self.disk = Some(LabDisk::Image(image.into()));
        self
    }

    /// Starts all hosts and waits until they are up.
    pub fn start(self) -> Result<Lab, LabError> {
        let folder = tempfile::Builder::new()
            .prefix("godwit-lab-")
            .tempdir()
            .map_err(LabError::system("create a folder for the lab"))?;
        let initramfs = folder.path().join("initramfs");
        std::fs::write(&initramfs, self.payload.initramfs()?)
            .map_err(LabError::system("write the hosts' initramfs"))?;
        let disk = self.disk(folder.path())?;
        let switch =
            Switch::start(folder.path(), self.hosts).map_err(LabError::system("open the network"))?;
        let machine = |index: usize| LabMachine {
            cpu: self.cpu_of(index),
            memory_mib: self.memory_mib,
            kernel: self.payload.kernel(),
            initramfs: initramfs.clone(),
            disk: disk.clone(),
            port: switch.path(index).to_path_buf(),
        };
        let hosts: Vec<_> = (0..self.hosts)
            .map(|index| LabHost::new(index, folder.path(), machine(index)))
            .collect();
        let lab = Lab {
            hosts,
            switch,
            disk,
            _folder: folder,
        };
        let starting = lab
            .hosts
            .iter()
            .map(LabHost::begin)
            .collect::<Result<Vec<_>, _>>()?;
        lab.hosts
            .iter()
            .zip(starting)
            .try_for_each(|(host, starting)| host.finish(starting))?;
        Ok(lab)
    }

    fn cpu_of(&self, host: usize) -> String {
        let named = self.cpus.iter().rev().find(|(index, _)| *index == host);
        named.map_or(CPU, |(_, model)| model).to_owned()
    }

    fn disk(&self, folder: &Path) -> Result<Option<PathBuf>, LabError> {
        match &self.disk {
            None => Ok(None),
            Some(LabDisk::Image(image)) => Ok(Some(image.clone())),
            Some(LabDisk::Empty(bytes)) => {
                let image = folder.join("disk");
                let made = File::create(&image).and_then(|file| file.set_len(*bytes));
                made.map_err(LabError::system("create the shared disk"))?;
                Ok(Some(image))
            }
        }
    }
}
