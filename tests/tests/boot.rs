//! The bare guest boots, works and ends, on machines of all shapes.

use anyhow::{Context, Result, ensure};
use tests::{BareGuest, GuestEvent, Journey, PATIENCE, TestHost};

/// Boots the guest, lets it verify its memory, and ends it; returns the number of pages that it has.
fn boot_and_end(guest: BareGuest<'_>, more: &[&str]) -> Result<u64> {
    let mut journey = Journey::start(TestHost::new()?, &guest, more)?;
    let start = journey
        .vm
        .process
        .stdout()
        .wait("start", 0, PATIENCE, |line| GuestEvent::named(line, "start"))?;
    ensure!(
        start.number("cpus")? == u64::from(guest.cpus),
        "expected {} CPUs, got {start:?}",
        guest.cpus
    );
    let pages = start.number("pages")?;
    let status = journey.vm.status()?;
    ensure!(
        status["vcpu_count"] == guest.cpus && status["mem_size_mib"] == guest.memory_mib,
        "got {status}"
    );
    let verified = journey.verify()?;
    ensure!(
        verified <= pages && verified > 0,
        "expected at most {pages} verified pages, got {verified}"
    );
    journey.end()?;
    Ok(pages)
}

#[test]
fn one_vcpu() -> Result<()> {
    let pages = boot_and_end(BareGuest::default(), &[])?;
    ensure!(
        (15_000..16_384).contains(&pages),
        "expected nearly all of 64 MiB, got {pages} pages"
    );
    Ok(())
}

#[test]
fn four_vcpus() -> Result<()> {
    boot_and_end(
        BareGuest {
            cpus: 4,
            ..Default::default()
        },
        &[],
    )
    .map(drop)
}

#[test]
fn as_many_vcpus_as_there_may_be() -> Result<()> {
    let guest = BareGuest {
        cpus: 32,
        ..Default::default()
    };
    boot_and_end(guest, &[]).map(drop)
}

#[test]
fn shared_memory() -> Result<()> {
    boot_and_end(BareGuest::default(), &["--shared-memory"]).map(drop)
}

#[test]
fn memory_on_both_sides_of_the_hole() -> Result<()> {
    let guest = BareGuest {
        memory_mib: 5 << 10,
        workset: "32M",
        fill: false,
        ..Default::default()
    };
    let pages = boot_and_end(guest, &[])?;
    ensure!(
        pages > (5 << 18) - 1000,
        "expected nearly all of 5 GiB, got {pages} pages"
    );
    Ok(())
}

/// Firecracker's format, with keys that ask for nothing, a root disk that is not the first, and words for a first
/// program, behind which no word of the machine's may come.
#[test]
fn configuration_file() -> Result<()> {
    let host = TestHost::new()?;
    let options = BareGuest {
        cpus: 2,
        reads: 32,
        ..Default::default()
    }
    .options(&host)?;
    let after = |option: &str| options.iter().skip_while(|word| *word != option).nth(1).cloned();
    let cmdline = after("--cmdline").context("no command line")?;
    let drive = |id: &str| -> Result<serde_json::Value> {
        let path = host.path(id);
        std::fs::File::create(&path)?.set_len(1 << 20)?;
        Ok(serde_json::json!({
            "drive_id": id, "path_on_host": path, "is_root_device": id == "root", "partuuid": null,
            "rate_limiter": null, "socket": null,
        }))
    };
    let file = serde_json::json!({
        "boot-source": {
            "kernel_image_path": after("--kernel"), "boot_args": format!("{cmdline} -- cpus=99"), "initrd_path": null,
        },
        "drives": [drive("data")?, drive("root")?],
        "machine-config": { "vcpu_count": 2, "mem_size_mib": 96, "smt": false, "track_dirty_pages": false },
        "balloon": null, "vsock": null, "logger": null, "metrics": null, "mmds-config": null, "cpu-config": null,
    });
    let path = host.path("vm.json");
    std::fs::write(&path, file.to_string())?;
    let mut vm = host.run("filed", ["--config-file".as_ref(), path.as_os_str()])?;
    vm.check_running()?;
    let status = vm.status()?;
    ensure!(
        status["vcpu_count"] == 2 && status["mem_size_mib"] == 96,
        "got {status}"
    );
    // The guest has stamped the first disk, and reads from it.
    vm.read_on(256)?;
    for (id, expected) in [("root", true), ("data", false)] {
        let written = std::fs::read(host.path(id))?.iter().any(|byte| *byte != 0);
        ensure!(
            written == expected,
            "{id}: expected it to be written to: {expected}"
        );
    }
    vm.process.send(b"q")?;
    vm.wait_success(PATIENCE)?;
    host.check_clean()
}
