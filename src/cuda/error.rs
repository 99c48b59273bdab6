//! What can go wrong with a GPU.

use super::fatbin::NOT_BUILT;
use cudarc::driver::result::DriverError;
use cudarc::driver::sys::{self, CUresult};
use std::fmt;

/// An answer of the driver other than success; prints the driver's own words.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct DriverCode(CUresult);

impl From<DriverError> for DriverCode {
    fn from(e: DriverError) -> Self {
        Self(e.0)
    }
}

impl DriverCode {
    pub(super) fn is(self, code: CUresult) -> bool {
        self.0 == code
    }

    /// CUDA's number of it.
    pub fn number(self) -> u32 {
        self.0 as u32
    }
}

impl fmt::Display for DriverCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let error = DriverError(self.0);
        let text = error.error_string().ok().and_then(|t| t.to_str().ok());
        write!(f, "{} (CUDA error {})", text.unwrap_or("no description"), self.number())
    }
}

impl fmt::Debug for DriverCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DriverCode({})", self.number())
    }
}

/// CUDA's own way to write a version, 12080, as people do, 12.8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaVersion(pub i32);

impl fmt::Display for CudaVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}

/// Why something on a GPU did not happen. Making one allocates nothing unless it carries a list.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// No libcuda.
    #[error(
        "the NVIDIA driver's library ({0}) can't be loaded: install the NVIDIA driver, or start the container with the \
         NVIDIA runtime"
    )]
    NoDriver(&'static str),
    /// The driver is older than the kernels or than what we call.
    #[error("the NVIDIA driver supports CUDA {has}, and this build needs {needs}: update the driver")]
    DriverTooOld {
        /// The driver's.
        has: CudaVersion,
        /// At least.
        needs: CudaVersion,
    },
    /// The driver finds none.
    #[error("the NVIDIA driver finds no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES")]
    NoGpu,
    /// There are fewer.
    #[error("there is no GPU {ordinal}: the driver finds {count}, counted from 0")]
    Ordinal {
        /// Asked for.
        ordinal: usize,
        /// There are.
        count: usize,
    },
    /// The table or this build has no kernel of that name.
    #[error("{}", no_kernel(.0))]
    NoKernel(&'static str),
    /// The fatbin has no such entry.
    #[error("the kernels `{fatbin}` hold no entry `{entry}`")]
    NoEntry {
        /// The table's name.
        fatbin: &'static str,
        /// The function.
        entry: &'static str,
    },
    /// The GPU is of another architecture.
    #[error(
        "the kernels `{fatbin}` were built for {built:?}, which do not run on sm_{capability}: add it to \
         MOE_ORACLE_CUDA_ARCHS and build again"
    )]
    NoImage {
        /// The table's name.
        fatbin: &'static str,
        /// What it holds.
        built: &'static [&'static str],
        /// The GPU's.
        capability: u16,
    },
    /// cuMemAlloc failed for want of memory.
    #[error("out of GPU memory: {wanted} bytes were asked for, {free} of {total} are free")]
    OutOfMemory {
        /// Asked for.
        wanted: usize,
        /// Free now.
        free: usize,
        /// The GPU's.
        total: usize,
    },
    /// More shared memory than a block may have.
    #[error("`{kernel}` asks for {wanted} bytes of shared memory per block, and the GPU offers {most}")]
    SharedMemory {
        /// The entry.
        kernel: &'static str,
        /// Asked for.
        wanted: usize,
        /// Offered.
        most: usize,
    },
    /// A copy that would leave its buffer.
    #[error("{len} bytes at {offset} lie outside a device buffer of {size}")]
    Range {
        /// Start in bytes.
        offset: usize,
        /// Length in bytes.
        len: usize,
        /// The buffer's.
        size: usize,
    },
    /// Objects of different GPUs or contexts together.
    #[error("`{0}` belongs to another CUDA context than the stream")]
    OtherContext(&'static str),
    /// What a call asked of us makes no sense.
    #[error("{0}")]
    Argument(&'static str),
    /// A kernel was not launched.
    #[error("`{kernel}` was not launched: {code}")]
    Launch {
        /// The entry.
        kernel: &'static str,
        /// The driver's answer.
        code: DriverCode,
    },
    /// Another call of the driver failed. An earlier kernel's fault shows up here too.
    #[error("{call} failed: {code}")]
    Driver {
        /// The driver's function.
        call: &'static str,
        /// Its answer.
        code: DriverCode,
    },
}

fn no_kernel(name: &str) -> String {
    match NOT_BUILT {
        Some(why) => format!("there are no CUDA kernels in this build: {why}"),
        None => format!("there is no CUDA kernel `{name}` in this build"),
    }
}

/// Turns an answer of the driver into a result.
pub(super) fn check(call: &'static str, code: CUresult) -> Result<(), CudaError> {
    match code {
        CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(CudaError::Driver { call, code: DriverCode(code) }),
    }
}

/// The same for a launch.
pub(super) fn check_launch(kernel: &'static str, code: CUresult) -> Result<(), CudaError> {
    match code {
        CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(CudaError::Launch { kernel, code: DriverCode(code) }),
    }
}

/// Calls a function of the driver API and checks its answer.
macro_rules! driver {
    ($call:ident($($arg:expr),* $(,)?)) => {
        $crate::cuda::error::check(stringify!($call), sys::$call($($arg),*))
    };
}
pub(super) use driver;

/// The driver's library, as the loader knows it.
pub(super) const LIBRARY: &str = if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" };

/// Whether the driver's library loads. cudarc panics where it does not, so that nothing may be called before this.
pub(super) fn driver_is_there() -> bool {
    static LOADED: std::sync::OnceLock<Option<libloading::Library>> = std::sync::OnceLock::new();
    // SAFETY: the initialisers of NVIDIA's driver library have no preconditions. It stays loaded for ever.
    LOADED.get_or_init(|| unsafe { libloading::Library::new(LIBRARY) }.ok()).is_some()
}

/// The driver's CUDA version; the only question that may be asked before `cuInit`.
pub(super) fn driver_version() -> Result<CudaVersion, CudaError> {
    if !driver_is_there() {
        return Err(CudaError::NoDriver(LIBRARY));
    }
    let mut version = 0;
    // SAFETY: the library is loaded; the driver writes one int.
    unsafe { driver!(cuDriverGetVersion(&mut version)) }?;
    Ok(CudaVersion(version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_sentences_with_the_numbers_in_them() {
        for (error, words) in [
            (CudaError::NoDriver("libcuda.so.1"), &["libcuda.so.1", "install"][..]),
            (
                CudaError::DriverTooOld { has: CudaVersion(12040), needs: CudaVersion(13000) },
                &["12.4", "13.0", "update"],
            ),
            (CudaError::Ordinal { ordinal: 3, count: 2 }, &["GPU 3", "finds 2"]),
            (CudaError::OutOfMemory { wanted: 7, free: 5, total: 6 }, &["7 bytes", "5 of 6"]),
            (
                CudaError::NoImage { fatbin: "routing", built: &["80", "90a"], capability: 103 },
                &["`routing`", "90a", "sm_103", "MOE_ORACLE_CUDA_ARCHS"],
            ),
        ] {
            let text = error.to_string();
            assert!(words.iter().all(|w| text.contains(w)), "{text}");
        }
        assert!(CudaError::NoKernel("nothing").to_string().contains(NOT_BUILT.unwrap_or("`nothing`")));
    }
}
