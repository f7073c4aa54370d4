//! Running tests, and building what they need.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::guests::{self, Artifact};
use crate::packages;
use crate::steps::TestCounts;
use crate::workspace::{cargo, root, run};

/// What is installed system-wide: the emulator for the lab, file system tools for its disk, network tools for taps, and
/// `losetup` (mount).
const PACKAGES: [&str; 6] = [
    "e2fsprogs",
    "iproute2",
    "mount",
    "qemu-system-x86",
    "qemu-utils",
    "util-linux",
];

/// The scenarios on emulated hosts; all others need the machine's own KVM.
const LAB: &str = "lab";

/// Where a scenario runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TestLane {
    Direct,
    Lab,
}

/// What scenarios work with.
pub(crate) struct Prepared {
    root: PathBuf,
    pub(crate) godwit: PathBuf,
    pub(crate) guests: PathBuf,
}

/// Installs and builds everything that scenarios need.
pub(crate) fn prepare() -> Result<Prepared> {
    packages::ensure(&PACKAGES)?;
    let guests = guests::build(&Artifact::ALL)?;
    Ok(Prepared {
        root: root()?,
        godwit: build_godwit()?,
        guests,
    })
}

/// Builds the program; returns its path.
pub(crate) fn build_godwit() -> Result<PathBuf> {
    let root = root()?;
    run(cargo()
        .current_dir(&root)
        .args(["build", "--quiet", "--release", "--package", "godwit"]))?;
    Ok(root.join("target/x86_64-unknown-linux-gnu/release/godwit"))
}

/// Whether the machine has a KVM of its own. One that is there and does not work is a failure, not an absence.
pub(crate) fn has_kvm() -> bool {
    Path::new("/dev/kvm").exists()
}

impl Prepared {
    /// Every test outside `tests/`: those that need nothing but the sources and the guests.
    pub(crate) fn unit_tests(&self, filter: Option<&str>) -> Result<TestCounts> {
        counted(&mut finish(self.unit_test_command(), filter, &[]))
    }

    /// Those of them that are properties, for long.
    pub(crate) fn properties(&self, filter: &str, settings: &[(&str, String)]) -> Result<TestCounts> {
        let mut command = self.unit_test_command();
        command.args(["--lib", "--profile", "fuzz"]);
        command.envs(settings.iter().map(|(key, value)| (key, value)));
        counted(&mut finish(command, Some(filter), &[]))
    }

    fn unit_test_command(&self) -> Command {
        let mut command = self.cargo_test();
        command.args(["--workspace", "--exclude", "tests"]);
        command
    }

    /// The tests of the harness itself.
    pub(crate) fn harness_tests(&self, filter: Option<&str>) -> Result<TestCounts> {
        let mut command = self.cargo_test();
        command.args(["--package", "tests", "--lib"]);
        counted(&mut finish(command, filter, &[]))
    }

    /// The scenarios of a lane, one at a time: they measure, and each of them fills the machine.
    pub(crate) fn scenarios(
        &self,
        lane: TestLane,
        filter: Option<&str>,
        settings: &[(&str, String)],
    ) -> Result<TestCounts> {
        let mut command = self.scenario_command(lane)?;
        command.envs(settings.iter().map(|(key, value)| (key, value)));
        counted(&mut finish(
            command,
            filter,
            &["--test-threads=1", "--show-output"],
        ))
    }

    /// How many scenarios a lane has.
    pub(crate) fn count_scenarios(&self, lane: TestLane, filter: Option<&str>) -> Result<TestCounts> {
        let listed =
            crate::workspace::output(&mut finish(self.scenario_command(lane)?, filter, &["--list"]))?;
        let skipped = listed.lines().filter(|line| line.ends_with(": test")).count() as u64;
        Ok(TestCounts {
            skipped,
            ..Default::default()
        })
    }

    fn scenario_command(&self, lane: TestLane) -> Result<Command> {
        let mut command = self.cargo_test();
        command.args(["--package", "tests"]);
        let mut names = self.scenario_names()?;
        names.retain(|name| (name == LAB) == (lane == TestLane::Lab));
        // Without a name cargo would run all of them.
        ensure!(!names.is_empty(), "tests/tests has no scenario of this lane");
        command.args(names.iter().flat_map(|name| ["--test", name]));
        Ok(command)
    }

    /// One binary for each file, so that none is forgotten.
    fn scenario_names(&self) -> Result<Vec<String>> {
        let folder = self.root.join("tests/tests");
        let mut names = Vec::new();
        for entry in folder.read_dir().with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "rs") {
                names.extend(path.file_stem().and_then(|name| name.to_str()).map(str::to_owned));
            }
        }
        names.sort();
        Ok(names)
    }

    fn cargo_test(&self) -> Command {
        let mut command = cargo();
        command.current_dir(&self.root).args(["test", "--no-fail-fast"]);
        command
            .env("GODWIT_BIN", &self.godwit)
            .env("GODWIT_GUESTS", &self.guests);
        // The error of a test says where it is from; thirty frames of the test runner do not.
        command.env("RUST_LIB_BACKTRACE", "0");
        command
    }
}

/// Adds what goes to the test runners: their options, and which tests to run.
fn finish(mut command: Command, filter: Option<&str>, options: &[&str]) -> Command {
    command.arg("--").args(options).args(filter);
    command
}

/// Runs tests, passes their output on, and adds up the runners' closing lines.
fn counted(command: &mut Command) -> Result<TestCounts> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo test")?;
    let stdout = child.stdout.take().context("cargo test without an output")?;
    let mut counts = TestCounts::default();
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.context("output of cargo test")?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        if let Some(of_runner) = TestCounts::parse(&line) {
            counts += of_runner;
        }
    }
    let status = child.wait().context("cargo test")?;
    // Tests that fail are counted; this is something that does not build or a runner that crashed.
    if !status.success() && counts.failed == 0 {
        bail!("cargo test ended with {status} and no failed test");
    }
    Ok(counts)
}
