//! What `doctor` says of GPUs: which there are, what this build holds for them, and what is missing between the two.

use std::path::Path;

/// GPUs, driver and kernels.
#[derive(serde::Serialize)]
pub struct Gpu {
    device: bool,
    driver_library: Option<String>,
    driver: Option<String>,
    found: Vec<Found>,
    cuda_kernels: bool,
    architectures: Vec<&'static str>,
    /// Why there are no kernels, or why the driver offers no GPU.
    #[serde(skip)]
    problems: Vec<String>,
}

#[derive(serde::Serialize)]
struct Found {
    ordinal: usize,
    name: String,
    capability: u16,
    multiprocessors: u32,
    memory: usize,
    l2: usize,
    has_kernels: bool,
}

/// Where Linux distributions and containers put the driver's library.
const LIBCUDA: [&str; 6] = [
    "/usr/lib/x86_64-linux-gnu/libcuda.so.1",
    "/usr/lib/aarch64-linux-gnu/libcuda.so.1",
    "/usr/lib64/libcuda.so.1",
    "/usr/lib/libcuda.so.1",
    "/usr/lib/wsl/lib/libcuda.so.1",
    "/run/opengl-driver/lib/libcuda.so.1",
];

impl Gpu {
    /// Looks at the file system, then, in a build with the feature `cuda`, asks the driver.
    pub fn look() -> Self {
        let listed = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
        let listed = std::env::split_paths(&listed).map(|folder| folder.join("libcuda.so.1"));
        let library = LIBCUDA.iter().map(|p| Path::new(p).to_path_buf()).chain(listed).find(|p| p.exists());
        let mut gpu = Gpu {
            // WSL has no device node of NVIDIA's own.
            device: Path::new("/dev/nvidia0").exists() || Path::new("/dev/dxg").exists(),
            driver_library: library.map(|p| p.display().to_string()),
            driver: None,
            found: Vec::new(),
            cuda_kernels: false,
            architectures: Vec::new(),
            problems: Vec::new(),
        };
        gpu.ask();
        gpu
    }

    #[cfg(not(feature = "cuda"))]
    fn ask(&mut self) {
        self.problems.push(
            "This build has no CUDA kernels, so that layers run on the CPU even where there is a GPU: build with \
             `--features cuda` on a machine that has nvcc."
                .into(),
        );
    }

    #[cfg(feature = "cuda")]
    fn ask(&mut self) {
        use moe_oracle::cuda::{CudaVersion, FATBINS, Gpu as Device, NOT_BUILT};
        self.cuda_kernels = NOT_BUILT.is_none();
        if let Some(why) = NOT_BUILT {
            self.problems.push(format!(
                "This build has no CUDA kernels ({why}): install the CUDA toolkit 12.8 or later, or its Python wheels \
                 into the active environment, or name its compiler in NVCC, and build again."
            ));
        }
        for arch in FATBINS.iter().flat_map(|f| f.archs) {
            if !self.architectures.contains(arch) {
                self.architectures.push(arch);
            }
        }
        let infos = Device::count().and_then(|n| (0..n).map(Device::describe).collect::<Result<Vec<_>, _>>());
        let infos = match infos {
            Ok(infos) => infos,
            // With neither a device nor a library there is nothing to repair; `advice` says it once.
            Err(_) if !self.device && self.driver_library.is_none() => return,
            Err(why) => return self.problems.push(format!("No GPU can be used: {why}.")),
        };
        for info in infos {
            let has_kernels = self.cuda_kernels && FATBINS.iter().all(|f| f.runs_on(info.capability));
            if self.cuda_kernels && !has_kernels {
                self.problems.push(format!(
                    "GPU {} ({}) is sm_{}, for which this build has no kernels: add {} to MOE_ORACLE_CUDA_ARCHS and \
                     build again.",
                    info.ordinal, info.name, info.capability, info.capability
                ));
            }
            self.driver = Some(CudaVersion(info.driver).to_string());
            self.found.push(Found {
                ordinal: info.ordinal,
                name: info.name,
                capability: info.capability,
                multiprocessors: info.sms,
                memory: info.memory,
                l2: info.l2,
                has_kernels,
            });
        }
    }

    /// What is missing and what to do about it.
    pub fn advice(&self) -> Vec<String> {
        let files = match (self.device, &self.driver_library) {
            _ if !self.found.is_empty() => None,
            (true, Some(_)) => None,
            (true, None) => Some(
                "A GPU's device node exists, but libcuda.so.1 was not found: install the NVIDIA driver's libraries, or \
                 start the container with the NVIDIA runtime.",
            ),
            (false, Some(_)) => Some(
                "libcuda.so.1 is here, but /dev/nvidia0 is not: load the NVIDIA kernel module, or pass the device into \
                 the container.",
            ),
            (false, None) => Some("No NVIDIA GPU was found; layers run on the CPU, which needs nothing more."),
        };
        files.map(String::from).into_iter().chain(self.problems.iter().cloned()).collect()
    }

    /// Lines of the report, a name and a value each.
    pub fn rows(&self) -> Vec<(&'static str, String)> {
        let yes_no = |b| if b { "yes" } else { "no" };
        let mut rows = vec![("GPU device", yes_no(self.device).into())];
        for g in &self.found {
            let Found { ordinal, name, capability, multiprocessors, .. } = g;
            let (memory, l2) = (g.memory as f64 / (1u64 << 30) as f64, g.l2 >> 20);
            let kernels = if g.has_kernels { "has kernels" } else { "no kernels" };
            rows.push((
                "GPU",
                format!(
                    "{ordinal}: {name}, sm_{capability}, {multiprocessors} multiprocessors, {memory:.1} GiB, L2 {l2} MiB, \
                     {kernels}"
                ),
            ));
        }
        rows.push(("libcuda", self.driver_library.clone().unwrap_or("not found".into())));
        rows.extend(self.driver.iter().map(|v| ("driver", format!("CUDA {v}"))));
        let of = if self.cuda_kernels { format!(", for {}", self.architectures.join(" ")) } else { String::new() };
        rows.push(("CUDA kernels", format!("{} in this build{of}", yes_no(self.cuda_kernels))));
        rows
    }
}
