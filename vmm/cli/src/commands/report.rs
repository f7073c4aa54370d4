//! `report`: draws a trace.

use std::fs;
use std::path::PathBuf;

use anyhow::Context;
use output::write_stdout;
use thiserror::Error;

use crate::Exit;
use crate::args::ReportArgs;
use crate::report::{Trace, html, svg};

/// A file name that does not say what to draw.
#[derive(Debug, Error)]
#[error("--output {got}: expected a name that ends in .svg or .html")]
pub(crate) struct OtherKind {
    got: PathBuf,
}

pub(crate) fn run(args: &ReportArgs) -> anyhow::Result<Exit> {
    let Some(output) = &args.output else {
        write_stdout(svg(&Trace::read(&args.trace)?)?.as_bytes()).context("standard output")?;
        return Ok(Exit::Done);
    };
    let draw = match output.extension().and_then(|extension| extension.to_str()) {
        Some("svg") => svg,
        Some("html" | "htm") => html,
        _ => return Err(OtherKind { got: output.clone() }.into()),
    };
    let text = draw(&Trace::read(&args.trace)?)?;
    fs::write(output, text).with_context(|| output.display().to_string())?;
    Ok(Exit::Done)
}
