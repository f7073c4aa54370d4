//! Traces of migrations, and pictures of them. Knows nothing of machines.

mod axis;
mod draw;
pub(crate) mod figures;
mod page;
mod panel;
#[cfg(test)]
mod testing;
mod trace;

pub(crate) use draw::svg;
pub(crate) use page::html;
pub(crate) use trace::{Trace, TraceWriter};
