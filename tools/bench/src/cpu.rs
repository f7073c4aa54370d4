//! CPU time of another process, to the nanosecond: `/proc/PID/stat` counts in hundredths of a second, which is a
//! tenth of what a migration of a GiB costs.

#![allow(unsafe_code, reason = "reads the CPU clock of another process")]

use std::time::Duration;

use anyhow::{Context, Result};

/// User and system time of a process, of all its threads, dead ones included. Also of one that has ended, as
/// long as its parent has not waited for it.
pub(crate) fn time_of(pid: u32) -> Result<Duration> {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: both calls write to a variable of the right type that outlives them.
    let result = unsafe {
        let mut clock = 0;
        match libc::clock_getcpuclockid(pid.cast_signed(), &raw mut clock) {
            0 => libc::clock_gettime(clock, &raw mut time),
            error => error,
        }
    };
    if result != 0 {
        return Err(std::io::Error::last_os_error()).with_context(|| format!("CPU clock of process {pid}"));
    }
    let seconds = u64::try_from(time.tv_sec).context("negative CPU time")?;
    Ok(Duration::from_secs(seconds) + Duration::from_nanos(time.tv_nsec.unsigned_abs()))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_that_has_ended_still_has_its_time() {
        let script = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done";
        let mut child = Command::new("sh").args(["-c", script]).spawn().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        let ended = rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT;
        rustix::process::waitid(rustix::process::WaitId::Pid(pid), ended).unwrap();
        assert!(time_of(child.id()).unwrap() > Duration::from_millis(1));
        child.wait().unwrap();
        assert!(time_of(child.id()).is_err());
    }
}
