//! The first program of an emulated host: process 1 sets the host up and reaps; a child of it (`init serve`)
//! starts what the lab asks for.

mod serve;
mod setup;

use std::process::Command;

use rustix::process::{WaitOptions, wait};
use rustix::system::{RebootCommand, reboot};

fn main() {
    if std::env::args().nth(1).as_deref() == Some("serve") {
        let end = serve::serve();
        println!("lab-host: {end:?}");
        return;
    }
    setup::set_up();
    match Command::new("/init").arg("serve").spawn() {
        Ok(child) => reap_until(child.id()),
        Err(error) => println!("lab-host: cannot start the server: {error}"),
    }
    rustix::fs::sync();
    if let Err(error) = reboot(RebootCommand::PowerOff) {
        println!("lab-host: cannot power off: {error}");
    }
}

/// Reaps orphans until process `server` ends: the lab is gone then.
fn reap_until(server: u32) {
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, _))) if pid.as_raw_nonzero().get() as u32 == server => return,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                println!("lab-host: wait: {error}");
                return;
            }
        }
    }
}
