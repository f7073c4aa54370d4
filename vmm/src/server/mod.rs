//! Serves the API (crate `api`): HTTP on the VM's Unix socket in, requests to the supervisor out.

mod balloon;
mod routes;
mod thread;

pub use thread::ApiServer;
