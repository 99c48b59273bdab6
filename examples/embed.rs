//! The layer inside of an engine: chosen while compiling, packed at load, run per step. Takes a small checkpoint of the
//! repository and compares with its expected answer.

use half::bf16;
use moe_oracle::cpu::ThreadPool;
use safetensors::SafeTensors;
use std::error::Error;
use std::path::Path;

// README: from here
use moe_oracle::checkpoint::Checkpoint;
use moe_oracle::config::MoeConfig;
use moe_oracle::kernel::{Rows, RowsMut, Standard};
use moe_oracle::oracle::{Fp8Backend, Fp8Block, MoeKernelOracle, SelectInputs, Selection};
use moe_oracle::platform::{CpuIsa, Platform};

/// 5 experts, 3 of them per token, hidden size 192, intermediate size 96.
const LAYER: MoeConfig = MoeConfig::new(5, 3, 192, 96);
/// Decided at compile time; an impossible layer is a compile error.
const CHOICE: Selection<Fp8Backend> =
    match Fp8Block::select(&LAYER, &Platform::Cpu(CpuIsa::Portable), &SelectInputs::AUTO) {
        Ok(choice) => choice,
        Err(_) => panic!("no backend serves this layer"),
    };
const MAX_TOKENS: usize = 64;
// README: to here

fn main() -> Result<(), Box<dyn Error>> {
    let (checksum, error) = run()?;
    println!("{} gives {checksum:.4}, {error:.5} from the expected answer", CHOICE.kernel.name);
    Ok(())
}

/// The sum of the output's magnitudes, and its distance from the expected answer relative to the answer's length.
pub fn run() -> Result<(f64, f64), Box<dyn Error>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/25_qwen3_moe_fp8_block_cut");
    let input = std::fs::read(dir.join("input.safetensors"))?;
    let expected = std::fs::read(dir.join("expected.safetensors"))?;
    let (input, expected) = (SafeTensors::deserialize(&input)?, SafeTensors::deserialize(&expected)?);
    let x: Vec<bf16> = words(&input, "hidden_states", |b: [u8; 2]| bf16::from_le_bytes(b))?;
    let topk_ids = words(&expected, "topk_ids", i32::from_le_bytes)?;
    let topk_weights = words(&expected, "topk_weights", f32::from_le_bytes)?;
    let mut y = vec![bf16::ZERO; x.len()];
    let pool = ThreadPool::new(2)?;

    // README: from here
    // At load: checkpoint -> canonical weights -> packed weights -> kernel.
    let weights = Checkpoint::open(&dir)?.layer(0)?.weights;
    let quant = Fp8Block::make_quant_config(&LAYER, &weights)?;
    let packed = Fp8Block::convert_to_kernel_format(CHOICE.backend, &LAYER, &Platform::cpu(), weights)?;
    let kernel = Fp8Block::make_kernel::<Standard>(packed, Some(quant), &LAYER, None)?;
    let mut workspace = vec![0; kernel.workspace_bytes(MAX_TOKENS)];

    // Per step; allocates nothing.
    kernel.forward(Rows::Bf16(&x), &topk_ids, &topk_weights, RowsMut::Bf16(&mut y), &mut workspace, &pool)?;
    // README: to here

    let want = words(&expected, "output", f32::from_le_bytes)?;
    let square = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>();
    let off = square(&mut y.iter().zip(&want).map(|(y, w)| f64::from(y.to_f32() - w)));
    let error = (off / square(&mut want.iter().map(|w| f64::from(*w)))).sqrt();
    Ok((y.iter().map(|y| f64::from(y.to_f32().abs())).sum(), error))
}

fn words<const N: usize, T>(
    file: &SafeTensors,
    name: &str,
    f: impl Fn([u8; N]) -> T,
) -> Result<Vec<T>, Box<dyn Error>> {
    let (words, _) = file.tensor(name)?.data().as_chunks();
    Ok(words.iter().map(|w| f(*w)).collect())
}
