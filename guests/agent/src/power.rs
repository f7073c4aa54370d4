//! The power button, as ACPI's button driver reports it through evdev.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;
use std::thread;

use rustix::system::RebootCommand;

use crate::commands::Workloads;
use crate::report::AgentReport;

/// `struct input_event` of a 64-bit kernel (Linux, include/uapi/linux/input.h): two words of time, type, code, value.
const EVENT_BYTES: usize = 24;
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

/// Listens to every input device that there is.
pub(crate) fn watch(report: &Arc<AgentReport>, workloads: &Arc<Workloads>) {
    let Ok(entries) = std::fs::read_dir("/dev/input") else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if !name.to_string_lossy().starts_with("event") {
            continue;
        }
        let Ok(device) = File::open(entry.path()) else {
            continue;
        };
        let (report, workloads) = (report.clone(), workloads.clone());
        thread::spawn(move || listen(device, &report, &workloads));
    }
}

fn listen(mut device: impl Read, report: &AgentReport, workloads: &Workloads) {
    let mut event = [0; EVENT_BYTES];
    while device.read_exact(&mut event).is_ok() {
        if is_power_button(&event) {
            report.line(format_args!("power button"));
            workloads.end(RebootCommand::PowerOff, report);
        }
    }
}

/// Whether the event is the button's way down.
fn is_power_button(event: &[u8; EVENT_BYTES]) -> bool {
    let [.., t0, t1, c0, c1, v0, v1, v2, v3] = *event;
    let kind = u16::from_le_bytes([t0, t1]);
    let code = u16::from_le_bytes([c0, c1]);
    (kind, code, u32::from_le_bytes([v0, v1, v2, v3])) == (EV_KEY, KEY_POWER, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_power_key_going_down_counts() {
        let event = |kind: u16, code: u16, value: u32| {
            let mut event = [7; EVENT_BYTES];
            event[16..18].copy_from_slice(&kind.to_le_bytes());
            event[18..20].copy_from_slice(&code.to_le_bytes());
            event[20..].copy_from_slice(&value.to_le_bytes());
            is_power_button(&event)
        };
        assert!(event(1, 116, 1));
        assert!(!event(1, 116, 0));
        assert!(!event(1, 115, 1));
        assert!(!event(0, 0, 0));
    }
}
