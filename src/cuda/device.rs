//! A GPU and the context that we use on it.

use super::error::{CudaError, CudaVersion, check, driver, driver_version};
use super::fatbin::driver_needed;
use super::module::Modules;
use crate::platform::Platform;
use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdevice_attribute as Attribute, CUresult};
use std::ffi::{CStr, c_void};
use std::sync::Arc;

/// What the driver says of a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuInfo {
    /// Among those that the driver shows this process.
    pub ordinal: usize,
    /// `NVIDIA H200`
    pub name: String,
    /// Compute capability, 90 for 9.0.
    pub capability: u16,
    /// Streaming multiprocessors.
    pub sms: u32,
    /// Bytes of memory.
    pub memory: usize,
    /// Bytes of L2 cache.
    pub l2: usize,
    /// Shared memory that a block may ask for, static and dynamic together.
    pub shared_per_block: usize,
    /// The driver's CUDA version, 13000 for 13.0.
    pub driver: i32,
}

/// A GPU with its context and loaded kernels. Clones are the same GPU; it closes with the last of them and of the
/// buffers, streams and kernels made from it.
#[derive(Clone)]
pub struct Gpu(Arc<Inner>);

struct Inner {
    info: GpuInfo,
    context: CUcontext,
    device: CUdevice,
    /// The primary context is ours to release; a caller's is not.
    retained: bool,
    modules: Modules,
}

// SAFETY: contexts, devices and module handles may be used from any thread, several at a time; the driver API locks
// inside. The modules guard their own state.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Gpu").field(&self.0.info).finish()
    }
}

impl Gpu {
    /// How many GPUs there are. Every reason to have none is an error that says so.
    pub fn count() -> Result<usize, CudaError> {
        initialise()?;
        let mut count = 0;
        // SAFETY: the driver is initialised and writes one int.
        unsafe { driver!(cuDeviceGetCount(&mut count)) }?;
        match usize::try_from(count) {
            Ok(count) if count > 0 => Ok(count),
            _ => Err(CudaError::NoGpu),
        }
    }

    /// What the driver says of a GPU, without making a context on it.
    pub fn describe(ordinal: usize) -> Result<GpuInfo, CudaError> {
        Ok(describe(ordinal)?.1)
    }

    /// Opens a GPU on its primary context, which it shares with cudart, PyTorch, candle and cudarc.
    pub fn open(ordinal: usize) -> Result<Self, CudaError> {
        let (device, info) = describe(ordinal)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: the device comes from cuDeviceGet. The reference is given back in `Inner::drop`.
        unsafe { driver!(cuDevicePrimaryCtxRetain(&mut context, device)) }?;
        Ok(Self(Arc::new(Inner { info, context, device, retained: true, modules: Modules::default() })))
    }

    /// Opens the GPU of a context (`CUcontext`) that the caller made.
    ///
    /// # Safety
    /// The context must be valid, and must stay so until the last clone of this and all that was made from it is gone.
    pub unsafe fn from_context(context: *mut c_void) -> Result<Self, CudaError> {
        initialise()?;
        let context: CUcontext = context.cast();
        if context.is_null() {
            return Err(CudaError::Argument("a null CUDA context was given"));
        }
        let mut device = 0;
        {
            let _entered = Entered::enter(context)?;
            // SAFETY: a context is current; the driver writes one int.
            unsafe { driver!(cuCtxGetDevice(&mut device)) }?;
        }
        let ordinal = (0..Self::count()?).find(|o| get(*o).is_ok_and(|d| d == device)).ok_or(CudaError::NoGpu)?;
        let (device, info) = describe(ordinal)?;
        Ok(Self(Arc::new(Inner { info, context, device, retained: false, modules: Modules::default() })))
    }

    /// What the driver says of it.
    pub fn info(&self) -> &GpuInfo {
        &self.0.info
    }

    /// For selection.
    pub fn platform(&self) -> Platform {
        Platform::Cuda(self.0.info.capability)
    }

    /// Bytes (free, in total) now.
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        let _entered = self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: a context is current; the driver writes two sizes.
        unsafe { driver!(cuMemGetInfo_v2(&mut free, &mut total)) }?;
        Ok((free, total))
    }

    /// Waits for everything on this GPU that was launched in this context.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        let _entered = self.enter()?;
        // SAFETY: a context is current.
        unsafe { driver!(cuCtxSynchronize()) }
    }

    pub(super) fn modules(&self) -> &Modules {
        &self.0.modules
    }

    /// Makes the context this thread's current one until the guard goes, as most driver calls want it.
    #[inline]
    pub(super) fn enter(&self) -> Result<Entered, CudaError> {
        Entered::enter(self.0.context)
    }

    pub(super) fn same_context(&self, other: &Gpu) -> bool {
        std::ptr::eq(self.0.context, other.0.context)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Ok(_entered) = Entered::enter(self.context) {
            self.modules.unload();
        }
        if self.retained {
            // SAFETY: gives back the reference that `open` took, once. At process exit the driver may be gone already
            // and answers so; there is nobody to tell.
            let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
        }
    }
}

/// Restores the caller's current context when it goes. Pushes nothing where ours is current already, the usual case.
pub(super) struct Entered {
    pushed: bool,
    /// It is about this thread.
    _thread: std::marker::PhantomData<*const ()>,
}

impl Entered {
    #[inline]
    fn enter(context: CUcontext) -> Result<Self, CudaError> {
        let mut current = std::ptr::null_mut();
        // SAFETY: the driver is initialised, since a context exists, and writes one pointer.
        unsafe { driver!(cuCtxGetCurrent(&mut current)) }?;
        let pushed = !std::ptr::eq(current, context);
        if pushed {
            // SAFETY: the context lives as long as the Gpu that holds it.
            unsafe { driver!(cuCtxPushCurrent_v2(context)) }?;
        }
        Ok(Self { pushed, _thread: std::marker::PhantomData })
    }
}

impl Drop for Entered {
    #[inline]
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = std::ptr::null_mut();
            // SAFETY: pops what `enter` pushed on this same thread. It can fail only where the driver is shutting down.
            let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut popped) };
        }
    }
}

fn initialise() -> Result<(), CudaError> {
    let (has, needs) = (driver_version()?, CudaVersion(driver_needed()));
    if has.0 < needs.0 {
        return Err(CudaError::DriverTooOld { has, needs });
    }
    // SAFETY: the library is loaded; cuInit may be called any number of times.
    match unsafe { sys::cuInit(0) } {
        CUresult::CUDA_ERROR_NO_DEVICE => Err(CudaError::NoGpu),
        code => check("cuInit", code),
    }
}

fn get(ordinal: usize) -> Result<CUdevice, CudaError> {
    let count = Gpu::count()?;
    let index = i32::try_from(ordinal).ok().filter(|_| ordinal < count);
    let index = index.ok_or(CudaError::Ordinal { ordinal, count })?;
    let mut device = 0;
    // SAFETY: the driver is initialised by `count`; the ordinal is in range; the driver writes one int.
    unsafe { driver!(cuDeviceGet(&mut device, index)) }?;
    Ok(device)
}

fn describe(ordinal: usize) -> Result<(CUdevice, GpuInfo), CudaError> {
    let device = get(ordinal)?;
    let attribute = |what| -> Result<u32, CudaError> {
        let mut value = 0;
        // SAFETY: the device comes from cuDeviceGet; the driver writes one int.
        unsafe { driver!(cuDeviceGetAttribute(&mut value, what, device)) }?;
        Ok(u32::try_from(value).unwrap_or(0))
    };
    let mut name = [0; 256];
    // SAFETY: the driver writes at most 255 characters and a zero.
    unsafe { driver!(cuDeviceGetName(name.as_mut_ptr().cast(), 255, device)) }?;
    let name = CStr::from_bytes_until_nul(&name).map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let mut memory = 0;
    // SAFETY: the device comes from cuDeviceGet; the driver writes one size.
    unsafe { driver!(cuDeviceTotalMem_v2(&mut memory, device)) }?;
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
    let info = GpuInfo {
        ordinal,
        name,
        capability: u16::try_from(10 * major + minor).unwrap_or(0),
        sms: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        memory,
        l2: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
        shared_per_block: shared as usize,
        driver: driver_version()?.0,
    };
    Ok((device, info))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_gpu_gets_an_error_and_one_with_a_gpu_its_description() {
        match Gpu::count() {
            Ok(count) => {
                let info = Gpu::describe(count - 1).unwrap();
                assert!(info.capability >= 50 && info.sms > 0 && info.memory > 1 << 30, "{info:?}");
                assert_eq!(Gpu::describe(count), Err(CudaError::Ordinal { ordinal: count, count }));
            }
            Err(why) => {
                println!("no GPU here: {why}");
                assert_eq!(Gpu::open(0).unwrap_err(), why);
                assert_eq!(Gpu::describe(usize::MAX), Err(why));
            }
        }
    }

    #[test]
    fn no_context_is_an_error() {
        // SAFETY: null is refused before anything is done with it.
        assert!(unsafe { Gpu::from_context(std::ptr::null_mut()) }.is_err());
    }
}
