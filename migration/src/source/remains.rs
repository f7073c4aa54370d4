//! What a migration has done to a machine besides pausing it, and how to undo that. Does not resume the guest.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::MigrateError;
use crate::ports::{PortError, Source};
use crate::text::{chain, panic_message};

/// What a migration has done to a machine besides pausing it. Each is set before the call is made, so that it also
/// holds when the call fails half-way or panics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Remains {
    pub(super) mirroring: bool,
    pub(super) logging: bool,
    pub(super) throttled: bool,
}

impl Remains {
    /// Everything, for a caller that does not know what was done.
    pub fn all() -> Self {
        Self {
            mirroring: true,
            logging: true,
            throttled: true,
        }
    }

    /// Undoes everything. Goes on after an error; returns the errors as text, for the log and the report.
    pub fn undo(&mut self, source: &mut dyn Source) -> Vec<String> {
        let remains = std::mem::take(self);
        let mut errors = Vec::new();
        if remains.throttled {
            errors.extend(undo_step(source, "throttle", |source| {
                let cpus = usize::from(source.describe().cpus);
                source.throttle(&vec![0.0; cpus])
            }));
        }
        if remains.logging {
            errors.extend(undo_step(source, "stop_dirty_log", |source| {
                source.stop_dirty_log()
            }));
        }
        if remains.mirroring {
            errors.extend(undo_step(source, "stop_mirror", |source| source.stop_mirror()));
        }
        errors
    }
}

/// Makes one call to the machine. Returns its error or panic as text.
pub(super) fn undo_step(
    source: &mut dyn Source,
    call: &'static str,
    step: impl FnOnce(&mut dyn Source) -> Result<(), PortError>,
) -> Option<String> {
    match catch_unwind(AssertUnwindSafe(|| step(source))) {
        Ok(Ok(())) => None,
        Ok(Err(source)) => Some(chain(&MigrateError::Machine { call, source })),
        Err(panic) => Some(format!("{call} panicked: {}", panic_message(&*panic))),
    }
}
