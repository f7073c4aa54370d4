//! What tests of several modules need.

use std::sync::{Condvar, Mutex, OnceLock};
use std::time::Duration;

use threads::{Failure, Role};

static FAILURES: Mutex<Vec<Failure>> = Mutex::new(Vec::new());
static MORE: Condvar = Condvar::new();

/// From here on failures are kept for the test that waits for them: all tests share one listener.
pub(crate) fn keep_failures() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        threads::report_failures_to(|failure| {
            FAILURES.lock().unwrap().push(failure);
            MORE.notify_all();
        });
    });
}

/// The next failure of a thread of that role, of which only one test may have any.
pub(crate) fn wait_for_failure(role: Role) -> Failure {
    let mine = |failure: &Failure| failure.role == role;
    let none = |failures: &mut Vec<Failure>| !failures.iter().any(mine);
    let failures = FAILURES.lock().unwrap();
    let (mut failures, _) = MORE
        .wait_timeout_while(failures, Duration::from_secs(60), none)
        .unwrap();
    let at = failures.iter().position(mine).expect("a thread that failed");
    failures.remove(at)
}
