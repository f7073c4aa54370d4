//! Any fault at any message of a migration of a real guest: the guest ends up in one place, or a side is in doubt, and
//! `godwit resolve` ends the doubt.

#[path = "any/dependent.rs"]
mod dependent;
#[path = "any/harm.rs"]
mod harm;
#[path = "any/receiver.rs"]
mod receiver;

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use fault_proxy::{FaultPlan, FaultPoint, NetworkPace, Proxy};
use migration::Outcome;
use serde_json::Value;
use tests::{
    BareGuest, Finished, Journey, Migration, PATIENCE, TestHost, TestProcess, Vm, count, wait_until,
};

use self::dependent::{Dependent, DependentDisk};
use self::harm::{HARMS, InjectedHarm};
use self::receiver::{FaultReceiver, LOGS, ReceiverLog};
use super::{ANY_PORT, Moments};

const VERIFIED: [&str; 3] = ["--on-miss", "switch", "--verify"];

/// What became of the guest.
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
    /// What the guest needs was taken away before the switch, and its VM said so and ended.
    EndedWithoutIt,
}

#[test]
fn any_fault_at_any_message() -> Result<()> {
    let faults = count(12)?;
    let mut moments = Moments::seeded()?;
    let mut journey = Some(begin()?);
    let points = points(journey.as_mut().context("no guest")?)?;
    let mut fates = BTreeMap::<_, u32>::new();
    for number in 1..=faults {
        let harm = *moments.choose(&HARMS);
        // Every other one at the end, where it is decided who has the guest. A network that trickles is one for pauses.
        let among = if number % 2 == 0 && harm != InjectedHarm::Trickle {
            &points[..]
        } else {
            last_words(&points)
        };
        let (point, log) = (moments.choose(among).clone(), *moments.choose(&LOGS));
        let guest = match (harm, journey.take()) {
            (InjectedHarm::Lose(thing), _) => Dependent::on(thing)?,
            (_, Some(guest)) => Dependent::on_nothing(guest),
            (_, None) => Dependent::on_nothing(begin()?),
        };
        let what = format!("{number} of {faults}: {harm:?} at {point}, log {log:?}");
        let strike = Strike::new(guest, &point, harm, log).with_context(|| what.clone())?;
        let (fate, left) = strike.run().with_context(|| what.clone())?;
        println!("{what}: {fate:?}");
        *fates.entry(fate).or_default() += 1;
        journey = left;
    }
    println!("{faults} faults: {fates:?}");
    Ok(())
}

fn begin() -> Result<Journey> {
    Journey::start(TestHost::new()?, &BareGuest::default(), &[])
}

/// The messages of a migration without faults: of those that come often on a connection, the first and the last.
fn points(journey: &mut Journey) -> Result<Vec<FaultPoint>> {
    let (receiver, endpoint) = journey.receiver(ANY_PORT)?;
    let proxy = proxy(&endpoint, Vec::new())?;
    journey.hop_to(receiver, &proxy.address().to_string(), &VERIFIED)?;
    let seen = proxy.seen();
    let like = |a: &FaultPoint, b: &FaultPoint| {
        (a.connection, a.direction, &a.message) == (b.connection, b.direction, &b.message)
    };
    let last = |point: &FaultPoint| seen.iter().rfind(|other| like(point, other)) == Some(point);
    Ok(seen
        .iter()
        .filter(|point| point.occurrence == 0 || last(point))
        .cloned()
        .collect())
}

/// Those of the points from the machine's state on.
fn last_words(points: &[FaultPoint]) -> &[FaultPoint] {
    let at = points.iter().position(|point| point.message == "state");
    &points[at.unwrap_or(0)..]
}

fn proxy(endpoint: &str, plans: Vec<FaultPlan>) -> Result<Proxy> {
    Ok(Proxy::start(&ANY_PORT.parse()?, &endpoint.parse()?, plans)?)
}

/// A migration with a fault under way.
struct Strike {
    journey: Journey,
    receiver: FaultReceiver,
    proxy: Proxy,
    harm: InjectedHarm,
    needs: Needs,
}

/// What the guest needs, and has lost by then.
struct Needs {
    /// Its disk, which has shrunk.
    disk: Option<DependentDisk>,
    /// The program that fills its pages, until this is dropped.
    _handler: Option<TestProcess>,
}

impl Strike {
    fn new(guest: Dependent, point: &FaultPoint, harm: InjectedHarm, log: ReceiverLog) -> Result<Self> {
        let Dependent {
            journey,
            receiver: options,
            lose,
            disk,
            handler,
        } = guest;
        let receiver = FaultReceiver::start(&journey, &options, log)?;
        let fault = harm.fault(&journey.vm, &receiver.vm, lose);
        let point = point.clone();
        let proxy = proxy(&receiver.endpoint, vec![FaultPlan { point, fault }])?;
        Ok(Self {
            journey,
            receiver,
            proxy,
            harm,
            needs: Needs {
                disk,
                _handler: handler,
            },
        })
    }

    /// Migrates, and checks where the guest is. What is left of it goes on.
    fn run(self) -> Result<(Fate, Option<Journey>)> {
        let to = self.proxy.address().to_string();
        let migration = self.journey.vm.start_migration(&to, self.harm.arguments())?;
        let migration = Migration::of(migration.finish(PATIENCE)?)?;
        let struck = self.proxy.struck() > 0;
        self.proxy.pace(NetworkPace::Free);
        self.proxy.heal();
        let source_died = struck && matches!(self.harm, InjectedHarm::KillSource(_));
        let destination_died = struck && matches!(self.harm, InjectedHarm::KillDestination(_));
        match migration.code {
            _ if source_died => self.without_source(Fate::DiedWithSource),
            Some(0) if destination_died => {
                // Moved to a process that is dead now, or that the kill has not reached yet.
                Ok((Fate::DiedWithDestination, None))
            }
            Some(0) => self.arrived(Fate::Moved),
            _ if let (true, Some(reason)) = (struck, self.memory_is_gone()) => {
                self.ended_without_memory(reason)
            }
            Some(1) => self.stayed(migration, destination_died),
            Some(3) => self.in_doubt(destination_died),
            _ => bail!("got {migration:?}"),
        }
    }

    /// What the VM says where the harm is one to its memory.
    fn memory_is_gone(&self) -> Option<&'static str> {
        match self.harm {
            InjectedHarm::Lose(thing) => thing.gone(),
            _ => None,
        }
    }

    /// A guest whose memory has gone does not run on with something else: its VM ends, and says why.
    fn ended_without_memory(mut self, reason: &str) -> Result<(Fate, Option<Journey>)> {
        let process = &mut self.journey.vm.process;
        // The VM may not have needed the part that is gone. It does now; if it has ended, the command has no effect.
        let _ = process.send(b"v");
        process.stderr().wait_end(PATIENCE)?;
        let said = process.stderr().text();
        ensure!(said.contains(reason), "expected {reason:?}, got {said:?}");
        self.without_source(Fate::EndedWithoutIt)
    }

    fn arrived(self, fate: Fate) -> Result<(Fate, Option<Journey>)> {
        let mut journey = self.journey;
        journey.arrive(self.receiver.vm)?;
        check(&mut journey)?;
        // The next receiver does not have its disk.
        Ok((fate, Some(journey).filter(|_| self.needs.disk.is_none())))
    }

    /// The guest runs on here, and can move, to the same receiver if that is alive.
    fn stayed(self, migration: Migration, destination_died: bool) -> Result<(Fate, Option<Journey>)> {
        let error = migration.stayed(Outcome::Failed)?;
        self.journey.vm.check_running()?;
        if error.contains("may wait for \"go\"")
            && !destination_died
            && phase(&self.receiver.vm)? == "stop-and-copy"
        {
            // `resolve` is refused where the destination has ended the doubt by itself meanwhile.
            resolve(&self.receiver.vm, &["--discard"])?;
        }
        self.moves_after_all(Fate::Stayed, destination_died)
    }

    fn moves_after_all(self, fate: Fate, destination_died: bool) -> Result<(Fate, Option<Journey>)> {
        let Self {
            mut journey,
            receiver,
            needs,
            ..
        } = self;
        if let Some(disk) = &needs.disk {
            disk.mend()?;
        }
        if destination_died {
            drop(receiver);
            journey.hop(&VERIFIED)?;
        } else {
            wait_until_idle(&receiver.vm)?;
            journey.hop_to(receiver.vm, &receiver.endpoint, &VERIFIED)?;
        }
        check(&mut journey)?;
        Ok((fate, Some(journey).filter(|_| needs.disk.is_none())))
    }

    fn in_doubt(self, destination_died: bool) -> Result<(Fate, Option<Journey>)> {
        let vm = &self.journey.vm;
        ensure!(vm.state()? == "In doubt", "got {}", vm.status()?);
        vm.godwit("resume", &[])?.expect_code(1)?;
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

    /// The source is dead: the guest runs at the destination, waits there for a word, or went with its source, which
    /// is the fate `lost`.
    fn without_source(self, lost: Fate) -> Result<(Fate, Option<Journey>)> {
        let Self {
            journey, receiver, ..
        } = self;
        let FaultReceiver { vm, endpoint, .. } = receiver;
        let host = journey.host.clone();
        let mut fate = Fate::Moved;
        let mut deadline = PATIENCE.begin();
        while vm.state()? == "Receiving" {
            ensure!(
                deadline.left().is_some(),
                "the destination still waits: {}",
                vm.status()?
            );
            match phase(&vm)?.as_str() {
                // The receiver has ended the attempt, or it never began.
                "waiting" | "done" => {
                    drop(journey);
                    let other = BareGuest::default().boot(&host, "other", &[])?;
                    let mut other = Journey::of(host, other);
                    other.hop_to(vm, &endpoint, &VERIFIED)?;
                    check(&mut other)?;
                    return Ok((lost, Some(other)));
                }
                "stop-and-copy" if resolve(&vm, &["--run"])?.code == Some(0) => fate = Fate::OutlivedSource,
                _ => {}
            }
        }
        let mut journey = journey.orphan(vm)?;
        check(&mut journey)?;
        Ok((fate, None))
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
    // The guest runs before "farewell" has come, and its console's input is connected after that.
    wait_until("the guest to be taken over", || {
        Ok(journey.vm.state()? != "Receiving")
    })?;
    journey.verify()?;
    journey.check_life().map(drop)
}
