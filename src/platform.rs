//! The hardware that a kernel would run on.

/// x86 instruction sets that kernels ask for, best last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CpuIsa {
    /// Whatever the target has.
    Portable,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// The same with VNNI, the integer dot products.
    Avx512Vnni,
    /// The same with the dot products of bfloat16 and with VBMI, the byte permutations.
    Avx512Bf16,
}

impl CpuIsa {
    /// All of them, best last.
    pub const ALL: [Self; 5] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Vnni, Self::Avx512Bf16];

    /// The best of this machine. Asks the processor once, then remembers.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let avx2 = has!("avx2") && has!("fma") && has!("f16c");
            if avx2 && has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") {
                return match has!("avx512vnni") {
                    true if has!("avx512bf16") && has!("avx512vbmi") => CpuIsa::Avx512Bf16,
                    true => CpuIsa::Avx512Vnni,
                    false => CpuIsa::Avx512,
                };
            }
            if avx2 {
                return CpuIsa::Avx2;
            }
        }
        CpuIsa::Portable
    }

    /// `portable`, `avx2`, `avx512`, `avx512_vnni`, `avx512_bf16`
    pub const fn name(self) -> &'static str {
        match self {
            CpuIsa::Portable => "portable",
            CpuIsa::Avx2 => "avx2",
            CpuIsa::Avx512 => "avx512",
            CpuIsa::Avx512Vnni => "avx512_vnni",
            CpuIsa::Avx512Bf16 => "avx512_bf16",
        }
    }
}

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
