//! The steps of a long command: announced, timed, and summed up at the end.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::workspace::print_status;

/// Numbers of tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TestCounts {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

/// What has been done so far.
#[derive(Default)]
pub(crate) struct Steps {
    done: Vec<FinishedStep>,
}

struct FinishedStep {
    name: String,
    took: Duration,
    outcome: StepOutcome,
}

enum StepOutcome {
    Done,
    Tests(TestCounts),
    Failed(String),
    NotRun(String),
}

impl TestCounts {
    /// Those of a test runner's closing line `test result: …`; nothing if the line is another.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let (_, numbers) = line.strip_prefix("test result: ")?.split_once(". ")?;
        let number = |name: &str| {
            let part = numbers
                .split(';')
                .map(str::trim)
                .find_map(|part| part.strip_suffix(name))?;
            part.trim().parse().ok()
        };
        Some(Self {
            passed: number("passed")?,
            failed: number("failed")?,
            skipped: number("ignored")?,
        })
    }
}

impl std::ops::AddAssign for TestCounts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for TestCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            passed,
            failed,
            skipped,
        } = self;
        write!(f, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

impl Steps {
    /// Does a step that the others need.
    pub(crate) fn need<T>(&mut self, name: &str, step: impl FnOnce() -> Result<T>) -> Result<T> {
        let (result, took) = timed(name, step);
        let outcome = result.as_ref().map_or_else(failed, |_| StepOutcome::Done);
        self.done.push(FinishedStep {
            name: name.into(),
            took,
            outcome,
        });
        result
    }

    /// Does a step whose failure stops nothing but the good end.
    pub(crate) fn check(&mut self, name: &str, step: impl FnOnce() -> Result<()>) {
        let (result, took) = timed(name, step);
        let outcome = result.as_ref().map_or_else(failed, |()| StepOutcome::Done);
        self.done.push(FinishedStep {
            name: name.into(),
            took,
            outcome,
        });
    }

    /// Runs tests.
    pub(crate) fn tests(&mut self, name: &str, step: impl FnOnce() -> Result<TestCounts>) {
        let (result, took) = timed(name, step);
        let outcome = result.map_or_else(|error| failed(&error), StepOutcome::Tests);
        self.done.push(FinishedStep {
            name: name.into(),
            took,
            outcome,
        });
    }

    /// Records what was not run, and why.
    pub(crate) fn not_run(&mut self, name: &str, why: &str) {
        print_status(format_args!("{name}: NOT RUN: {why}"));
        self.done.push(FinishedStep {
            name: name.into(),
            took: Duration::ZERO,
            outcome: StepOutcome::NotRun(why.into()),
        });
    }

    /// Prints the summary. An error if a step or a test failed, or if no test ran.
    pub(crate) fn finish(self) -> Result<()> {
        println!("\nsummary:");
        let mut counts = TestCounts::default();
        let mut broken = 0;
        for FinishedStep { name, took, outcome } in &self.done {
            let said = match outcome {
                StepOutcome::Done => "ok".to_owned(),
                StepOutcome::Tests(of_step) => {
                    counts += *of_step;
                    of_step.to_string()
                }
                StepOutcome::Failed(error) => {
                    broken += 1;
                    format!("FAILED: {error}")
                }
                StepOutcome::NotRun(why) => format!("NOT RUN: {why}"),
            };
            println!("  {name:<14} {:>7.1} s  {said}", took.as_secs_f64());
        }
        let total: Duration = self.done.iter().map(|step| step.took).sum();
        println!("{counts}, {broken} steps broken, in {:.0} s", total.as_secs_f64());
        if broken > 0 || counts.failed > 0 {
            bail!("something failed, see above");
        }
        if counts.passed == 0 {
            bail!("no test ran");
        }
        Ok(())
    }
}

fn failed(error: &anyhow::Error) -> StepOutcome {
    StepOutcome::Failed(format!("{error:#}"))
}

fn timed<T>(name: &str, step: impl FnOnce() -> Result<T>) -> (Result<T>, Duration) {
    print_status(format_args!("== {name}"));
    let begin = Instant::now();
    let result = step();
    let took = begin.elapsed();
    match &result {
        Ok(_) => print_status(format_args!("== {name}: {:.1} s", took.as_secs_f64())),
        Err(error) => print_status(format_args!(
            "== {name}: FAILED after {:.1} s: {error:#}",
            took.as_secs_f64()
        )),
    }
    (result, took)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_read() {
        let line = "test result: FAILED. 5 passed; 2 failed; 1 ignored; 0 measured; 3 filtered out; finished in 4.77s";
        assert_eq!(
            TestCounts::parse(line),
            Some(TestCounts {
                passed: 5,
                failed: 2,
                skipped: 1
            })
        );
        assert_eq!(TestCounts::parse("test tests::result: ok"), None);
    }

    #[test]
    fn a_failure_is_not_forgotten() {
        let tests = |counts: TestCounts| {
            let mut steps = Steps::default();
            steps.tests("tests", || Ok(counts));
            steps
        };
        let passed = TestCounts {
            passed: 1,
            ..Default::default()
        };
        tests(passed).finish().unwrap();
        assert!(tests(TestCounts::default()).finish().is_err());
        assert!(tests(TestCounts { failed: 1, ..passed }).finish().is_err());
        let mut broken = tests(passed);
        broken.check("lint", || bail!("bad"));
        assert!(broken.finish().is_err());
    }
}
