//! CUDA graphs: launches recorded once, replayed at the cost of one.

use super::device::Gpu;
use super::error::{CudaError, driver};
use super::stream::Stream;
use cudarc::driver::sys::{self, CUgraph, CUgraphExec, CUstreamCaptureMode};

/// Recorded launches.
pub struct Graph {
    gpu: Gpu,
    exec: CUgraphExec,
}

// SAFETY: an executable graph may move between threads, and launches through `&self` are the driver's to order: it
// runs one launch of a graph after the other.
unsafe impl Send for Graph {}
// SAFETY: as above.
unsafe impl Sync for Graph {}

impl Graph {
    /// Records what `work` puts on the stream, instead of running it. It may launch, copy inside the device and clear;
    /// it may not wait, allocate or copy from the host.
    pub fn capture<E: From<CudaError>>(stream: &Stream, work: impl FnOnce() -> Result<(), E>) -> Result<Self, E> {
        let gpu = stream.gpu();
        let _entered = gpu.enter()?;
        // Thread-local: what other threads do meanwhile, allocations for example, does not spoil it.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive and of the current context; `Capture` ends what begins here.
        unsafe { driver!(cuStreamBeginCapture_v2(stream.handle(), mode)) }?;
        let capture = Capture { stream };
        work()?;
        let graph = Recorded(capture.end()?);
        let mut exec = std::ptr::null_mut();
        // SAFETY: the graph was just recorded and is alive; the driver writes one handle, which `drop` destroys.
        unsafe { driver!(cuGraphInstantiateWithFlags(&mut exec, graph.0, 0)) }?;
        Ok(Self { gpu: gpu.clone(), exec })
    }

    /// Puts all of it on a stream of the same context; does not wait.
    ///
    /// # Safety
    /// What was promised for each recorded launch must hold again: the memory must still be there, and no unordered
    /// work may touch it in conflict.
    #[inline]
    pub unsafe fn launch(&self, stream: &Stream) -> Result<(), CudaError> {
        if !self.gpu.same_context(stream.gpu()) {
            return Err(CudaError::OtherContext("a graph"));
        }
        let _entered = self.gpu.enter()?;
        // SAFETY: graph and stream are alive and of the current context; the rest is the caller's promise.
        unsafe { driver!(cuGraphLaunch(self.exec, stream.handle())) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if let Ok(_entered) = self.gpu.enter() {
            // SAFETY: ours, destroyed once; the driver lets a running launch finish.
            let _ = unsafe { sys::cuGraphExecDestroy(self.exec) };
        }
    }
}

/// An open capture. Going without `end`, because the work failed or panicked, it gives the stream back as it was.
struct Capture<'a> {
    stream: &'a Stream,
}

impl Capture<'_> {
    fn end(self) -> Result<CUgraph, CudaError> {
        let graph = self.stop();
        std::mem::forget(self);
        graph
    }

    fn stop(&self) -> Result<CUgraph, CudaError> {
        let mut graph = std::ptr::null_mut();
        // SAFETY: the stream is alive and in the capture that `Graph::capture` began on this thread.
        unsafe { driver!(cuStreamEndCapture(self.stream.handle(), &mut graph)) }?;
        Ok(graph)
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        drop(self.stop().map(Recorded));
    }
}

/// A recorded graph, needed only until it is instantiated.
struct Recorded(CUgraph);

impl Drop for Recorded {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: ours, destroyed once; an executable graph does not need it any more.
            let _ = unsafe { sys::cuGraphDestroy(self.0) };
        }
    }
}
