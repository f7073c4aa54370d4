//! The entropy device (virtio 1.2, 5.4).

mod device;
mod state;

#[cfg(test)]
mod tests;

pub use device::Rng;
pub use state::RngState;
