use migration::{Decision, Migrated, Remains};
use tokio::sync::oneshot;

use super::*;
use crate::api::{Resolution, Verdict};
use crate::rundir::ApiSocket;

struct Rig {
    supervisor: Supervisor,
    server: ApiServer,
    _directory: tempfile::TempDir,
}

fn rig() -> Rig {
    let directory = tempfile::tempdir().unwrap();
    let socket = ApiSocket::bind(&directory.path().join("vm.sock")).unwrap();
    let console = Console::detached();
    let supervisor = Supervisor::new("vm", console.clone());
    let server = ApiServer::start(socket, supervisor.handle(), console).unwrap();
    Rig {
        supervisor,
        server,
        _directory: directory,
    }
}

fn job() -> Job {
    Job::start("job", Arc::new(Control::new().unwrap()), || {}).unwrap()
}

#[test]
fn a_job_that_hangs_is_left_alone_in_the_end() {
    let (back, hangs) = mpsc::channel::<()>();
    let control = Arc::new(Control::new().unwrap());
    let (entered, inside) = mpsc::channel();
    let hang = move || {
        let _ = entered.send(());
        let _ = hangs.recv();
    };
    let job = Job::start("job", control.clone(), hang).unwrap();
    inside.recv().unwrap();
    job.end_within(Duration::from_millis(20));
    assert!(control.is_cancelled());
    drop(back);

    let ended = Arc::new(());
    let seen = ended.clone();
    let work = move || drop(seen);
    Job::start("job", control, work)
        .unwrap()
        .end_within(Duration::from_secs(60));
    assert_eq!(Arc::strong_count(&ended), 1, "waited for");
}

fn ended(outcome: &str) -> Box<Ended> {
    let text = format!(
        r#"{{"outcome":"{outcome}","error":"why","mode":"precopy","budget_ms":1,"budget_kept":false,
        "predicted_downtime_ms":null,"downtime_ms":null,"downtime":{{"pause_ms":0,"drain_ms":0,"final_log_ms":0,
        "final_copy_ms":0,"state_ms":0,"restore_ms":0,"commit_ms":0,"resume_ms":0}},"predicted_total_ms":null,
        "total_ms":1,"rounds":[],"bytes_sent":0,"pages_sent":0,"pages_zero":0,"streams":1,"data_path":"gather",
        "verify_ms":0,"memory_digest":null}}"#
    );
    let migrated = Migrated {
        report: serde_json::from_str(&text).unwrap(),
        doubt: None,
        untold: None,
        remains: Remains::default(),
    };
    Box::new(Ended {
        migrated,
        source: None,
    })
}

#[test]
fn a_job_that_receives_is_called_off_and_has_the_last_word() {
    let stop = || {
        Event::Request(Request::Stop {
            force: false,
            reply: oneshot::channel().0,
        })
    };
    for ask in [stop(), Event::Terminate] {
        let mut rig = rig();
        let job = job();
        let control = job.control.clone();
        rig.supervisor.life = Some(Life::Receiving(job));
        assert!(rig.supervisor.handle_event(ask, &rig.server).is_none());
        assert!(control.is_cancelled());
        // A second time is no reason either to throw away what may have arrived.
        assert!(
            rig.supervisor
                .handle_event(Event::Terminate, &rig.server)
                .is_none()
        );
        let last = Event::ReceiveFailed("cancelled".into());
        let ending = rig.supervisor.handle_event(last, &rig.server);
        assert!(matches!(ending, Some(Ok(Ending::Stopped))));
    }
}

#[test]
fn a_receive_that_fails_by_itself_is_a_failure() {
    let mut rig = rig();
    rig.supervisor.life = Some(Life::Receiving(job()));
    let ending = rig
        .supervisor
        .handle_event(Event::ReceiveFailed("no sockets".into()), &rig.server);
    assert!(matches!(ending, Some(Err(SupervisorError::Receive(_)))));
}

#[test]
fn the_end_of_the_vm_leaves_no_migration_without_a_report() {
    for (outcome, end) in [
        ("moved", Ending::Moved),
        ("cancelled", Ending::Stopped),
        ("in-doubt", Ending::Stopped),
    ] {
        let mut rig = rig();
        let (reports, mut feed) = broadcast::channel(1);
        rig.supervisor.migration = Some(MigrationJob { job: job(), reports });
        let handle = rig.supervisor.handle();
        handle.send(Event::Escape);
        handle.send(Event::MigrationEnded(ended(outcome)));
        let ending = rig.supervisor.settle(Ok(Ending::Stopped));
        assert_eq!(ending.unwrap(), end);
        let error = feed.try_recv().unwrap().error.unwrap();
        assert_eq!(
            error.contains("ended meanwhile"),
            end == Ending::Stopped,
            "{error}"
        );
    }
}

fn asked(rig: &mut Rig, decision: Option<Decision>) -> oneshot::Receiver<Result<Resolution, Refusal>> {
    let (reply, answer) = oneshot::channel();
    let request = Event::Request(Request::Resolve(decision, reply));
    assert!(rig.supervisor.handle_event(request, &rig.server).is_none());
    answer
}

#[test]
fn without_doubt_there_is_nothing_to_resolve() {
    let mut rig = rig();
    let mut answer = asked(&mut rig, Some(Decision::Run));
    assert!(matches!(answer.try_recv().unwrap(), Err(Refusal::NoDoubt)));

    // A receiver whose source has not even come.
    rig.supervisor.life = Some(Life::Receiving(job()));
    for decision in [None, Some(Decision::Run), Some(Decision::Discard)] {
        let mut answer = asked(&mut rig, decision);
        assert!(matches!(
            answer.try_recv().unwrap(),
            Err(Refusal::NothingToDecide)
        ));
    }
}

#[test]
fn a_decision_is_answered_by_what_the_receiving_job_does() {
    let mut rig = rig();
    rig.supervisor.life = Some(Life::Receiving(job()));
    let decide = |rig: &mut Rig, decision| {
        let (reply, answer) = oneshot::channel();
        let until = Instant::now() + Duration::from_secs(3600);
        rig.supervisor.resolving = Some(Resolving::Deciding {
            decision,
            reply,
            until,
        });
        answer
    };
    for (decision, as_asked) in [(Decision::Discard, true), (Decision::Run, false)] {
        let mut answer = decide(&mut rig, decision);
        assert!(rig.supervisor.deciding_until().is_some());
        // One at a time.
        let mut second = asked(&mut rig, None);
        assert!(matches!(second.try_recv().unwrap(), Err(Refusal::Resolving)));
        let failed = Event::AttemptFailed("discarded".into());
        assert!(rig.supervisor.handle_event(failed, &rig.server).is_none());
        let resolution = answer.try_recv().unwrap().unwrap();
        assert_eq!(
            (resolution.verdict, resolution.as_asked),
            (Verdict::Discarded, as_asked)
        );
        assert!(rig.supervisor.deciding_until().is_none());
    }
    let mut answer = decide(&mut rig, Decision::Run);
    rig.supervisor.machine_came(None);
    assert_eq!(answer.try_recv().unwrap().unwrap().verdict, Verdict::Here);
    let mut answer = decide(&mut rig, Decision::Run);
    rig.supervisor.give_up_deciding();
    assert!(matches!(
        answer.try_recv().unwrap(),
        Err(Refusal::NothingToDecide)
    ));
}
