//! Traces of migrations, and pictures of them. Knows nothing of machines.

mod axis;
mod draw;
pub(crate) mod figures;
mod page;
mod panel;
#[cfg(test)]
mod testing;
mod trace;

pub use draw::{DrawError, svg};
pub use page::html;
pub use trace::{FORMAT, Goal, Header, Trace, TraceError, TraceWriter};
