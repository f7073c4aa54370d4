//! The supervisor with machines that never were: requests, doubts, and threads that fail.

use api::rundir::ApiSocket;
use api::{Resolution, Resolved};
use migration::{Control, Decision, Migrated, Remains};
use threads::Role;
use tokio::sync::oneshot;

use super::*;

struct SupervisorRig {
    supervisor: Supervisor,
    server: ApiServer,
    _directory: tempfile::TempDir,
}

fn rig() -> SupervisorRig {
    let directory = tempfile::tempdir().unwrap();
    let socket = ApiSocket::bind(&directory.path().join("vm.sock")).unwrap();
    let console = Console::detached();
    let supervisor = Supervisor::new("vm", console.clone());
    let server = ApiServer::start(socket, supervisor.handle(), console).unwrap();
    SupervisorRig {
        supervisor,
        server,
        _directory: directory,
    }
}

fn job() -> Job {
    Job::start(Role::Receive, "job", Arc::new(Control::new().unwrap()), || {}).unwrap()
}

#[test]
fn a_job_that_hangs_is_left_alone_in_the_end() {
    let (back, hangs) = mpsc::channel::<()>();
    let (entered, inside) = mpsc::channel();
    let hang = move || {
        let _ = entered.send(());
        let _ = hangs.recv();
    };
    let worker = Worker::start(Role::Receive, "job", hang).unwrap();
    inside.recv().unwrap();
    worker.join_within(Duration::from_millis(20));
    drop(back);

    let ended = Arc::new(());
    let seen = ended.clone();
    let control = Arc::new(Control::new().unwrap());
    Job::start(Role::Receive, "job", control.clone(), move || drop(seen))
        .unwrap()
        .end();
    assert!(control.is_cancelled());
    assert_eq!(Arc::strong_count(&ended), 1, "waited for");
}

fn ended(outcome: &str) -> Box<EndedMigration> {
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
        unanswered: None,
        remains: Remains::default(),
    };
    Box::new(EndedMigration {
        migrated,
        source: None,
    })
}

#[test]
fn a_receiving_job_is_cancelled_and_its_event_decides() {
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
        let ending = rig.supervisor.settle_migration(Ok(Ending::Stopped));
        assert_eq!(ending.unwrap(), end);
        let error = feed.try_recv().unwrap().error.unwrap();
        assert_eq!(
            error.contains("ended meanwhile"),
            end == Ending::Stopped,
            "{error}"
        );
    }
}

fn asked(
    rig: &mut SupervisorRig,
    decision: Option<Decision>,
) -> oneshot::Receiver<Result<Resolution, Refusal>> {
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
    let decide = |rig: &mut SupervisorRig, decision| {
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
            (Resolved::Discarded, as_asked)
        );
        assert!(rig.supervisor.deciding_until().is_none());
    }
    let mut answer = decide(&mut rig, Decision::Run);
    rig.supervisor.machine_arrived(None);
    assert_eq!(answer.try_recv().unwrap().unwrap().verdict, Resolved::Here);
    let mut answer = decide(&mut rig, Decision::Run);
    rig.supervisor.refuse_decision();
    assert!(matches!(
        answer.try_recv().unwrap(),
        Err(Refusal::NothingToDecide)
    ));
}

fn failure(role: Role) -> Event {
    Event::ThreadFailed(Failure {
        role,
        name: "thread".into(),
        reason: "panicked: planted".into(),
    })
}

#[test]
fn a_thread_that_the_guest_needs_takes_the_vm_along_with_an_error() {
    for role in [Role::Devices, Role::Vcpu, Role::FaultHandler, Role::Pages] {
        let mut rig = rig();
        let ending = rig.supervisor.handle_event(failure(role), &rig.server);
        assert!(
            matches!(ending, Some(Err(SupervisorError::Thread(_)))),
            "{role:?}"
        );
    }
    for role in [
        Role::Console,
        Role::Input,
        Role::Log,
        Role::Stream,
        Role::Greeting,
        Role::Acceptor,
    ] {
        let mut rig = rig();
        assert!(
            rig.supervisor.handle_event(failure(role), &rig.server).is_none(),
            "{role:?}"
        );
        assert_eq!(
            rig.supervisor.settle_failure(Ok(Ending::Stopped)).unwrap(),
            Ending::Stopped
        );
    }
}

#[test]
fn a_receiver_without_an_acceptor_ends_with_an_error_unless_a_guest_comes() {
    let mut rig = rig();
    let job = job();
    let control = job.control.clone();
    rig.supervisor.life = Some(Life::Receiving(job));
    assert!(
        rig.supervisor
            .handle_event(failure(Role::Acceptor), &rig.server)
            .is_none()
    );
    assert!(control.is_cancelled());
    let last = Event::ReceiveFailed("called off".into());
    let ending = rig.supervisor.handle_event(last, &rig.server).unwrap();
    let ending = rig.supervisor.settle_failure(ending);
    assert!(matches!(ending, Err(SupervisorError::Thread(_))));
    assert_eq!(
        rig.supervisor.settle_failure(Ok(Ending::Moved)).unwrap(),
        Ending::Moved
    );
}

#[test]
fn the_api_is_served_again_and_the_vm_ends_if_it_cannot_be() {
    let mut rig = rig();
    let ending = loop {
        if let Some(ending) = rig.supervisor.handle_event(failure(Role::Api), &rig.server) {
            break ending;
        }
    };
    let ending = rig.supervisor.settle_failure(ending);
    assert!(matches!(ending, Err(SupervisorError::Thread(_))));
}

#[test]
fn a_client_gets_an_error_if_the_question_fails() {
    let mut rig = rig();
    let (reply, mut answer) = oneshot::channel();
    rig.supervisor.resolving = Some(Resolving::Asking {
        decision: None,
        reply,
    });
    assert!(
        rig.supervisor
            .handle_event(failure(Role::Resolve), &rig.server)
            .is_none()
    );
    assert!(answer.try_recv().unwrap().is_err());
    assert!(rig.supervisor.resolving.is_none());
}

#[test]
fn a_question_whose_thread_fails_leaves_room_for_another() {
    let mut rig = rig();
    rig.supervisor.withdrawals.asked = 4;
    assert!(
        rig.supervisor
            .handle_event(failure(Role::Withdraw), &rig.server)
            .is_none()
    );
    assert_eq!(rig.supervisor.withdrawals.asked, 3);
}

#[test]
fn events_of_a_machine_that_was_replaced_do_not_count() {
    let mut rig = rig();
    let sinks = [rig.supervisor.event_sink(), rig.supervisor.event_sink()];
    for (sink, counts) in sinks.iter().zip([false, true]) {
        sink(MachineEvent::Exit(GuestExit::PowerOff));
        let event = rig.supervisor.events.try_recv().unwrap();
        let ending = rig.supervisor.handle_event(event, &rig.server);
        assert_eq!(ending.is_some(), counts);
    }
}
