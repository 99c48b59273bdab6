//! Selection: in const context, by name, and every reason to refuse.

use moe_oracle::config::*;
use moe_oracle::kernel::{Batched, MoeKernel, Standard};
use moe_oracle::oracle::*;
use moe_oracle::platform::{CpuIsa, Platform};
use moe_oracle::scheme::*;
use static_assertions::{assert_eq_size, assert_impl_all};

const LAYER: MoeConfig = MoeConfig::new(256, 8, 7168, 2048);
const CPU: Platform = Platform::Cpu(CpuIsa::Avx512);

const SELECTED: Selection<Fp8Backend> = match Fp8Block::select(&LAYER, &CPU, &SelectInputs::AUTO) {
    Ok(s) => s,
    Err(_) => panic!("no backend"),
};
const REFUSED: SelectError = match Fp8Block::select(&LAYER, &Platform::Rocm, &SelectInputs::AUTO) {
    Ok(_) => panic!("a backend on other hardware"),
    Err(e) => e,
};

assert_eq_size!((), Bf16, Fp8Block, Nvfp4W4A4, Mxfp4W4A16, Mxfp8W8A8, Int8Channel, Int4);
assert_eq_size!((), Fp8CpuSimd<0, 0>, Fp8CpuReference<0, 0>, Standard, Batched);
assert_impl_all!(Bf16: MoeKernelOracle, Send, Sync, Copy);
assert_impl_all!(Int4: MoeKernelOracle, Send, Sync, Copy);
assert_impl_all!(Fp8CpuReference<0, 0>: Send, Sync, Copy);
assert_impl_all!(MoeKernel<Standard, Box<dyn moe_oracle::cpu::Experts>>: Send, Sync);
assert_impl_all!(SelectError: Send, Sync, Copy, std::error::Error);

fn refusal(config: &MoeConfig, platform: Platform) -> SelectError {
    Fp8Block::select_backend(config, &platform, &SelectInputs::AUTO).unwrap_err()
}

#[test]
fn selection_in_const_context_is_selection_at_run_time() {
    let now = Fp8Block::select_backend(&LAYER, &CPU, &SelectInputs::AUTO).unwrap();
    assert_eq!(SELECTED.backend, now.backend);
    // Not the address: a const in two crates may be two copies.
    assert_eq!(format!("{:?}", SELECTED.kernel), format!("{:?}", now.kernel));
    assert_eq!(SELECTED.backend.name(), SELECTED.kernel.name);
    assert_eq!(REFUSED, refusal(&LAYER, Platform::Rocm));
}

#[test]
fn the_first_supported_backend_of_the_priority_list_wins_for_every_oracle() {
    for oracle in ORACLES {
        let selected = oracle.select(&LAYER, &CPU, &SelectInputs::AUTO).unwrap();
        let candidates = oracle.explain(&LAYER, &CPU);
        let first = candidates.iter().find(|c| c.verdict.is_ok()).unwrap();
        assert_eq!(first.backend, selected.name, "{}", oracle.alias);
        let found = find(oracle.scheme, QuantKey::from_bits(oracle.weight), QuantKey::from_bits(oracle.activation));
        assert_eq!(found.unwrap().alias, oracle.alias);
    }
    assert!(find(Scheme::Nvfp4, Some(FP8_STATIC_128_BLOCK_SYM), None).is_none());
}

#[test]
fn what_rounds_activations_unasked_is_never_chosen_but_by_its_name() {
    let mut rows = 0;
    for (scheme, info) in SUPPORT.iter().filter(|(_, info)| info.by_name_only) {
        rows += 1;
        let named = MoeBackend::by_name(info.name).unwrap();
        for oracle in ORACLES.iter().filter(|o| o.scheme == *scheme && info.pairs.contains(&(o.weight, o.activation))) {
            let asked = oracle.select(&LAYER, &CPU, &SelectInputs::named(named)).unwrap();
            assert_eq!((asked.name, asked.numerics), (info.name, info.numerics));
            for name in MoeBackend::ALL.iter().filter(|n| **n != named) {
                for platform in [CPU, Platform::Cpu(CpuIsa::Portable), Platform::Cuda(90), Platform::Rocm] {
                    let chosen = oracle.select(&LAYER, &platform, &SelectInputs::named(*name));
                    assert!(chosen.is_err() || chosen.unwrap().name != info.name, "{} for {}", info.name, name.name());
                }
            }
        }
    }
    assert!(rows >= 5);
    assert!(SUPPORT.iter().all(|(_, info)| info.by_name_only || info.numerics != Numerics::Int8Block));
    // Where nothing serves but such a backend, there is none.
    let refused = Int4::select_backend(&LAYER, &Platform::Rocm, &SelectInputs::AUTO).unwrap_err();
    assert!(refused.rejections().all(|r| r.backend != "cpu_simd_a8"));
}

#[test]
fn a_name_gets_its_backend_or_nothing() {
    for (name, backend) in [
        ("cpu_simd", Fp8Backend::CpuSimd),
        ("cpu", Fp8Backend::CpuSimd),
        ("cpu_reference", Fp8Backend::CpuReference),
        ("emulation", Fp8Backend::CpuReference),
    ] {
        let name = MoeBackend::by_name(name).unwrap();
        let selected = Fp8Block::select_backend(&LAYER, &CPU, &SelectInputs::named(name)).unwrap();
        assert_eq!(selected.backend, backend);
        // A name is never given up for another backend: elsewhere it alone is refused.
        let error = Fp8Block::select_backend(&LAYER, &Platform::Rocm, &SelectInputs::named(name)).unwrap_err();
        assert_eq!(error.rejections().map(|r| r.backend).collect::<Vec<_>>(), [backend.name()]);
    }
    let emulation = SelectInputs::named(MoeBackend::by_name("emulation").unwrap());
    let on_gpu = Fp8Block::select_backend(&LAYER, &Platform::Cuda(90), &emulation).unwrap();
    assert_eq!(on_gpu.backend, Fp8Backend::CudaEmulation, "the same part on the other device");
    assert_eq!(Bf16::map_backend(MoeBackend::by_name("marlin").unwrap()), Ok(None), "a name that means auto here");
    assert_eq!(Fp8Block::map_backend(MoeBackend::Auto), Ok(None));
    assert_eq!(MoeBackend::by_name("fast"), None);
    for name in MoeBackend::ALL {
        assert_eq!(MoeBackend::by_name(name.name()), Some(*name));
    }
}

#[test]
fn names_that_mean_nothing_here_say_why() {
    let message = |error: SelectError| error.to_string();
    let aiter = MoeBackend::by_name("aiter").unwrap();
    let error = message(Fp8Block::map_backend(aiter).unwrap_err());
    assert!(error.contains("`aiter` stands for another vendor's hardware"), "{error}");
    let rdna = MoeBackend::by_name("rdna3").unwrap();
    let error = message(Fp8Block::map_backend(rdna).unwrap_err());
    assert!(error.contains("`rdna3` is no backend of this scheme") && error.contains("cpu_simd"), "{error}");
    let error = message(Int4::map_backend(rdna).unwrap_err());
    assert!(error.contains("`rdna3` stands for another vendor's hardware"), "{error}");
}

#[test]
fn every_reason_to_refuse() {
    // The verdicts on the rows of one device; the others say that they are not for this platform.
    let on = |device: &str, config: MoeConfig, platform: Platform, want: Unsupported| {
        let error = refusal(&config, platform);
        // Hopper's own row has other capabilities.
        let rows = error.rejections().filter(|r| r.backend.starts_with(device) && r.backend != "cuda_wgmma");
        let mine: Vec<_> = rows.map(|r| r.why).collect();
        assert!(!mine.is_empty() && mine.iter().all(|r| *r == want), "{want}: {mine:?}");
    };
    for platform in [Platform::Rocm, Platform::Xpu] {
        on("cpu_", LAYER, platform, Unsupported::Device { needs: "the CPU", platform });
        on("cuda_", LAYER, platform, Unsupported::Device { needs: "NVIDIA GPUs", platform });
    }
    let sm_90 = Platform::Cuda(90);
    let odd = MoeConfig { hidden: 100, ..LAYER };
    on("cuda_", odd, sm_90, Unsupported::Shape("it needs a hidden size that is a multiple of 8"));
    let old = Platform::Cuda(75);
    on("cuda_", LAYER, old, Unsupported::Capability { min: 80, platform: old });
    let all = |config: MoeConfig, platform: Platform, want: Unsupported| on("cpu_", config, platform, want);
    all(MoeConfig { lora: true, ..LAYER }, CPU, Unsupported::Lora);
    let mori = Parallel { all2all: All2All::Mori, ..Parallel::SINGLE };
    all(MoeConfig { parallel: mori, ..LAYER }, CPU, Unsupported::Transport);
    let group = Routing { groups: 3, ..LAYER.routing };
    for broken in [
        MoeConfig { hidden: 0, ..LAYER },
        MoeConfig { topk: 257, ..LAYER },
        MoeConfig { topk: 0, ..LAYER },
        MoeConfig { local_experts: 257, ..LAYER },
        MoeConfig { hidden: 1 << 25, ..LAYER },
        MoeConfig { routing: group, ..LAYER },
        MoeConfig { routing: Routing { groups: 64, ..LAYER.routing }, ..LAYER },
        MoeConfig { routing: Routing { scaling: f32::NAN, ..LAYER.routing }, ..LAYER },
        MoeConfig { activation: Activation::Silu { limit: Some(-1.0) }, ..LAYER },
    ] {
        all(broken, CPU, Unsupported::Shape(broken.problem().unwrap()));
    }
}

/// A row of its own, for the reasons that no row of the table happens to give.
#[test]
fn reasons_that_depend_on_the_row() {
    const PAIR: (u64, u64) = (1, 2);
    let kernel = |device, activations, formats| KernelInfo {
        name: "a_row",
        device,
        numerics: Numerics::AsKeyed,
        experts: ExpertsKind::Reference,
        by_name_only: false,
        pairs: &[PAIR],
        activations,
        formats,
        inputs: 1,
    };
    let ask = |k: &KernelInfo, config: &MoeConfig, platform: Platform, pair: (u64, u64)| {
        supports(k, config, &platform, &SelectInputs::AUTO, pair.0, pair.1)
    };
    let cuda = kernel(Device::Cuda { min: 90, max: u16::MAX }, 1, 1);
    let old = Platform::Cuda(80);
    assert_eq!(ask(&cuda, &LAYER, Platform::Cuda(90), PAIR), Ok(()));
    assert_eq!(ask(&cuda, &LAYER, old, PAIR), Err(Unsupported::Capability { min: 90, platform: old }));
    assert_eq!(ask(&cuda, &LAYER, CPU, PAIR), Err(Unsupported::Device { needs: "NVIDIA GPUs", platform: CPU }));
    let hopper = kernel(Device::Cuda { min: 90, max: 90 }, 1, 1);
    let newer = Platform::Cuda(100);
    assert_eq!(ask(&hopper, &LAYER, Platform::Cuda(90), PAIR), Ok(()));
    assert_eq!(ask(&hopper, &LAYER, old, PAIR), Err(Unsupported::Capability { min: 90, platform: old }));
    assert_eq!(ask(&hopper, &LAYER, newer, PAIR), Err(Unsupported::NewerCapability { max: 90, platform: newer }));
    let cpu = kernel(Device::Cpu, 1, 1);
    assert_eq!(ask(&cpu, &LAYER, CPU, PAIR), Ok(()));
    assert_eq!(ask(&cpu, &LAYER, CPU, (2, 1)), Err(Unsupported::QuantScheme));
    let gelu = MoeConfig { activation: Activation::Gelu, ..LAYER };
    assert_eq!(ask(&cpu, &gelu, CPU, PAIR), Err(Unsupported::Activation("gelu")));
    let batched = MoeConfig { format: ActivationFormat::Batched, ..LAYER };
    assert_eq!(ask(&cpu, &batched, CPU, PAIR), Err(Unsupported::Format("batched")));
    let wide = MoeConfig { input: InputType::F32, ..LAYER };
    assert_eq!(ask(&cpu, &wide, CPU, PAIR), Err(Unsupported::Input("float32")));
}

#[test]
fn where_there_is_no_gpu_row_the_cpu_rows_say_so() {
    let sm_90 = Platform::by_name("sm_90a").unwrap();
    assert_eq!(sm_90, Platform::Cuda(90));
    for oracle in ORACLES {
        let gpu = SUPPORT.iter().any(|(s, k)| *s == oracle.scheme && matches!(k.device, Device::Cuda { .. }));
        for platform in [sm_90, Platform::Rocm, Platform::Xpu] {
            if gpu && platform == sm_90 {
                continue;
            }
            let error = oracle.select(&LAYER, &platform, &SelectInputs::AUTO).unwrap_err();
            let rows = SUPPORT.iter().filter(|(s, k)| *s == oracle.scheme && !k.by_name_only).count();
            assert_eq!(error.rejections().count(), rows, "{}: a reason for every candidate", oracle.alias);
            let text = error.to_string();
            assert!(text.contains("cpu_simd: it runs on the CPU, not on"), "{text}");
        }
    }
}

#[test]
fn a_build_without_kernels_refuses_them_where_asked_to() {
    let sm_90 = Platform::Cuda(90);
    let table = Fp8Block::select_backend(&LAYER, &sm_90, &SelectInputs::AUTO).unwrap();
    assert_eq!(table.kernel.built(), NO_CUDA.is_none());
    let built = Fp8Block::select_backend(&LAYER, &sm_90, &SelectInputs::AUTO.built_only());
    match NO_CUDA {
        None => assert_eq!(built.unwrap().backend, table.backend),
        Some(why) => assert!(built.unwrap_err().to_string().contains(why)),
    }
    let cpu = Fp8Block::select_backend(&LAYER, &CPU, &SelectInputs::AUTO.built_only()).unwrap();
    assert!(cpu.kernel.built());
}

#[test]
fn unquantized_layers_have_no_quant_config_and_the_error_says_so() {
    let weights = moe_oracle::weights::MoeWeights {
        scheme: Scheme::Unquantized,
        weight_key: None,
        activation_key: None,
        experts: Vec::new(),
    };
    assert_eq!(Bf16::make_quant_config(&LAYER, &weights), Err(QuantConfigError::Unquantized));
}
