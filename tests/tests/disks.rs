//! Disks whose size and limits change, and images, with a guest that moves.

use std::fs::File;

use anyhow::{Result, ensure};
use migration::Outcome;
use tests::{BareGuest, Host, Journey, http};

const ANY_PORT: &str = "tcp:127.0.0.1:0";

#[test]
fn a_disk_is_resized_and_moves() -> Result<()> {
    let host = Host::new()?;
    let image = host.path("disk");
    let file = File::create(&image)?;
    file.set_len(1 << 20)?;
    let disk = format!("id=data,path={},cache=writethrough", image.display());
    let mut journey = Journey::start(host, &BareGuest::default(), &["--disk", &disk])?;
    let socket = journey.host.run_dir().join("vm-0.sock");
    let patch = |id: &str, body: &str| http(&socket, "PATCH", &format!("/drives/{id}"), body);

    // A file that has grown without anybody saying so is not the disk that the guest knows.
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
