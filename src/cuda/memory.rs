//! Device memory.

use super::device::Gpu;
use super::error::{CudaError, driver};
use super::stream::Stream;
use bytemuck::Pod;
use cudarc::driver::sys::{self, CUdeviceptr, CUresult};
use std::ffi::c_void;
use std::marker::PhantomData;

/// Bytes on a GPU, aligned to 256. Not `Clone`: a copy of gigabytes must be asked for by name.
pub struct DeviceBuffer {
    gpu: Gpu,
    raw: CUdeviceptr,
    len: usize,
}

impl DeviceBuffer {
    /// Allocates; the contents are whatever was there. Length 0 is legal.
    pub fn alloc(gpu: &Gpu, len: usize) -> Result<Self, CudaError> {
        let mut raw = 0;
        if len > 0 {
            let _entered = gpu.enter()?;
            // SAFETY: the context is current; the driver writes one address, which `drop` frees.
            unsafe { driver!(cuMemAlloc_v2(&mut raw, len)) }.map_err(|e| match e {
                CudaError::Driver { code, .. } if code.is(CUresult::CUDA_ERROR_OUT_OF_MEMORY) => {
                    let (free, total) = gpu.memory().unwrap_or((0, gpu.info().memory));
                    CudaError::OutOfMemory { wanted: len, free, total }
                }
                other => other,
            })?;
        }
        Ok(Self { gpu: gpu.clone(), raw, len })
    }

    /// Allocates and fills with zero bytes.
    pub fn zeroed(stream: &Stream, len: usize) -> Result<Self, CudaError> {
        let buffer = Self::alloc(stream.gpu(), len)?;
        buffer.zero(stream)?;
        Ok(buffer)
    }

    /// Allocates and uploads.
    pub fn of<T: Pod>(stream: &Stream, data: &[T]) -> Result<Self, CudaError> {
        let buffer = Self::alloc(stream.gpu(), size_of_val(data))?;
        buffer.upload(stream, 0, data)?;
        Ok(buffer)
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device's address, 0 for an empty buffer.
    pub fn address(&self) -> u64 {
        self.raw
    }

    /// All of it as `T`s; a rest that makes no whole `T` is left out.
    pub fn ptr<T: Pod>(&self) -> DevicePtr<'_, T> {
        DevicePtr { address: self.raw, len: self.len / size_of::<T>().max(1), of: PhantomData }
    }

    /// Copies into the buffer at a byte offset, in the stream's order, and waits for it: `data` may go at once.
    pub fn upload<T: Pod>(&self, stream: &Stream, offset: usize, data: &[T]) -> Result<(), CudaError> {
        let len = size_of_val(data);
        let (from, to) = (data.as_ptr().cast::<c_void>(), self.at(stream, offset, len)?);
        if len == 0 {
            return Ok(());
        }
        let _entered = self.gpu.enter()?;
        stream.refuse_capture()?;
        // SAFETY: the range lies in the buffer (`at`), the source is `len` readable bytes, and both outlive the copy,
        // which is waited for.
        unsafe { driver!(cuMemcpyHtoDAsync_v2(to, from, len, stream.handle())) }?;
        stream.synchronize()
    }

    /// Copies out of the buffer from a byte offset, in the stream's order, and waits for it.
    pub fn download<T: Pod>(&self, stream: &Stream, offset: usize, data: &mut [T]) -> Result<(), CudaError> {
        let len = size_of_val(data);
        let (to, from) = (data.as_mut_ptr().cast::<c_void>(), self.at(stream, offset, len)?);
        if len == 0 {
            return Ok(());
        }
        let _entered = self.gpu.enter()?;
        stream.refuse_capture()?;
        // SAFETY: the range lies in the buffer (`at`), the target is `len` writable bytes for which every pattern is a
        // value (Pod), and both outlive the copy, which is waited for.
        unsafe { driver!(cuMemcpyDtoHAsync_v2(to, from, len, stream.handle())) }?;
        stream.synchronize()
    }

    /// Fills with zero bytes in the stream's order; does not wait.
    pub fn zero(&self, stream: &Stream) -> Result<(), CudaError> {
        let to = self.at(stream, 0, self.len)?;
        if self.len == 0 {
            return Ok(());
        }
        let _entered = self.gpu.enter()?;
        // SAFETY: the whole buffer, which `drop` frees only after the device has finished (cuMemFree waits).
        unsafe { driver!(cuMemsetD8Async(to, 0, self.len, stream.handle())) }
    }

    /// The address of a range that lies inside, on the stream's own context.
    fn at(&self, stream: &Stream, offset: usize, len: usize) -> Result<CUdeviceptr, CudaError> {
        if !self.gpu.same_context(stream.gpu()) {
            return Err(CudaError::OtherContext("a device buffer"));
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(self.raw + offset as u64),
            _ => Err(CudaError::Range { offset, len, size: self.len }),
        }
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if let (true, Ok(_entered)) = (self.len > 0, self.gpu.enter()) {
            // SAFETY: ours, made by `alloc`, freed once; the driver waits for work that may use it.
            let _ = unsafe { sys::cuMemFree_v2(self.raw) };
        }
    }
}

/// `len` elements of `T` on a device, borrowed: from a [`DeviceBuffer`], or an engine's own allocation.
///
/// It is an address: nobody keeps two of them from meeting in one kernel, hence the `unsafe` of launches.
#[repr(C)]
#[derive(Debug)]
pub struct DevicePtr<'a, T> {
    /// First, so that a kernel's pointer parameter is read from the start of this struct.
    address: CUdeviceptr,
    len: usize,
    of: PhantomData<&'a T>,
}

impl<T> Clone for DevicePtr<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for DevicePtr<'_, T> {}

impl<T> DevicePtr<'_, T> {
    /// No elements; a kernel sees a null pointer.
    pub const NULL: Self = Self { address: 0, len: 0, of: PhantomData };

    /// `len` elements at a device address.
    ///
    /// # Safety
    /// They must be allocated on the GPU that kernels will use them on, aligned for `T`, as long as `'a` lasts and until
    /// the work launched with them has finished.
    pub unsafe fn new(address: u64, len: usize) -> Self {
        Self { address, len, of: PhantomData }
    }

    /// The device's address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Elements `start..start + len`; `None` where they do not all exist.
    pub fn slice(self, start: usize, len: usize) -> Option<Self> {
        let end = start.checked_add(len)?;
        let address = self.address + (start * size_of::<T>()) as u64;
        (end <= self.len).then_some(Self { address, len, of: PhantomData })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_stay_inside() {
        // SAFETY: nothing is launched with it.
        let p = unsafe { DevicePtr::<f32>::new(256, 8) };
        assert_eq!(p.slice(2, 6).map(|s| (s.address(), s.len())), Some((264, 6)));
        assert_eq!(p.slice(8, 0).map(|s| (s.address(), s.len())), Some((288, 0)));
        assert!(p.slice(2, 7).is_none() && p.slice(usize::MAX, 2).is_none());
        assert_eq!(DevicePtr::<u8>::NULL.address(), 0);
    }
}
