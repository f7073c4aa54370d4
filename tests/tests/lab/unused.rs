//! Memory that a guest has just freed, and that the host does not have back yet.

use super::*;

/// What the guest uses once, in MiB: three quarters of its memory.
const CHURN: u64 = 384;
/// Bytes that its move may take: 0.3 of its memory, of which it has used nearly all.
const FEW: u64 = (512 << 20) * 3 / 10;
/// What the guest has reported by then at the least, on a slow host.
const TOLD: u64 = 64 << 20;

/// Uses much memory once; the bytes that are free then.
fn churn(journey: &mut LabJourney) -> Result<u64> {
    journey.command(&format!("churn {CHURN}"), "churned")?;
    let free = journey.godwit_json("balloon", &[])?["free_memory"].as_u64();
    free.context("no statistics")
}

/// Returns once the guest has that much memory free again, but for what it may need in between.
fn wait_for_free(journey: &LabJourney, free: u64) -> Result<()> {
    const LESS: u64 = 32 << 20;
    let back = |statistics: &Value| {
        statistics["free_memory"]
            .as_u64()
            .is_some_and(|now| now + LESS >= free)
    };
    wait_for_balloon(journey, back).map(drop)
}

#[test]
fn what_a_guest_has_just_freed_is_not_copied() -> Result<()> {
    let guest = StockGuest {
        memory: "512M",
        // Debian's kernel would fill with zeroes what it allocates, also to report that it does not use it.
        words: "init_on_alloc=0",
        options: &["--balloon"],
        ..Default::default()
    };
    let mut journey = LabJourney::start(two_hosts()?, guest)?;
    for outcome in [Outcome::Cancelled, Outcome::Failed] {
        let (receiver, endpoint) = journey.receiver()?;
        let free = churn(&mut journey)?;
        let migration = journey.start_migration(&endpoint, &SLOWLY)?;
        wait_for_precopy(&journey)?;
        if outcome == Outcome::Cancelled {
            journey.lab.host(0).run(&["godwit", "cancel", "vm-0"])?;
        } else {
            drop(receiver);
        }
        ended(migration)?.stayed(outcome)?;
        wait_for_free(&journey, free).with_context(|| format!("{outcome:?}"))?;
    }
    for number in 1..=2 {
        let on = || format!("move {number}");
        let (receiver, endpoint) = journey.receiver()?;
        let free = churn(&mut journey)?;
        let report = journey.hop_to(receiver, &endpoint, &VERIFIED)?;
        let unused = report.pages_unused << 12;
        println!(
            "move {number} of a guest that has just freed {CHURN} MiB: {} bytes, and {unused} left out",
            report.bytes_sent
        );
        ensure!(
            report.bytes_sent <= FEW && unused >= TOLD,
            "move {number}: expected at most {FEW} bytes, and {TOLD} left out at least, got {report:?}"
        );
        wait_for_free(&journey, free).with_context(on)?;
        journey.verify().with_context(on)?;
    }
    journey.power_off().map(drop)
}
