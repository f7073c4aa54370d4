//! A guest that uses all of its devices while it moves.

use super::*;

#[test]
fn everything_at_once() -> Result<()> {
    let (directory, image) = formatted_disk()?;
    let lab = Lab::builder(payload_with_echo()?)
        .hosts(2)
        .shared_image(&image)
        .start()?;
    let peer = network::connect(&lab)?;
    let guest = StockGuest {
        memory: "320M",
        disk: true,
        net: true,
        vsock: true,
        words: RANDOM,
        options: &["--balloon"],
        ..Default::default()
    };
    let mut journey = LabJourney::start(lab, guest)?;
    let moves = count(2)?;
    for number in 1..=moves {
        let on = || format!("move {number} of {moves}");
        let mut program = connect(&journey).with_context(on)?;
        echo(&mut program, 64 << 10).with_context(on)?;
        // The balloon grows or shrinks while the guest moves.
        let target = if number % 2 == 1 { "96M" } else { "0M" };
        journey.godwit_json("balloon", &[target]).with_context(on)?;
        journey.hop(&VERIFIED).with_context(on)?;
        // Its streams to programs of a host end with its stay there, all others go on.
        program.write_stdin(b"end\n")?;
        program.wait_line(|line| line == "ended", PATIENCE)?;
        let mut again = connect(&journey).with_context(on)?;
        echo(&mut again, 64 << 10).with_context(on)?;
        let streamed = journey.check_stream().with_context(on)?;
        journey.check_growing("random").with_context(on)?;
        let verified = journey.verify().with_context(on)?;
        let (pages, files) = (verified.number("pages")?, verified.number("files")?);
        let balloon = journey.godwit_json("balloon", &[])?;
        println!(
            "move {number} of {moves}: {streamed} bytes came back, {pages} pages and {files} files verified, \
             {} MiB in the balloon",
            balloon["actual_mib"]
        );
        drop(again);
    }
    drop(journey.power_off()?);
    drop(peer);
    tool(&["e2fsck", "-fn", &image])?;
    directory.close().context("the disk's folder")
}
