//! The experiments: each measures one or more rows.

mod block;
mod budget;
mod cancel;
mod capped;
mod engine;
mod footprint;
mod handover;
mod idle;
mod live_snapshot;
mod log_start;
mod overload;
mod prediction;
mod prefetch;
mod restore;
mod snapshot;
mod throughput;
mod vcpus;
mod work;

use anyhow::Result;

use crate::bench::Bench;
use crate::row::Figure;

/// What measures a row; the order is that of the bench. Predictions come last: they are about all moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Experiment {
    /// Rates and CPU time, beside iperf3 and QEMU.
    Throughput,
    /// The downtime of a guest that does nothing.
    Idle,
    /// A downtime budget under load.
    Budget,
    /// A guest that dirties faster than the link carries.
    Overload,
    /// The same against QEMU's auto-converge.
    Capped,
    /// Memory handed over.
    Handover,
    /// Cancels at random moments.
    Cancel,
    /// What the start of dirty logging costs.
    LogStart,
    /// Memory of the process itself.
    Footprint,
    /// How soon a guest from a snapshot runs.
    Restore,
    /// How a guest fares whose snapshot is in no cache.
    Prefetch,
    /// How fast snapshots are written.
    Snapshot,
    /// Snapshots of guests that run on.
    LiveSnapshot,
    /// How fast a disk is read.
    Block,
    /// Pauses of guests with many vCPUs.
    Vcpus,
    /// A machine of 1 TiB, for the engine alone.
    Engine,
    /// The guest's work before, during and after.
    Work,
    /// How well all of the above was predicted.
    Prediction,
}

impl Experiment {
    /// Seconds for the repetition of runs that the host spoiled. Those of the overload are long.
    pub(crate) fn spare_seconds(self) -> u32 {
        if self == Experiment::Overload { 120 } else { 60 }
    }

    /// Measures; `wanted` names the rows.
    pub(crate) fn run(self, bench: &mut Bench, wanted: &[&str]) -> Result<Vec<Figure>> {
        match self {
            Experiment::Throughput => throughput::run(bench, wanted),
            Experiment::Idle => idle::run(bench),
            Experiment::Budget => budget::run(bench),
            Experiment::Overload => overload::run(bench),
            Experiment::Capped => capped::run(bench),
            Experiment::Handover => handover::run(bench),
            Experiment::Cancel => cancel::run(bench),
            Experiment::LogStart => log_start::run(bench),
            Experiment::Footprint => footprint::run(bench),
            Experiment::Restore => restore::run(bench),
            Experiment::Prefetch => prefetch::run(bench),
            Experiment::Snapshot => snapshot::run(bench),
            Experiment::LiveSnapshot => live_snapshot::run(bench),
            Experiment::Block => block::run(bench),
            Experiment::Vcpus => vcpus::run(bench),
            Experiment::Engine => engine::run(bench),
            Experiment::Work => work::run(bench),
            Experiment::Prediction => prediction::run(bench),
        }
    }
}
