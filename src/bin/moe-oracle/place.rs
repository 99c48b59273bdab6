//! The `--device` argument.

use moe_oracle::layer::Device;
use moe_oracle::platform::Platform;
use std::str::FromStr;

/// A device by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// `cpu`
    Cpu,
    /// `cuda` or `cuda:N`
    Cuda(usize),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let ordinal = match name {
            "cpu" => return Ok(Place::Cpu),
            "cuda" => Some(0),
            _ => name.strip_prefix("cuda:").and_then(|n| n.parse().ok()),
        };
        ordinal.map(Place::Cuda).ok_or_else(|| "expected `cpu`, `cuda` or `cuda:N`".into())
    }
}

/// An opened device.
pub enum Opened {
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda(std::sync::Arc<moe_oracle::cuda::Stream>),
}

impl Place {
    /// Opens the device; the error is a sentence on what is missing.
    pub fn open(self) -> Result<Opened, Box<dyn std::error::Error>> {
        match self {
            Place::Cpu => Ok(Opened::Cpu),
            #[cfg(feature = "cuda")]
            Place::Cuda(ordinal) => {
                use moe_oracle::cuda::{Gpu, Stream};
                Ok(Opened::Cuda(std::sync::Arc::new(Stream::new(&Gpu::open(ordinal)?)?)))
            }
            #[cfg(not(feature = "cuda"))]
            Place::Cuda(_) => Err("this build runs on `cpu` only: build it with `--features cuda`".into()),
        }
    }
}

impl Opened {
    /// What selection needs to know.
    pub fn platform(&self) -> Platform {
        match self {
            Opened::Cpu => Platform::cpu(),
            #[cfg(feature = "cuda")]
            Opened::Cuda(stream) => Platform::Cuda(stream.gpu().info().capability),
        }
    }

    /// What a layer needs.
    pub fn device(&self) -> Device<'_> {
        match self {
            Opened::Cpu => Device::Cpu,
            #[cfg(feature = "cuda")]
            Opened::Cuda(stream) => Device::Gpu(stream),
        }
    }
}
