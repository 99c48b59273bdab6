//! `cuda_wgmma` against the float64 reference that quantises activations as the keys say, on a Hopper GPU.
#![cfg(feature = "cuda")]

mod common;

use common::packed::{self, oracle};
use common::reference::Reference;
use common::*;
use moe_oracle::config::*;
use moe_oracle::cuda::{CudaKernel, Families, Stream};
use moe_oracle::oracle::{DynOracle, ExpertsKind, ORACLES};
use moe_oracle::platform::Platform;
use moe_oracle::scheme::{QuantKey, Scheme};

const KIND: ExpertsKind = ExpertsKind::Wgmma;
const TILES: [usize; 3] = [64, 128, 256];

fn config(e: usize, k: usize, h: usize, i: usize) -> MoeConfig {
    MoeConfig::new(e, k, h, i)
}

/// A stream on a GPU that these kernels are for.
fn stream() -> Option<Stream> {
    let stream = gpu::stream()?;
    let capability = stream.gpu().info().capability;
    if capability == 90 {
        return Some(stream);
    }
    skip::skipped(format!("this GPU has compute capability {capability}, not 90"));
    None
}

/// Oracles that have these kernels.
fn oracles() -> impl Iterator<Item = (usize, &'static DynOracle)> {
    let served = |oracle: &DynOracle| {
        let verdicts = oracle.explain(&config(4, 2, 64, 64), &Platform::Cuda(90));
        verdicts.iter().any(|c| c.backend == "cuda_wgmma" && c.verdict.is_ok())
    };
    ORACLES.iter().enumerate().filter(move |(_, o)| served(o))
}

/// Hopper's kernels whatever the number of tokens, with a tile or the one that suits.
fn wgmma(stream: &Stream, layer: &Layer, wgmma_tile: Option<usize>, map: Option<&[i32]>) -> CudaKernel {
    let mut kernel = gpu::kernel(stream, layer, KIND, map);
    let families = Families { decode_up_to: 0, wgmma_from: 0, wgmma_tile, ..Families::of(&layer.config) };
    kernel.set_families(families).unwrap();
    kernel
}

/// What these kernels quantise activations to. Stored scales with routing weights on the input are `cuda_mma`'s, which
/// multiplies int8 as keyed, too, and keeps activations exact for fp8.
fn key(layer: &Layer) -> Option<QuantKey> {
    let key = QuantKey::from_bits(layer.oracle.activation)?;
    let served = key.scale.dynamic || !layer.config.weight_on_input || layer.oracle.scheme == Scheme::Int8;
    served.then_some(key)
}

/// All experts' stored scales the first one's.
fn share_scales(layer: &mut Layer) {
    let first = &layer.weights.experts[0];
    let (input, down) = (first.input_scale, first.down_input_scale);
    for e in &mut layer.weights.experts {
        (e.input_scale, e.down_input_scale) = (input, down);
    }
}

fn check(stream: &Stream, kernel: &CudaKernel, layer: &Layer, rng: &mut Rng, tokens: usize, skew: Skew) -> Vec<u16> {
    let key = key(layer);
    // Every expert's result is rounded before the sum. Where activations are quantised, those between the projections are
    // rounded to bf16 before, which takes one in 64 to the other side of a boundary of e4m3, a step of an eighth away. In
    // float64 that costs 1.2 percent of rows of 192 and more (1.5 at most in a dozen layers), and up to 3.4 of rows of 32,
    // where few values make the whole. Exact activations would be 4 percent off.
    let between = if layer.config.intermediate < 64 { 4e-2 } else { 2e-2 };
    let bound = 1.5 * packed::bound(layer.config.input) + if key.is_some() { between } else { 0.0 };
    packed::check_keyed(stream, kernel, layer, key, rng, tokens, skew, bound)
}

#[test]
fn every_oracle_is_near_its_reference() {
    let Some(stream) = stream() else { return };
    assert!(oracles().count() >= 10);
    for (n, oracle) in oracles() {
        for (m, (h, i)) in [(2880, 32), (64, 1408), (704, 96), (96, 352), (192, 192)].into_iter().enumerate() {
            for input in [InputType::Bf16, InputType::F16] {
                let mut rng = Rng((n * 100 + m) as u64);
                let activation = if m % 2 == 0 { Activation::SILU } else { Activation::Relu2NoMul };
                let c = MoeConfig { input, bias: (n + m) % 3 == 0, activation, ..config(4, 2, h, i) };
                let mut layer = weights::layer(&mut rng, oracle, c);
                if m % 2 == 0 {
                    share_scales(&mut layer);
                }
                for (tile, tokens) in [(Some(TILES[(n + m) % 3]), 37), (None, 300)] {
                    check(&stream, &wgmma(&stream, &layer, tile, None), &layer, &mut rng, tokens, Skew::Uniform);
                }
            }
        }
    }
}

#[test]
fn every_activation_with_biases() {
    let Some(stream) = stream() else { return };
    let situ = Activation::Situ { beta: 2.0, linear_beta: Some(1.5) };
    let more = [Activation::Silu { limit: Some(1.5) }, Activation::SwigluStep { limit: 1.25 }, situ];
    for (n, activation) in Activation::ALL.into_iter().chain(more).enumerate() {
        for alias in ["Bf16", "Fp8Block", "Int8Channel"] {
            let mut rng = Rng(1000 + n as u64);
            let c = MoeConfig { activation, bias: true, ..config(5, 3, 96, 208) };
            let layer = weights::layer(&mut rng, oracle(alias), c);
            let tile = Some(TILES[n % 3]);
            check(&stream, &wgmma(&stream, &layer, tile, None), &layer, &mut rng, 119, Skew::Zipf);
        }
    }
}

#[test]
fn every_skew_and_number_of_tokens() {
    let Some(stream) = stream() else { return };
    for (e, k) in [(512, 10), (16, 8), (1, 1), (40, 32)] {
        for alias in ["Bf16", "Fp8Block", "Fp8Channel", "Int8Channel"] {
            for (weight_on_input, skew) in
                [(false, Skew::Uniform), (true, Skew::Same), (false, Skew::Zipf), (true, Skew::Holes)]
            {
                let mut rng = Rng(3000);
                let c = MoeConfig { weight_on_input, ..config(e, k, 96, 32) };
                let layer = weights::layer(&mut rng, oracle(alias), c);
                let kernel = wgmma(&stream, &layer, None, None);
                for tokens in [0, 1, 9, 33, 130, 700] {
                    check(&stream, &kernel, &layer, &mut rng, tokens, skew);
                }
            }
        }
    }
}

#[test]
fn every_tile_gives_the_same_bits() {
    let Some(stream) = stream() else { return };
    for (n, oracle) in oracles() {
        let c = MoeConfig { bias: n % 2 == 0, ..config(6, 3, 352, 416) };
        let mut layer = weights::layer(&mut Rng(7000 + n as u64), oracle, c);
        if n % 2 == 0 {
            share_scales(&mut layer);
        }
        let of = |tile| check(&stream, &wgmma(&stream, &layer, tile, None), &layer, &mut Rng(7100), 333, Skew::Zipf);
        let want = of(None);
        for tile in TILES {
            assert_eq!(of(Some(tile)), want, "{}, {tile}", oracle.alias);
        }
    }
}

#[test]
fn with_batch_invariance_a_token_is_alone() {
    let Some(stream) = stream() else { return };
    for (n, oracle) in oracles() {
        let mut rng = Rng(4000 + n as u64);
        let c = MoeConfig { batch_invariant: true, ..config(6, 3, 1024, 672) };
        let layer = weights::layer(&mut rng, oracle, c);
        let kernel = wgmma(&stream, &layer, None, None);
        packed::tokens_are_alone(&stream, &kernel, &layer, &mut rng, 275, &[0, 1, 13, 40, 274]);
    }
}

/// Slots of the batched format: expert after expert, with NaNs where there is no token, and those tokens' rows.
fn slots(rng: &mut Rng, layer: &Layer, counts: &[i32], max: usize) -> (Vec<f32>, Vec<usize>) {
    let mut x = hidden(rng, counts.len() * max, &layer.config);
    let (full, empty): (Vec<usize>, Vec<usize>) =
        (0..counts.len() * max).partition(|row| row % max < counts[row / max] as usize);
    let h = layer.config.hidden;
    empty.iter().for_each(|row| x[row * h..(row + 1) * h].fill(f32::NAN));
    (x, full)
}

fn rows_of<T: Copy>(x: &[T], width: usize, rows: &[usize]) -> Vec<T> {
    rows.iter().flat_map(|r| x[r * width..(r + 1) * width].iter().copied()).collect()
}

/// Each token of the batched format has the bits that it has in the standard one as its expert's only, and nothing else is
/// written; the same launches serve other counts.
#[test]
fn the_batched_format_gives_what_the_standard_one_gives() {
    let Some(stream) = stream() else { return };
    let counts = [[3, 0, 300, 1, 40], [0, 17, 64, 300, 9]];
    for (n, oracle) in oracles() {
        for (m, (max, h, i)) in [(300, 96, 192), (301, 1032, 160)].into_iter().enumerate() {
            let mut rng = Rng(6000 + n as u64);
            let input = if (n + m) % 2 == 0 { InputType::Bf16 } else { InputType::F16 };
            let standard = weights::layer(&mut rng, oracle, MoeConfig { bias: true, input, ..config(5, 1, h, i) });
            let batched = Layer {
                oracle,
                config: MoeConfig { format: ActivationFormat::Batched, ..standard.config },
                weights: standard.weights.clone(),
            };
            let tile = [None, Some(64), Some(128), Some(256)][(n + m) % 4];
            let (one, many) = (wgmma(&stream, &standard, None, None), wgmma(&stream, &batched, tile, None));
            let given = counts.map(|counts| slots(&mut rng, &standard, &counts, max));
            let call = gpu::BatchedCall::new(&stream, &many, &given[0].0, &counts[0], max);
            call.launch(&stream, &many);
            let first = call.output_bits(&stream);
            let second = call.replay(&stream, &many, &given[1].0, &counts[1]);
            for (y, (x, full)) in [first, second].iter().zip(&given) {
                let tokens = rows_of(x, h, full);
                let ids: Vec<i32> = full.iter().map(|row| (row / max) as i32).collect();
                let ones = vec![1.0; ids.len()];
                let have = gpu::values(input, &rows_of(y, h, full));
                assert_eq!(gpu::forward(&stream, &one, &tokens, &ids, &ones), have, "{}, {tile:?}", oracle.alias);
                let stored = packed::as_stored(&standard);
                let want = Reference::new(&stored, key(&standard)).forward(&tokens, &ids, &ones, None);
                let error = relative_error(&have, &want);
                assert!(error < if key(&standard).is_some() { 2e-2 } else { 6e-3 }, "{}: {error:e}", oracle.alias);
                let written = |row: usize| y[row * h..(row + 1) * h].iter().any(|v| *v != 0xffff);
                assert!(
                    (0..5 * max).all(|row| full.contains(&row) || !written(row)),
                    "{}: an empty slot",
                    oracle.alias
                );
            }
        }
    }
}

/// The same layer with sums of e4m3 products left in the tensor cores.
fn fast(layer: &Layer) -> Layer {
    let config = MoeConfig { fast_accum: true, ..layer.config };
    Layer { oracle: layer.oracle, config, weights: layer.weights.clone() }
}

#[test]
fn sums_may_stay_in_the_tensor_cores() {
    let Some(stream) = stream() else { return };
    for (n, alias) in ["Fp8Channel", "Fp8Tensor", "Fp8ChannelTensor", "Fp8Block", "Bf16"].into_iter().enumerate() {
        for (m, (h, i)) in [(2880, 64), (704, 352)].into_iter().enumerate() {
            let mut rng = Rng(9100 + (10 * n + m) as u64);
            let mut exact = weights::layer(&mut rng, oracle(alias), MoeConfig { bias: m == 1, ..config(5, 2, h, i) });
            share_scales(&mut exact);
            let layer = fast(&exact);
            check(&stream, &wgmma(&stream, &layer, None, None), &layer, &mut rng, 130, Skew::Uniform);
            let x = hidden(&mut rng, 333, &layer.config);
            let (ids, weights) = route(&mut rng, 333, &layer.config, Skew::Zipf);
            let of = |layer, tile| gpu::forward(&stream, &wgmma(&stream, layer, tile, None), &x, &ids, &weights);
            let have = of(&layer, None);
            for tile in TILES {
                assert_eq!(of(&layer, Some(tile)), have, "{alias}, {tile}");
            }
            // Scales that change along a row, and other formats, know no such sums.
            assert_eq!(of(&exact, None) == have, matches!(alias, "Fp8Block" | "Bf16"), "{alias}");
        }
    }
}

/// Where all products are positive, such sums lose the most; the others next to nothing.
#[test]
fn what_sums_in_the_tensor_cores_lose() {
    let Some(stream) = stream() else { return };
    let mut rng = Rng(9300);
    let mut layer = weights::layer(&mut rng, oracle("Fp8Channel"), config(2, 1, 4096, 64));
    for m in layer.weights.experts.iter_mut().flat_map(|e| e.gate.iter_mut().chain([&mut e.up, &mut e.down])) {
        m.codes = m.codes.iter().map(|code| code & 0x7f).collect::<Vec<u8>>().into();
    }
    let x: Vec<f32> = hidden(&mut rng, 100, &layer.config).into_iter().map(f32::abs).collect();
    let (ids, weights) = route(&mut rng, 100, &layer.config, Skew::Uniform);
    let want = Reference::new(&layer, key(&layer)).forward(&x, &ids, &weights, None);
    let error = |layer: &Layer| {
        relative_error(&gpu::forward(&stream, &wgmma(&stream, layer, None, None), &x, &ids, &weights), &want)
    };
    // Gate and up lose up to 5 percent each, and are multiplied; the default has two roundings to 16 bits.
    let (kept, lost) = (error(&layer), error(&fast(&layer)));
    assert!(kept < 8e-3 && lost < 0.12, "{kept:e} {lost:e}");
}

/// From 2048 slots on the plan is made by several blocks.
#[test]
fn many_slots_of_which_few_are_taken() {
    let Some(stream) = stream() else { return };
    for (alias, max) in [("Bf16", 1500), ("Fp8Tensor", 700), ("Int8Channel", 2100)] {
        let mut rng = Rng(6200);
        let c = MoeConfig { format: ActivationFormat::Batched, ..config(7, 1, 64, 64) };
        let layer = weights::layer(&mut rng, oracle(alias), c);
        let kernel = wgmma(&stream, &layer, None, None);
        let counts = [0, 1, max as i32, 0, 33, 8, 0];
        let (x, full) = slots(&mut rng, &layer, &counts, max);
        let y = gpu::forward_batched(&stream, &kernel, &x, &counts, max);
        let stored = packed::as_stored(&layer);
        let mut reference = Reference::new(&stored, key(&layer));
        let ids: Vec<i32> = full.iter().map(|row| (row / max) as i32).collect();
        let want = reference.forward(&rows_of(&x, 64, &full), &ids, &vec![1.0; ids.len()], None);
        let error = relative_error(&rows_of(&y, 64, &full), &want);
        assert!(error < if key(&layer).is_some() { 2.5e-2 } else { 6e-3 }, "{alias}: {error:e}");
        let empty = (0..7 * max).filter(|row| row % max >= counts[row / max] as usize);
        assert!(empty.flat_map(|row| &y[row * 64..(row + 1) * 64]).all(|v| v.is_nan()), "{alias}: an empty slot");
    }
}

#[test]
fn each_number_of_slots_goes_to_its_kernels() {
    let Some(stream) = stream() else { return };
    let c = MoeConfig { format: ActivationFormat::Batched, ..config(5, 1, 256, 128) };
    let layer = weights::layer(&mut Rng(8200), oracle("Fp8Channel"), c);
    let all = gpu::kernel(&stream, &layer, KIND, None);
    let families = all.families().unwrap();
    assert!(families.decode_up_to == 8 && families.wgmma_from <= 9, "{families:?}");
    let decode = gpu::kernel(&stream, &layer, ExpertsKind::Decode, None);
    let hopper = wgmma(&stream, &layer, None, None);
    for (max, want) in [(1, &decode), (8, &decode), (9, &hopper), (70, &hopper)] {
        let mut rng = Rng(8300);
        let counts = [1, 0, max as i32, 1, 1];
        let (x, full) = slots(&mut rng, &layer, &counts, max);
        let bits = |kernel| rows_of(&gpu::forward_batched(&stream, kernel, &x, &counts, max), 256, &full);
        assert_eq!(bits(&all), bits(want), "{max} slots");
    }
    let sizes: Vec<usize> = (0..300).map(|t| all.workspace_bytes(t)).collect();
    assert!(sizes.is_sorted(), "{sizes:?}");
}

#[test]
fn each_number_of_tokens_goes_to_its_kernels() {
    let Some(stream) = stream() else { return };
    let layer = weights::layer(&mut Rng(8000), oracle("Fp8Block"), config(64, 2, 256, 384));
    let all = gpu::kernel(&stream, &layer, KIND, None);
    let from = all.families().unwrap().wgmma_from;
    assert!((9..=64).contains(&from), "{from}");
    let mma = gpu::kernel(&stream, &layer, ExpertsKind::Mma, None);
    let hopper = wgmma(&stream, &layer, None, None);
    for (tokens, want) in [(1, &mma), (from - 1, &mma), (from, &hopper), (200, &hopper)] {
        let bits = |kernel: &CudaKernel| {
            let mut rng = Rng(8100);
            let x = hidden(&mut rng, tokens, &layer.config);
            let (ids, weights) = route(&mut rng, tokens, &layer.config, Skew::Uniform);
            gpu::forward(&stream, kernel, &x, &ids, &weights)
        };
        assert_eq!(bits(&all), bits(want), "{tokens} tokens");
    }
    // A workspace for many tokens serves fewer.
    let sizes: Vec<usize> = (0..300).map(|t| all.workspace_bytes(t)).collect();
    assert!(sizes.is_sorted(), "{sizes:?}");
}

#[test]
fn a_token_may_name_an_expert_twice() {
    let Some(stream) = stream() else { return };
    packed::a_token_names_an_expert_twice(&stream, &|layer, map| wgmma(&stream, layer, None, map));
}

#[test]
fn expert_parallel_ranks_add_up() {
    let Some(stream) = stream() else { return };
    let keyed = |alias| (alias, QuantKey::from_bits(oracle(alias).activation), 1.6e-2);
    let cases = [("Bf16", None, 6e-3), keyed("Fp8Block"), keyed("Int8Channel")];
    packed::ranks_of_add_up(&stream, &|layer, map| wgmma(&stream, layer, None, map), 150, &cases);
}

#[test]
fn a_long_row_of_large_layers() {
    let Some(stream) = stream() else { return };
    for (alias, h, i) in
        [("Bf16", 2048, 768), ("Fp8Block", 7168, 256), ("Fp8Channel", 4096, 512), ("Int8Channel", 2048, 768)]
    {
        let mut rng = Rng(9000);
        let layer = weights::layer(&mut rng, oracle(alias), config(4, 2, h, i));
        check(&stream, &wgmma(&stream, &layer, None, None), &layer, &mut rng, 610, Skew::Zipf);
    }
}

/// Beyond 2048 rows a warp quantises one, not a block: either way to the same operands.
#[test]
fn many_tokens_give_the_bits_of_few() {
    let Some(stream) = stream() else { return };
    let aliases = ["Bf16", "Fp8Block", "Fp8Channel", "Fp8Tensor", "Fp8ChannelTensor", "Int8Channel", "Int8Tensor"];
    for (n, alias) in aliases.into_iter().enumerate() {
        let mut layer = weights::layer(&mut Rng(9500 + n as u64), oracle(alias), config(16, 3, 1224, 160));
        if alias == "Fp8Tensor" {
            share_scales(&mut layer);
        }
        let kernel = wgmma(&stream, &layer, Some(64), None);
        let (tokens, h, k) = (2300, layer.config.hidden, layer.config.topk);
        let mut rng = Rng(9600);
        let x = hidden(&mut rng, tokens, &layer.config);
        let (ids, weights) = route(&mut rng, tokens, &layer.config, Skew::Uniform);
        let all = gpu::forward(&stream, &kernel, &x, &ids, &weights);
        for first in [0, 1000, 2200] {
            let some = first..first + 100;
            let of = |width: usize| some.start * width..some.end * width;
            let bits = gpu::forward(&stream, &kernel, &x[of(h)], &ids[of(k)], &weights[of(k)]);
            assert_eq!(all[of(h)], bits, "{alias}, tokens {some:?}");
        }
        check(&stream, &kernel, &layer, &mut rng, 100, Skew::Uniform);
    }
}

#[test]
fn a_poisoned_token_leaves_its_neighbours_alone() {
    let Some(stream) = stream() else { return };
    for (n, alias) in ["Bf16", "Fp8Block", "Fp8Channel", "Int8Channel"].into_iter().enumerate() {
        let mut rng = Rng(9990 + n as u64);
        let layer = weights::layer(&mut rng, oracle(alias), config(4, 2, 96, 96));
        let kernel = wgmma(&stream, &layer, None, None);
        let (tokens, h) = (21, 96);
        let mut x = hidden(&mut rng, tokens, &layer.config);
        let (ids, weights) = route(&mut rng, tokens, &layer.config, Skew::Same);
        let want = gpu::forward(&stream, &kernel, &x, &ids, &weights);
        x[2 * h + 7] = f32::NAN;
        let call = gpu::Call::new(&stream, &kernel, &x, &ids, &weights);
        call.launch(&stream, &kernel);
        let bits = gpu::values(layer.config.input, &call.output_bits(&stream));
        assert!(bits[2 * h..3 * h].iter().any(|v| v.is_nan()), "{alias}: a NaN was swallowed");
        assert!(bits[..2 * h] == want[..2 * h] && bits[3 * h..] == want[3 * h..], "{alias}: other tokens changed");
    }
}
