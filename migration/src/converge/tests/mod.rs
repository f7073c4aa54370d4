//! The policy against a simulated link and guest, in simulated time.

mod arithmetic;
mod promises;
mod properties;
mod recorded;
mod run;
mod shapes;
mod simulator;
