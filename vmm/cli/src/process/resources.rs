//! What this process may have of the host's.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// As many file descriptors as it may have: what it starts with (1024) is soon used up by the sockets of a guest's
/// connections, and a migration needs some of its own.
pub(crate) fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "the limit of {:?} files stays", limit.current);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_may_be_had_is_taken() {
        raise_file_limit();
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
    }
}
