use moe_oracle::config::MoeConfig;
use moe_oracle::oracle::{Fp8Block, SelectInputs};
use moe_oracle::platform::{CpuIsa, Platform};

const LAYER: MoeConfig = MoeConfig::new(8, 2, 128, 128);
const _: () = assert!(Fp8Block::select(&LAYER, &Platform::Cpu(CpuIsa::Portable), &SelectInputs::AUTO).is_ok());

fn main() {}
