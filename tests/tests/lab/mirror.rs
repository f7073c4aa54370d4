//! A disk that comes along, under load.

use super::*;

#[test]
fn a_disk_comes_along_with_a_debian_guest() -> Result<()> {
    let (_directory, image) = formatted_disk()?;
    let lab = Lab::builder(payload(&Fixtures::from_env()?))
        .hosts(2)
        .shared_image(&image)
        .start()?;
    let guest = StockGuest {
        disk: true,
        ..Default::default()
    };
    let mut journey = LabJourney::start(lab, guest)?;
    journey.verify()?;
    let arguments = [&VERIFIED[..], &["--with-disks"]].concat();
    // From the hosts' own disk to a file on the other host, and from there to one here.
    for path in ["/disk-there", "/disk-here"] {
        let (receiver, endpoint) = journey.receiver_with_disk(path)?;
        let report = journey.hop_to(receiver, &endpoint, &arguments)?;
        ensure!(
            report.disks == 1 && report.disk_bytes > 1 << 20,
            "no disk in {report:?}"
        );
        let verified = journey.verify().with_context(|| format!("on {path}"))?;
        println!(
            "{path}: {} bytes in {:.0} ms before memory, {} files verified",
            report.disk_bytes,
            report.mirror_ms,
            verified.number("files")?
        );
    }
    let lab = journey.power_off()?;
    let copy = lab
        .host(0)
        .run(&["dd", "if=/disk-here", "of=/dev/vda", "bs=1M", "conv=fsync"])?;
    ensure!(copy.status.success(), "dd: {}", copy.stderr);
    drop(lab);
    tool(&["e2fsck", "-fn", &image])
}
