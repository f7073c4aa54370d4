//! How fast memory goes from process to process, and what that costs in CPU time.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::bench::{Bench, print_status};
use crate::godwit::{Asked, Godwit};
use crate::guest::BenchGuest;
use crate::iperf;
use crate::qemu::{QemuJourney, QemuSettings};
use crate::row::Figure;
use crate::sentinel::Window;
use crate::stats::median;

const MEMORY_MIB: u64 = 2048;
const REPETITIONS: u32 = 5;
const GIB: f64 = (1u64 << 30) as f64;

/// A program that is measured. A destination that is `ready` has touched all of its memory before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ThroughputContender {
    Iperf { pairs: u32, zero_copy: bool },
    Godwit { streams: u32, ready: bool },
    Qemu { channels: Option<u32>, ready: bool },
}

use ThroughputContender::{Godwit as G, Iperf, Qemu as Q};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    GigabytesPerSecond,
    CpuPerGib,
}

/// Row, what of it, godwit's part, and the peers, of which the best counts.
type Comparison = (
    &'static str,
    What,
    ThroughputContender,
    &'static [ThroughputContender],
);

const ONE: ThroughputContender = G {
    streams: 1,
    ready: true,
};
const TWO: ThroughputContender = G {
    streams: 2,
    ready: true,
};
const FRESH: ThroughputContender = G {
    streams: 1,
    ready: false,
};

const COMPARISONS: [Comparison; 8] = [
    (
        "throughput-1-stream-vs-iperf3",
        What::GigabytesPerSecond,
        ONE,
        &[Iperf {
            pairs: 1,
            zero_copy: false,
        }],
    ),
    (
        "throughput-1-stream-vs-iperf3-z",
        What::GigabytesPerSecond,
        ONE,
        &[Iperf {
            pairs: 1,
            zero_copy: true,
        }],
    ),
    (
        "throughput-cold",
        What::GigabytesPerSecond,
        FRESH,
        &[Q {
            channels: None,
            ready: false,
        }],
    ),
    (
        "throughput-2-streams-vs-iperf3",
        What::GigabytesPerSecond,
        TWO,
        &[Iperf {
            pairs: 2,
            zero_copy: false,
        }],
    ),
    (
        "throughput-1-stream-vs-qemu",
        What::GigabytesPerSecond,
        ONE,
        &[Q {
            channels: None,
            ready: true,
        }],
    ),
    (
        "throughput-2-streams-vs-qemu",
        What::GigabytesPerSecond,
        TWO,
        &[
            Q {
                channels: Some(2),
                ready: true,
            },
            Q {
                channels: Some(4),
                ready: true,
            },
        ],
    ),
    (
        "cpu-per-gib-vs-qemu",
        What::CpuPerGib,
        FRESH,
        &[Q {
            channels: None,
            ready: false,
        }],
    ),
    (
        "cpu-per-gib-reserved-vs-qemu",
        What::CpuPerGib,
        ONE,
        &[Q {
            channels: None,
            ready: true,
        }],
    ),
];

#[derive(Clone, Copy, Debug)]
struct Sample {
    bytes_per_s: f64,
    cpu_s_per_gib: Option<f64>,
}

/// The guests under both monitors; the one that is not measured is stopped.
struct Field {
    godwit: Godwit,
    qemu: QemuJourney,
}

/// Measures all contenders that the wanted rows need, in turn.
pub(super) fn run(bench: &mut Bench, wanted: &[&str]) -> Result<Vec<Figure>> {
    let comparisons: Vec<_> = COMPARISONS
        .iter()
        .filter(|comparison| wanted.contains(&comparison.0))
        .collect();
    let mut samples: Vec<(ThroughputContender, Vec<Sample>)> = Vec::new();
    for (_, _, ours, peers) in &comparisons {
        for contender in std::iter::once(ours).chain(peers.iter()) {
            if !samples.iter().any(|(known, _)| known == contender) {
                samples.push((*contender, Vec::new()));
            }
        }
    }
    let mut field = Field::new(bench)?;
    let turns = samples.len();
    for repetition in 0..bench.count(REPETITIONS) as usize {
        // Each repetition begins with another contender.
        for turn in 0..turns {
            let (contender, of) = &mut samples[(turn + repetition) % turns];
            of.push(field.measure(bench, *contender)?);
        }
    }
    let of = |contender: &ThroughputContender, what: What| {
        let (_, of) = samples.iter().find(|(known, _)| known == contender)?;
        median(of.iter().filter_map(|sample| sample.get(what)))
    };
    let figure = |&&(name, what, ours, peers): &&Comparison| {
        let peers = peers.iter().filter_map(|peer| of(peer, what));
        let best = peers.max_by(|a, b| {
            if what == What::CpuPerGib {
                b.total_cmp(a)
            } else {
                a.total_cmp(b)
            }
        });
        Figure::beside(name, of(&ours, what), best)
    };
    Ok(comparisons.iter().map(figure).collect())
}

impl Field {
    fn new(bench: &Bench) -> Result<Self> {
        let guest = BenchGuest::idle(MEMORY_MIB);
        let godwit = Godwit::start(&bench.fixtures, guest, &[])?;
        godwit.freeze()?;
        let qemu = QemuJourney::start(&bench.fixtures, guest, &[])?;
        qemu.freeze()?;
        Ok(Self { godwit, qemu })
    }

    fn measure(&mut self, bench: &mut Bench, contender: ThroughputContender) -> Result<Sample> {
        let what = contender.shown();
        match contender {
            Iperf { pairs, zero_copy } => bench.clean(&what, |_| {
                let (rate, window) = Window::of(|| iperf::rate(pairs, zero_copy));
                let sample = Sample {
                    bytes_per_s: rate?,
                    cpu_s_per_gib: None,
                };
                sample.print(&what);
                Ok((sample, window))
            }),
            G { streams, ready } => {
                self.godwit.thaw()?;
                let sample = Self::measure_godwit(bench, &mut self.godwit, &what, streams, ready)?;
                self.godwit.freeze()?;
                sample.print(&what);
                Ok(sample)
            }
            Q { channels, ready } => {
                self.qemu.thaw()?;
                let (limit, bandwidth, auto_converge) = (Duration::from_millis(30), None, false);
                let settings = QemuSettings {
                    limit,
                    bandwidth,
                    multifd: channels,
                    auto_converge,
                    prealloc: ready,
                };
                let qemu = &mut self.qemu;
                let sample = bench.clean(&what, |_| {
                    let moved = qemu.hop(&settings)?;
                    let cpu_s_per_gib = Some(moved.cpu.as_secs_f64() / (moved.data_bytes / GIB));
                    let sample = Sample {
                        bytes_per_s: moved.bytes / moved.total_ms * 1e3,
                        cpu_s_per_gib,
                    };
                    sample.print(&what);
                    let window = moved.window;
                    Ok((sample, window))
                })?;
                self.qemu.freeze()?;
                Ok(sample)
            }
        }
    }

    fn measure_godwit(
        bench: &mut Bench,
        godwit: &mut Godwit,
        what: &str,
        streams: u32,
        ready: bool,
    ) -> Result<Sample> {
        let streams = streams.to_string();
        let migrate = ["--streams", streams.as_str(), "--max-downtime", "30ms"];
        let asked = Asked {
            migrate: &migrate,
            reserve: ready,
            handover: false,
            promise: false,
        };
        let ended = bench.hop(what, godwit, &asked)?;
        let bytes_per_s = ended.first_pass_rate().context("the report has no rounds")?;
        let cpu_s_per_gib = Some(ended.cpu.as_secs_f64() / (ended.data_bytes() / GIB));
        Ok(Sample {
            bytes_per_s,
            cpu_s_per_gib,
        })
    }
}

impl ThroughputContender {
    fn shown(self) -> String {
        let of = |ready: bool| if ready { "memory ready" } else { "fresh memory" };
        match self {
            Iperf { pairs, zero_copy } => format!("iperf3 × {pairs}{}", if zero_copy { " -Z" } else { "" }),
            G { streams, ready } => format!("godwit, {streams} streams, {}", of(ready)),
            Q {
                channels: None,
                ready,
            } => format!("QEMU, {}", of(ready)),
            Q {
                channels: Some(channels),
                ready,
            } => format!("QEMU, multifd {channels}, {}", of(ready)),
        }
    }
}

impl Sample {
    /// In the unit of the rows.
    fn get(&self, what: What) -> Option<f64> {
        match what {
            What::GigabytesPerSecond => Some(self.bytes_per_s / 1e9),
            What::CpuPerGib => self.cpu_s_per_gib,
        }
    }

    fn print(&self, what: &str) {
        let cpu = self
            .cpu_s_per_gib
            .map(|cpu| format!(", {cpu:.3} CPU s/GiB"))
            .unwrap_or_default();
        print_status(format_args!("{what}: {:.2} GB/s{cpu}", self.bytes_per_s / 1e9));
    }
}
