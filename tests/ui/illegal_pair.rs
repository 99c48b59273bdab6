use moe_oracle::oracle::Fp8;
use moe_oracle::platform::{CpuIsa, Platform};
use moe_oracle::scheme::{FP8_STATIC_128_BLOCK_SYM, NVFP4_DYNAMIC};

type Nonsense = Fp8<{ FP8_STATIC_128_BLOCK_SYM.bits() }, { NVFP4_DYNAMIC.bits() }>;

const _: () = {
    Nonsense::priority(&Platform::Cpu(CpuIsa::Portable));
};

fn main() {}
