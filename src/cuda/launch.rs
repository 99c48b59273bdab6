//! Launches. No allocation, no lock, no look at the environment.

use super::error::{CudaError, check_launch};
use super::memory::DevicePtr;
use super::module::Kernel;
use super::stream::Stream;
use cudarc::driver::sys::{self, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig};
use std::ffi::c_void;
use std::marker::PhantomData;

/// What a kernel's parameter may be: numbers, plain structs of them, and device pointers.
pub trait Parameter: Copy {}
impl<T: bytemuck::Pod> Parameter for T {}
impl<T> Parameter for DevicePtr<'_, T> {}

/// One argument, by the address of its value.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Arg<'a>(*mut c_void, PhantomData<&'a ()>);

impl<'a> Arg<'a> {
    /// The value is read when the kernel is launched, and copied then.
    #[inline]
    pub fn new<T: Parameter>(value: &'a T) -> Self {
        // The driver takes mutable pointers and only reads.
        Self(std::ptr::from_ref(value).cast_mut().cast(), PhantomData)
    }
}

/// The shape of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks; none at all is legal and does nothing.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Blocks of a cluster, `[1, 1, 1]` for none.
    pub cluster: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// Programmatic dependent launch: may start before the previous kernel of the stream has finished, because the
    /// kernel itself waits (`griddepcontrol.wait`) before it reads or writes what the previous one touches. Ignored for
    /// kernels that were compiled for GPUs before Hopper, which cannot wait.
    pub overlap: bool,
}

impl Launch {
    /// One dimension, nothing special.
    pub const fn new(blocks: u32, threads: u32) -> Self {
        Self { grid: [blocks, 1, 1], block: [threads, 1, 1], cluster: [1; 3], shared: 0, overlap: false }
    }

    /// With dynamic shared memory.
    pub const fn shared(self, bytes: u32) -> Self {
        Self { shared: bytes, ..self }
    }

    /// With programmatic dependent launch.
    pub const fn overlap(self, overlap: bool) -> Self {
        Self { overlap, ..self }
    }

    /// Puts a kernel on the stream; does not wait for it.
    ///
    /// # Safety
    /// The arguments must be the kernel's parameters in number, order and size. What its pointers point to must be as the
    /// kernel wants it, must not be touched in conflict by work that is not ordered with this launch, and must stay
    /// until the work is done.
    #[inline]
    pub unsafe fn run(&self, stream: &Stream, kernel: &Kernel, args: &mut [Arg<'_>]) -> Result<(), CudaError> {
        if self.grid.contains(&0) {
            return Ok(());
        }
        if !stream.gpu().same_context(kernel.gpu()) {
            return Err(CudaError::OtherContext(kernel.entry()));
        }
        let pad = Default::default();
        let zero = CUlaunchAttributeValue { pad: [0; 64] };
        let none = CUlaunchAttribute { id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_IGNORE, pad, value: zero };
        let mut attributes = [none; 2];
        let mut count = 0;
        if self.overlap && kernel.compiled_for() >= 90 {
            attributes[count].id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[count].value.programmaticStreamSerializationAllowed = 1;
            count += 1;
        }
        if self.cluster != [1; 3] {
            attributes[count].id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            let [x, y, z] = self.cluster;
            attributes[count].value.clusterDim.x = x;
            attributes[count].value.clusterDim.y = y;
            attributes[count].value.clusterDim.z = z;
            count += 1;
        }
        let config = CUlaunchConfig {
            gridDimX: self.grid[0],
            gridDimY: self.grid[1],
            gridDimZ: self.grid[2],
            blockDimX: self.block[0],
            blockDimY: self.block[1],
            blockDimZ: self.block[2],
            sharedMemBytes: self.shared,
            hStream: stream.handle(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: count as u32,
        };
        let _entered = kernel.gpu().enter()?;
        // `Arg` is transparent over the pointer that the driver wants.
        let args = args.as_mut_ptr().cast::<*mut c_void>();
        // SAFETY: function and stream are alive and of the current context; config, attributes and the values behind the
        // arguments outlive the call, which copies them; the rest is the caller's promise.
        let code = unsafe { sys::cuLaunchKernelEx(&config, kernel.handle(), args, std::ptr::null_mut()) };
        check_launch(kernel.entry(), code)
    }
}
