//! The emulation on the GPU against the float64 reference, and what else a yardstick must be: the same bits every time,
//! nothing but its output written.
#![cfg(feature = "cuda")]

mod common;

use common::reference::Reference;
use common::*;
use moe_oracle::checkpoint::Checkpoint;
use moe_oracle::config::*;
use moe_oracle::cuda::emulation::{Emulation, EmulationError};
use moe_oracle::cuda::{CudaError, DeviceBuffer, DevicePtr, Graph, Stream, Tensors};
use moe_oracle::layer::{Device, LayerError, LayerOptions};
use moe_oracle::oracle::{DynOracle, ExpertsKind, ORACLES, SelectInputs};
use moe_oracle::platform::Platform;
use moe_oracle::scheme::{FP8_DYNAMIC_TOKEN_SYM, FP8_STATIC_TENSOR_SYM, INT4_STATIC, QuantKey};
use moe_oracle::weights::Scales;

const TYPES: [InputType; 3] = InputType::ALL;

/// Bytes after output and workspace that nobody may write.
const GUARD: usize = 512;

fn oracle(alias: &str) -> &'static DynOracle {
    ORACLES.iter().find(|o| o.alias == alias).unwrap()
}

/// The layer's activation key.
fn key(layer: &Layer) -> Option<QuantKey> {
    QuantKey::from_bits(layer.oracle.activation)
}

fn with_key(stream: &Stream, layer: &Layer, key: Option<QuantKey>) -> Emulation {
    Emulation::new(stream, &layer.weights, key, &layer.config).unwrap_or_else(|e| panic!("{}: {e}", layer.oracle.alias))
}

/// As the oracle's keys ask.
fn emulation(stream: &Stream, layer: &Layer) -> Emulation {
    with_key(stream, layer, key(layer))
}

fn to_bytes(ty: InputType, x: &[f32]) -> Vec<u8> {
    match ty {
        InputType::Bf16 => x.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        InputType::F16 => x.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
        InputType::F32 => x.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

fn from_bytes(ty: InputType, x: &[u8]) -> Vec<f32> {
    let pairs = || x.chunks_exact(2).map(|b| [b[0], b[1]]);
    match ty {
        InputType::Bf16 => pairs().map(|b| half::bf16::from_le_bytes(b).to_f32()).collect(),
        InputType::F16 => pairs().map(|b| half::f16::from_le_bytes(b).to_f32()).collect(),
        InputType::F32 => x.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}

/// The memory of one call on the GPU. Output and workspace are full of 0xff bytes, NaNs of every type, and so are the
/// guards behind them.
struct Memory {
    tokens: usize,
    hidden: DeviceBuffer,
    ids: DeviceBuffer,
    weights: DeviceBuffer,
    output: DeviceBuffer,
    /// Bytes.
    output_len: usize,
    workspace: DeviceBuffer,
    workspace_len: usize,
}

impl Memory {
    fn new(stream: &Stream, e: &Emulation, c: &MoeConfig, x: &[f32], ids: &[i32], weights: &[f32]) -> Self {
        let tokens = x.len() / c.hidden;
        let workspace_len = e.workspace_bytes(tokens);
        Self {
            tokens,
            hidden: DeviceBuffer::of(stream, &to_bytes(c.input, x)).unwrap(),
            ids: DeviceBuffer::of(stream, ids).unwrap(),
            weights: DeviceBuffer::of(stream, weights).unwrap(),
            output: DeviceBuffer::of(stream, &vec![0xff_u8; c.input.bytes() * x.len() + GUARD]).unwrap(),
            output_len: c.input.bytes() * x.len(),
            workspace: DeviceBuffer::of(stream, &vec![0xff_u8; workspace_len + GUARD]).unwrap(),
            workspace_len,
        }
    }

    fn tensors(&self) -> Tensors<'_> {
        Tensors {
            hidden: self.hidden.ptr(),
            topk_ids: self.ids.ptr(),
            topk_weights: self.weights.ptr(),
            output: self.output.ptr().slice(0, self.output_len).unwrap(),
            workspace: self.workspace.ptr().slice(0, self.workspace_len).unwrap(),
        }
    }

    /// The output's bytes, after a look at the guards.
    fn output(&self, stream: &Stream) -> Vec<u8> {
        let mut out = vec![0; self.output_len];
        self.output.download(stream, 0, &mut out).unwrap();
        for (buffer, at) in [(&self.output, self.output_len), (&self.workspace, self.workspace_len)] {
            let mut guard = [0_u8; GUARD];
            buffer.download(stream, at, &mut guard).unwrap();
            assert!(guard.iter().all(|b| *b == 0xff), "wrote beyond the end");
        }
        out
    }
}

/// One call; the output's bytes.
fn call(
    stream: &Stream,
    e: &Emulation,
    c: &MoeConfig,
    x: &[f32],
    ids: &[i32],
    weights: &[f32],
    map: Option<&[i32]>,
) -> Vec<u8> {
    let memory = Memory::new(stream, e, c, x, ids, weights);
    let map = map.map(|m| DeviceBuffer::of(stream, m).unwrap());
    // SAFETY: emulation, memory and map live until the download has waited for the kernels; nothing else runs.
    unsafe { e.forward(stream, &memory.tensors(), memory.tokens, map.as_ref().map(|m| m.ptr())) }.unwrap();
    let out = memory.output(stream);
    assert!(from_bytes(c.input, &out).iter().all(|v| !v.is_nan()), "an output element is NaN or was not written");
    out
}

/// As `bound` of tests/layers.rs.
fn bound(c: &MoeConfig, key: Option<QuantKey>) -> f64 {
    let out = match c.input {
        InputType::Bf16 => 4e-3,
        InputType::F16 => 6e-4,
        InputType::F32 => 0.0,
    };
    let activations = match key {
        None => 2e-5,
        Some(key) if key.elem_bits() == 8 => 5e-3,
        // Once in a while bf16 values lie in the middle between two codes, where float32 and float64 disagree, and a step of
        // these elements is up to a third of the largest. Exact activations are more than twice as far away.
        Some(_) => 1.5e-2,
    };
    out + activations
}

/// Compares one batch with the reference, with activations as the key asks and with exact ones.
fn check(stream: &Stream, layer: &Layer, rng: &mut Rng, tokens: usize, skew: Skew) {
    let c = &layer.config;
    let x = hidden(rng, tokens, c);
    let (ids, weights) = route(rng, tokens, c, skew);
    for key in key(layer).map(Some).into_iter().chain([None]) {
        let have = call(stream, &with_key(stream, layer, key), c, &x, &ids, &weights, None);
        let want = Reference::new(layer, key).forward(&x, &ids, &weights, None);
        let error = relative_error(&from_bytes(c.input, &have), &want);
        let alias = layer.oracle.alias;
        assert!(error < bound(c, key), "{alias}, {tokens} tokens, activations {key:?}, {c:?}: {error:e}");
    }
}

#[test]
fn every_oracle_is_near_float64() {
    let Some(stream) = gpu::stream() else { return };
    for (n, oracle) in ORACLES.iter().enumerate() {
        for (m, (h, i)) in [(2880, 32), (64, 1408), (704, 96), (96, 352), (192, 192)].into_iter().enumerate() {
            let mut rng = Rng((n * 100 + m) as u64);
            let activation = if m % 2 == 0 { GATED[(n + m) % GATED.len()] } else { UNGATED[(n + m) % UNGATED.len()] };
            let (bias, input) = ((n + m) % 3 == 0, TYPES[(n + m) % 3]);
            let c = MoeConfig { activation, bias, input, ..MoeConfig::new(4, 2, h, i) };
            check(&stream, &weights::layer(&mut rng, oracle, c), &mut rng, 7, Skew::Uniform);
        }
    }
}

#[test]
fn every_activation_with_biases() {
    let Some(stream) = gpu::stream() else { return };
    for (n, activation) in GATED.into_iter().chain(UNGATED).enumerate() {
        for alias in ["Bf16", "Fp8Channel", "Mxfp4W4A16", "Int4Asym"] {
            let mut rng = Rng(1000 + n as u64);
            let c = MoeConfig { activation, bias: true, input: InputType::F16, ..MoeConfig::new(5, 3, 96, 192) };
            check(&stream, &weights::layer(&mut rng, oracle(alias), c), &mut rng, 7, Skew::Zipf);
        }
    }
}

#[test]
fn every_input_type_and_the_weight_on_the_input() {
    let Some(stream) = gpu::stream() else { return };
    for alias in ["Bf16", "Fp8Block", "Nvfp4W4A4", "Int8Tensor", "Int4"] {
        for input in TYPES {
            for (weight_on_input, topk) in [(false, 4), (true, 1), (true, 4)] {
                let mut rng = Rng(2000);
                let c = MoeConfig { input, weight_on_input, ..MoeConfig::new(8, topk, 192, 352) };
                check(&stream, &weights::layer(&mut rng, oracle(alias), c), &mut rng, 7, Skew::Uniform);
            }
        }
    }
}

#[test]
fn many_experts_many_tokens_and_every_skew() {
    let Some(stream) = gpu::stream() else { return };
    for (e, k) in [(512, 10), (16, 8), (1, 1)] {
        for alias in ["Bf16", "Mxfp4W4A16", "Fp8ChannelWeightOnly"] {
            let mut rng = Rng(3000);
            let c = MoeConfig { input: InputType::F16, ..MoeConfig::new(e, k, 96, 32) };
            let layer = weights::layer(&mut rng, oracle(alias), c);
            for skew in [Skew::Uniform, Skew::Same, Skew::Zipf, Skew::Holes] {
                for tokens in [0, 1, 33, 130] {
                    check(&stream, &layer, &mut rng, tokens, skew);
                }
            }
        }
    }
}

#[test]
fn odd_sizes_and_blocks_that_are_cut() {
    let Some(stream) = gpu::stream() else { return };
    for alias in ["Bf16", "Fp8Block", "Fp8Block32", "Fp8TensorDynamic", "Fp8ChannelWeightOnly", "Int8Channel"] {
        for (h, i) in [(8, 1), (72, 37), (136, 131), (264, 257)] {
            let mut rng = Rng(3500);
            let c = MoeConfig { bias: true, input: InputType::F16, ..MoeConfig::new(3, 2, h, i) };
            check(&stream, &weights::layer(&mut rng, oracle(alias), c), &mut rng, 7, Skew::Uniform);
        }
    }
}

#[test]
fn permuted_groups_with_and_without_zero_points_in_both_half_types() {
    let Some(stream) = gpu::stream() else { return };
    for alias in ["Int4", "Int4Asym", "Int8Group", "Int8GroupAsym", "Int8GroupWeightOnly"] {
        // Bit 0 is the half type, bit 1 the group size.
        for style in 0..4 {
            let mut rng = Rng(3600 + style as u64);
            let c = MoeConfig { input: InputType::F16, ..MoeConfig::new(4, 2, 192, 128) };
            let mut layer = weights::layer(&mut rng, oracle(alias), c);
            let key = QuantKey::from_bits(layer.oracle.weight);
            for e in &mut layer.weights.experts {
                e.up = weights::matrix(&mut rng, key, 128, 192, style);
                e.down = weights::matrix(&mut rng, key, 192, 128, style);
                for m in [&e.up, &e.down] {
                    assert!(matches!(&m.scales, Scales::Group { g_idx: Some(_), .. }), "{:?}", m.scales);
                }
            }
            check(&stream, &layer, &mut rng, 7, Skew::Uniform);
        }
    }
}

#[test]
fn ranks_compute_their_experts_and_nothing_else() {
    let Some(stream) = gpu::stream() else { return };
    for alias in ["Bf16", "Fp8Block", "Int4"] {
        let mut rng = Rng(5000);
        let c = MoeConfig { input: InputType::F16, ..MoeConfig::new(10, 3, 96, 96) };
        let whole = weights::layer(&mut rng, oracle(alias), c);
        let x = hidden(&mut rng, 33, &c);
        let (ids, weights) = route(&mut rng, 33, &c, Skew::Holes);
        // Experts are dealt out to three ranks, so that local order and global order differ in stride.
        for rank in 0..3 {
            let mine: Vec<usize> = (0..10).filter(|e| e % 3 == rank).collect();
            let map = (0..10).map(|e| mine.iter().position(|m| *m == e).map_or(-1, |l| l as i32)).collect::<Vec<_>>();
            let config = MoeConfig { local_experts: mine.len(), parallel: Parallel { ep: 3, ..c.parallel }, ..c };
            let mut part = whole.weights.clone();
            part.experts = mine.iter().map(|e| whole.weights.experts[*e].clone()).collect();
            let layer = Layer { oracle: whole.oracle, config, weights: part };
            let e = emulation(&stream, &layer);
            let have = call(&stream, &e, &config, &x, &ids, &weights, Some(&map));
            let want = Reference::new(&layer, key(&layer)).forward(&x, &ids, &weights, Some(&map));
            let error = relative_error(&from_bytes(c.input, &have), &want);
            assert!(error < bound(&c, key(&layer)), "{alias}, rank {rank}: {error:e}");
            // What is no local expert is none, whatever its number is; nor is an id that only the map's memory goes on to.
            let mut odd = [&map[..], &[0, 0]].concat();
            let odd_ids: Vec<i32> = ids.iter().map(|id| if *id == -1 { 11 } else { *id }).collect();
            for (place, absent) in [(rank + 1, -7), (rank + 2, mine.len() as i32), (rank + 4, i32::MAX)] {
                let place = &mut odd[place % 10];
                assert!(*place == -1);
                *place = absent;
            }
            assert_eq!(have, call(&stream, &e, &config, &x, &odd_ids, &weights, Some(&odd)), "{alias}, rank {rank}");
        }
    }
}

#[test]
fn ids_that_do_not_exist_add_nothing_and_their_weights_are_not_read() {
    let Some(stream) = gpu::stream() else { return };
    for (weight_on_input, alias) in [(false, "Bf16"), (true, "Bf16"), (false, "Fp8Channel"), (true, "Fp8Tensor")] {
        let mut rng = Rng(5500);
        let c = MoeConfig { bias: true, weight_on_input, ..MoeConfig::new(6, 4, 64, 40) };
        let layer = weights::layer(&mut rng, oracle(alias), c);
        let e = emulation(&stream, &layer);
        let x = hidden(&mut rng, 16, &c);
        let (mut ids, mut weights) = route(&mut rng, 16, &c, Skew::Holes);
        // One token with no expert at all.
        ids[4..8].fill(-1);
        let want = call(&stream, &e, &c, &x, &ids, &weights, None);
        assert!(want[2 * 64..2 * 128].iter().all(|b| *b == 0), "a token without experts becomes zero");
        for absent in [-2, i32::MIN, 6, 7, i32::MAX] {
            let odd: Vec<i32> = ids.iter().map(|id| if *id < 0 { absent } else { *id }).collect();
            assert_eq!(want, call(&stream, &e, &c, &x, &odd, &weights, None), "{absent}");
        }
        weights.iter_mut().zip(&ids).filter(|(_, id)| **id < 0).for_each(|(w, _)| *w = f32::NAN);
        assert_eq!(want, call(&stream, &e, &c, &x, &ids, &weights, None));
    }
}

#[test]
fn a_tokens_bits_depend_on_nothing_but_the_token() {
    let Some(stream) = gpu::stream() else { return };
    for (n, oracle) in ORACLES.iter().enumerate() {
        let mut rng = Rng(4000 + n as u64);
        let c = MoeConfig { input: TYPES[n % 3], ..MoeConfig::new(6, 3, 192, 96) };
        let layer = weights::layer(&mut rng, oracle, c);
        let e = emulation(&stream, &layer);
        let x = hidden(&mut rng, 33, &c);
        let (ids, weights) = route(&mut rng, 33, &c, Skew::Zipf);
        let all = call(&stream, &e, &c, &x, &ids, &weights, None);
        assert_eq!(all, call(&stream, &e, &c, &x, &ids, &weights, None), "{}", oracle.alias);
        let bytes = 192 * c.input.bytes();
        for t in [0, 1, 17, 32] {
            let (row, slots) = (t * 192..(t + 1) * 192, t * 3..(t + 1) * 3);
            let alone = call(&stream, &e, &c, &x[row], &ids[slots.clone()], &weights[slots], None);
            assert_eq!(all[t * bytes..(t + 1) * bytes], alone, "{}, token {t}", oracle.alias);
        }
    }
}

#[test]
fn more_tokens_than_one_launch_takes() {
    let Some(stream) = gpu::stream() else { return };
    for alias in ["Int8ChannelWeightOnly", "Int8Channel"] {
        let mut rng = Rng(4500);
        let (h, k, tokens) = (16, 32, 1100);
        let c = MoeConfig::new(32, k, h, 2048);
        let layer = weights::layer(&mut rng, oracle(alias), c);
        let e = emulation(&stream, &layer);
        let once = e.workspace_bytes(usize::MAX) / e.workspace_bytes(1);
        assert!(once > 1 && once < tokens, "{once}");
        let x = hidden(&mut rng, tokens, &c);
        let (ids, weights) = route(&mut rng, tokens, &c, Skew::Holes);
        let all = call(&stream, &e, &c, &x, &ids, &weights, None);
        for t in [0, once - 1, once, tokens - 1] {
            let (x, slots) = (&x[t * h..(t + 1) * h], t * k..(t + 1) * k);
            let alone = call(&stream, &e, &c, x, &ids[slots.clone()], &weights[slots], None);
            assert_eq!(all[2 * t * h..2 * (t + 1) * h], alone, "{alias}, token {t}");
        }
    }
}

#[test]
fn a_replayed_graph_gives_the_bits_of_an_eager_call() {
    let Some(stream) = gpu::stream() else { return };
    for alias in ["Bf16", "Mxfp4W4A16", "Nvfp4Token"] {
        let mut rng = Rng(6000);
        let c = MoeConfig::new(8, 3, 192, 96);
        let layer = weights::layer(&mut rng, oracle(alias), c);
        let e = emulation(&stream, &layer);
        let nothing = vec![0.0; 9 * 192];
        let memory = Memory::new(&stream, &e, &c, &nothing, &[-1; 9 * 3], &[0.0; 9 * 3]);
        // SAFETY: emulation and memory outlive the graph and every replay, each of which is waited for.
        let graph = Graph::capture(&stream, || unsafe { e.forward(&stream, &memory.tensors(), 9, None) }).unwrap();
        let mut before = Vec::new();
        for replay in 0..3 {
            let x = hidden(&mut rng, 9, &c);
            let (ids, weights) = route(&mut rng, 9, &c, Skew::Holes);
            memory.hidden.upload(&stream, 0, &to_bytes(c.input, &x)).unwrap();
            memory.ids.upload(&stream, 0, &ids).unwrap();
            memory.weights.upload(&stream, 0, &weights).unwrap();
            // SAFETY: as above.
            unsafe { graph.launch(&stream) }.unwrap();
            let have = memory.output(&stream);
            assert_eq!(have, call(&stream, &e, &c, &x, &ids, &weights, None), "{alias}, replay {replay}");
            assert_ne!(have, before, "{alias}, replay {replay}: the inputs are others");
            before = have;
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_is_written() {
    let Some(stream) = gpu::stream() else { return };
    let mut rng = Rng(8000);
    let c = MoeConfig::new(4, 2, 32, 32);
    let layer = weights::layer(&mut rng, oracle("Bf16"), c);
    let e = emulation(&stream, &layer);
    let x = hidden(&mut rng, 3, &c);
    let memory = Memory::new(&stream, &e, &c, &x, &[0; 6], &[1.0; 6]);
    let all = memory.tensors();
    // SAFETY: refused calls launch nothing.
    let refused = |t: Tensors<'_>, tokens, map| unsafe { e.forward(&stream, &t, tokens, map) };
    let argument = |r: Result<(), CudaError>| assert!(matches!(r, Err(CudaError::Argument(_))), "{r:?}");
    argument(refused(Tensors { hidden: all.hidden.slice(0, 2 * 96 - 1).unwrap(), ..all }, 3, None));
    argument(refused(Tensors { output: all.output.slice(0, 2 * 96 - 1).unwrap(), ..all }, 3, None));
    argument(refused(Tensors { topk_ids: all.topk_ids.slice(0, 5).unwrap(), ..all }, 3, None));
    argument(refused(Tensors { topk_weights: all.topk_weights.slice(0, 5).unwrap(), ..all }, 3, None));
    let short = memory.workspace_len - 1;
    argument(refused(Tensors { workspace: all.workspace.slice(0, short).unwrap(), ..all }, 3, None));
    argument(refused(all, 4, None));
    argument(refused(all, usize::MAX, None));
    argument(refused(all, 3, all.topk_ids.slice(0, 3)));
    let nothing = Tensors {
        hidden: DevicePtr::NULL,
        topk_ids: DevicePtr::NULL,
        topk_weights: DevicePtr::NULL,
        output: DevicePtr::NULL,
        workspace: DevicePtr::NULL,
    };
    assert_eq!((refused(nothing, 0, None), e.workspace_bytes(0)), (Ok(()), 0));
    assert!(memory.output(&stream).iter().all(|b| *b == 0xff));

    let new = |weights: &_, c: MoeConfig| Emulation::new(&stream, weights, None, &c).err();
    let too_large = MoeConfig { experts: 1 << 20, topk: 1 << 10, intermediate: 1 << 24, ..c };
    assert!(matches!(new(&layer.weights, too_large), Some(EmulationError::Cuda(CudaError::Argument(_)))));
    // The same bytes are half as many float32 elements.
    let wide = Emulation::new(&stream, &layer.weights, None, &MoeConfig { input: InputType::F32, ..c }).unwrap();
    // SAFETY: as above.
    argument(unsafe { wide.forward(&stream, &all, 3, None) });
    for c in [
        MoeConfig { hidden: 64, ..c },
        MoeConfig { local_experts: 3, ..c },
        MoeConfig { activation: Activation::GeluNoMul, ..c },
    ] {
        assert!(matches!(new(&layer.weights, c), Some(EmulationError::Convert(_))), "{c:?}");
    }
    let mut broken = layer.weights.clone();
    broken.experts[2].down.codes.truncate(100);
    let why = new(&broken, c).unwrap().to_string();
    assert!(why.contains("experts.2.w2"), "{why}");
    // Stored activation scales must be there where the key needs them.
    let mut scaleless = layer.weights.clone();
    scaleless.experts[1].down_input_scale = None;
    let keyed = |key| Emulation::new(&stream, &scaleless, Some(key), &c).err();
    assert!(matches!(keyed(FP8_STATIC_TENSOR_SYM), Some(EmulationError::Scales(_))));
    assert!(keyed(FP8_DYNAMIC_TOKEN_SYM).is_none());
    assert!(matches!(keyed(INT4_STATIC), Some(EmulationError::Cuda(CudaError::Argument(_)))));
    // A rank that holds some of the experts needs to know which.
    let mut part = layer.weights.clone();
    part.experts.truncate(2);
    let e = Emulation::new(&stream, &part, None, &MoeConfig { local_experts: 2, ..c }).unwrap();
    // SAFETY: as above.
    argument(unsafe { e.forward(&stream, &all, 3, None) });
    stream.synchronize().unwrap();
}

#[test]
fn a_backend_of_the_cpu_does_not_run_behind_a_gpus_back() {
    let Some(stream) = gpu::stream() else { return };
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/16_gpt_oss_mxfp4");
    let layer = Checkpoint::open(fixture.as_ref()).unwrap().layer(0).unwrap();
    let options = LayerOptions { platform: Platform::cpu(), inputs: SelectInputs::AUTO, exact_activations: false };
    let said = moe_oracle::layer::Layer::on(layer, &options, Device::Gpu(&stream.into())).err().unwrap();
    assert!(matches!(said, LayerError::Device), "{said}");
}

#[test]
fn the_batched_format_gives_what_the_standard_one_gives() {
    let Some(stream) = gpu::stream() else { return };
    let make = |layer: &Layer, map: Option<&[i32]>| gpu::kernel(&stream, layer, ExpertsKind::Emulation, map);
    let aliases = [&packed::BATCHED[..], &["Fp8Channel", "Int8Channel"]].concat();
    packed::the_batched_format_agrees(&stream, &make, &aliases, key, 19, [3, 0, 19, 1, 9]);
}
