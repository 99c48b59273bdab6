//! Events: marks in a stream, to measure time by.

use super::device::Gpu;
use super::error::{CudaError, DriverCode, driver};
use super::stream::Stream;
use cudarc::driver::{result, sys};

/// A mark that a stream passes.
pub struct Event {
    gpu: Gpu,
    raw: sys::CUevent,
}

// SAFETY: an event may be used from any thread, several at a time; the driver API locks inside.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// A new event that keeps the time.
    pub fn new(gpu: &Gpu) -> Result<Self, CudaError> {
        let _entered = gpu.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the context is current; the driver writes one handle, which `drop` destroys.
        unsafe { driver!(cuEventCreate(&mut raw, 0)) }?;
        Ok(Self { gpu: gpu.clone(), raw })
    }

    /// Marks this point of the stream.
    pub fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        if !self.gpu.same_context(stream.gpu()) {
            return Err(CudaError::OtherContext("an event"));
        }
        let _entered = self.gpu.enter()?;
        // SAFETY: event and stream are alive and of the current context.
        unsafe { driver!(cuEventRecord(self.raw, stream.handle())) }
    }

    /// Waits until the stream has passed the mark.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        let _entered = self.gpu.enter()?;
        // SAFETY: the event is alive.
        unsafe { driver!(cuEventSynchronize(self.raw)) }
    }

    /// Milliseconds from one mark to this one; both must have been passed.
    pub fn ms_since(&self, start: &Event) -> Result<f32, CudaError> {
        let _entered = self.gpu.enter()?;
        // The name of the function depends on the version of CUDA; cudarc knows which is there.
        // SAFETY: both events are alive.
        let ms = unsafe { result::event::elapsed(start.raw, self.raw) };
        ms.map_err(|e| CudaError::Driver { call: "cuEventElapsedTime", code: DriverCode::from(e) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(_entered) = self.gpu.enter() {
            // SAFETY: ours, destroyed once; the driver waits for nothing and frees it when the stream is past it.
            let _ = unsafe { sys::cuEventDestroy_v2(self.raw) };
        }
    }
}
