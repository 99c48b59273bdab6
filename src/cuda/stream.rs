//! Streams: what orders work on a GPU.

use super::device::Gpu;
use super::error::{CudaError, driver};
use cudarc::driver::sys::{self, CUstream};
use std::ffi::c_void;

/// A stream of our own, or the caller's.
pub struct Stream {
    gpu: Gpu,
    raw: CUstream,
    owned: bool,
}

// SAFETY: a stream may be used from any thread, several at a time; the driver API locks inside.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// A new stream, which does not wait for the legacy default stream.
    pub fn new(gpu: &Gpu) -> Result<Self, CudaError> {
        let _entered = gpu.enter()?;
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current; the driver writes one handle, which `drop` destroys.
        unsafe { driver!(cuStreamCreate(&mut raw, flags)) }?;
        Ok(Self { gpu: gpu.clone(), raw, owned: true })
    }

    /// The caller's `CUstream` (or `cudaStream_t`, the same thing); null is the legacy default stream.
    ///
    /// # Safety
    /// The stream must be of this GPU's context, and must live until this value is gone.
    pub unsafe fn borrow(gpu: &Gpu, raw: *mut c_void) -> Self {
        Self { gpu: gpu.clone(), raw: raw.cast(), owned: false }
    }

    /// The `CUstream`.
    pub fn raw(&self) -> *mut c_void {
        self.raw.cast()
    }

    /// Whose it is.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Waits for everything launched on it. A kernel's fault comes back from here.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        let _entered = self.gpu.enter()?;
        // SAFETY: the stream is alive and of the current context.
        unsafe { driver!(cuStreamSynchronize(self.raw)) }
    }

    /// An error while a graph is captured on it: a captured copy would keep the address of host memory that is gone when
    /// the graph runs.
    pub(super) fn refuse_capture(&self) -> Result<(), CudaError> {
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: the stream is alive and of the current context; the driver writes one of the enum's values.
        unsafe { driver!(cuStreamIsCapturing(self.raw, &mut status)) }?;
        match status {
            sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE => Ok(()),
            _ => Err(CudaError::Argument("host memory can't be copied on a stream that is being captured")),
        }
    }

    #[inline]
    pub(super) fn handle(&self) -> CUstream {
        self.raw
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let (true, Ok(_entered)) = (self.owned, self.gpu.enter()) {
            // SAFETY: ours, made by `new`, destroyed once; the driver finishes its work first.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.raw) };
        }
    }
}
