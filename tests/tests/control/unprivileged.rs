//! A VM of a user without rights: it works, and other users cannot read what is in it.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::process::Command;

use anyhow::{Result, ensure};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::mount::mount_bind;
use tests::{BareGuest, Fixtures, PATIENCE, SmallFileSystem, TestHost, TestProcess};

/// A user, and a group, without any rights.
const NOBODY: u32 = 65534;
/// KVM's device (Documentation/admin-guide/devices.txt).
const KVM: (u32, u32) = (10, 232);

/// The program that runs its last arguments as that user.
fn nobody() -> Vec<OsString> {
    let words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    words.map(OsString::from).into()
}

/// Lets each process that this thread starts use KVM, and gives `host` to that user.
fn hand_over(host: &TestHost) -> Result<SmallFileSystem> {
    let devices = SmallFileSystem::mount(host.path("devices"), 1)?;
    let kvm = devices.path().join("kvm");
    let (major, minor) = KVM;
    mknodat(
        CWD,
        &kvm,
        FileType::CharacterDevice,
        Mode::empty(),
        makedev(major, minor),
    )?;
    fs::set_permissions(&kvm, fs::Permissions::from_mode(0o666))?;
    mount_bind(&kvm, "/dev/kvm")?;
    for path in ["", "run"] {
        chown(host.path(path), Some(NOBODY), Some(NOBODY))?;
    }
    Ok(devices)
}

#[test]
fn what_is_in_a_vm_is_nobody_elses_and_it_moves_all_the_same() -> Result<()> {
    // That user may have no access to the folders of program and guest.
    let place = tempfile::tempdir()?;
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755))?;
    let host = TestHost::with(Fixtures::from_env()?.copied_to(place.path())?)?;
    let _devices = hand_over(&host)?;

    let mut command = host.command(["run", "--name", "source"]);
    command.args(BareGuest::default().options(&host)?);
    let mut source = host.start("source", host.under(&nobody(), &command)?)?;
    source.check_running()?;
    check_private(source.process.id())?;

    let command = host.command(["receive", "--name", "destination", "--listen", "tcp:127.0.0.1:0"]);
    let (mut destination, endpoint) = host.start_receiver("destination", host.under(&nobody(), &command)?)?;
    source.migrate(&endpoint, &["--verify"])?.moved()?;
    source.wait_success(PATIENCE)?;
    destination.check_running()?;
    check_private(destination.process.id())?;
    destination.godwit("stop", &[])?.expect_code(0)?;
    destination.wait_success(PATIENCE)?;
    host.check_clean()
}

/// Fails if another process of the same user can read this one's memory, or if a core dump would have the guest's.
fn check_private(id: u32) -> Result<()> {
    let mut words = nobody();
    words.extend(["head", "-c1", &format!("/proc/{id}/environ")].map(OsString::from));
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]);
    let finished = TestProcess::run(command, PATIENCE)?;
    ensure!(
        finished.code != Some(0) && finished.stderr.contains("Permission denied"),
        "another process of the user reads its /proc: {finished:?}"
    );
    let maps = fs::read_to_string(format!("/proc/{id}/smaps"))?;
    let mut size = 0;
    let (mut guests, mut kept_out) = (0, 0);
    for line in maps.lines() {
        if let Some(kib) = line.strip_prefix("Size:") {
            size = kib.trim().trim_end_matches("kB").trim().parse::<u64>()?;
        }
        let flags = line.strip_prefix("VmFlags:").filter(|_| size >= 32 << 10);
        if let Some(flags) = flags.filter(|flags| flags.split(' ').any(|flag| flag == "wr")) {
            guests += 1;
            kept_out += usize::from(flags.split(' ').any(|flag| flag == "dd"));
        }
    }
    let context = || format!("{kept_out} of {guests} large mappings are left out of a core dump");
    ensure!(guests > 0 && kept_out == guests, "{}", context());
    Ok(())
}
