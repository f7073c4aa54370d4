//! Every row of the bench.

use crate::experiments::Experiment::{
    Block, Budget, Cancel, Capped, Engine, Footprint, Handover, Idle, LiveSnapshot, LogStart, Overload,
    Prediction, Prefetch, Restore, Snapshot, Throughput, Vcpus, Work,
};
use crate::row::BenchBar::{AtLeast, AtMost, RatioAtLeast, RatioAtMost};
use crate::row::Definition;

const GB_PER_S: &str = "GB/s";
const SHARE: &str = "share";

/// Every row, in the order in which they are printed.
pub const ROWS: [Definition; 44] = [
    Definition::new(Throughput, "throughput-1-stream-vs-iperf3", GB_PER_S)
        .meaning("2 GiB that are not zero, destination ready, first to last page byte")
        .beside("iperf3, one stream")
        .bar(RatioAtLeast(0.9)),
    Definition::new(Throughput, "throughput-1-stream-vs-iperf3-z", GB_PER_S)
        .meaning("the same")
        .beside("iperf3 -Z, one stream"),
    Definition::new(Throughput, "throughput-cold", GB_PER_S)
        .meaning("the same with a destination whose memory is fresh")
        .beside("QEMU, memory fresh"),
    Definition::new(Throughput, "throughput-2-streams-vs-iperf3", GB_PER_S)
        .meaning("two streams, destination ready")
        .beside("two pairs of iperf3, in sum")
        .bar(RatioAtLeast(0.85)),
    Definition::new(Throughput, "throughput-1-stream-vs-qemu", GB_PER_S)
        .meaning("one stream, destination ready")
        .beside("QEMU, memory preallocated")
        .bar(RatioAtLeast(1.1)),
    Definition::new(Throughput, "throughput-2-streams-vs-qemu", GB_PER_S)
        .meaning("two streams, destination ready")
        .beside("QEMU, best of 2 and 4 multifd channels")
        .bar(RatioAtLeast(1.3)),
    Definition::new(Idle, "idle-downtime-ms", "ms")
        .meaning("idle guest of 2 GiB, destination ready, 30 ms allowed, by the report")
        .beside("QEMU, stop to start by its events")
        .bar(AtMost(3.0)),
    Definition::new(Idle, "idle-downtime-vs-qemu", "ms")
        .meaning("the same as the guest saw it on its TSC")
        .beside("QEMU, as the guest saw it"),
    Definition::new(Budget, "budget-20ms-kept", SHARE)
        .meaning("300 MB/s in 512 MiB of 1 GiB, destination ready: moved within 20 ms of downtime")
        .bar(AtLeast(1.0)),
    Definition::new(Overload, "overload-50ms-kept", SHARE)
        .meaning("512 MiB of 2 GiB at full speed, link of 500 MB/s, destination ready: moved within 50 ms and 60 s")
        .bar(AtLeast(1.0)),
    Definition::new(Overload, "overload-work-fraction", SHARE)
        .meaning("the guest's work while those migrations converge, of the most that could converge")
        .bar(AtLeast(0.8)),
    Definition::new(Capped, "overload-total-vs-qemu", "s")
        .meaning("total time at 1000 MB/s over a link of 200 MiB/s, destination ready, 30 ms allowed")
        .beside("QEMU with auto-converge, memory preallocated")
        .bar(RatioAtMost(0.5)),
    Definition::new(Prediction, "prediction-downtime-within", SHARE)
        .meaning("moves whose downtime was predicted to 20 % or 2 ms"),
    Definition::new(Prediction, "prediction-downtime-covered", SHARE)
        .meaning("moves whose downtime was in the interval that was to hold it nine times in ten")
        .bar(AtLeast(0.88)),
    Definition::new(Prediction, "prediction-downtime-width", "of it")
        .meaning("width of that interval over the downtime; one of up to 2 ms counts as no more than the bar")
        .bar(AtMost(0.5)),
    Definition::new(Prediction, "prediction-total-within", SHARE)
        .meaning("moves whose total time was predicted to 15 % or 50 ms after a fifth of the way"),
    Definition::new(Prediction, "prediction-total-covered", SHARE)
        .meaning("moves whose total time was in the interval that was to hold it nine times in ten")
        .bar(AtLeast(0.88)),
    Definition::new(Prediction, "prediction-total-width", "of it")
        .meaning("width of that interval over the total time; one of up to 100 ms counts as no more than the bar")
        .bar(AtMost(0.35)),
    Definition::new(Handover, "handover-downtime-ms", "ms")
        .meaning("4 GiB of shared memory handed to a process of the same host")
        .bar(AtMost(10.0)),
    Definition::new(Handover, "handover-downtime-16gib-ms", "ms")
        .meaning("the same with 16 GiB: no growth but noise")
        .beside("1 GiB")
        .bar(AtMost(10.0)),
    Definition::new(Throughput, "cpu-per-gib-vs-qemu", "s/GiB")
        .meaning("CPU time of both sides for an idle guest, memory fresh, one stream")
        .beside("QEMU, memory fresh")
        .bar(RatioAtMost(0.65)),
    Definition::new(Throughput, "cpu-per-gib-reserved-vs-qemu", "s/GiB")
        .meaning("the same with a destination that was ready")
        .beside("QEMU, memory preallocated"),
    Definition::new(Cancel, "cancel-ms-max", "ms")
        .meaning("longest cancel at a random moment, until the guest ticks unhindered")
        .bar(AtMost(100.0)),
    Definition::new(Cancel, "cancel-busy-ms-max", "ms")
        .meaning("the same with a busy loop on each CPU, from a request to the API on")
        .bar(AtMost(100.0)),
    Definition::new(LogStart, "dirty-log-start-ms", "ms")
        .meaning("time in KVM to turn dirty logging on for 2 GiB"),
    Definition::new(Footprint, "rss-overhead-mib", "MiB")
        .meaning("resident memory besides a guest's 512 MiB")
        .beside("QEMU"),
    Definition::new(Restore, "restore-128mib-ms", "ms")
        .meaning("from the start of the process until the guest of a snapshot of 128 MiB runs, memory on demand")
        .bar(AtMost(10.0)),
    Definition::new(Restore, "restore-8gib-ms", "ms")
        .meaning("the same with 8 GiB")
        .beside("1.2 times that with 128 MiB, and KVM's slots")
        .bar(RatioAtMost(1.0)),
    Definition::new(Restore, "restore-8gib-slots-ms", "ms")
        .meaning("time in KVM to make the slots of 8 GiB, part of the row above"),
    Definition::new(Prefetch, "restore-prefetch-work", "pages")
        .meaning("pages of 512 MiB that a guest of 2 GiB writes in its first second, snapshot on the disk, in no cache")
        .beside("memory on demand (--lazy)")
        .bar(RatioAtLeast(3.0)),
    Definition::new(Prefetch, "restore-prefetch-all-here-ms", "ms")
        .meaning("from the start of that process until all memory is there")
        .beside("memory read before the guest runs (--preload)")
        .bar(RatioAtMost(1.3)),
    Definition::new(Snapshot, "snapshot-full-vs-dd", "MB/s")
        .meaning("a guest of 256 MiB that are not zero, on the disk, while it stands still")
        .beside("dd bs=2M conv=fsync of as much")
        .bar(RatioAtLeast(0.8)),
    Definition::new(Snapshot, "snapshot-diff-vs-dd", "MB/s")
        .meaning("the 9 MiB of it that changed since")
        .beside("dd bs=2M conv=fsync of as much")
        .bar(RatioAtLeast(0.8)),
    Definition::new(Snapshot, "snapshot-diff-pause-ms", "ms")
        .meaning("how long the guest stands still for those"),
    Definition::new(LiveSnapshot, "live-snapshot-pause-ms", "ms")
        .meaning("how long a guest of 2 GiB that writes 300 MB/s stands still for a snapshot with --live")
        .bar(AtMost(5.0)),
    Definition::new(LiveSnapshot, "live-snapshot-pause-8gib-ms", "ms")
        .meaning("the same with 8 GiB")
        .beside("2 GiB")
        .bar(AtMost(5.0)),
    Definition::new(LiveSnapshot, "live-snapshot-gap-ms", "ms")
        .meaning("longest time in which the guest of 2 GiB does nothing meanwhile, waits for copies included"),
    Definition::new(Block, "block-read-vs-qemu", "1000/s")
        .meaning("reads of 4 KiB at random places of a file in the page cache, 32 at a time, by a guest that polls")
        .beside("QEMU, best of io_uring and threads, each with and without an iothread")
        .bar(RatioAtLeast(1.0)),
    Definition::new(Vcpus, "pause-32-vcpus-ms", "ms")
        .meaning("mean time to pause an idle guest of 32 vCPUs and to save those, in rehearsals")
        .beside("one vCPU"),
    Definition::new(Engine, "engine-1tib", "MiB")
        .meaning("memory that both sides of the engine need besides the guest's, for 1 TiB of which 8 GiB are populated")
        .bar(AtMost(160.0)),
    Definition::new(Engine, "engine-1tib-look-ms", "ms")
        .meaning("the last look at the log of that machine's memory")
        .bar(AtMost(10.0)),
    Definition::new(Engine, "engine-1tib-pause-ms", "ms")
        .meaning("how much longer its pause is than that of 16 GiB with as much populated")
        .bar(AtMost(5.0)),
    Definition::new(Work, "work-during-vs-qemu", SHARE)
        .meaning("pages per second of a guest at full speed while it migrates, of those before, destination ready")
        .beside("QEMU with auto-converge, memory preallocated")
        .bar(RatioAtLeast(1.0)),
    Definition::new(Work, "work-before-during-after", SHARE)
        .meaning("pages per second of a guest at full speed while it migrates, of those before")
        .beside("after, of those before"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        let mut names = ROWS.map(|row| row.name);
        names.sort();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
    }
}
