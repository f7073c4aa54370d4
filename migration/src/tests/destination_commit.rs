//! What decides about a machine that is ready, and what the destination answers afterwards.

use std::thread;
use std::time::{Duration, Instant};

use super::destination_hand::*;
use super::fake::{FakeDestination, PortFault};
use super::rig::control;
use crate::protocol::{AttemptOutcome, Message};
use crate::*;

const TCP: &str = "tcp:127.0.0.1:0";

#[test]
fn a_source_that_is_silent_after_ready_and_asks_gets_its_guest_back() {
    let mut receiver = receiver(TCP);
    let (received, mut hand, _) = meet(&mut receiver, |to, there| {
        let mut hand = Hand::open(to, 1);
        hand.make_ready();
        // Neither of these decides.
        there.cancel();
        assert_eq!(ask(to, [3; 16]), AttemptOutcome::Unknown);
        assert_eq!(ask(to, hand.token), AttemptOutcome::GaveUp);
        hand
    });
    assert!(matches!(received, Err(ReceiveError::GivenUp)), "{received:?}");
    // Too late: the connection belongs to no migration any more.
    let _ = hand.control.link.send(&Message::KeepAlive);
    assert_eq!(ask(receiver.endpoint(), hand.token), AttemptOutcome::GaveUp);
    assert_receives(&mut receiver);
    assert_eq!(ask(receiver.endpoint(), hand.token), AttemptOutcome::GaveUp);
}

#[test]
fn a_source_that_withdraws_while_memory_comes_is_answered_as_well() {
    let mut receiver = receiver(TCP);
    let (received, (), _) = meet(&mut receiver, |to, _| {
        let hand = Hand::open(to, 1);
        assert_eq!(ask(to, hand.token), AttemptOutcome::GaveUp);
        assert!(hand.control.refused().contains("given up"));
    });
    assert!(matches!(received, Err(ReceiveError::GivenUp)), "{received:?}");
    assert_receives(&mut receiver);
}

#[test]
fn a_source_that_is_lost_after_go_gets_the_answer_that_the_guest_runs() {
    let mut receiver = receiver(TCP);
    let (received, token, destination) = meet(&mut receiver, |to, _| {
        let mut hand = Hand::open(to, 2);
        hand.make_ready();
        hand.go();
        assert_eq!(ask(to, hand.token), AttemptOutcome::Runs);
        hand.control.hang_up();
        hand.token
    });
    assert!(
        !received.unwrap().confirmed,
        "the source has not said that it knows"
    );
    destination.guest.unwrap().check_stamps();
    assert_eq!(ask(receiver.endpoint(), token), AttemptOutcome::Runs);
}

#[test]
fn a_question_waits_for_a_guest_that_is_about_to_run() {
    let mut receiver = receiver(TCP);
    let (to, there) = (receiver.endpoint().clone(), control());
    let mut destination = FakeDestination::default();
    destination
        .faults
        .insert("resume", PortFault::Slow(Duration::from_millis(300)));
    thread::scope(|scope| {
        let acting = scope.spawn(|| {
            let mut hand = Hand::open(&to, 1);
            hand.make_ready();
            hand.go();
            while there.progress().phase != Phase::Commit {
                thread::yield_now();
            }
            ask(&to, hand.token)
        });
        receiver.receive(&mut destination, &there).unwrap();
        assert_eq!(acting.join().unwrap(), AttemptOutcome::Runs);
    });
}

#[test]
fn a_machine_that_does_not_run_is_kept_with_the_reason() {
    for fault in [PortFault::Error, PortFault::Panic] {
        let mut receiver = receiver(TCP);
        let (to, there) = (receiver.endpoint().clone(), control());
        let mut destination = FakeDestination::default();
        destination.faults.insert("resume", fault);
        let token = thread::scope(|scope| {
            let acting = scope.spawn(|| {
                let mut hand = Hand::open(&to, 1);
                hand.make_ready();
                hand.go();
                let message = hand.control.receive();
                assert!(matches!(message, Message::ResumeFailed { .. }), "{message:?}");
                hand.token
            });
            let error = receiver.receive(&mut destination, &there).unwrap_err();
            assert!(error.is_committed(), "{error}");
            acting.join().unwrap()
        });
        assert!(destination.guest.is_some() && destination.discarded == 0);
        match ask(&to, token) {
            AttemptOutcome::Kept { reason } => assert!(reason.contains("injected into resume"), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_lost_connection_leaves_a_ready_machine_to_its_operator() {
    for decision in [Decision::Run, Decision::Discard] {
        let mut receiver = receiver(TCP);
        let (received, token, destination) = meet(&mut receiver, |to, there| {
            let mut hand = Hand::open(to, 2);
            hand.make_ready();
            hand.control.hang_up();
            there.cancel();
            // Another question and another source change nothing.
            assert_eq!(ask(to, [9; 16]), AttemptOutcome::Unknown);
            there.decide(decision);
            hand.token
        });
        match decision {
            Decision::Run => {
                assert!(!received.unwrap().confirmed);
                destination.guest.unwrap().check_stamps();
                assert_eq!(ask(receiver.endpoint(), token), AttemptOutcome::Runs);
            }
            Decision::Discard => {
                assert!(matches!(received, Err(ReceiveError::Discarded)), "{received:?}");
                assert_eq!(ask(receiver.endpoint(), token), AttemptOutcome::GaveUp);
                assert_receives(&mut receiver);
            }
        }
    }
}

#[test]
fn a_source_that_sends_again_decides_itself() {
    let options = ReceiveOptions {
        io_timeout: Duration::from_secs(1),
        ..ReceiveOptions::default()
    };
    let mut receiver = Receiver::listen(&TCP.parse().unwrap(), options).unwrap();
    let (received, _, _) = meet(&mut receiver, |to, there| {
        let mut hand = Hand::open(to, 1);
        hand.make_ready();
        let until = Instant::now() + Duration::from_secs(20);
        while !there.is_undecided() {
            assert!(Instant::now() < until, "never an operator's to decide");
            thread::sleep(Duration::from_millis(10));
        }
        while there.is_undecided() {
            assert!(Instant::now() < until, "still an operator's to decide");
            hand.control.link.send(&Message::KeepAlive).unwrap();
            thread::sleep(Duration::from_millis(10));
        }
        hand.control.link.send(&Message::KeepAlive).unwrap();
        assert!(!there.decide(Decision::Discard));
        hand.finish()
    });
    assert!(received.unwrap().confirmed);
}

#[test]
fn a_lost_connection_leaves_a_ready_machine_to_a_question() {
    let mut receiver = receiver(TCP);
    let (received, token, _) = meet(&mut receiver, |to, _| {
        let mut hand = Hand::open(to, 1);
        hand.make_ready();
        hand.control.hang_up();
        assert_eq!(ask(to, hand.token), AttemptOutcome::GaveUp);
        hand.token
    });
    assert!(matches!(received, Err(ReceiveError::GivenUp)), "{received:?}");
    assert_eq!(ask(receiver.endpoint(), token), AttemptOutcome::GaveUp);
}

#[test]
fn an_abort_after_ready_discards_the_machine() {
    let mut receiver = receiver(TCP);
    let (received, token, _) = meet(&mut receiver, |to, _| {
        let mut hand = Hand::open(to, 1);
        hand.make_ready();
        assert!(hand.control.link.abort(true, "changed my mind"));
        hand.token
    });
    assert!(
        matches!(&received, Err(ReceiveError::Link(LinkError::Aborted { cancelled: true, reason })) if reason == "changed my mind"),
        "{received:?}"
    );
    assert_eq!(ask(receiver.endpoint(), token), AttemptOutcome::GaveUp);
    assert_receives(&mut receiver);
}

#[test]
fn a_lost_connection_before_ready_discards_the_machine() {
    let mut receiver = receiver(TCP);
    let (received, token, _) = meet(&mut receiver, |to, _| {
        let mut hand = Hand::open(to, 2);
        hand.send_all();
        hand.control.hang_up();
        hand.token
    });
    assert!(
        matches!(received, Err(ReceiveError::Link(LinkError::Closed { .. }))),
        "{received:?}"
    );
    assert_eq!(ask(receiver.endpoint(), token), AttemptOutcome::GaveUp);
    assert_receives(&mut receiver);
}

#[test]
fn an_operator_decides_only_while_the_source_is_silent() {
    let patient = Duration::from_secs(20);
    let options = ReceiveOptions {
        io_timeout: Duration::from_millis(300),
        step_timeout: patient,
    };
    let mut receiver = Receiver::listen(&TCP.parse().unwrap(), options).unwrap();
    let (received, _, destination) = meet(&mut receiver, |to, there| {
        let mut hand = Hand::open(to, 1);
        hand.make_ready();
        while !there.is_undecided() {
            thread::yield_now();
        }
        while there.is_undecided() {
            hand.control.link.send(&Message::KeepAlive).unwrap();
            thread::sleep(Duration::from_millis(20));
        }
        assert!(!there.decide(Decision::Run) && !there.decide(Decision::Discard));
        hand.finish()
    });
    assert!(received.unwrap().confirmed && destination.running);
}
