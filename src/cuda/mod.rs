//! NVIDIA GPUs: the driver, the kernels of this build, and how they are launched. The only module that touches cudarc.
//!
//! Nothing here links to CUDA. The driver's library is loaded when [`Gpu::open`] first asks for it, so that one binary
//! runs with and without a GPU.

mod activation;
mod call;
mod decode;
mod device;
pub mod emulation;
mod error;
mod event;
mod fatbin;
mod graph;
mod kernel;
mod launch;
mod memory;
mod mma;
mod module;
mod operands;
pub mod pack;
mod permute;
mod projection;
pub mod quantize;
pub mod routing;
mod stream;
mod wgmma;

pub use call::{BatchedTensors, Tensors};
pub use device::{Gpu, GpuInfo};
pub use error::{CudaError, CudaVersion, DriverCode};
pub use event::Event;
pub use fatbin::{FATBINS, Fatbin, NOT_BUILT, Resources, TOOLKIT, driver_needed};
pub use graph::Graph;
pub use kernel::{CudaKernel, Families, GpuLayerError, GpuWeights};
pub use launch::{Arg, Launch, Parameter};
pub use memory::{DeviceBuffer, DevicePtr};
pub use mma::Tile;
pub use module::Kernel;
pub use stream::Stream;
