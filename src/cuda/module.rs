//! Kernels, loaded once per GPU when they are first asked for.

use super::device::Gpu;
use super::error::{CudaError, driver};
use super::fatbin::{FATBINS, Fatbin};
use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute as Attribute, CUmodule};
use std::ffi::CString;
use std::sync::{Mutex, PoisonError};

/// The loaded fatbins of a GPU.
#[derive(Default)]
pub(super) struct Modules(Mutex<Vec<(&'static str, CUmodule)>>);

impl Modules {
    /// The module of a fatbin. The GPU's context must be current.
    fn get(&self, fatbin: &'static Fatbin) -> Result<CUmodule, CudaError> {
        // A panic cannot leave the list half written.
        let mut loaded = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, module)) = loaded.iter().find(|m| m.0 == fatbin.name) {
            return Ok(*module);
        }
        let mut module = std::ptr::null_mut();
        // SAFETY: the image is a whole fatbin that nvcc wrote, which says its own length, and lives for ever.
        unsafe { driver!(cuModuleLoadData(&mut module, fatbin.image.as_ptr().cast())) }?;
        loaded.push((fatbin.name, module));
        Ok(module)
    }

    /// Unloads all. The GPU's context must be current.
    pub(super) fn unload(&mut self) {
        for (_, module) in self.0.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // SAFETY: loaded by `get`, unloaded once; every kernel of it held the GPU that now goes.
            let _ = unsafe { sys::cuModuleUnload(module) };
        }
    }
}

/// A function on a GPU, ready to launch.
#[derive(Clone)]
pub struct Kernel {
    gpu: Gpu,
    function: CUfunction,
    entry: &'static str,
    /// See [`Kernel::compiled_for`].
    compiled_for: u16,
}

// SAFETY: a function handle may be used from any thread; it belongs to a module that lives as long as `gpu`.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

impl Gpu {
    /// The entry of a fatbin, loading it if need be. For plan time: it locks and may take milliseconds.
    pub fn kernel(&self, fatbin: &'static str, entry: &'static str) -> Result<Kernel, CudaError> {
        let found = FATBINS.iter().find(|f| f.name == fatbin).ok_or(CudaError::NoKernel(fatbin))?;
        let capability = self.info().capability;
        if !found.runs_on(capability) {
            return Err(CudaError::NoImage { fatbin, built: found.archs, capability });
        }
        let missing = CudaError::NoEntry { fatbin, entry };
        if !found.resources.is_empty() && !found.resources.iter().any(|r| r.kernel == entry) {
            return Err(missing);
        }
        let name = CString::new(entry).map_err(|_| missing)?;
        let _entered = self.enter()?;
        let module = self.modules().get(found)?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is loaded, the name ends in a zero, the driver writes one handle.
        unsafe { driver!(cuModuleGetFunction(&mut function, module, name.as_ptr())) }?;
        let mut kernel = Kernel { gpu: self.clone(), function, entry, compiled_for: 0 };
        // Asking makes the driver load the code now; left to the first launch, it could not be captured in a graph.
        let compiled_for = kernel.attribute(Attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION)?;
        kernel.compiled_for = u16::try_from(compiled_for).unwrap_or(0);
        // All kernels want the same split of a multiprocessor's memory, the most for shared memory: another one could only
        // begin there once the kernel before has left, however much room there is.
        let split = Attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
        // SAFETY: the function is alive and of the current context.
        unsafe { driver!(cuFuncSetAttribute(function, split, 100)) }?;
        Ok(kernel)
    }
}

impl Kernel {
    /// Its name.
    pub fn entry(&self) -> &'static str {
        self.entry
    }

    /// The compute capability (90 for 9.0) that nvcc compiled it for. Below the GPU's own where the driver translated older
    /// PTX, which then has none of what later GPUs brought.
    pub fn compiled_for(&self) -> u16 {
        self.compiled_for
    }

    /// Whose it is.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Makes launches with so much dynamic shared memory legal; without it, 48 KiB with the static part are the most.
    pub fn allow_shared(&self, bytes: usize) -> Result<(), CudaError> {
        let _entered = self.gpu.enter()?;
        let fixed = self.attribute(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
        let most = self.gpu.info().shared_per_block.saturating_sub(fixed as usize);
        if bytes > most {
            return Err(CudaError::SharedMemory { kernel: self.entry, wanted: bytes, most });
        }
        // Always the most there is: clones share the attribute, and one must not lower it for another. What a launch
        // really takes is what it asks for.
        let most = i32::try_from(most).unwrap_or(i32::MAX);
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is alive and of the current context.
        unsafe { driver!(cuFuncSetAttribute(self.function, attribute, most)) }
    }

    /// Blocks of so many threads and so much dynamic shared memory that one multiprocessor holds at a time.
    pub fn blocks_per_sm(&self, threads: u32, shared: usize) -> Result<u32, CudaError> {
        let _entered = self.gpu.enter()?;
        let threads = i32::try_from(threads).map_err(|_| CudaError::Argument("no block has that many threads"))?;
        let mut blocks = 0;
        // SAFETY: the function is alive and of the current context; the driver writes one int.
        unsafe { driver!(cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut blocks, self.function, threads, shared)) }?;
        Ok(u32::try_from(blocks).unwrap_or(0))
    }

    /// The GPU's context must be current.
    fn attribute(&self, attribute: Attribute) -> Result<i32, CudaError> {
        let mut value = 0;
        // SAFETY: the function is alive; the driver writes one int.
        unsafe { driver!(cuFuncGetAttribute(&mut value, attribute, self.function)) }?;
        Ok(value)
    }

    #[inline]
    pub(super) fn handle(&self) -> CUfunction {
        self.function
    }
}
