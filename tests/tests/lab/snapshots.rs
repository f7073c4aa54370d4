//! A Debian guest that goes into files under load, and what comes out of them, on the same host and on another.

use super::*;

/// Where a host has the file system on the disk that both see; one at a time may have it.
const SHELF: &str = "/mnt";
/// Two clones of the guest have one emulated CPU between them, where each page of a snapshot that is written is a fault
/// and a copy, and each character that is printed an exit: all devices are in use, and none for long.
const QUIETLY: &str = "godwit.disk=/dev/vda godwit.random=/dev/hwrng godwit.rate=1M godwit.print=1000ms";
const DISKS: [&str; 3] = ["disk", "disk-1", "disk-2"];

/// An image with a file system in which there is a guest's formatted disk, and the folder that it is in.
fn shelf() -> Result<(tempfile::TempDir, String)> {
    let (directory, disk) = formatted_disk()?;
    let content = directory.path().join("content");
    std::fs::create_dir(&content)?;
    std::fs::rename(disk, content.join(DISKS[0]))?;
    let image = directory.path().join("shelf").display().to_string();
    std::fs::File::create(&image)?.set_len(2 << 30)?;
    tool(&[
        "mkfs.ext4",
        "-q",
        "-F",
        "-d",
        &content.display().to_string(),
        &image,
    ])?;
    Ok((directory, image))
}

/// The guest runs, and nothing that it has written is lost.
fn goes_on(journey: &mut LabJourney, uds: &str) -> Result<()> {
    journey.check_running()?;
    let mut program = start_echo(journey, uds, &ECHO_PORT.to_string())?;
    echo(&mut program, 64 << 10)?;
    let verified = journey.verify()?;
    ensure!(
        verified.number("files")? > 0,
        "no file was verified: {verified:?}"
    );
    Ok(())
}

#[test]
fn a_guest_in_files_and_its_clones_on_another_host() -> Result<()> {
    let (directory, image) = shelf()?;
    let lab = Lab::builder(payload_with_echo()?)
        .hosts(2)
        .shared_image(&image)
        .start()?;
    let lab = Arc::new(lab);
    let peer = network::connect(&lab)?;
    let mount = format!("mount /dev/vda {SHELF}");
    shell(&lab, 0, &mount)?;
    let guest = StockGuest {
        net: true,
        vsock: true,
        words: QUIETLY,
        options: &["--balloon", "--disk", "id=data,path=/mnt/disk"],
        ..Default::default()
    };
    let journey = LabJourney::start(lab.clone(), guest.clone())?;
    a_base_and_differences(journey)?;
    shell(&lab, 0, &format!("umount {SHELF}"))?;
    shell(&lab, 1, &mount)?;
    two_clones(&lab, &guest)?;
    shell(&lab, 1, &format!("umount {SHELF}"))?;
    drop((peer, lab));
    for name in DISKS {
        let disk = directory.path().join(name).display().to_string();
        tool(&["debugfs", "-R", &format!("dump {name} {disk}"), &image])?;
        tool(&["e2fsck", "-fn", &disk]).context(name)?;
    }
    directory.close().context("the disks' folder")
}

/// Three snapshots of a guest under load, and the guest that the three of them are, which goes on where they ended.
fn a_base_and_differences(mut journey: LabJourney) -> Result<()> {
    journey.check_stream()?;
    // While the guest stands still its disk fits its memory: the clones get copies of the disk from now.
    journey.godwit("pause", &[])?;
    journey.godwit_json("snapshot", &["/mnt/base", "--keep-running"])?;
    let [disk, first, second] = DISKS;
    let copy = format!("cd {SHELF}; cp {disk} {first}; cp {disk} {second}");
    shell(&journey.lab, journey.host(), &copy)?;
    journey.godwit("resume", &[])?;
    goes_on(&mut journey, StockGuest::VSOCK).context("after the first snapshot")?;
    journey.check_stream().context("after the first snapshot")?;

    journey.godwit_json("snapshot", &["/mnt/first", "--diff", "--keep-running"])?;
    goes_on(&mut journey, StockGuest::VSOCK).context("after the second snapshot")?;
    journey.godwit_json("snapshot", &["/mnt/second", "--diff"])?;
    let merge = format!("cd {SHELF}; godwit snapshot merge base first second --output whole");
    shell(&journey.lab, journey.host(), &merge)?;
    let vsock = format!("--vsock=uds={}", StockGuest::VSOCK);
    let options = [&vsock, "--net=net0=tap0", "--disk=data=/mnt/disk"];
    journey.restore("/mnt/whole", &options)?;
    goes_on(&mut journey, StockGuest::VSOCK).context("out of the files")?;
    // The stream's peer has waited for the guest all the time.
    journey.check_stream().context("out of the files")?;
    journey.check_growing("random").context("out of the files")?;
    journey.power_off().map(drop)
}

/// Two guests at once that live on from the first snapshot, each with a disk, a network and a socket of its own.
fn two_clones(lab: &Arc<Lab>, guest: &StockGuest) -> Result<()> {
    const HOST: usize = 1;
    let uds = |number: u32| format!("/run/clone-{number}");
    let mut clones = Vec::new();
    for number in 1..=2 {
        // They have one address: neither tap leads anywhere else.
        let tap = format!("clone{number}");
        shell(lab, HOST, &format!("tunctl -t {tap}; ip link set {tap} up"))?;
        let (disk, net) = (
            format!("--disk=data=/mnt/disk-{number}"),
            format!("--net=net0={tap}"),
        );
        let vsock = format!("--vsock=uds={}", uds(number));
        let options = [disk.as_str(), &net, &vsock];
        let clone = LabJourney::clone_of(guest.clone(), lab, (HOST, number), "/mnt/base", &options);
        clones.push((number, clone.with_context(|| format!("clone {number}"))?));
    }
    for (number, clone) in &mut clones {
        let which = || format!("clone {number}");
        goes_on(clone, &uds(*number)).with_context(which)?;
        clone.check_growing("random").with_context(which)?;
        network::wait_for_answer(lab, HOST, &format!("-I clone{number}")).with_context(which)?;
    }
    for (_, clone) in &mut clones {
        clone.vm.write_stdin(b"poweroff\n")?;
        clone.vm.wait(PATIENCE)?;
    }
    clones
        .into_iter()
        .try_for_each(|(number, clone)| clone.ended().map(drop).with_context(|| format!("clone {number}")))
}
