//! Any fault at any message of a migration of a real guest: it ends up in one place, or a side that does not know
//! says so, and `godwit resolve` finds out.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use fault_proxy::{Fault, Part, Plan, Point, Proxy, When};
use migration::Outcome;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tests::{BareGuest, Finished, Host, Journey, Migration, PATIENCE, Vm, count, wait_until};

use super::{ANY_PORT, Moments};

const VERIFIED: [&str; 3] = ["--on-miss", "switch", "--verify"];

/// What happens when the message passes.
#[derive(Clone, Copy, Debug)]
enum Harm {
    KillSource(When),
    KillDestination(When),
    Drop,
    Truncate,
    Corrupt,
    Duplicate,
    Reset,
    Stall,
    CutAll,
}

const HARMS: [Harm; 11] = [
    Harm::KillSource(When::Before),
    Harm::KillSource(When::After),
    Harm::KillDestination(When::Before),
    Harm::KillDestination(When::After),
    Harm::Drop,
    Harm::Truncate,
    Harm::Corrupt,
    Harm::Duplicate,
    Harm::Reset,
    Harm::Stall,
    Harm::CutAll,
];

/// How it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    Moved,
    Stayed,
    /// In doubt, until `resolve` found it at the destination.
    FoundThere,
    /// In doubt, until `resolve` let it run at the source.
    TakenBack,
    /// Its source died before the switch, and the guest with it.
    DiedWithSource,
    /// Its source died when the destination was ready; the operator let it run there.
    OutlivedSource,
    /// It had moved when its destination died.
    DiedWithDestination,
}

#[test]
fn any_fault_at_any_message() -> Result<()> {
    let faults = count(12)?;
    let mut moments = Moments::seeded()?;
    let mut journey = Some(begin()?);
    let points = points(journey.as_mut().context("no guest")?)?;
    let mut fates = BTreeMap::<_, u32>::new();
    for number in 1..=faults {
        // Every other one at the end, where it is decided who has the guest.
        let among = if number % 2 == 0 {
            &points[..]
        } else {
            last_words(&points)
        };
        let (point, harm) = (moments.choose(among).clone(), *moments.choose(&HARMS));
        let guest = match journey.take() {
            Some(guest) => guest,
            None => begin()?,
        };
        let strike = Strike::new(guest, &point, harm)?;
        let (fate, left) = strike
            .run()
            .with_context(|| format!("{number} of {faults}: {harm:?} at {point}"))?;
        println!("{number} of {faults}: {harm:?} at {point}: {fate:?}");
        *fates.entry(fate).or_default() += 1;
        journey = left;
    }
    println!("{faults} faults: {fates:?}");
    Ok(())
}

fn begin() -> Result<Journey> {
    Journey::start(Host::new()?, &BareGuest::default(), &[])
}

/// The messages of a migration without faults: of those that come often on a connection, the first and the last.
fn points(journey: &mut Journey) -> Result<Vec<Point>> {
    let (receiver, endpoint) = journey.receiver(ANY_PORT)?;
    let proxy = proxy(&endpoint, Vec::new())?;
    journey.hop_to(receiver, &proxy.address().to_string(), &VERIFIED)?;
    let seen = proxy.seen();
    let like = |a: &Point, b: &Point| {
        (a.connection, a.direction, &a.message) == (b.connection, b.direction, &b.message)
    };
    let last = |point: &Point| seen.iter().rfind(|other| like(point, other)) == Some(point);
    Ok(seen
        .iter()
        .filter(|point| point.occurrence == 0 || last(point))
        .cloned()
        .collect())
}

/// Those of the points from the machine's state on.
fn last_words(points: &[Point]) -> &[Point] {
    let at = points.iter().position(|point| point.message == "state");
    &points[at.unwrap_or(0)..]
}

fn proxy(endpoint: &str, plans: Vec<Plan>) -> Result<Proxy> {
    Ok(Proxy::start(&ANY_PORT.parse()?, &endpoint.parse()?, plans)?)
}

/// A migration with a fault under way.
struct Strike {
    journey: Journey,
    receiver: Vm,
    /// Where the receiver listens itself.
    endpoint: String,
    proxy: Proxy,
    harm: Harm,
}

impl Strike {
    fn new(journey: Journey, point: &Point, harm: Harm) -> Result<Self> {
        let (receiver, endpoint) = journey.receiver(ANY_PORT)?;
        let kill = |vm: &Vm, when| {
            let id = vm.process.id();
            Fault::Call(when, Box::new(move || kill(id)))
        };
        let fault = match harm {
            Harm::KillSource(when) => kill(&journey.vm, when),
            Harm::KillDestination(when) => kill(&receiver, when),
            Harm::Drop => Fault::Drop,
            Harm::Truncate => Fault::Truncate,
            Harm::Corrupt => Fault::Corrupt(Part::Kind),
            Harm::Duplicate => Fault::Duplicate,
            Harm::Reset => Fault::Reset,
            Harm::Stall => Fault::Stall(None),
            Harm::CutAll => Fault::CutAll,
        };
        let point = point.clone();
        let proxy = proxy(&endpoint, vec![Plan { point, fault }])?;
        Ok(Self {
            journey,
            receiver,
            endpoint,
            proxy,
            harm,
        })
    }

    /// Migrates, and checks where the guest is. What is left of it goes on.
    fn run(self) -> Result<(Fate, Option<Journey>)> {
        let to = self.proxy.address().to_string();
        let migration = Migration::of(
            self.journey
                .vm
                .start_migration(&to, &VERIFIED)?
                .finish(PATIENCE)?,
        )?;
        let struck = self.proxy.struck() > 0;
        let source_died = struck && matches!(self.harm, Harm::KillSource(_));
        let destination_died = struck && matches!(self.harm, Harm::KillDestination(_));
        match migration.code {
            _ if source_died => self.without_source(),
            Some(0) if destination_died => {
                // Moved to a process that is dead now, or that the kill has not reached yet.
                Ok((Fate::DiedWithDestination, None))
            }
            Some(0) => self.arrived(Fate::Moved),
            Some(1) => self.stayed(migration, destination_died),
            Some(3) => self.in_doubt(destination_died),
            _ => bail!("got {migration:?}"),
        }
    }

    fn arrived(self, fate: Fate) -> Result<(Fate, Option<Journey>)> {
        let mut journey = self.journey;
        journey.arrive(self.receiver)?;
        check(&mut journey)?;
        Ok((fate, Some(journey)))
    }

    /// The guest runs on here, and can move, to the same receiver if that is alive.
    fn stayed(self, migration: Migration, destination_died: bool) -> Result<(Fate, Option<Journey>)> {
        let error = migration.stayed(Outcome::Failed)?;
        self.journey.vm.check_running()?;
        if error.contains("may wait for \"go\"")
            && !destination_died
            && phase(&self.receiver)? == "stop-and-copy"
        {
            // It is refused where the destination has found out by itself meanwhile.
            resolve(&self.receiver, &["--discard"])?;
        }
        self.moves_after_all(Fate::Stayed, destination_died)
    }

    fn moves_after_all(self, fate: Fate, destination_died: bool) -> Result<(Fate, Option<Journey>)> {
        let Self {
            mut journey,
            receiver,
            endpoint,
            ..
        } = self;
        if destination_died {
            drop(receiver);
            journey.hop(&VERIFIED)?;
        } else {
            wait_until_idle(&receiver)?;
            journey.hop_to(receiver, &endpoint, &VERIFIED)?;
        }
        check(&mut journey)?;
        Ok((fate, Some(journey)))
    }

    fn in_doubt(self, destination_died: bool) -> Result<(Fate, Option<Journey>)> {
        let vm = &self.journey.vm;
        ensure!(vm.state()? == "In doubt", "got {}", vm.status()?);
        vm.godwit("resume", &[])?.expect_code(1)?;
        self.proxy.heal();
        if destination_died {
            resolve(vm, &[])?.expect_code(3)?;
            resolve(vm, &["--run"])?.expect_code(0)?;
            vm.check_running()?;
            return self.moves_after_all(Fate::TakenBack, true);
        }
        let resolved = resolve(vm, &[])?;
        resolved.expect_code(0)?;
        match verdict(&resolved)?.as_str() {
            "moved" => self.arrived(Fate::FoundThere),
            "here" => {
                vm.check_running()?;
                self.moves_after_all(Fate::TakenBack, false)
            }
            other => bail!("resolved to {other:?}: {resolved:?}"),
        }
    }

    /// The source is dead: the guest runs at the destination, waits there for a word, or died with its source.
    fn without_source(self) -> Result<(Fate, Option<Journey>)> {
        let Self {
            journey,
            receiver,
            endpoint,
            ..
        } = self;
        let host = journey.host.clone();
        let mut fate = Fate::Moved;
        let mut deadline = PATIENCE.begin();
        while receiver.state()? == "Receiving" {
            ensure!(
                deadline.left().is_some(),
                "the destination still waits: {}",
                receiver.status()?
            );
            match phase(&receiver)?.as_str() {
                // It has seen the end, or has not seen a beginning.
                "waiting" | "done" => {
                    drop(journey);
                    let other = BareGuest::default().boot(&host, "other", &[])?;
                    let mut other = Journey::of(host, other);
                    other.hop_to(receiver, &endpoint, &VERIFIED)?;
                    check(&mut other)?;
                    return Ok((Fate::DiedWithSource, Some(other)));
                }
                "stop-and-copy" if resolve(&receiver, &["--run"])?.code == Some(0) => {
                    fate = Fate::OutlivedSource
                }
                _ => {}
            }
        }
        let mut journey = journey.orphan(receiver)?;
        check(&mut journey)?;
        Ok((fate, None))
    }
}

fn kill(id: u32) {
    // It may be on its way out by itself; as a child that nobody has waited for, its number is still its own.
    if let Some(pid) = i32::try_from(id).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, Signal::KILL);
    }
}

fn resolve(vm: &Vm, arguments: &[&str]) -> Result<Finished> {
    vm.godwit("resolve", &[&["--json"], arguments].concat())
}

fn verdict(resolved: &Finished) -> Result<String> {
    let resolution: Value = serde_json::from_str(&resolved.stdout).context("resolution")?;
    Ok(resolution["verdict"].as_str().context("no verdict")?.to_owned())
}

/// Waits until a receiver has done with the attempt before.
fn wait_until_idle(receiver: &Vm) -> Result<()> {
    wait_until("the receiver to be idle", || {
        Ok(matches!(phase(receiver)?.as_str(), "waiting" | "done"))
    })
}

fn phase(receiver: &Vm) -> Result<String> {
    let status = receiver.status()?;
    let phase = status["migration"]["phase"].as_str();
    Ok(phase.map_or_else(|| "done".into(), Into::into))
}

/// The guest is well, all of its memory is, and its life has no gap.
fn check(journey: &mut Journey) -> Result<()> {
    journey.vm.check_running()?;
    // It runs before "farewell" has come, and its console's input is connected after that.
    wait_until("the guest to be taken over", || {
        Ok(journey.vm.state()? != "Receiving")
    })?;
    journey.verify()?;
    journey.check_life().map(drop)
}
