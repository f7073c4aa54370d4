//! Sockets appear whole, and never replace a file of another process.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::Barrier;
use std::thread;

use rustix::fs::{FlockOperation, flock};

use super::*;

#[test]
fn a_socket_in_use_is_refused_and_a_stale_one_reclaimed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    let first = NamedListener::bind(&path).unwrap();
    let second = NamedListener::bind(&path);
    assert!(matches!(second, Err(NamedListenerError::InUse { .. })));
    drop(first);
    assert!(!path.exists());

    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    NamedListener::bind(&path).unwrap();
}

#[test]
fn a_listener_that_accepts_no_connection_is_in_use_all_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    let _first = NamedListener::bind(&path).unwrap();
    let waiting: Vec<_> = std::iter::from_fn(|| connect_now(&path).ok()).collect();
    assert!(!waiting.is_empty());
    let second = NamedListener::bind(&path);
    assert!(matches!(second, Err(NamedListenerError::InUse { .. })));
}

#[test]
fn anothers_socket_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    let first = NamedListener::bind(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let _second = NamedListener::bind(&path).unwrap();
    drop(first);
    let third = NamedListener::bind(&path);
    assert!(matches!(third, Err(NamedListenerError::InUse { .. })));
}

#[test]
fn other_files_are_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("precious");
    fs::write(&path, "data").unwrap();
    let bound = NamedListener::bind(&path);
    assert!(matches!(bound, Err(NamedListenerError::NotASocket { .. })));
    assert_eq!(fs::read(&path).unwrap(), b"data");
}

#[test]
fn a_lock_on_the_folder_delays_no_bind() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    drop(UnixListener::bind(&path).unwrap());
    let folder = fs::File::open(directory.path()).unwrap();
    flock(&folder, FlockOperation::LockShared).unwrap();
    // With the old code, which locked the folder, this never came back.
    let bound = NamedListener::bind(&path).unwrap();
    drop(bound);
    assert_eq!(directory.path().read_dir().unwrap().count(), 0);
}

#[test]
fn a_lock_that_another_process_keeps_is_an_error_in_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    drop(UnixListener::bind(&path).unwrap());
    let lock = fs::File::create(directory.path().join(".a.sock.lock")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let refused = NamedListener::bind(&path).unwrap_err();
    assert!(matches!(refused, NamedListenerError::Locked { .. }), "{refused}");
    assert_eq!(
        directory.path().read_dir().unwrap().count(),
        2,
        "the stale socket and the lock"
    );
}

#[test]
fn a_lock_that_is_a_link_is_not_followed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    drop(UnixListener::bind(&path).unwrap());
    symlink("/dev/null", directory.path().join(".a.sock.lock")).unwrap();
    assert!(matches!(
        NamedListener::bind(&path),
        Err(NamedListenerError::Io { .. })
    ));
}

#[test]
fn of_many_that_reclaim_one_stale_socket_one_gets_it() {
    const CONTENDERS: usize = 8;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    for _ in 0..50 {
        drop(UnixListener::bind(&path).unwrap());
        let start = Barrier::new(CONTENDERS);
        let bound: Vec<_> = thread::scope(|scope| {
            let contend = || {
                start.wait();
                NamedListener::bind(&path)
            };
            let threads: Vec<_> = (0..CONTENDERS).map(|_| scope.spawn(contend)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let (winners, losers): (Vec<_>, Vec<_>) = bound.into_iter().partition(Result::is_ok);
        assert_eq!(winners.len(), 1);
        for loser in losers {
            assert!(
                matches!(loser, Err(NamedListenerError::InUse { .. })),
                "{loser:?}"
            );
        }
        connect_now(&path).unwrap();
        drop(winners);
        assert_eq!(directory.path().read_dir().unwrap().count(), 0);
    }
}

#[test]
fn a_socket_is_its_owners_alone_from_the_first_moment() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    let draft = SocketDraft::listen(&path).unwrap();
    let entry = directory.path().read_dir().unwrap().next().unwrap().unwrap();
    assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o7777, 0o600);
    drop(draft);
    assert_eq!(directory.path().read_dir().unwrap().count(), 0);
}

#[test]
fn paths_may_be_as_long_as_a_socket_allows() {
    let directory = tempfile::tempdir().unwrap();
    let room = PATH_MAX - directory.path().as_os_str().len() - 1;
    let path = directory.path().join("s");
    let _short = NamedListener::bind(&path).unwrap();
    let path = directory.path().join("s".repeat(room));
    let _long = NamedListener::bind(&path).unwrap();
    connect_now(&path).unwrap();
    let refused = NamedListener::bind(&directory.path().join("s".repeat(room + 1))).unwrap_err();
    assert!(matches!(refused, NamedListenerError::Length { got, .. } if got == PATH_MAX + 1));
    // The hidden name is longer than a short one: a folder with a long path has room for that all the same.
    let folder = directory.path().join("f".repeat(room - 2));
    fs::create_dir(&folder).unwrap();
    let path = folder.join("s");
    let _deep = NamedListener::bind(&path).unwrap();
    connect_now(&path).unwrap();
}
