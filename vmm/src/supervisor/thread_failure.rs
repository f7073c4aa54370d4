//! Decides, by the role of a thread that failed, what becomes of the VM: it ends, it goes on without the thread, or the
//! thread is started again. A machine that may be the only copy of its guest must outlive the failure.

use threads::{Failure, Role};

use super::resolve::Resolving;
use super::{ApiServer, Ending, Life, Refusal, Supervisor, SupervisorError, answer};

impl Supervisor {
    /// Handles the failure of a thread. Returns how the VM ends, if the failure ends it.
    pub(super) fn thread_failed(
        &mut self,
        failure: Failure,
        server: &ApiServer,
    ) -> Option<Result<Ending, SupervisorError>> {
        tracing::error!("{failure}");
        match failure.role {
            // The guest cannot go on, or only as one whose disks never answer.
            Role::Vcpu | Role::Devices => Some(Err(failure.into())),
            // Without this thread the end of the fault handler is not noticed, and the guest would wait for ever for a
            // page.
            Role::FaultHandler => Some(Err(failure.into())),
            // The guest waits for pages that may never come.
            Role::Pages => Some(Err(failure.into())),
            Role::Api => self.serve_api_again(failure, server),
            // No source can connect any more. A machine that is on its way is waited for.
            Role::Acceptor if self.cancel_receiving() => {
                self.failure.get_or_insert(failure);
                None
            }
            Role::Resolve => {
                self.fail_question(&failure);
                None
            }
            // Its destination is asked no more. Others are.
            Role::Withdraw => {
                self.withdrawals.count_end();
                None
            }
            // The guest goes on without these: no output is shown and no input read, a guest is slowed down too little, or a
            // connection breaks off. Jobs report their end themselves, and the thread that waits for a helper or a stream
            // gets its failure.
            Role::Console
            | Role::Input
            | Role::Log
            | Role::Throttle
            | Role::Migration
            | Role::Receive
            | Role::Snapshot
            | Role::Restore
            | Role::Operation
            | Role::Stream
            | Role::Control
            | Role::Acceptor
            | Role::Greeting
            | Role::Helper => None,
        }
    }

    /// Serves the API again, up to a limit. Beyond it the VM cannot be controlled any more: its guest is asked to shut
    /// down, unless the guest may run elsewhere as well, as such a copy has to be kept.
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

    /// Answers the request for which the destination was being asked: the thread that asked has failed.
    fn fail_question(&mut self, failure: &Failure) {
        match self.resolving.take() {
            Some(Resolving::Asking { reply, .. }) => {
                answer(reply, Err(Refusal::Failed(failure.to_string())));
            }
            other => self.resolving = other,
        }
    }

    /// Turns the end of a VM into an error if it ends because a thread failed, unless the guest is safe elsewhere.
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
