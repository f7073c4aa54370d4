//! File systems, drivers, the network of an emulated host.

use std::fs;
use std::path::Path;
use std::process::Command;

use rustix::fs::CWD;
use rustix::mount::{MountFlags, mount};

const BUSYBOX: &str = "/bin/busybox";

/// Sets everything up. What fails is printed on the console; the lab shows it when the host does not answer.
pub(crate) fn set_up() {
    for folder in ["/dev", "/proc", "/sys", "/run", "/tmp", "/mnt", "/bin"] {
        let _ = fs::create_dir_all(folder);
    }
    file_system("proc", "/proc");
    file_system("sysfs", "/sys");
    file_system("devtmpfs", "/dev");
    for folder in ["/dev/pts", "/dev/shm"] {
        let _ = fs::create_dir_all(folder);
    }
    file_system("devpts", "/dev/pts");
    file_system("tmpfs", "/dev/shm");
    file_system("tmpfs", "/run");
    file_system("tmpfs", "/tmp");
    let _ = rustix::fs::symlinkat("/proc/self/fd", CWD, "/dev/fd");
    busybox(&["--install", "-s", "/bin"]);
    drivers();
    network();
}

fn file_system(kind: &str, target: &str) {
    if let Err(error) = mount(kind, target, kind, MountFlags::empty(), None) {
        println!("lab-host: cannot mount {target}: {error}");
    }
}

/// Loads the modules in their order; `kvm-intel` or `kvm-amd` only where the CPU has what it needs.
fn drivers() {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flag = |name: &str| cpu.split_whitespace().any(|word| word == name);
    let order = fs::read_to_string("/modules/order").unwrap_or_default();
    for module in order.lines() {
        let wanted = match module {
            "kvm-amd.ko" => flag("svm"),
            "kvm-intel.ko" => flag("vmx"),
            _ => true,
        };
        if wanted {
            busybox(&["insmod", &format!("/modules/{module}")]);
        }
    }
}

/// The address that the lab gives on the kernel's command line: `lab.address=10.0.0.1/24`.
fn network() {
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let value = |key: &str| {
        line.split_whitespace()
            .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    };
    if let Some(name) = value("lab.name") {
        let _ = fs::write("/proc/sys/kernel/hostname", name);
    }
    busybox(&["ip", "link", "set", "lo", "up"]);
    if let (Some(address), true) = (value("lab.address"), Path::new("/sys/class/net/eth0").exists()) {
        busybox(&["ip", "address", "add", address, "dev", "eth0"]);
        busybox(&["ip", "link", "set", "eth0", "up"]);
    }
}

fn busybox(words: &[&str]) {
    match Command::new(BUSYBOX).args(words).status() {
        Ok(status) if status.success() => {}
        Ok(status) => println!("lab-host: {}: {status}", words.join(" ")),
        Err(error) => println!("lab-host: {}: {error}", words.join(" ")),
    }
}
