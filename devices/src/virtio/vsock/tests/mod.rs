//! A socket device as a guest and as programs on the host use it.

mod flow;
mod fuzz;
mod hostile;
mod limits;
mod moves;
mod rig;
mod streams;

use super::*;

#[test]
fn golden_record() {
    let state = VsockState {
        guest_cid: 3,
        next_port: 1 << 30 | 7,
    };
    migration_state::assert_golden(1, "038780808004", &state);
}
