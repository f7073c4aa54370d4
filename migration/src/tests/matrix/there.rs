//! The destination of an attempt, as `godwit receive` has it: it takes one source after the other until one of
//! them has moved its machine here.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use super::super::fake::FakeDestination;
use crate::text::chain;
use crate::*;

/// Costs time only where something is broken.
const PATIENCE: Duration = Duration::from_secs(20);

/// A receiver on a thread of its own.
pub(super) struct There {
    pub(super) endpoint: Endpoint,
    pub(super) control: Arc<Control>,
    arrived: mpsc::Receiver<ArrivedThere>,
}

/// How it ended.
pub(super) struct ArrivedThere {
    /// Answers a source's questions until it is dropped.
    pub(super) _receiver: Receiver,
    pub(super) destination: FakeDestination,
    pub(super) result: Result<Received, ReceiveError>,
}

impl There {
    pub(super) fn start(endpoint: &str, options: &MigrateOptions, mut destination: FakeDestination) -> Self {
        let options = ReceiveOptions {
            io_timeout: options.io_timeout,
            step_timeout: options.step_timeout,
        };
        let mut receiver = Receiver::listen(&endpoint.parse().unwrap(), options).unwrap();
        let (endpoint, control) = (receiver.endpoint().clone(), Arc::new(Control::new().unwrap()));
        let (arrival, arrived) = mpsc::channel();
        let theirs = control.clone();
        thread::spawn(move || {
            let mut failures = 0;
            let result = loop {
                let result = receiver.receive(&mut destination, &theirs);
                match result {
                    Err(error) if !error.is_committed() && !theirs.is_cancelled() => {
                        assert!(destination.guest.is_none(), "kept after {error}");
                        failures += 1;
                        assert!(failures < 1000, "no end of {}", chain(&error));
                    }
                    result => break result,
                }
            };
            // A test that gave up waiting has failed with a reason of its own.
            let _ = arrival.send(ArrivedThere {
                _receiver: receiver,
                destination,
                result,
            });
        });
        Self {
            endpoint,
            control,
            arrived,
        }
    }

    /// Waits until a machine has come for good, or for the end after a cancel.
    pub(super) fn wait(&self) -> ArrivedThere {
        match self.arrived.recv_timeout(PATIENCE) {
            Ok(arrived) => arrived,
            Err(RecvTimeoutError::Timeout) => {
                panic!("the destination still waits: {:?}", self.control.progress())
            }
            Err(RecvTimeoutError::Disconnected) => panic!("the destination panicked"),
        }
    }
}

impl Drop for There {
    fn drop(&mut self) {
        // Only where the test fails is there anything left to end.
        self.control.cancel();
        self.control.decide(Decision::Discard);
    }
}
