//! One attempt with a fault, and what must hold after it.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use fault_proxy::{FaultPlan, FaultPoint, FramePart, Proxy};

use super::super::fake::FakeSource;
use super::harm::Harm;
use super::setup::Setup;
use super::there::{ArrivedThere, There};
use crate::*;

/// Costs time only where something is broken.
const PATIENCE: Duration = Duration::from_secs(20);

/// What an attempt showed.
pub(super) struct AttemptEnded {
    pub(super) report: Report,
    /// What the destination answered to a source in doubt.
    pub(super) answer: Option<Answer>,
    /// Every message that came.
    pub(super) seen: Vec<FaultPoint>,
    /// Whether the fault met its message.
    pub(super) struck: bool,
}

/// Both sides of an attempt and what is between them.
struct AttemptRig<'a> {
    setup: &'a Setup,
    harm: Option<Harm>,
    options: MigrateOptions,
    source: FakeSource,
    here: Arc<Control>,
    there: There,
    proxy: Proxy,
    _dir: tempfile::TempDir,
}

/// Runs an attempt with a fault at `point`, and checks everything that must hold afterwards.
pub(super) fn attempt(setup: &Setup, harm: Option<(&FaultPoint, Harm)>) -> AttemptEnded {
    let mut rig = AttemptRig::new(setup, harm);
    let to = rig.proxy.address().to_string().parse().unwrap();
    let Migrated { report, doubt, .. } = migrate(&mut rig.source, &to, &rig.options, &rig.here);
    let mut answer = None;
    assert_eq!(doubt.is_some(), report.outcome == Outcome::InDoubt, "{report:?}");
    match report.outcome {
        Outcome::Moved => rig.check_moved(&report),
        Outcome::Failed => rig.check_stayed(&report),
        Outcome::Cancelled => {
            assert!(
                rig.harm.is_some_and(Harm::cancels),
                "nobody cancelled: {report:?}"
            );
            rig.check_stayed(&report);
        }
        Outcome::InDoubt => answer = Some(rig.resolve(&report, &doubt.unwrap())),
    }
    AttemptEnded {
        report,
        answer,
        seen: rig.proxy.seen(),
        struck: rig.proxy.struck() > usize::from(setup.first.is_some()),
    }
}

impl<'a> AttemptRig<'a> {
    fn new(setup: &'a Setup, harm: Option<(&FaultPoint, Harm)>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listen = |name: &str| match setup.handover {
            true => format!("unix:{}", dir.path().join(name).display()),
            false => "tcp:127.0.0.1:0".into(),
        };
        let options = setup.options();
        let here = Arc::new(Control::new().unwrap());
        let there = There::start(&listen("there"), &options, setup.destination());
        let first = setup.first.map(|(connection, direction, message, harm)| {
            let message = message.into();
            let point = FaultPoint {
                connection,
                direction,
                message,
                occurrence: 0,
            };
            (point, harm)
        });
        let plans = first
            .into_iter()
            .chain(harm.map(|(point, harm)| (point.clone(), harm)))
            .map(|(point, harm)| FaultPlan {
                point,
                fault: harm.fault(&here, &there.control),
            });
        let to = there.endpoint.to_string().parse().unwrap();
        let proxy = Proxy::start(&listen("proxy").parse().unwrap(), &to, plans.collect()).unwrap();
        Self {
            setup,
            harm: harm.map(|(_, harm)| harm),
            options,
            source: setup.source(),
            here,
            there,
            proxy,
            _dir: dir,
        }
    }

    /// The guest runs there, whole, and nowhere else.
    fn check_moved(&self, report: &Report) {
        let ArrivedThere {
            destination, result, ..
        } = self.there.wait();
        result.unwrap();
        assert!(self.source.guest.is_held() && !self.source.locked && destination.running);
        let guest = destination.guest.as_ref().unwrap();
        assert_eq!(guest.registers(), self.source.guest.registers());
        guest.check_stamps();
        if let (Some(ours), Some(theirs)) = (&self.source.disk, &destination.blank) {
            assert!(ours.content() == theirs.content(), "disks differ: {report:?}");
        }
        if let Some(downtime_ms) = report.downtime_ms {
            let terms = report.downtime.total_ms();
            assert!((terms - downtime_ms).abs() < 1e-6, "{report:?}");
            assert!(downtime_ms + report.verify_ms <= report.total_ms, "{report:?}");
        } else if report.outcome == Outcome::Moved {
            let said = report.error.as_deref().unwrap_or_default();
            assert!(
                said.contains("how long the guest stood still is not known"),
                "{report:?}"
            );
        }
    }

    /// The guest runs here as before, and can be moved from here, to the same destination if that is able.
    fn check_stayed(&mut self, report: &Report) {
        assert!(report.error.is_some() && report.downtime_ms.is_none() && !report.budget_kept);
        self.source.assert_runs();
        self.source.faults.clear();
        let waits = report.error.as_ref().unwrap().contains("may wait for \"go\"");
        let able = self.setup.destination.is_none() && self.harm != Some(Harm::CancelDestination);
        let other = (!able).then(|| {
            self.there.control.cancel();
            if waits {
                self.there.control.decide(Decision::Discard);
            }
            let ArrivedThere {
                destination, result, ..
            } = self.there.wait();
            assert!(result.is_err() && destination.guest.is_none(), "{result:?}");
            There::start("tcp:127.0.0.1:0", &self.options, Default::default())
        });
        if let Some(other) = other {
            self.there = other;
        }
        let report = self.move_after_all(waits);
        self.check_moved(&report);
    }

    /// Migrates without faults until it is done: the destination may still be busy with what went before.
    fn move_after_all(&mut self, decide: bool) -> Report {
        let options = MigrateOptions {
            io_timeout: Duration::from_secs(5),
            step_timeout: Duration::from_secs(10),
            ..self.options.clone()
        };
        let until = Instant::now() + PATIENCE;
        loop {
            if decide {
                self.there.control.decide(Decision::Discard);
            }
            let control = Control::new().unwrap();
            let report = migrate(&mut self.source, &self.there.endpoint, &options, &control).report;
            if report.outcome == Outcome::Moved {
                return report;
            }
            assert_eq!(report.outcome, Outcome::Failed, "afterwards: {report:?}");
            self.source.assert_runs();
            assert!(Instant::now() < until, "afterwards, for {PATIENCE:?}: {report:?}");
            // There is no event for the end of the destination's attempt before.
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// The guest is held here until the destination has been asked, over a network that works again.
    fn resolve(&mut self, report: &Report, doubt: &Doubt) -> Answer {
        assert!(self.source.guest.is_held() && !self.source.locked, "{report:?}");
        let answer = self.ask(doubt);
        match &answer {
            Answer::Runs => self.check_moved(report),
            Answer::GaveUp => {
                self.source.resume().unwrap();
                self.source.stop_dirty_log().unwrap();
                if self.setup.disks {
                    self.source.stop_mirror().unwrap();
                }
                self.source.throttle(&[0.0]).unwrap();
                self.check_stayed(report);
            }
            Answer::Kept { .. } => {
                let ArrivedThere {
                    destination, result, ..
                } = self.there.wait();
                assert!(result.unwrap_err().is_committed());
                assert!(destination.guest.is_some() && !destination.running);
            }
            Answer::Unknown => panic!("forgotten: {report:?}"),
        }
        answer
    }

    /// Asks until there is an answer: the fault may strike a question.
    fn ask(&self, doubt: &Doubt) -> Answer {
        let until = Instant::now() + PATIENCE;
        let mut garbled = self.harm == Some(Harm::Corrupt(FramePart::Content));
        loop {
            self.proxy.heal();
            match doubt.ask(Duration::from_secs(1)) {
                // A question about another migration.
                Ok(Answer::Unknown) if garbled => garbled = false,
                Ok(answer) => return answer,
                Err(error) => assert!(Instant::now() < until, "no answer: {error}"),
            }
        }
    }
}
