//! The virtio console and the channels beside it, across moves.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use migration::Outcome;
use tests::{Echo, GuestEvent, Journey, PATIENCE, TestHost, TestTerminal, TinyGuest};

/// Several times what queues and sockets hold.
const MUCH: usize = 256 << 10;
/// Until the guest must have its terminal's size, each with a command and its answer.
const LOOKS: usize = 100;

fn option(uds: &Path) -> String {
    format!("echo={}", uds.display())
}

/// Waits until the guest says that its terminal has a size.
fn wait_for_size(journey: &mut Journey, columns: u64, rows: u64) -> Result<()> {
    let stdout = journey.vm.process.stdout().clone();
    let mut seen = (0, 0);
    for _ in 0..LOOKS {
        let mark = stdout.mark();
        journey.vm.process.send(b"size\n")?;
        let size = stdout.wait("agent: size", mark, PATIENCE, |line| {
            GuestEvent::named(line, "size")
        })?;
        seen = (size.number("columns")?, size.number("rows")?);
        if seen == (columns, rows) {
            return Ok(());
        }
    }
    bail!("expected a terminal of {columns} columns and {rows} rows, got {seen:?}")
}

/// How often the guest has said that the program at the other side of the port has gone.
fn ends(journey: &Journey) -> Result<usize> {
    Ok(journey.life()?.matches("agent: port name=echo end=eof").count())
}

/// Waits until it has said so that often.
fn wait_for_ends(journey: &Journey, count: usize) -> Result<()> {
    for _ in 0..LOOKS {
        if ends(journey)? == count {
            return Ok(());
        }
        journey.vm.next_tick()?;
    }
    bail!("expected {count} ends of streams, got {}", ends(journey)?)
}

/// One boot for all of it: where kernel code is interpreted it takes most of half a minute.
#[test]
fn a_console_and_its_ports_move() -> Result<()> {
    let host = TestHost::new()?;
    let (first, second) = (host.path("first.port"), host.path("second.port"));
    let guest = TinyGuest {
        words: "console=hvc0",
        ..Default::default()
    };
    // All of the agent's output and input goes through the virtio console.
    let options = ["--console", "virtio", "--port", &option(&first)];
    let mut journey = guest.start(host, &options)?;
    let stdout = journey.vm.process.stdout().clone();
    stdout.wait("agent: port", 0, PATIENCE, |line| GuestEvent::named(line, "port"))?;
    let mut stream = Echo::port(&first)?;
    stream.check(MUCH).context("before the move")?;
    journey.verify()?;

    let terminal = TestTerminal::attach(&journey.host, &journey.vm, 132, 43)?;
    wait_for_size(&mut journey, 132, 43)?;
    terminal.resize(61, 17)?;
    wait_for_size(&mut journey, 61, 17)?;
    drop(terminal);

    let (without, endpoint) = journey.receiver("tcp:127.0.0.1:0")?;
    let line = journey.vm.migrate(&endpoint, &[])?.stayed(Outcome::Failed)?;
    for word in ["\"console\"", "--port echo=PATH"] {
        ensure!(line.contains(word), "expected {word:?} in {line:?}");
    }
    drop(without);
    stream.check(MUCH).context("after a move that was refused")?;

    let (receiver, endpoint) = journey.receiver_with("tcp:127.0.0.1:0", &["--port", &option(&second)])?;
    ensure!(!second.exists(), "the socket is there before the guest is");
    journey.hop_to(receiver, &endpoint, &["--verify", "--on-miss", "switch"])?;
    ensure!(!first.exists(), "the source has left its socket behind");
    stream.wait_end().context("the stream of before the move")?;
    wait_for_ends(&journey, 1)?;
    let mut again = Echo::port(&second)?;
    again.check(MUCH).context("after the move")?;
    wait_for_size(&mut journey, 61, 17)?;
    let terminal = TestTerminal::attach(&journey.host, &journey.vm, 99, 33)?;
    wait_for_size(&mut journey, 99, 33)?;
    drop(terminal);

    let third = through_files(&mut journey, again)?;
    journey.vm.check_running()?;
    journey.verify()?;
    journey.end()?;
    ensure!(!third.exists(), "the end has left the socket behind");
    Ok(())
}

/// A snapshot, and a guest restored from it.
fn through_files(journey: &mut Journey, stream: Echo) -> Result<PathBuf> {
    let directory = journey.host.path("saved");
    journey.vm.snapshot(&directory, &[])?;
    let third = journey.host.path("third.port");
    let options = ["--resume", "--port", &option(&third)];
    let restored = journey.host.restore(&directory, &options)?;
    journey.arrive(restored)?;
    stream.wait_end().context("the stream of before the snapshot")?;
    // The guest's kernel does not report that a program has gone if the next one comes at once.
    wait_for_ends(journey, 2)?;
    Echo::port(&third)?.check(MUCH).context("after the restore")?;
    wait_for_ends(journey, 3)?;
    Ok(third)
}
