//! Fused Mixture-of-Experts layers for inference engines.
#![warn(missing_docs)]

pub mod checkpoint;
pub mod config;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod kernel;
pub mod layer;
pub mod oracle;
pub mod platform;
pub mod scheme;
pub mod weights;
