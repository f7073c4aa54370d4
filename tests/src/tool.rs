//! Programs of the system.

use std::ffi::OsStr;
use std::process::Command;

use anyhow::{Context, Result};

use crate::{PATIENCE, TestProcess};

/// Runs one to its end in this thread's network and mounts; returns what it prints. It must exit with 0.
pub(crate) fn tool<S: AsRef<OsStr>>(program: &str, words: impl IntoIterator<Item = S>) -> Result<String> {
    let mut command = Command::new(program);
    command.args(words);
    // A user's path may lack these folders.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    let shown = format!("{command:?}");
    let finished = TestProcess::run(command, PATIENCE)?;
    finished.expect_code(0).context(shown)?;
    Ok(finished.stdout)
}
