//! The trace of a migration: one JSON object in each line, as `godwit migrate --trace` writes them.
//!
//! The first is the [`TraceHeader`], then come the samples in the order in which they were taken, and last the
//! report, unless whoever wrote lost the VM. Fields that are not known are passed over, so that a newer trace of
//! the same format can be read.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use api::VERSION;
use migration::{Progress, Report};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The format that this program writes and reads.
pub(crate) const FORMAT: u32 = 1;
/// Most bytes of a line: far more than a report of the most rounds has.
const LINE_MAX: u64 = 4 << 20;
/// Most samples of a trace: what the engine keeps.
const SAMPLES_MAX: usize = 1 << 20;

/// A trace cannot be written or read.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub(crate) enum TraceError {
    #[error("trace {path}")]
    File { path: PathBuf, source: io::Error },
    #[error("{path}: expected a trace as `godwit migrate --trace` writes it, got {got}")]
    NotATrace { path: PathBuf, got: String },
    #[error("{path}: expected a trace of format {FORMAT}, got format {got}, written by godwit {version}")]
    OtherFormat {
        path: PathBuf,
        got: u32,
        version: String,
    },
    #[error("{path}: line {line}")]
    TraceLine {
        path: PathBuf,
        line: usize,
        source: serde_json::Error,
    },
    #[error("{path}: line {line}: expected {expected}, got {got}")]
    Order {
        path: PathBuf,
        line: usize,
        expected: &'static str,
        got: &'static str,
    },
    #[error("{path}: expected at most {SAMPLES_MAX} samples in lines of at most {LINE_MAX} bytes, got more")]
    TooLong { path: PathBuf },
    #[error("{path}: no samples: the migration ended before there was anything to draw")]
    NoSamples { path: PathBuf },
}

/// What was asked for, as far as a drawing needs it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct TraceGoal {
    /// Budget of the downtime in milliseconds.
    pub max_downtime_ms: f64,
    /// When it must have ended, in milliseconds from its start.
    #[serde(default)]
    pub deadline_ms: Option<f64>,
}

/// The first line. `O` is everything that was asked for when it is written, and a [`TraceGoal`] when it is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct TraceHeader<O> {
    /// [`FORMAT`].
    pub format: u32,
    /// Version of the program that wrote it.
    pub godwit_version: String,
    /// The VM that was to move.
    pub vm: String,
    /// Where to.
    pub destination: String,
    /// When it was asked for, in milliseconds since 1970.
    pub started_unix_ms: u64,
    /// What was asked for.
    pub options: O,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum TraceLine<O> {
    Trace(TraceHeader<O>),
    Sample(Progress),
    Report(Box<Report>),
}

/// Writes a trace. Whatever was given to it is in the file when the call returns.
pub(crate) struct TraceWriter {
    path: PathBuf,
    out: BufWriter<File>,
}

impl TraceWriter {
    /// Creates the file, with its header.
    pub(crate) fn create(
        path: &Path,
        vm: &str,
        destination: &str,
        options: impl Serialize,
    ) -> Result<Self, TraceError> {
        let file = File::create(path).map_err(|source| TraceError::File {
            path: path.into(),
            source,
        })?;
        let mut writer = Self {
            path: path.into(),
            out: BufWriter::new(file),
        };
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let header = TraceHeader {
            format: FORMAT,
            godwit_version: VERSION.into(),
            vm: vm.into(),
            destination: destination.into(),
            started_unix_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
            options,
        };
        writer.write([TraceLine::Trace(header)])?;
        Ok(writer)
    }

    /// Adds samples.
    pub(crate) fn samples(&mut self, samples: &[Progress]) -> Result<(), TraceError> {
        self.write(samples.iter().map(|sample| TraceLine::<()>::Sample(*sample)))
    }

    /// Adds the report, the last line.
    pub(crate) fn report(&mut self, report: &Report) -> Result<(), TraceError> {
        self.write([TraceLine::<()>::Report(Box::new(report.clone()))])
    }

    fn write<O: Serialize>(
        &mut self,
        lines: impl IntoIterator<Item = TraceLine<O>>,
    ) -> Result<(), TraceError> {
        let write = || {
            for line in lines {
                serde_json::to_writer(&mut self.out, &line)?;
                self.out.write_all(b"\n")?;
            }
            self.out.flush()
        };
        write().map_err(|source| TraceError::File {
            path: self.path.clone(),
            source,
        })
    }
}

/// A trace that was read.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Trace {
    /// Its header.
    pub header: TraceHeader<TraceGoal>,
    /// Never empty.
    pub samples: Vec<Progress>,
    /// How the migration ended, if that is known.
    pub report: Option<Report>,
    /// Whether the last line is cut off.
    pub truncated: bool,
}

impl Trace {
    /// Reads a file.
    pub(crate) fn read(path: &Path) -> Result<Self, TraceError> {
        let file = File::open(path).map_err(|source| TraceError::File {
            path: path.into(),
            source,
        })?;
        Self::parse(BufReader::new(file), path)
    }

    /// Reads lines; `path` is for the errors.
    fn parse(mut input: impl BufRead, path: &Path) -> Result<Self, TraceError> {
        let header = parse_header(&next_line(&mut input, path)?, path)?;
        let mut trace = Self {
            header,
            samples: Vec::new(),
            report: None,
            truncated: false,
        };
        for line in 2.. {
            let text = next_line(&mut input, path)?;
            if text.is_empty() {
                break;
            }
            let order = |expected, got| TraceError::Order {
                path: path.into(),
                line,
                expected,
                got,
            };
            match serde_json::from_slice::<TraceLine<TraceGoal>>(&text) {
                Ok(_) if trace.report.is_some() => return Err(order("nothing after the report", "more")),
                Ok(TraceLine::Sample(_)) if trace.samples.len() == SAMPLES_MAX => {
                    return Err(TraceError::TooLong { path: path.into() });
                }
                Ok(TraceLine::Sample(sample)) => trace.samples.push(sample),
                Ok(TraceLine::Report(report)) => trace.report = Some(*report),
                Ok(TraceLine::Trace(_)) => return Err(order("a sample or the report", "a second header")),
                // Nobody finished writing it.
                Err(_) if text.last() != Some(&b'\n') => trace.truncated = true,
                Err(source) => {
                    return Err(TraceError::TraceLine {
                        path: path.into(),
                        line,
                        source,
                    });
                }
            }
        }
        if trace.samples.is_empty() {
            return Err(TraceError::NoSamples { path: path.into() });
        }
        Ok(trace)
    }
}

/// With its end of line; empty at the end.
fn next_line(input: &mut impl BufRead, path: &Path) -> Result<Vec<u8>, TraceError> {
    let mut line = Vec::new();
    let read = input.take(LINE_MAX).read_until(b'\n', &mut line);
    let count = read.map_err(|source| TraceError::File {
        path: path.into(),
        source,
    })?;
    if count as u64 == LINE_MAX && line.last() != Some(&b'\n') {
        return Err(TraceError::TooLong { path: path.into() });
    }
    Ok(line)
}

fn parse_header(line: &[u8], path: &Path) -> Result<TraceHeader<TraceGoal>, TraceError> {
    /// What every format has.
    #[derive(Deserialize)]
    struct AnyFormat {
        trace: TraceFormat,
    }
    #[derive(Deserialize)]
    struct TraceFormat {
        format: u32,
        godwit_version: String,
    }
    let path = PathBuf::from(path);
    match serde_json::from_slice::<AnyFormat>(line) {
        Ok(AnyFormat { trace }) if trace.format != FORMAT => {
            return Err(TraceError::OtherFormat {
                path,
                got: trace.format,
                version: trace.godwit_version,
            });
        }
        Ok(_) => {}
        Err(_) => {
            let got = match line {
                [] => "an empty file".into(),
                line => {
                    let text = String::from_utf8_lossy(line);
                    format!("{:?}", text.trim_end().chars().take(60).collect::<String>())
                }
            };
            return Err(TraceError::NotATrace { path, got });
        }
    }
    match serde_json::from_slice(line) {
        Ok(TraceLine::Trace(header)) => Ok(header),
        Ok(_) => Err(TraceError::NotATrace {
            path,
            got: "no header".into(),
        }),
        Err(source) => Err(TraceError::TraceLine {
            path,
            line: 1,
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{progress, report};
    use super::*;

    fn written() -> String {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("trace");
        let goal = TraceGoal {
            max_downtime_ms: 20.0,
            deadline_ms: None,
        };
        let mut writer = TraceWriter::create(&path, "web", "tcp:host:7000", goal).unwrap();
        writer.samples(&[progress(0.0), progress(20.0)]).unwrap();
        // It is in the file as soon as it was given.
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 3);
        writer.report(&report()).unwrap();
        std::fs::read_to_string(&path).unwrap()
    }

    fn parse(text: &str) -> Result<Trace, String> {
        Trace::parse(text.as_bytes(), Path::new("t")).map_err(|error| migration::chain(&error))
    }

    #[test]
    fn what_was_written_is_read() {
        let trace = parse(&written()).unwrap();
        assert_eq!(trace.samples, [progress(0.0), progress(20.0)]);
        assert_eq!(trace.report, Some(report()));
        assert_eq!((trace.header.vm.as_str(), trace.header.format), ("web", FORMAT));
        assert!(!trace.truncated);
    }

    #[test]
    fn a_cut_off_line_costs_no_more_than_itself() {
        let text = written();
        let lines: Vec<&str> = text.lines().collect();
        let cut = &text[..text.len() - 10];
        let trace = parse(cut).unwrap();
        assert_eq!(
            (trace.samples.len(), trace.report, trace.truncated),
            (2, None, true)
        );
        // In the middle it is damage.
        let middle = format!("{}\n{}\n{}\n", lines[0], &lines[1][..20], lines[2]);
        assert!(parse(&middle).unwrap_err().starts_with("t: line 2"));
    }

    #[test]
    fn a_trace_that_is_cut_anywhere_is_drawn_or_refused_in_a_sentence() {
        let text = written();
        for end in 0..text.len() {
            match parse(&text[..end]) {
                Ok(trace) => {
                    assert!(!trace.samples.is_empty(), "{end}");
                    assert_eq!(
                        trace.report.is_some(),
                        end + 1 == text.len(),
                        "all but the end of its line: {end}"
                    );
                    super::super::svg(&trace).unwrap();
                }
                Err(error) => assert!(
                    error.starts_with("t: ") && !error.contains('\n'),
                    "{end}: {error}"
                ),
            }
        }
    }

    #[test]
    fn a_trace_of_an_older_version_is_read() {
        // Without what was added since: intervals, rehearsals, disks.
        let header = written().lines().next().unwrap().to_owned();
        let sample = r#"{"sample":{"phase":"precopy","round":1,"remaining_bytes":1,"total_bytes":2,"bytes_sent":3,
            "dirty_bytes_per_s":4.0,"bandwidth_bytes_per_s":5.0,"throttle_percent":0.0,"predicted_downtime_ms":6.0,
            "predicted_total_ms":null,"elapsed_ms":7.0}}"#;
        let trace = parse(&format!("{header}\n{}\n", sample.replace('\n', ""))).unwrap();
        assert_eq!(trace.samples[0].predicted_downtime_interval_ms, None);
        super::super::svg(&trace).unwrap();
    }

    #[test]
    fn what_is_no_trace_is_refused_with_what_it_is() {
        let text = written();
        let header = text.lines().next().unwrap();
        let other = header.replace("\"format\":1", "\"format\":7");
        let report = text.lines().last().unwrap();
        for (text, expected) in [
            ("", "got an empty file"),
            ("ELF\u{1}", "got \"ELF"),
            (report, "expected a trace as `godwit migrate --trace` writes it"),
            (
                &other[..],
                "expected a trace of format 1, got format 7, written by godwit",
            ),
            (header, "no samples"),
            (&format!("{header}\n{header}\n"), "got a second header"),
            (&format!("{text}{report}\n"), "nothing after the report"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let endless = vec![b'x'; LINE_MAX as usize + 1];
        assert!(Trace::parse(&endless[..], Path::new("t")).is_err());
    }

    #[test]
    fn a_file_that_cannot_be_had_is_an_error_at_once() {
        let error = TraceWriter::create(Path::new("/nowhere/trace"), "web", "x", ())
            .err()
            .unwrap();
        assert!(migration::chain(&error).contains("/nowhere/trace"));
    }
}
