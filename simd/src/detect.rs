//! The instruction sets that there are kernels for, and the best of this machine.

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
