//! Disks whose size and limits change, and images that QEMU's tools read.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Result, ensure};
use migration::Outcome;
use rustix::process::Signal;
use tests::{BareGuest, Finished, Image, Journey, PATIENCE, TestHost, Vm, http, qemu, wait_until};

const ANY_PORT: &str = "tcp:127.0.0.1:0";
const IMAGE_BYTES: u64 = 4 << 20;
/// Each page of such a disk four times in the mean, and each cluster of 64 KiB for sure.
const READS: u64 = 4 * (IMAGE_BYTES >> 12);

const READER: BareGuest = BareGuest {
    reads: 32,
    ..BareGuest::DEFAULT
};
/// The guest never flushes.
const WRITER: BareGuest = BareGuest {
    writes: true,
    ..READER
};

#[test]
fn an_image_in_use_can_be_read_and_is_whole_in_a_pause() -> Result<()> {
    let host = TestHost::new()?;
    let image = Image::make(&host.path("disk.qcow2"), IMAGE_BYTES)?;
    let (path, copy) = (image.path(), host.path("copy"));
    let disk = format!("id=d,path={path},format=qcow2");
    let mut journey = Journey::start(host, &WRITER, &["--disk", &disk])?;
    journey.vm.read_on(READS)?;
    qemu("qemu-img", &["info", path])?.expect_code(0)?;
    for (program, words) in [
        ("qemu-img", &["resize", "-f", "qcow2", path, "8M"][..]),
        ("qemu-io", &["-f", "qcow2", "-c", "write 0 4k", path]),
    ] {
        let finished = qemu(program, words)?;
        ensure!(finished.expect_code(0).is_err(), "{words:?} has changed the disk");
        ensure!(finished.stderr.contains("lock"), "{}", finished.stderr);
    }
    journey.vm.godwit("pause", &[])?.expect_code(0)?;
    fs::copy(path, &copy)?;
    let copy = Image::at(&copy);
    copy.check(true)?;
    let known = copy.mapped()?;
    ensure!(
        known == IMAGE_BYTES,
        "a copy has {known} bytes of {IMAGE_BYTES} that the guest has written"
    );
    journey.vm.godwit("resume", &[])?.expect_code(0)?;
    journey.vm.read_on(READS)?;
    let backend = format!("d={path},format=qcow2");
    let (receiver, endpoint) = journey.receiver_with(ANY_PORT, &["--disk", &backend])?;
    journey.hop_to(receiver, &endpoint, &["--on-miss", "switch"])?;
    journey.vm.read_on(READS)?;
    journey.verify()?;
    let _host = journey.host.clone();
    journey.end()?;
    image.check(true)
}

#[test]
fn a_killed_process_leaves_an_image_with_its_data() -> Result<()> {
    let host = TestHost::new()?;
    for cache in ["writeback", "unsafe"] {
        let image = Image::make(&host.path(cache), IMAGE_BYTES)?;
        let disk = format!("id=d,path={},format=qcow2,cache={cache}", image.path());
        let mut vm = WRITER.boot(&host, cache, &["--disk", &disk])?;
        vm.read_on(READS)?;
        wait_until(
            "the image to know its data",
            || Ok(image.mapped()? == IMAGE_BYTES),
        )?;
        vm.process.signal(Signal::KILL)?;
        vm.process.wait(PATIENCE)?;
        // Clusters may be lost, but none is wrong.
        image.check(false)?;
        ensure!(image.mapped()? == IMAGE_BYTES);
    }
    Ok(())
}

#[test]
fn nobody_boots_what_overlays_are_on() -> Result<()> {
    let host = TestHost::new()?;
    let base = host.path("base").display().to_string();
    File::create(&base)?.set_len(IMAGE_BYTES)?;
    let run = |name: &str, disk: &str| -> Result<Finished> {
        let mut words = vec!["run".to_owned(), "--name".to_owned(), name.to_owned()];
        words.extend(READER.options(&host)?);
        words.extend(["--disk".to_owned(), disk.to_owned()]);
        host.godwit(words)
    };
    let mut clones = Vec::new();
    for name in ["one", "two"] {
        let top = Image::make_on(&host.path(name), &base)?;
        let disk = format!("id=d,path={},format=qcow2", top.path());
        // A file that an image names is not opened for that reason.
        let finished = run("unnamed", &disk)?;
        finished.expect_code(1)?;
        ensure!(
            finished.stderr.contains(&format!("add backing={base}")),
            "{}",
            finished.stderr
        );
        let disk = format!("{disk},backing={base}");
        clones.push(READER.boot(&host, name, &["--disk", &disk])?);
    }
    let finished = run("base", &format!("path={base}"))?;
    finished.expect_code(1)?;
    ensure!(
        finished.stderr.contains(&base) && finished.stderr.contains("locked"),
        "{}",
        finished.stderr
    );
    // The guest moves with all of its files, and not without.
    let moving = clones.remove(0);
    let top = format!("d={},format=qcow2", host.path("one").display());
    let (receiver, endpoint) = host.receive("unnamed", ANY_PORT, ["--disk", &top])?;
    let line = moving.migrate(&endpoint, &[])?.stayed(Outcome::Failed)?;
    ensure!(line.contains("add backing="), "{line}");
    drop(receiver);
    let (receiver, endpoint) =
        host.receive("three", ANY_PORT, ["--disk", &format!("{top},backing={base}")])?;
    moving.migrate(&endpoint, &[])?.moved()?;
    clones.push(receiver);
    for mut vm in clones {
        vm.read_on(READS)?;
        vm.process.send(b"q")?;
        vm.wait_success(PATIENCE)?;
    }
    Ok(())
}

/// How often the log says that the disk's end is hidden.
fn hidden(vm: &Vm) -> usize {
    let log = vm.process.stderr().text();
    log.lines()
        .filter(|line| line.contains("last 300 bytes are hidden"))
        .count()
}

#[test]
fn a_disk_has_any_size() -> Result<()> {
    let host = TestHost::new()?;
    let (odd, empty) = (host.path("odd"), host.path("empty"));
    File::create(&odd)?.set_len(IMAGE_BYTES + 300)?;
    File::create(&empty)?;
    let disk = |path: &Path| format!("path={}", path.display());
    let (d, e) = (format!("id=d,{}", disk(&odd)), format!("id=e,{}", disk(&empty)));
    let mut journey = Journey::start(host, &READER, &["--disk", &d, "--disk", &e])?;
    journey.vm.read_on(READS)?;
    ensure!(hidden(&journey.vm) == 1, "{}", journey.vm.process.stderr().text());
    let (there, nothing) = (journey.host.path("there"), journey.host.path("nothing"));
    for (d, e, come, logged) in [(&odd, &empty, 0, 1), (&there, &nothing, 1, 0)] {
        let [d, e] = [("d", d), ("e", e)].map(|(id, path)| format!("{id}={}", path.display()));
        let (receiver, endpoint) = journey.receiver_with(ANY_PORT, &["--disk", &d, "--disk", &e])?;
        let report = journey.hop_to(receiver, &endpoint, &["--with-disks", "--on-miss", "switch"])?;
        ensure!(report.disks == come, "{report:?}");
        journey.vm.read_on(READS)?;
        ensure!(
            hidden(&journey.vm) == logged,
            "{}",
            journey.vm.process.stderr().text()
        );
    }
    ensure!(fs::metadata(&there)?.len() == IMAGE_BYTES && fs::metadata(&nothing)?.len() == 0);
    journey.verify()?;
    journey.end()
}

#[test]
fn a_disk_is_resized_and_moves() -> Result<()> {
    let host = TestHost::new()?;
    let image = host.path("disk");
    let file = File::create(&image)?;
    file.set_len(1 << 20)?;
    let disk = format!("id=data,path={},cache=writethrough", image.display());
    let mut journey = Journey::start(host, &BareGuest::default(), &["--disk", &disk])?;
    let socket = journey.host.run_dir().join("vm-0.sock");
    let patch = |id: &str, body: &str| http(&socket, "PATCH", &format!("/drives/{id}"), body);

    // A file that has grown without a request to resize is not the disk that the guest has.
    file.set_len(2 << 20)?;
    let backend = format!("data={}", image.display());
    let (receiver, endpoint) = journey.receiver_with(ANY_PORT, &["--disk", &backend])?;
    let error = journey.vm.migrate(&endpoint, &[])?.stayed(Outcome::Failed)?;
    ensure!(
        error.contains("1048576 bytes") && error.contains("2097152 bytes"),
        "{error}"
    );

    let unknown = journey.vm.godwit("disk", &["nothing"])?;
    ensure!(
        unknown.expect_code(1)?.stderr.contains("no disk \"nothing\""),
        "{}",
        unknown.stderr
    );
    journey.vm.godwit("disk", &["data"])?.expect_code(0)?;
    let limits = r#"{"drive_id": "data", "rate_limiter": {"ops": {"size": 5, "refill_time": 100}}}"#;
    ensure!(patch("data", limits)?.starts_with("HTTP/1.1 204"));
    let unchanged = r#"{"drive_id": "data", "path_on_host": null, "rate_limiter": null}"#;
    ensure!(patch("data", unchanged)?.starts_with("HTTP/1.1 204"));
    for (id, body, status, expected) in [
        ("other", r#"{"drive_id": "other"}"#, 404, "no disk"),
        ("data", r#"{"drive_id": "other"}"#, 400, "drive_id"),
        (
            "data",
            r#"{"drive_id": "data", "path_on_host": "/dev/null"}"#,
            400,
            "path_on_host",
        ),
        (
            "data",
            r#"{"drive_id": "data", "rate_limiter": {"ops": {"size": 5, "refill_time": 0}}}"#,
            400,
            "rate limit",
        ),
    ] {
        let answer = patch(id, body)?;
        ensure!(
            answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.contains(expected),
            "{body}: {answer}"
        );
    }

    // Size, cache and limits go along.
    journey.hop_to(receiver, &endpoint, &["--verify"])?;
    let (receiver, endpoint) = journey.receiver_with(ANY_PORT, &["--disk", &backend])?;
    journey.hop_to(receiver, &endpoint, &["--verify"])?;
    journey.verify()?;
    journey.end()
}
