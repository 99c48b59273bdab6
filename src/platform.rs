//! The hardware that a kernel would run on.

#[doc(inline)]
pub use moe_oracle_simd::CpuIsa;

/// Where a layer would run. The kinds that we have no kernels for are named so that selection can say why not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Platform {
    /// The CPU with at most this instruction set.
    Cpu(CpuIsa),
    /// An NVIDIA GPU by compute capability, 90 for 9.0.
    Cuda(u16),
    /// An AMD GPU.
    Rocm,
    /// An Intel GPU.
    Xpu,
}

impl Platform {
    /// This machine's CPU.
    pub fn cpu() -> Self {
        Platform::Cpu(CpuIsa::detect())
    }

    /// `cpu`, `cpu_avx2`, `cpu_avx512`, `cpu_avx512_vnni`, `cpu_avx512_bf16`, `cpu_amx`, `cpu_portable`, `sm_90`, `rocm`, `xpu`.
    pub fn by_name(name: &str) -> Option<Self> {
        Some(match name {
            "cpu" => Platform::cpu(),
            "cpu_portable" => Platform::Cpu(CpuIsa::Portable),
            "cpu_avx2" => Platform::Cpu(CpuIsa::Avx2),
            "cpu_avx512" => Platform::Cpu(CpuIsa::Avx512),
            "cpu_avx512_vnni" => Platform::Cpu(CpuIsa::Avx512Vnni),
            "cpu_avx512_bf16" | "cpu_amx" => Platform::Cpu(CpuIsa::Avx512Bf16),
            "rocm" => Platform::Rocm,
            "xpu" => Platform::Xpu,
            _ => Platform::Cuda(name.strip_prefix("sm_")?.trim_end_matches(['a', 'f']).parse().ok()?),
        })
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Platform::Cpu(isa) => write!(f, "cpu_{}", isa.name()),
            Platform::Cuda(cc) => write!(f, "sm_{cc}"),
            Platform::Rocm => f.write_str("rocm"),
            Platform::Xpu => f.write_str("xpu"),
        }
    }
}
