//! What bad input gets: one line that names the thing, what was expected and what came; the right exit code;
//! nothing left behind.

#[path = "bad_input/snapshots.rs"]
mod snapshots;
#[path = "bad_input/sockets.rs"]
mod sockets;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tests::{BareGuest, Finished, PATIENCE, TestHost, TestProcess};

/// The exit code of something that failed, and of something that made no sense.
const FAILED: i32 = 1;
const USAGE: i32 = 2;

/// A run with the bare guest's kernel, which `more` may contradict.
fn run(host: &TestHost, more: &[&str]) -> Result<Finished> {
    let kernel = host.fixtures().bare().display().to_string();
    host.godwit(["run", "--kernel", &kernel].iter().chain(more))
}

/// Checks how a command failed: its code, one line on stderr with all of `words`, nothing else.
fn check(host: &TestHost, finished: &Finished, code: i32, words: &[&str]) -> Result<()> {
    finished.expect_code(code)?;
    let said = &finished.stderr;
    ensure!(
        finished.stdout.is_empty(),
        "expected nothing on stdout, got {:?}",
        finished.stdout
    );
    ensure!(!said.contains("panicked"), "it panicked: {said}");
    // The log has the choice of the CPU template; clap adds an empty line and where to find help.
    let is_log = |line: &&str| {
        !line.is_empty() && !line.contains(" INFO ") && !line.starts_with("For more information")
    };
    let lines: Vec<_> = said.lines().filter(is_log).collect();
    let first = lines
        .first()
        .with_context(|| format!("nothing on stderr but {said:?}"))?;
    let of_clap = code == USAGE && first.starts_with("error: ");
    ensure!(
        of_clap || (lines.len() == 1 && first.starts_with("godwit: ")),
        "expected one line, got {lines:?}"
    );
    for word in words {
        ensure!(first.contains(word), "expected {word:?} in {first:?}");
    }
    host.check_clean()
}

#[test]
fn sizes_and_counts_out_of_range() -> Result<()> {
    let host = TestHost::new()?;
    for (option, value, words) in [
        ("--cpus", "0", &["cpus", "expected 1 to 32", "got 0"][..]),
        ("--cpus", "33", &["cpus", "expected 1 to 32", "got 33"]),
        ("--cpus", "-1", &["cpus", "-1"]),
        ("--cpus", "two", &["cpus", "two"]),
        ("--memory", "0", &["memory", "expected", "got 0"]),
        (
            "--memory",
            "67108865",
            &["memory", "expected a multiple of 4096", "got 67108865"],
        ),
        ("--memory", "1024T", &["memory", "this host has"]),
        ("--memory", "much", &["memory", "expected a size", "much"]),
        ("--memory", "-5", &["memory", "expected a size", "-5"]),
        (
            "--cpu-template",
            "T2",
            &["template", "T2", "expected one of host, pvm, baseline"],
        ),
        ("--disk", "ro", &["disk", "expected", "no path"]),
        ("--disk", "path=x,rw", &["disk", "expected", "rw"]),
        ("--disk", "id=a/b,path=x", &["device id", "a/b", "expected"]),
        ("--disk", "id=vsock,path=x", &["device id", "vsock", "expected"]),
        (
            "--vsock",
            "cid=2,uds=x",
            &["vsock cid", "expected 3 to 4294967294", "got 2"],
        ),
        (
            "--vsock",
            "cid=4294967295,uds=x",
            &["vsock cid", "got 4294967295"],
        ),
        ("--vsock", "cid=x,uds=x", &["vsock", "expected cid=N,uds=PATH"]),
        ("--vsock", "cid=3", &["vsock", "got no uds"]),
        ("--console", "graphics", &["--console", "graphics"]),
        ("--port", "agent", &["--port", "expected a name"]),
        ("--port", "a b=x", &["port name", "a b", "expected 1 to 64"]),
        (
            "--disk",
            "id=console,path=x",
            &["device id", "console", "expected"],
        ),
        ("--net", "id=x", &["net", "expected", "got no tap"]),
        ("--net", "fd=2", &["net", "expected a descriptor above 2"]),
        (
            "--net",
            "tap=x,queues=0",
            &["network card", "expected 1 to 16", "got 0"],
        ),
        ("--net", "tap=x,bandwidth=1", &["net", "expected a rate"]),
        ("--config-file", "missing.json", &["missing.json", "No such file"]),
    ] {
        let finished = run(&host, &[option, value])?;
        check(&host, &finished, USAGE, words).with_context(|| format!("{option} {value}"))?;
    }
    Ok(())
}

#[test]
fn commands_that_make_no_sense() -> Result<()> {
    let host = TestHost::new()?;
    for (arguments, words) in [
        (&["run"][..], &["required"][..]),
        (&["fly"], &["fly"]),
        (
            &["migrate", "web", "host:7000"],
            &["host:7000", "expected tcp:HOST:PORT or unix:PATH"],
        ),
        (
            &["migrate", "web", "tcp:host:7000", "--max-downtime", "soon"],
            &["soon", "expected a duration"],
        ),
        (
            &["receive", "--listen", "tcp:127.0.0.1"],
            &["tcp:127.0.0.1", "expected"],
        ),
        (
            &["receive", "--listen", "tcp:127.0.0.1:0", "--disk", "x"],
            &["x", "--disk", "expected a name"],
        ),
        (
            &["receive", "--listen", "tcp:127.0.0.1:0", "--port", "a/b=x"],
            &["port name", "a/b", "expected 1 to 64"],
        ),
        (
            &["receive", "--listen", "tcp:127.0.0.1:0", "--vsock", "cid=3,uds=x"],
            &["cid=3,uds=x", "expected uds=PATH"],
        ),
    ] {
        check(&host, &host.godwit(arguments)?, USAGE, words).with_context(|| format!("{arguments:?}"))?;
    }
    Ok(())
}

#[test]
fn a_configuration_file_that_makes_no_sense() -> Result<()> {
    let host = TestHost::new()?;
    let path = host.path("vm.json");
    for (text, word) in [
        ("{", "EOF"),
        (
            r#"{"boot-source": {"kernel_image_path": "k"}, "mmds-config": {}}"#,
            "mmds-config: expected null, got {}: there is no metadata service",
        ),
        (
            r#"{"boot-source": {"kernel_image_path": "k"}, "balloons": null}"#,
            "unknown field `balloons`",
        ),
        (
            r#"{"boot-source": {"kernel_image_path": "k"}, "machine-config": {"vcpu_count": 99, "mem_size_mib": 64}}"#,
            "got 99",
        ),
    ] {
        std::fs::write(&path, text)?;
        let finished = host.godwit(["run".as_ref(), "--config-file".as_ref(), path.as_os_str()])?;
        check(&host, &finished, USAGE, &[word]).with_context(|| text.to_owned())?;
    }
    Ok(())
}

/// A file of the test's with these bytes.
fn file(host: &TestHost, name: &str, bytes: &[u8]) -> Result<String> {
    let path = host.path(name);
    std::fs::write(&path, bytes)?;
    Ok(path.display().to_string())
}

/// The first half of a file.
fn half(host: &TestHost, name: &str, of: &Path) -> Result<String> {
    let whole = std::fs::read(of).with_context(|| of.display().to_string())?;
    file(host, name, &whole[..whole.len() / 2])
}

#[test]
fn kernels_that_are_none() -> Result<()> {
    let host = TestHost::new()?;
    let fixtures = host.fixtures();
    let directory = host.path("folder").display().to_string();
    std::fs::create_dir(&directory)?;
    for (kernel, words) in [
        ("/nonexistent/kernel".to_owned(), &["No such file"][..]),
        (directory, &["expected a file, got a directory"]),
        (file(&host, "empty", b"")?, &["expected"]),
        (
            file(&host, "text", b"#!/bin/sh\nexit 0\n")?,
            &["expected an ELF vmlinux or a bzImage"],
        ),
        (file(&host, "magic", b"\x7fELF")?, &[]),
        (half(&host, "half-bare", &fixtures.bare())?, &["truncated"]),
        (
            half(&host, "half-vmlinux", &fixtures.stock_kernel("vmlinux"))?,
            &["truncated"],
        ),
        (
            half(&host, "half-vmlinuz", &fixtures.stock_kernel("vmlinuz"))?,
            &["truncated", "promises", "has"],
        ),
    ] {
        let finished = host.godwit(["run", "--kernel", &kernel, "--memory", "256M"])?;
        let words = [&[kernel.as_str(), "kernel"], words].concat();
        check(&host, &finished, FAILED, &words).with_context(|| kernel.clone())?;
    }
    Ok(())
}

#[test]
fn initrds_and_command_lines_that_do_not_fit() -> Result<()> {
    let host = TestHost::new()?;
    let large = host.path("large");
    std::fs::File::create(&large)?.set_len(65 << 20)?;
    let large = large.display().to_string();
    let kernel = host.fixtures().stock_kernel("vmlinux").display().to_string();
    let arguments = ["run", "--kernel", &kernel, "--memory", "64M", "--initrd", &large];
    check(
        &host,
        &host.godwit(arguments)?,
        FAILED,
        &["initrd", &large, "do not fit"],
    )?;
    // The initrd would lie behind the kernel file's end, but where the kernel unpacks itself.
    let compressed = host.fixtures().stock_kernel("vmlinuz").display().to_string();
    let small = host.path("small");
    std::fs::File::create(&small)?.set_len(40 << 20)?;
    let small = small.display().to_string();
    for (memory, words) in [
        ("96M", &["initrd", &small, "do not fit", "unpacked kernel"][..]),
        ("64M", &["kernel", &compressed, "to unpack itself"]),
    ] {
        let arguments = [
            "run",
            "--kernel",
            &compressed,
            "--memory",
            memory,
            "--initrd",
            &small,
        ];
        check(&host, &host.godwit(arguments)?, FAILED, words)?;
    }
    check(
        &host,
        &run(&host, &["--initrd", "/nonexistent/initrd"])?,
        FAILED,
        &["initrd", "/nonexistent/initrd"],
    )?;
    let long = "x".repeat(1 << 16);
    check(
        &host,
        &run(&host, &["--cmdline", &long])?,
        FAILED,
        &["command line", "bytes, at most"],
    )
}

#[test]
fn disks_that_are_none() -> Result<()> {
    let host = TestHost::new()?;
    let directory = host.path("folder").display().to_string();
    std::fs::create_dir(&directory)?;
    for (path, words) in [
        (
            "/nonexistent/disk".to_owned(),
            &["expected a file or a block device", "found nothing"][..],
        ),
        (
            directory,
            &["expected a file or a block device", "got a directory"],
        ),
    ] {
        let finished = run(&host, &["--disk", &format!("path={path}")])?;
        check(
            &host,
            &finished,
            FAILED,
            &[&["disk", path.as_str()], words].concat(),
        )
        .with_context(|| path.clone())?;
    }
    Ok(())
}

#[test]
fn descriptors_that_nobody_opened() -> Result<()> {
    let host = TestHost::new()?;
    let words = ["descriptor 999", "expected one that was open"];
    check(&host, &run(&host, &["--net", "fd=999"])?, FAILED, &words)?;
    let receiver = ["receive", "--listen", "tcp:127.0.0.1:0", "--net", "net0=fd:[999]"];
    check(&host, &host.godwit(receiver)?, FAILED, &words)
}

#[test]
fn a_disk_that_another_vm_uses() -> Result<()> {
    let (host, other) = (TestHost::new()?, TestHost::new()?);
    let path = file(&host, "disk", &[0; 4096])?;
    let disk = format!("path={path}");
    let mut vm = BareGuest::default().boot(&host, "first", &["--disk", &disk])?;
    check(
        &other,
        &run(&other, &["--disk", &disk])?,
        FAILED,
        &["disk", &path, "lock"],
    )?;
    check(
        &other,
        &run(&other, &["--disk", &format!("{disk},ro")])?,
        FAILED,
        &["disk", &path, "lock"],
    )?;
    vm.check_running()?;
    vm.process.send(b"q")?;
    vm.wait_success(PATIENCE)
}

#[test]
fn sockets_that_cannot_be_had() -> Result<()> {
    let host = TestHost::new()?;
    let precious = file(&host, "precious", b"data")?;
    check(
        &host,
        &run(&host, &["--api-sock", &precious])?,
        FAILED,
        &["API socket", &precious, "expected"],
    )?;
    ensure!(std::fs::read(&precious)? == b"data", "the file was changed");
    check(
        &host,
        &run(&host, &["--api-sock", "/nonexistent/x.sock"])?,
        FAILED,
        &["/nonexistent/x.sock"],
    )?;
    check(
        &host,
        &run(&host, &["--name", "a/b"])?,
        USAGE,
        &["a/b", "expected"],
    )?;
    check(
        &host,
        &run(&host, &["--log", "/nonexistent/log"])?,
        FAILED,
        &["/nonexistent/log"],
    )?;
    for command in ["status", "pause", "stop", "console", "cancel"] {
        check(
            &host,
            &host.godwit([command, "nobody"])?,
            FAILED,
            &["nobody", "not there"],
        )?;
    }

    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let taken = format!("tcp:{}", listener.local_addr()?);
    check(
        &host,
        &host.godwit(["receive", "--listen", &taken])?,
        FAILED,
        &[&taken, "in use"],
    )?;
    check(
        &host,
        &host.godwit(["receive", "--listen", "unix:/nonexistent/x"])?,
        FAILED,
        &["/nonexistent/x"],
    )
}

/// Runs `godwit run` and `godwit probe` where `prepare`, a shell command, has changed `/dev`: in namespaces of
/// their own, so that no other process sees the change.
fn elsewhere(host: &TestHost, prepare: &str, identity: &[&str]) -> Result<(Finished, Finished)> {
    let kernel = host.fixtures().bare().display().to_string();
    let in_namespace = |arguments: &[&str]| -> Result<Finished> {
        let godwit = host.command(arguments);
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount", "sh", "-ec"]);
        command
            .arg(format!("{prepare}; exec \"$@\""))
            .arg("sh")
            .args(identity);
        command.arg(godwit.get_program()).args(godwit.get_args());
        command.envs(godwit.get_envs().filter_map(|(key, value)| Some((key, value?))));
        TestProcess::run(command, PATIENCE)
    };
    let run = in_namespace(&["run", "--kernel", &kernel, "--memory", "64M"])?;
    Ok((run, in_namespace(&["probe"])?))
}

#[test]
fn no_kvm() -> Result<()> {
    let host = TestHost::new()?;
    let (run, probe) = elsewhere(&host, "mount -t tmpfs none /dev", &[])?;
    check(&host, &run, FAILED, &["/dev/kvm", "No such file", "godwit probe"])?;
    probe.expect_code(FAILED)?;
    ensure!(probe.stdout.contains("not there"), "got {}", probe.stdout);
    Ok(())
}

#[test]
fn no_permission_for_kvm() -> Result<()> {
    let host = TestHost::new()?;
    let closed: PathBuf = host.path("closed");
    std::fs::write(&closed, "")?;
    let prepare = format!("chmod 0 {0}; mount --bind {0} /dev/kvm", closed.display());
    // Within the namespace the program is root; without this capability even root obeys the file's mode.
    let identity = [
        "setpriv",
        "--bounding-set=-dac_override,-dac_read_search",
        "--inh-caps=-all",
    ];
    let (run, probe) = elsewhere(&host, &prepare, &identity)?;
    check(
        &host,
        &run,
        FAILED,
        &["/dev/kvm", "Permission denied", "godwit probe"],
    )?;
    probe.expect_code(FAILED)?;
    ensure!(probe.stdout.contains("no permission"), "got {}", probe.stdout);
    Ok(())
}
