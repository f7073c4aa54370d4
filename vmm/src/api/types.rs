//! What goes over the API, as JSON.

use migration::Progress;
use serde::{Deserialize, Serialize};

use crate::snapshot::SnapshotProgress;

/// Life cycle of an instance. `Running` and `Paused` are Firecracker's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum InstanceState {
    /// vCPUs are let into the guest.
    Running,
    /// vCPUs are held out because a user asked for it.
    Paused,
    /// No machine yet: waiting for one, or receiving it.
    Receiving,
    /// "go" was sent and nobody knows whether the destination runs.
    #[serde(rename = "In doubt")]
    InDoubt,
}

impl std::fmt::Display for InstanceState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            InstanceState::Running => "running",
            InstanceState::Paused => "paused",
            InstanceState::Receiving => "receiving",
            InstanceState::InDoubt => "in doubt",
        })
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
}

/// The program's version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// As `godwit --version` prints it.
    pub godwit_version: String,
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
}

/// What `PUT /actions` can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActionType {
    /// Firecracker's way to ask a guest to shut down; here it presses the ACPI power button.
    SendCtrlAltDel,
    /// Ends the process, whatever the guest does.
    Stop,
}

/// An error, in Firecracker's shape.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// One line: what, expected, got.
    pub fault_message: String,
}
