//! A guest whose console is the virtio one, with a channel beside it.

use super::*;

#[test]
fn a_console_and_its_port_of_a_debian_guest() -> Result<()> {
    const MUCH: usize = 512 << 10;
    let payload = payload(&Fixtures::from_env()?).with("bin/vsock-echo", env!("CARGO_BIN_EXE_vsock-echo"));
    let lab = Lab::builder(payload).hosts(2).start()?;
    // All of the agent's output and input goes through it.
    let guest = StockGuest {
        console: true,
        ..Default::default()
    };
    let mut journey = LabJourney::start(lab, guest)?;
    journey.event("port")?;
    for number in 1..=2 {
        let on = || format!("move {number}");
        let mut program = start_echo(&journey, StockGuest::PORT, "-").with_context(on)?;
        echo(&mut program, MUCH).with_context(on)?;
        journey.hop(&VERIFIED).with_context(on)?;
        program.write_stdin(b"end\n")?;
        program.wait_line(|line| line == "ended", PATIENCE)?;
        wait_for_ends(&mut journey, 1).with_context(on)?;
        let mut again = start_echo(&journey, StockGuest::PORT, "-").with_context(on)?;
        echo(&mut again, MUCH).with_context(on)?;
        drop(again);
        wait_for_ends(&mut journey, 2).with_context(on)?;
        journey.verify().with_context(on)?;
    }
    journey.power_off().map(drop)
}

/// Waits until the guest has said so often on its host that the program at the port's other side has gone.
fn wait_for_ends(journey: &mut LabJourney, count: usize) -> Result<()> {
    journey.wait_for_words("port name=echo end=eof", count)
}
