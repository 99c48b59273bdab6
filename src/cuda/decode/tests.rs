use super::super::pack::{Codes, Compute, Format, StageScales};
use super::super::{FATBINS, NOT_BUILT};
use super::plan::{Limits, Plan, STATIC_SHARED, Sizes, TOKENS, pays_up_to};
use super::{MAX_EXPERTS, MAX_ITEMS};

const H200: Limits = Limits { multiprocessors: 132, shared: 227 << 10, clusters: true };
const ADA: Limits = Limits { multiprocessors: 128, shared: 99 << 10, clusters: false };

fn sizes(codes: Codes, scales: StageScales, (hidden, intermediate, topk): (usize, usize, usize)) -> Sizes {
    Sizes {
        format: Format { codes, scales, compute: Compute::Bf16, scale_bf16: false },
        topk,
        first_blocks: hidden.div_ceil(64),
        first_slabs: intermediate.div_ceil(8),
        second_blocks: intermediate.div_ceil(64),
        second_slabs: hidden.div_ceil(16),
    }
}

const QWEN3: (usize, usize, usize) = (2048, 768, 8);
const MIXTRAL: (usize, usize, usize) = (4096, 14336, 2);
const DEEPSEEK_TP8: (usize, usize, usize) = (7168, 256, 8);
const INT4: (Codes, StageScales) = (Codes::U4, StageScales::Half(1, false));

#[test]
fn every_plan_fits_the_gpu_and_its_blocks_are_whole() {
    let formats = [(Codes::Half, StageScales::None), (Codes::E4m3, StageScales::F32(4)), INT4];
    let layers = [QWEN3, MIXTRAL, DEEPSEEK_TP8, (2880, 2880, 4), (5120, 8192, 1), (96, 32, 10), (16384, 8, 16)];
    for (codes, scales) in formats {
        for layer in layers {
            for gpu in [H200, ADA] {
                let s = sizes(codes, scales, layer);
                let plans = (1..=TOKENS).map(|n| Plan::new(s, gpu, n)).chain([Plan::batched(s, gpu)]);
                for plan in plans {
                    let plan = plan.unwrap_or_else(|| panic!("{layer:?} has no plan"));
                    for shape in [plan.first, plan.second] {
                        assert!(shape.shared <= gpu.shared && shape.depth >= 1, "{layer:?} {shape:?}");
                        assert!(
                            shape.warps >> shape.split << shape.split == shape.warps && (4..=16).contains(&shape.warps),
                            "{shape:?}"
                        );
                        assert!(1 << shape.split <= shape.warps, "{shape:?}");
                    }
                    // What the kernels count on: a result has a thread, the far kernel's registers are for 8 warps.
                    assert!(plan.second.split >= 2 && (plan.first.near || plan.first.warps <= 8), "{plan:?}");
                }
            }
        }
    }
}

#[test]
fn rows_that_do_not_fit_stay_in_global_memory() {
    let near = |layer, tokens| {
        let plan = Plan::new(sizes(Codes::Half, StageScales::None, layer), H200, tokens).unwrap();
        (plan.first.near, plan.second.near)
    };
    assert_eq!(near(QWEN3, 8), (true, true));
    assert_eq!(near(MIXTRAL, 1), (true, true));
    assert_eq!(near(MIXTRAL, 8), (true, false));
    assert_eq!(near((16384, 256, 8), 8), (false, true));
}

#[test]
fn few_units_get_many_warps() {
    let shape = |layer| Plan::new(sizes(INT4.0, INT4.1, layer), H200, 1).unwrap();
    // 768 units for 132 multiprocessors: all six at once; 256: two at once, with all warps that there is room for.
    assert_eq!((shape(QWEN3).first.groups(), shape(QWEN3).first.warps), (6, 12));
    assert_eq!((shape(DEEPSEEK_TP8).first.groups(), shape(DEEPSEEK_TP8).first_blocks), (2, 132));
    // As many slabs of the output as multiprocessors: a block to each.
    assert_eq!((shape(QWEN3).second.groups(), shape(DEEPSEEK_TP8).second.groups()), (1, 2));
    let eight_bits = Plan::new(sizes(Codes::E4m3, StageScales::None, DEEPSEEK_TP8), H200, 1).unwrap();
    assert_eq!(eight_bits.second.groups(), 4, "448 slabs in one go");
}

#[test]
fn a_few_tokens_units_are_all_at_work_at_once() {
    let first = |layer, tokens| Plan::new(sizes(INT4.0, INT4.1, layer), H200, tokens).unwrap().first;
    let shape = |layer, tokens| {
        let f = first(layer, tokens);
        (f.groups(), f.warps, f.depth)
    };
    // 1536 units for 132 multiprocessors, a warp to each; with five tokens half of them at once.
    assert_eq!((shape(QWEN3, 2), shape(QWEN3, 5)), ((12, 12, 2), (16, 16, 2)));
    assert_eq!((shape(DEEPSEEK_TP8, 2), shape(DEEPSEEK_TP8, 6)), ((8, 16, 2), (12, 12, 2)));
    assert_eq!((shape(QWEN3, 4), shape(MIXTRAL, 4).0), ((8, 16, 2), 8));
    // The second kernel's block has room beside the first's, with the 2816 bytes of static shared memory that they have.
    for (codes, scales) in [INT4, (Codes::E2m1, StageScales::E8m0), (Codes::E2m1, StageScales::E4m3)] {
        let plan = Plan::new(sizes(codes, scales, QWEN3), H200, 2).unwrap();
        assert_eq!((plan.first.warps, plan.first.depth, plan.second.depth), (12, 2, 2), "{scales:?}");
        assert!(plan.first.shared + plan.second.shared + 2 * (1024 + 2816) <= 228 << 10, "{plan:?}");
    }
}

#[test]
fn clusters_where_multiprocessors_would_be_idle_or_rows_have_no_room() {
    let sharing = |(codes, scales), layer, tokens| {
        let plan = Plan::new(sizes(codes, scales, layer), H200, tokens).unwrap();
        plan.second.sharing.map(|s| (s.each, s.parts, plan.second.depth))
    };
    let gpt_oss = (2880, 2880, 4);
    let (mxfp4, nvfp4) = ((Codes::E2m1, StageScales::E8m0), (Codes::E2m1, StageScales::E4m3));
    let (mxfp8, fp8) = ((Codes::E4m3, StageScales::E8m0), (Codes::E4m3, StageScales::F32(1)));
    // 180 slabs: three to two blocks, 120 of them.
    assert_eq!((sharing(mxfp4, gpt_oss, 1), sharing(nvfp4, gpt_oss, 1)), (Some((3, 1, 2)), Some((3, 1, 2))));
    assert_eq!((sharing(mxfp8, gpt_oss, 1), sharing(INT4, gpt_oss, 1)), (None, None));
    for format in [mxfp4, nvfp4, mxfp8] {
        for tokens in [2, 4, 8] {
            assert_eq!(sharing(format, gpt_oss, tokens), Some((3, 1, 2)));
        }
    }
    // Half of the rows fit, of up to four tokens; of eight not even that.
    assert_eq!((sharing(INT4, MIXTRAL, 2), sharing(INT4, MIXTRAL, 4)), (None, Some((4, 1, 2))));
    assert_eq!((sharing(nvfp4, MIXTRAL, 4), sharing(nvfp4, MIXTRAL, 8)), (Some((4, 1, 2)), None));
    assert_eq!(sharing(nvfp4, MIXTRAL, 5), Some((4, 1, 1)));
    for layer in [QWEN3, DEEPSEEK_TP8] {
        assert_eq!(sharing(INT4, layer, 4), None);
    }
    assert_eq!(sharing(fp8, MIXTRAL, 4), None);
    let ada = Plan::new(sizes(mxfp4.0, mxfp4.1, gpt_oss), ADA, 4).unwrap();
    assert_eq!(ada.second.sharing, None);
}

#[test]
fn few_units_are_spread_and_the_second_kernel_starts_behind_most_loads() {
    let plan = |(codes, scales), layer, tokens| Plan::new(sizes(codes, scales, layer), H200, tokens).unwrap();
    let fp8 = (Codes::E4m3, StageScales::None);
    // 768 units, a block for every multiprocessor: one to each of 792 groups, or three to each of 264.
    let (four, eight) = (plan(INT4, QWEN3, 1), plan(fp8, QWEN3, 1));
    assert_eq!((four.first.depth, plan(INT4, DEEPSEEK_TP8, 1).first.depth, eight.first.depth), (4, 3, 2));
    assert_eq!((four.first_blocks, four.first.groups(), four.spread, four.release), (132, 6, true, 0));
    assert_eq!((eight.first_blocks, eight.first.groups(), eight.spread, eight.release), (132, 2, true, 2));
    // 14336 units: neighbours in memory stay together.
    assert!(plan(fp8, MIXTRAL, 1).spread && !plan(fp8, MIXTRAL, 4).spread);
}

#[test]
fn no_multiprocessor_takes_more_blocks_than_planned() {
    for (codes, scales) in [(Codes::Half, StageScales::None), (Codes::E2m1, StageScales::E4m3), INT4] {
        for layer in [QWEN3, MIXTRAL, DEEPSEEK_TP8, (2880, 2880, 4)] {
            for tokens in 1..=TOKENS {
                let plan = Plan::new(sizes(codes, scales, layer), H200, tokens).unwrap();
                let blocks = plan.first_blocks / H200.multiprocessors;
                // An H200's multiprocessor has 228 KiB and spends 1 KiB on every block.
                assert!((blocks + 1) * (plan.first.shared + 1024) > 228 << 10, "{layer:?} {plan:?}");
                assert!(blocks * (plan.first.shared + 1024) <= 228 << 10, "{layer:?} {plan:?}");
            }
        }
    }
}

#[test]
fn a_plan_without_room_is_none() {
    let tiny = Limits { multiprocessors: 1, shared: 4 << 10, clusters: true };
    assert_eq!(Plan::new(sizes(INT4.0, INT4.1, QWEN3), tiny, 1), None);
}

#[test]
fn the_kernels_have_the_same_numbers() {
    let params = include_str!("../../../kernels/decode/params.cuh");
    for (name, value) in [("kColumns", TOKENS.to_string()), ("kMaxItems", MAX_ITEMS.to_string())] {
        assert!(params.contains(&format!("constexpr int {name} = {value};")), "{name}");
    }
    assert!(params.contains("constexpr int kMaxExperts = 1 << 24;") && MAX_EXPERTS == 1 << 24);
    let decode =
        concat!(include_str!("../../../kernels/decode/first.cuh"), include_str!("../../../kernels/decode/second.cuh"));
    for line in [
        "constexpr int kFirstStages = (kMode == Mode::kOne && Q::kWords < 4 ? 2 : 4) / Q::kWords;",
        "constexpr int kSecondStages = Q::kWords == 1 ? 2 : 1;",
        "using FirstRing = Ring<C, Q, S, kFirstStages<kMode>, 128>;",
    ] {
        assert!(decode.contains(line), "{line}");
    }
    // As plan.rs reckons the rows.
    let rows = include_str!("../../../kernels/decode/tokens.cuh");
    assert!(rows.contains("stride = blocks * 128 + 64;") && rows.contains("rows(at + 16)"));
}

#[test]
fn no_kernel_has_more_static_shared_memory_than_plans_leave() {
    if let Some(why) = NOT_BUILT {
        return println!("skipped: {why}");
    }
    for r in FATBINS.iter().filter(|f| f.name.starts_with("decode_")).flat_map(|f| f.resources) {
        assert!(r.shared_bytes as usize <= STATIC_SHARED, "{} on {}: {}", r.kernel, r.arch, r.shared_bytes);
    }
}

#[test]
fn more_tokens_where_they_share_few_experts() {
    for (codes, experts, topk, want) in [
        (Codes::U4, 8, 2, 8),
        (Codes::U4, 128, 8, 8),
        (Codes::U4, 256, 8, 16),
        (Codes::E2m1, 128, 4, 16),
        (Codes::E4m3, 256, 8, 12),
        (Codes::E4m3, 128, 8, 8),
        (Codes::Int8, 256, 8, 8),
        (Codes::Half, 512, 1, 8),
    ] {
        assert_eq!(pays_up_to(codes, experts, topk), want, "{codes:?} {experts} {topk}");
    }
}
