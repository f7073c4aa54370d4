//! `cargo xtask test`: everything that is tested.

use anyhow::Result;

use crate::lint;
use crate::runner::{TestLane, has_kvm, prepare};
use crate::steps::Steps;

#[derive(clap::Args)]
pub(crate) struct TestOptions {
    /// Run only tests whose name contains this
    filter: Option<String>,
}

/// Sets up, checks, tests, sums up.
pub(crate) fn run(options: &TestOptions) -> Result<()> {
    let filter = options.filter.as_deref();
    let mut steps = Steps::default();
    let prepared = steps.need("set-up", prepare)?;
    match filter {
        None => steps.check("lint", lint::run_all),
        Some(_) => steps.not_run("lint", "a filter was given"),
    }
    steps.tests("unit tests", || prepared.unit_tests(filter));
    steps.tests("harness", || prepared.harness_tests(filter));
    if has_kvm() {
        steps.tests("direct lane", || {
            prepared.scenarios(TestLane::Direct, filter, &[])
        });
    } else {
        steps.not_run(
            "direct lane",
            "this machine has no /dev/kvm; its tests count as skipped",
        );
        steps.tests("direct lane", || {
            prepared.count_scenarios(TestLane::Direct, filter)
        });
    }
    steps.tests("lab", || prepared.scenarios(TestLane::Lab, filter, &[]));
    steps.finish()
}
