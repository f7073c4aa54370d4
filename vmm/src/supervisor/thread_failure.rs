//! Threads that failed: what becomes of the VM is decided by what they were for.

use threads::{Failure, Role};

use super::resolve::Resolving;
use super::{ApiServer, Ending, Life, Refusal, Supervisor, SupervisorError, answer};

impl Supervisor {
    pub(super) fn thread_failed(
        &mut self,
        failure: Failure,
        server: &ApiServer,
    ) -> Option<Result<Ending, SupervisorError>> {
        tracing::error!("{failure}");
        match failure.role {
            // The guest cannot go on, or only as one whose disks never answer.
            Role::Vcpu | Role::Devices => Some(Err(failure.into())),
            // Nobody would hear that the handler has gone, and the guest would wait for ever for the first page.
            Role::FaultHandler => Some(Err(failure.into())),
            Role::Api => self.serve_api_again(failure, server),
            // Nobody can bring a machine any more. One that is under way is waited for.
            Role::Acceptor if self.cancel_receiving() => {
                self.failure.get_or_insert(failure);
                None
            }
            Role::Resolve => {
                self.fail_question(&failure);
                None
            }
            // Without them nothing is shown or typed, a guest is slowed down too little, a connection breaks off. Jobs
            // say by themselves how they ended, whoever waits for a helper or a stream hears of it from that.
            Role::Console
            | Role::Input
            | Role::Log
            | Role::Throttle
            | Role::Migration
            | Role::Receive
            | Role::Snapshot
            | Role::Restore
            | Role::Operation
            | Role::Withdraw
            | Role::Stream
            | Role::Control
            | Role::Acceptor
            | Role::Greeting
            | Role::Helper => None,
        }
    }

    /// A VM that nobody can speak to any more ends, its guest in good order. One whose guest may run elsewhere as well
    /// has to be kept.
    fn serve_api_again(
        &mut self,
        failure: Failure,
        server: &ApiServer,
    ) -> Option<Result<Ending, SupervisorError>> {
        let Err(error) = server.restart() else {
            return None;
        };
        tracing::error!("the API cannot be served again: {error}");
        self.failure.get_or_insert(failure);
        if let Some(Life::InDoubt(..)) = self.life {
            return None;
        }
        self.terminate().map(Ok)
    }

    fn fail_question(&mut self, failure: &Failure) {
        match self.resolving.take() {
            Some(Resolving::Asking { reply, .. }) => {
                answer(reply, Err(Refusal::Failed(failure.to_string())));
            }
            other => self.resolving = other,
        }
    }

    /// An end that was asked for because a thread failed is a failure, unless the guest is safe elsewhere.
    pub(super) fn settle_failure(
        &mut self,
        ending: Result<Ending, SupervisorError>,
    ) -> Result<Ending, SupervisorError> {
        match (ending, self.failure.take()) {
            (Ok(Ending::Stopped | Ending::Guest(_)), Some(failure)) => Err(failure.into()),
            (ending, _) => ending,
        }
    }
}
