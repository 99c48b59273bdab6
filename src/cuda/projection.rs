//! A packed projection on the device, as all kernel families read it.

use super::memory::DeviceBuffer;
use super::pack::{Format, PackedProjection};
use super::{CudaError, Stream};

/// As `Matrix` in kernels/common/matrix.cuh.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Matrix {
    pub stages: u64,
    pub factors: u64,
    pub bias: u64,
    pub slab_bytes: i32,
    pub slabs: i32,
    pub blocks: i32,
    pub scale_bf16: i32,
}

/// A projection on the device: what `matrix` points into.
pub(super) struct Projection {
    _stages: DeviceBuffer,
    _factors: DeviceBuffer,
    _bias: Option<DeviceBuffer>,
    pub matrix: Matrix,
}

impl Projection {
    pub fn new(stream: &Stream, p: &PackedProjection, format: Format) -> Result<Self, CudaError> {
        let stages = DeviceBuffer::of(stream, &p.stages)?;
        let factors = DeviceBuffer::of(stream, &p.factors)?;
        let bias = p.bias.as_ref().map(|b| DeviceBuffer::of(stream, b)).transpose()?;
        // The packer refuses slabs beyond 32 bits, and with them more slabs or blocks than that.
        let matrix = Matrix {
            stages: stages.address(),
            factors: factors.address(),
            bias: bias.as_ref().map_or(0, DeviceBuffer::address),
            slab_bytes: p.slab_bytes as i32,
            slabs: p.slabs as i32,
            blocks: p.blocks as i32,
            scale_bf16: i32::from(format.scale_bf16),
        };
        Ok(Self { _stages: stages, _factors: factors, _bias: bias, matrix })
    }
}
