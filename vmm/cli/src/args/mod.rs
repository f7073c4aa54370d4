//! The arguments of every command.

mod device_options;
mod help;
mod limits;
mod place;
mod units;
mod vsock;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use devices::Limits;
use migration::{MAX_STREAMS, MigrateOptions};
use vmm::machine::VsockConfig;

use device_options::{BackendArgs, DeviceArgs, backend};
use help::{
    BALLOON_EXAMPLES, DISK_EXAMPLES, MIGRATE_EXAMPLES, RECEIVE_EXAMPLES, REPORT_EXAMPLES, RESOLVE_HELP,
    RESTORE_EXAMPLES, RUN_EXAMPLES, SNAPSHOT_EXAMPLES,
};
use place::Place;

/// MicroVMs that move between hosts while they run.
#[derive(Debug, Parser)]
#[command(name = "godwit", version, propagate_version = true)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Boot a guest and run it until it ends, is stopped, or has moved.
    #[command(after_help = RUN_EXAMPLES)]
    Run(Box<RunArgs>),
    /// Wait for a guest that moves here, and run it.
    #[command(after_help = RECEIVE_EXAMPLES)]
    Receive(ReceiveArgs),
    /// Start a guest from a snapshot.
    #[command(after_help = RESTORE_EXAMPLES)]
    Restore(RestoreArgs),
    /// Move a running guest to another host.
    #[command(after_help = MIGRATE_EXAMPLES)]
    Migrate(MigrateArgs),
    /// Put a guest in files, from which it can be started again, and more than once.
    #[command(after_help = SNAPSHOT_EXAMPLES)]
    Snapshot(SnapshotArgs),
    /// Take memory from a guest that has a balloon, or give it back; show what it has and what it needs.
    #[command(after_help = BALLOON_EXAMPLES)]
    Balloon(BalloonArgs),
    /// Show what a VM's devices have counted since its process has it.
    Metrics(OutputArgs),
    /// Have a guest see that the file or block device of one of its disks has another size now.
    #[command(after_help = DISK_EXAMPLES)]
    Disk(DiskArgs),
    /// Show what a VM is and does.
    Status(OutputArgs),
    /// Cancel a VM's migration or snapshot; the guest runs on where it is.
    Cancel(VmArgs),
    /// Settle a migration in doubt: ask the other side, or decide.
    #[command(after_help = RESOLVE_HELP)]
    Resolve(ResolveArgs),
    /// Hold a guest's vCPUs.
    Pause(VmArgs),
    /// Let a paused guest go on.
    Resume(VmArgs),
    /// Shut a guest down: power button first, then the end.
    Stop(StopArgs),
    /// List the VMs of this host.
    Ps(ListArgs),
    /// Attach to a guest's console. Ctrl-] detaches.
    Console(VmArgs),
    /// Print the log of a VM that was started with --detach or --log.
    Logs(LogsArgs),
    /// Draw the trace of a migration.
    #[command(after_help = REPORT_EXAMPLES)]
    Report(ReportArgs),
    /// Say what this host offers for booting and moving guests, and what it lacks.
    Probe(ListArgs),
}

/// Arguments of `run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) common: CommonArgs,
    /// Configuration in Firecracker's format; other options override it
    #[arg(long, value_name = "FILE")]
    pub(crate) config_file: Option<PathBuf>,
    /// Kernel: ELF vmlinux or bzImage
    #[arg(long, value_name = "FILE", required_unless_present = "config_file")]
    pub(crate) kernel: Option<PathBuf>,
    /// Initial RAM file system
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// Kernel command line [default: "console=ttyS0 reboot=k panic=1 pci=off", or with --console virtio
    /// "earlyprintk=ttyS0 console=hvc0 reboot=k panic=1 pci=off"]
    #[arg(long, value_name = "TEXT")]
    pub(crate) cmdline: Option<String>,
    /// Number of vCPUs, 1 to 32 [default: 1]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) cpus: Option<u64>,
    /// Guest memory, e.g. 512M or 2GiB [default: 512M]
    #[arg(long, value_name = "SIZE", value_parser = units::size, allow_hyphen_values = true)]
    pub(crate) memory: Option<u64>,
    /// Back guest memory by a memfd, which other processes can share
    #[arg(long)]
    pub(crate) shared_memory: bool,
    /// Take guest memory from the huge pages of 2 MiB that the host has set aside (/proc/sys/vm/nr_hugepages)
    #[arg(long)]
    pub(crate) huge_pages: bool,
    /// Touch all guest memory before the guest starts, so that it never waits for the host's
    #[arg(long)]
    pub(crate) prealloc: bool,
    /// Track dirty pages with a ring per vCPU instead of a bitmap, which tells a migration which vCPU dirties
    #[arg(long)]
    pub(crate) dirty_ring: bool,
    /// What the guest's CPUs announce: host, pvm, baseline [default: chosen by a probe and printed]
    #[arg(long, value_name = "NAME")]
    pub(crate) cpu_template: Option<String>,
    #[command(flatten)]
    pub(crate) devices: DeviceArgs,
    /// A balloon: the guest gives memory back that it does not use, and SIZE of it from the start [default size: 0]
    #[arg(long, value_name = "SIZE", value_parser = units::size, num_args = 0..=1, default_missing_value = "0")]
    pub(crate) balloon: Option<u64>,
    /// A socket device: cid=N,uds=PATH[,bandwidth=RATE][,iops=N]; programs on the host connect to the Unix socket PATH
    #[arg(long, value_name = "SPEC", value_parser = vsock::run)]
    pub(crate) vsock: Option<VsockConfig<u64>>,
    /// Limits of the entropy device, which every machine has: bandwidth=RATE, iops=N or both [default: none]
    #[arg(long, value_name = "SPEC", value_parser = limits::alone)]
    pub(crate) rng: Option<Limits>,
    /// Which of the guest's consoles has the terminal
    #[arg(long, value_enum, default_value_t = ConsoleArg::Serial)]
    pub(crate) console: ConsoleArg,
    /// What becomes of a guest that resets. One that has moved ends all the same: its kernel stays where it was booted
    #[arg(long, value_enum, default_value_t = OnResetArg::Exit)]
    pub(crate) on_reset: OnResetArg,
    /// A channel between the guest's /dev/virtio-ports/NAME and a program on the host that connects to the Unix socket
    /// PATH; may be given several times
    #[arg(long = "port", value_name = "NAME=PATH", value_parser = backend::<PathBuf>)]
    pub(crate) ports: Vec<(String, PathBuf)>,
}

/// What becomes of a guest that resets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnResetArg {
    /// The VM ends, with status 0.
    Exit,
    /// It boots again in the same process, at once, or up to half a minute later if it keeps resetting.
    Reboot,
}

/// The consoles of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ConsoleArg {
    /// The serial port, ttyS0.
    Serial,
    /// A virtio console, hvc0, which knows the terminal's size.
    Virtio,
}

/// What a restored guest's clocks make of the time since its snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ClockArg {
    /// They go on by it: the wall clock is right, and what was due meanwhile is due at once.
    Advance,
    /// They go on from where they stood, as with Firecracker: nothing jumps, and the wall clock is behind.
    Keep,
}

/// What `run`, `receive` and `restore` have in common.
#[derive(Debug, Args)]
pub(crate) struct CommonArgs {
    /// Name of the VM [default: vm-PID]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Path of the API socket [default: NAME.sock in the run-time directory]
    #[arg(long, value_name = "PATH")]
    pub(crate) api_sock: Option<PathBuf>,
    /// How long a guest that is asked to shut down (SIGTERM, Ctrl-], `godwit stop`) may take before it is stopped
    #[arg(long, value_name = "DURATION", value_parser = units::duration, default_value = "5s")]
    pub(crate) stop_timeout: Duration,
    /// Append log messages to a file instead of writing them to stderr
    #[arg(long, value_name = "FILE")]
    pub(crate) log: Option<PathBuf>,
    /// Leave the VM running in the background: wait until it is up, print its name, and return. `godwit console` has its
    /// console, `godwit logs` its log, which is NAME.log in the run-time directory without --log
    #[arg(long)]
    pub(crate) detach: bool,
}

/// Arguments of `receive`.
#[derive(Debug, Args)]
pub(crate) struct ReceiveArgs {
    #[command(flatten)]
    pub(crate) common: CommonArgs,
    /// Where to listen: tcp:HOST:PORT (every address of a name) or unix:PATH
    #[arg(long, value_name = "ENDPOINT")]
    pub(crate) listen: Place,
    #[command(flatten)]
    pub(crate) backends: BackendArgs,
    /// Refuse machines with more memory than this [default: what the host has]
    #[arg(long, value_name = "SIZE", value_parser = units::size)]
    pub(crate) max_memory: Option<u64>,
    /// Make this much memory resident before listening, for a machine that has exactly that much
    #[arg(long, value_name = "SIZE", value_parser = units::size)]
    pub(crate) reserve: Option<u64>,
}

/// Arguments of `restore`.
#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// What `godwit snapshot` wrote
    #[arg(value_name = "DIR")]
    pub(crate) directory: PathBuf,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
    #[command(flatten)]
    pub(crate) backends: BackendArgs,
    /// Let the guest run; otherwise it waits for `godwit resume`
    #[arg(long)]
    pub(crate) resume: bool,
    /// What the guest's clocks make of the time since the snapshot
    #[arg(long, value_enum, default_value = "advance")]
    pub(crate) clock: ClockArg,
    #[command(flatten)]
    pub(crate) memory: RestoreMemoryArgs,
}

/// How `restore` gets the guest's memory.
#[derive(Debug, Args)]
pub(crate) struct RestoreMemoryArgs {
    /// Read pages when they are needed, which is the default
    #[arg(long = "lazy", conflicts_with_all = ["prefetch", "preload", "uffd"])]
    pub(crate) _lazy: bool,
    /// Let the guest run at once and read all memory meanwhile, what it waits for first; check it
    #[arg(long, conflicts_with_all = ["preload", "uffd"])]
    pub(crate) prefetch: bool,
    /// Read all memory and check it before the guest runs
    #[arg(long)]
    pub(crate) preload: bool,
    /// Let the page-fault handler that listens at this Unix socket bring pages when they are needed
    #[arg(long, value_name = "SOCKET", conflicts_with = "preload")]
    pub(crate) uffd: Option<PathBuf>,
}

/// Arguments of `snapshot`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct SnapshotArgs {
    #[command(subcommand)]
    pub(crate) command: Option<SnapshotCommand>,
    #[command(flatten)]
    pub(crate) write: Option<WriteArgs>,
}

/// What else there is to do with snapshots.
#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Put a snapshot and differences to it together, into one whole snapshot
    Merge(MergeArgs),
}

/// Arguments of `snapshot` itself.
#[derive(Debug, Args)]
pub(crate) struct WriteArgs {
    /// Name of the VM, or path of its API socket
    #[arg(value_name = "VM")]
    pub(crate) vm: String,
    /// The directory that is to be made
    #[arg(value_name = "DIR")]
    pub(crate) directory: PathBuf,
    /// Write only what has changed since the VM's last snapshot, or since it was restored from one that it is mapped from
    #[arg(long)]
    pub(crate) diff: bool,
    /// Let the guest run on here afterwards; otherwise the VM ends
    #[arg(long)]
    pub(crate) keep_running: bool,
    /// Let it run on at once, however much memory it has: what it writes meanwhile is copied before it changes
    #[arg(long, requires = "keep_running", conflicts_with = "diff")]
    pub(crate) live: bool,
    /// Print the report as one JSON object on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `snapshot merge`.
#[derive(Debug, Args)]
pub(crate) struct MergeArgs {
    /// The whole snapshot
    #[arg(value_name = "BASE")]
    pub(crate) base: PathBuf,
    /// Differences, each to the one before it
    #[arg(value_name = "DIFF", required = true)]
    pub(crate) differences: Vec<PathBuf>,
    /// The directory that is to be made
    #[arg(long, short, value_name = "DIR")]
    pub(crate) output: PathBuf,
}

/// Arguments of `disk`.
#[derive(Debug, Args)]
pub(crate) struct DiskArgs {
    /// Name of the VM, or path of its API socket
    pub(crate) vm: String,
    /// Name of the disk
    pub(crate) id: String,
}

/// Arguments of `balloon`.
#[derive(Debug, Args)]
pub(crate) struct BalloonArgs {
    /// Name of the VM, or path of its API socket
    #[arg(value_name = "VM")]
    pub(crate) vm: String,
    /// How much of its memory the guest is to give up, in whole MiB [default: as it is]
    #[arg(value_name = "SIZE", value_parser = units::mebibytes)]
    pub(crate) target_mib: Option<u64>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `migrate`.
#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    /// Name of the VM, or path of its API socket
    #[arg(value_name = "VM")]
    pub(crate) vm: String,
    /// Where `godwit receive` listens: tcp:HOST:PORT, tcp:ADDRESS:PORT,ADDRESS:PORT... or unix:PATH
    #[arg(value_name = "DEST")]
    pub(crate) destination: Place,
    /// How long the guest may stand still; a pause that comes to three times as much (or 100 ms more, if that is more)
    /// is undone
    #[arg(long, value_name = "DURATION", value_parser = units::some_duration, default_value = "300ms")]
    pub(crate) max_downtime: Duration,
    /// When the move must have ended, counted from its start [default: never]
    #[arg(long, value_name = "DURATION", value_parser = units::some_duration)]
    pub(crate) deadline: Option<Duration>,
    /// When either cannot be kept: give up, or move it nevertheless (with a pause of up to 30 s)
    #[arg(long, value_enum, default_value_t = OnMissArg::Fail)]
    pub(crate) on_miss: OnMissArg,
    /// Data streams, 1 to 32
    #[arg(long, value_name = "N", default_value_t = MigrateOptions::default().streams,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_STREAMS)))]
    pub(crate) streams: u32,
    /// Send no faster than this while the guest runs [default: no limit]
    #[arg(long, value_name = "RATE", value_parser = units::rate)]
    pub(crate) bandwidth: Option<u64>,
    /// Send no faster than this while the guest stands still [default: no limit]
    #[arg(long, value_name = "RATE", value_parser = units::rate)]
    pub(crate) final_bandwidth: Option<u64>,
    /// Never slow the guest down to keep the promise
    #[arg(long)]
    pub(crate) no_throttle: bool,
    /// Compress memory where it pays
    #[arg(long, value_enum)]
    pub(crate) compression: Option<CompressionArg>,
    /// Disks that the destination does not have come along: where nothing is at the path that `receive --disk` names, a
    /// raw image is made there and filled while the guest runs
    #[arg(long)]
    pub(crate) with_disks: bool,
    /// Compare a digest of all memory, and of disks that come along, on both sides before the guest runs on
    #[arg(long)]
    pub(crate) verify: bool,
    /// Write every sample to a file that `godwit report` draws
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    /// Print the report as one JSON object on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

/// See [`migration::Compression`].
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum CompressionArg {
    /// Fast: for links of some Gbit/s and less.
    Lz4,
    /// Denser: for links of some hundred Mbit/s and less.
    Zstd,
}

/// See [`migration::OnMiss`].
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum OnMissArg {
    /// Give up; the guest runs on here.
    Fail,
    /// Move it nevertheless.
    Switch,
}

/// Arguments of `report`.
#[derive(Debug, Args)]
pub(crate) struct ReportArgs {
    /// What `godwit migrate --trace` wrote
    #[arg(value_name = "FILE")]
    pub(crate) trace: PathBuf,
    /// Where to: a picture (.svg) or a page with the report's figures (.html) [default: SVG on stdout]
    #[arg(long, short, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
}

/// Arguments of `resolve`.
#[derive(Debug, Args)]
pub(crate) struct ResolveArgs {
    /// Name of the VM, or path of its API socket
    #[arg(value_name = "VM")]
    pub(crate) vm: String,
    /// If nobody answers: throw the copy of this process away
    #[arg(long, conflicts_with = "run")]
    pub(crate) discard: bool,
    /// If nobody answers: run the guest in this process; make sure that it never runs at the other end
    #[arg(long)]
    pub(crate) run: bool,
    /// Print one JSON object on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

/// A VM.
#[derive(Debug, Args)]
pub(crate) struct VmArgs {
    /// Name of the VM, or path of its API socket
    #[arg(value_name = "VM")]
    pub(crate) vm: String,
}

/// A VM, and how to print.
#[derive(Debug, Args)]
pub(crate) struct OutputArgs {
    /// Name of the VM, or path of its API socket
    #[arg(value_name = "VM")]
    pub(crate) vm: String,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `logs`.
#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Name of the VM, or path of its API socket; also that of one that has ended, if it was started with --detach
    #[arg(value_name = "VM")]
    pub(crate) vm: String,
    /// Go on until the VM ends
    #[arg(long, short)]
    pub(crate) follow: bool,
}

/// Arguments of `stop`.
#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// Name of the VM, or path of its API socket
    #[arg(value_name = "VM")]
    pub(crate) vm: String,
    /// End it at once, without asking the guest; its process as well if that does not answer, and also a copy of a guest
    /// that a migration left in doubt
    #[arg(long)]
    pub(crate) force: bool,
    /// How long the guest may take to shut down [default: what the VM was started with]
    #[arg(long, value_name = "DURATION", value_parser = units::duration, conflicts_with = "force")]
    pub(crate) timeout: Option<Duration>,
}

/// How to print a list.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn bad_usage_is_refused() {
        for bad in [
            &["godwit", "run"][..],
            &["godwit", "migrate", "web", "host:7000"],
            &[
                "godwit",
                "migrate",
                "web",
                "tcp:host:7000",
                "--max-downtime",
                "soon",
            ],
            &["godwit", "receive", "--listen", "tcp:host"],
            &["godwit", "restore", "dir", "--lazy", "--preload"],
            &["godwit", "restore", "dir", "--lazy", "--prefetch"],
            &["godwit", "restore", "dir", "--prefetch", "--preload"],
            &["godwit", "restore", "dir", "--prefetch", "--uffd", "handler"],
            &["godwit", "restore", "dir", "--lazy", "--uffd", "handler"],
        ] {
            assert!(Cli::try_parse_from(bad).is_err(), "{bad:?}");
        }
        Cli::try_parse_from(["godwit", "restore", "dir", "--lazy", "--resume"]).unwrap();
    }

    #[test]
    fn options_of_a_migration() {
        let migrate = |more: &str| {
            let words = "godwit migrate web tcp:host:7000"
                .split(' ')
                .chain(more.split_whitespace());
            Cli::try_parse_from(words).map_err(|error| error.to_string())
        };
        let all = "--streams 4 --max-downtime 20ms --deadline 30s --on-miss switch --bandwidth 1GiB/s \
                   --final-bandwidth 500MB/s --no-throttle --compression lz4 --with-disks --verify --json";
        let Command::Migrate(args) = migrate(all).unwrap().command else {
            panic!("another command");
        };
        assert_eq!((args.streams, args.bandwidth), (4, Some(1 << 30)));
        assert_eq!(args.deadline, Some(Duration::from_secs(30)));
        for bad in [
            "--streams 0",
            "--streams 33",
            "--max-downtime 0s",
            "--deadline 0ms",
            "--bandwidth 0MB/s",
            "--final-bandwidth 1GiB",
            "--compression rar",
        ] {
            let (option, _) = bad.split_once(' ').unwrap();
            let error = migrate(bad).unwrap_err();
            assert!(error.contains(option), "{bad}: {error}");
        }
    }
}
