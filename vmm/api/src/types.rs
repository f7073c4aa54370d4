//! What goes over the API, as JSON.

use std::path::PathBuf;

use migration::Progress;
use serde::{Deserialize, Serialize};

use super::snapshot::SnapshotProgress;

/// Life cycle of an instance. `Running` and `Paused` are Firecracker's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum InstanceState {
    /// vCPUs are let into the guest.
    Running,
    /// vCPUs are held out because a user asked for it.
    Paused,
    /// No machine yet: waiting for one, or receiving it.
    Receiving,
    /// No machine: its guest has reset, and will boot again.
    #[serde(rename = "Not started")]
    NotStarted,
    /// As a client sees it: its process does not answer.
    #[serde(rename = "No answer")]
    NoAnswer,
    /// "go" was sent, and it is not known whether the destination runs the guest.
    #[serde(rename = "In doubt")]
    InDoubt,
}

impl std::fmt::Display for InstanceState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            InstanceState::Running => "running",
            InstanceState::Paused => "paused",
            InstanceState::Receiving => "receiving",
            InstanceState::NoAnswer => "no answer",
            InstanceState::NotStarted => "not started",
            InstanceState::InDoubt => "in doubt",
        })
    }
}

impl InstanceInfo {
    /// What can be said of a VM that does not answer: its name and its process, if that is known.
    pub fn silent(id: &str, pid: Option<u32>) -> Self {
        Self {
            app_name: "godwit".into(),
            id: id.into(),
            state: InstanceState::NoAnswer,
            vmm_version: String::new(),
            pid: pid.unwrap_or(0),
            vcpu_count: 0,
            mem_size_mib: 0,
            cpu_template: String::new(),
            in_doubt: None,
            migration: None,
            snapshot: None,
            prefetch: None,
            stop_timeout_ms: 0,
            log: None,
        }
    }
}

/// What an instance says about itself; the first four fields are Firecracker's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InstanceInfo {
    /// `godwit`.
    pub app_name: String,
    /// The VM's name.
    pub id: String,
    /// Where it is in its life cycle.
    pub state: InstanceState,
    /// Version of this program.
    pub vmm_version: String,
    /// Process id.
    pub pid: u32,
    /// Number of vCPUs; 0 while there is no machine.
    pub vcpu_count: u8,
    /// Guest memory in MiB; 0 while there is no machine.
    pub mem_size_mib: u64,
    /// CPU template in force; empty while there is no machine.
    pub cpu_template: String,
    /// What is known about a migration in doubt, and what to do; one line.
    pub in_doubt: Option<String>,
    /// The migration under way.
    pub migration: Option<Progress>,
    /// The snapshot that is being written.
    pub snapshot: Option<SnapshotProgress>,
    /// How much of the memory of the snapshot that it runs from is there; nothing once all is.
    pub prefetch: Option<SnapshotProgress>,
    /// How long its guest may take to shut down when it is asked to, in milliseconds.
    pub stop_timeout_ms: u64,
    /// The file that its process logs to, if it is one.
    pub log: Option<PathBuf>,
}

/// The program's version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// As `godwit --version` prints it.
    pub godwit_version: String,
    /// The same, where Firecracker's clients look for it.
    pub firecracker_version: String,
}

/// Body of `PATCH /vm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmUpdate {
    /// The state that it shall have.
    pub state: VmState,
}

/// A state that can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// Hold the vCPUs out of the guest.
    Paused,
    /// Let them in.
    Resumed,
}

/// Body of `PUT /actions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Action {
    /// What to do.
    pub action_type: ActionType,
    /// Whether `Stop` also ends a VM whose copy of its guest may be the only one.
    #[serde(default)]
    pub force: bool,
}

/// What `PUT /actions` can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActionType {
    /// Firecracker's way to ask a guest to shut down; here it presses the ACPI power button.
    SendCtrlAltDel,
    /// Ends the process, whatever the guest does.
    Stop,
}

/// The size of a terminal in characters; body of `PUT /console/size`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleSize {
    /// Characters of a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

/// An error, in Firecracker's shape.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// One line: what, expected, got.
    pub fault_message: String,
}
