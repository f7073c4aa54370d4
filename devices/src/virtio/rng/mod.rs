//! The entropy device (virtio 1.2, 5.4).

mod device;
mod metrics;
mod state;

#[cfg(test)]
mod tests;

pub use device::VirtioRng;
pub use metrics::RngMetrics;
pub use state::RngState;
