//! What the machine is, as far as the operating system tells.

use std::fs;

/// The processor's name; `unknown` where the system has no /proc/cpuinfo.
pub fn cpu_model() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find(|l| l.starts_with("model name")).and_then(|l| l.split_once(':'));
    model.map_or_else(|| "unknown".into(), |m| m.1.trim().to_string())
}

/// Cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Bytes that can be allocated without swapping; `None` where the system does not say.
pub fn memory_available() -> Option<usize> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

/// `always`, `madvise` or `never`; `None` where the system does not say.
pub fn transparent_huge_pages() -> Option<String> {
    let state = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").ok()?;
    // The active choice stands in brackets: `always [madvise] never`.
    Some(state.split_once('[')?.1.split_once(']')?.0.to_string())
}

/// The instruction-set extensions that kernels look at, and whether this processor has them.
pub fn features() -> Vec<(&'static str, bool)> {
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! has {
            ($($name:tt),*) => { vec![$(($name, std::arch::is_x86_feature_detected!($name))),*] };
        }
        has!(
            "avx2",
            "fma",
            "f16c",
            "avxvnni",
            "avx512f",
            "avx512bw",
            "avx512dq",
            "avx512vl",
            "avx512vbmi",
            "avx512vnni",
            "avx512bf16",
            "avx512fp16"
        )
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        Vec::new()
    }
}
