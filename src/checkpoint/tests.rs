//! Against the shared checkpoints with known answers. They lie beside the repository, or where the environment variable
//! MOE_ORACLE_CHECKPOINTS says; without them these tests say so and check nothing.

use super::{Checkpoint, CheckpointError, MoeLayer, SharedExpert};
use crate::config::{InputType, RoutingMethod};
use crate::scheme::QuantKey;
use crate::weights::{ExpertWeights, Scales};
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::Value;
use std::path::{Path, PathBuf};

fn root() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/checkpoints");
    let named = std::env::var_os("MOE_ORACLE_CHECKPOINTS").map(PathBuf::from);
    let found = named.into_iter().chain([beside]).find(|p| p.join("cases.json").exists());
    if found.is_none() {
        println!("skipped: no checkpoints with known answers here");
    }
    found
}

/// Folders whose case expects this, with the case.
fn cases(expect: &str) -> Vec<(PathBuf, Value)> {
    let Some(root) = root() else { return Vec::new() };
    let mut cases: Vec<_> = std::fs::read_dir(root)
        .unwrap()
        .map(|d| d.unwrap().path())
        .filter(|p| p.join("case.json").exists())
        .map(|p| (p.clone(), serde_json::from_slice::<Value>(&std::fs::read(p.join("case.json")).unwrap()).unwrap()))
        .filter(|(_, c)| c["expect"] == expect)
        .collect();
    cases.sort_by(|a, b| a.0.cmp(&b.0));
    assert!(cases.len() > 20);
    cases
}

fn read(dir: &Path, layer: usize) -> Result<MoeLayer, CheckpointError> {
    Checkpoint::open(dir)?.layer(layer)
}

fn number(v: &Value) -> usize {
    v.as_u64().unwrap() as usize
}

#[test]
fn every_good_case_is_what_it_says() {
    for (dir, case) in cases("ok") {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let index = number(&case["layer"]);
        let checkpoint = Checkpoint::open(&dir).unwrap_or_else(|e| panic!("{name}: {e}"));
        // Case 10 has routers of other layers, which are not in the files.
        assert_eq!(checkpoint.layers(), [index], "{name}");
        let layer = checkpoint.layer(index).unwrap_or_else(|e| panic!("{name}: {e}"));
        let (c, w) = (&layer.config, &layer.weights);
        assert_eq!((layer.index, layer.family.as_str()), (index, case["family"].as_str().unwrap()), "{name}");
        assert_eq!(w.scheme.name(), case["scheme"], "{name}");
        let key = |k: &str| case[k].as_str().map(|k| QuantKey::by_name(k).unwrap());
        assert_eq!(w.weight_key, key("weight_key"), "{name}");
        assert_eq!(w.activation_key, key("activation_key"), "{name}");
        let sizes = ["E", "topk", "H", "I"].map(|k| number(&case[k]));
        assert_eq!([c.experts, c.topk, c.hidden, c.intermediate], sizes, "{name}");
        assert_eq!([w.experts.len(), w.hidden(), w.intermediate()], [sizes[0], sizes[2], sizes[3]], "{name}");
        assert_eq!((w.gated(), c.activation.gated()), (case["gated"] == true, case["gated"] == true), "{name}");
        assert_eq!(c.bias, case["has_bias"] == true, "{name}");
        assert_eq!(w.experts.iter().all(|e| e.down_bias.is_some()), c.bias, "{name}");
        assert_eq!(layer.shared.is_some(), case["has_shared_expert"] == true, "{name}");
        assert_eq!(c.activation.name().trim_end_matches("_no_mul"), case["activation"], "{name}");
        assert_eq!(c.weight_on_input, case["routing"]["weight_on_input"] == true, "{name}");
        let method = match case["routing"]["method"].as_str().unwrap() {
            "softmax_renorm" | "gemma4" => RoutingMethod::RenormalizeNaive,
            "softmax" => RoutingMethod::Default,
            "topk_then_softmax" => RoutingMethod::Renormalize,
            "grouped_sigmoid" => RoutingMethod::DeepSeekV3,
            "sigmoid_top1" => RoutingMethod::Llama4,
            other => panic!("{name}: {other}"),
        };
        assert_eq!(c.routing.method, method, "{name}");
        if let Some(scale) = case["routing"]["scale"].as_f64() {
            let groups = (number(&case["routing"]["n_group"]), number(&case["routing"]["topk_group"]));
            assert_eq!((c.routing.groups, c.routing.topk_groups), groups, "{name}");
            assert_eq!((c.routing.scaling, c.routing.normalize), (scale as f32, true), "{name}");
        }
        let half = ["04_mixtral_f16", "13_mixtral_gptq", "14_qwen3_moe_gptq_act_order", "15_qwen3_moe_awq"];
        assert_eq!(c.input == InputType::F16, half.contains(&name.as_str()), "{name}");
        let wants_input = ["kFp8StaticTensorSym", "kNvfp4Dynamic"].iter().any(|k| case["activation_key"] == **k);
        assert!(w.experts.iter().all(|e| e.input_scale.is_some() == wants_input), "{name}");
        assert!(w.experts.iter().all(|e| e.down_input_scale.is_some() == wants_input), "{name}");
        if let Scales::Group { g_idx, .. } = &w.experts[0].up.scales {
            assert_eq!(g_idx.is_some(), case["quant"]["desc_act"] == true, "{name}");
        }
    }
}

#[test]
fn canonical_layouts_stay_mapped() {
    let Some(root) = root() else { return };
    let checkpoint = Checkpoint::open(&root.join("05_qwen3_moe_fp8_block")).unwrap();
    let (a, b) = (checkpoint.layer(0).unwrap(), checkpoint.layer(0).unwrap());
    assert_eq!(a.weights.experts[3].up.codes.as_ptr(), b.weights.experts[3].up.codes.as_ptr());
}

#[test]
fn every_bad_case_is_refused_and_named() {
    for (dir, case) in cases("error") {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let error = match read(&dir, number(&case["layer"])) {
            Ok(_) => panic!("{name} was read"),
            Err(e) => e.to_string(),
        };
        println!("{name}: {error}");
        let about = case["about"].as_str().unwrap();
        let named = about.split(' ').find(|w| w.starts_with("model.layers.") || w.starts_with("num_experts_per_tok"));
        if let Some(named) = named {
            assert!(error.contains(named), "{name}: {error:?} does not name {named}");
        }
        assert!(!error.contains('\n'), "{name}");
    }
}

/// One expert on one token in float64.
fn expert(layer: &MoeLayer, e: &ExpertWeights, x: &[f64]) -> Vec<f64> {
    let product = |m: &crate::weights::WeightMatrix, bias: &Option<Vec<f32>>, x: &[f64]| -> Vec<f64> {
        let row = |r| x.iter().enumerate().map(|(c, x)| x * f64::from(m.value(r, c))).sum::<f64>();
        (0..m.rows).map(|r| row(r) + bias.as_ref().map_or(0.0, |b| f64::from(b[r]))).collect()
    };
    let up = product(&e.up, &e.up_bias, x);
    let gate = e.gate.as_ref().map_or_else(|| vec![0.0; up.len()], |g| product(g, &e.gate_bias, x));
    let act = layer.config.activation;
    let mid: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| f64::from(act.apply(*g as f32, *u as f32))).collect();
    product(&e.down, &e.down_bias, &mid)
}

fn shared(layer: &MoeLayer, s: &SharedExpert, x: &[f64]) -> Vec<f64> {
    let gate = s.gate.as_ref().map_or(1.0, |g| {
        let dot: f64 = g.iter().zip(x).map(|(g, x)| f64::from(*g) * x).sum();
        1.0 / (1.0 + (-dot).exp())
    });
    expert(layer, &s.weights.experts[0], x).iter().map(|y| y * gate).collect()
}

fn floats(file: &SafeTensors, name: &str) -> Option<Vec<f64>> {
    let t = file.tensor(name).ok()?;
    Some(match t.dtype() {
        safetensors::Dtype::BF16 => {
            t.data().chunks_exact(2).map(|b| f64::from(half::bf16::from_le_bytes([b[0], b[1]]).to_f32())).collect()
        }
        safetensors::Dtype::F32 => {
            t.data().chunks_exact(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect()
        }
        safetensors::Dtype::I32 => {
            t.data().chunks_exact(4).map(|b| f64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect()
        }
        other => panic!("{name} is {other:?}"),
    })
}

fn distance(ours: &[f64], theirs: &[f64]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let square = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>();
    (square(&mut ours.iter().zip(theirs).map(|(a, b)| a - b)) / square(&mut theirs.iter().copied())).sqrt()
}

/// What is read, computed plainly, gives the stored answer: nearly exactly, as nothing is rounded on the way.
#[test]
fn every_good_case_gives_its_answer() {
    for (dir, case) in cases("ok") {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let layer = read(&dir, number(&case["layer"])).unwrap();
        let bytes = ["input", "expected"].map(|f| std::fs::read(dir.join(format!("{f}.safetensors"))).unwrap());
        let [input, expected] = bytes.each_ref().map(|b| SafeTensors::deserialize(b).unwrap());
        let x = floats(&input, "hidden_states").unwrap();
        let ids = floats(&expected, "topk_ids").unwrap();
        let weights = floats(&expected, "topk_weights").unwrap();
        let (h, k) = (layer.config.hidden, layer.config.topk);
        // Eight tokens see most experts.
        let tokens = (x.len() / h).min(8);
        let (mut routed, mut total) = (Vec::new(), Vec::new());
        for t in 0..tokens {
            let x = &x[t * h..(t + 1) * h];
            let mut y = vec![0.0; h];
            for (id, w) in ids[t * k..(t + 1) * k].iter().zip(&weights[t * k..(t + 1) * k]) {
                let (inside, outside) = if layer.config.weight_on_input { (*w, 1.0) } else { (1.0, *w) };
                let x: Vec<f64> = x.iter().map(|x| x * inside).collect();
                let e = expert(&layer, &layer.weights.experts[*id as usize], &x);
                y.iter_mut().zip(e).for_each(|(y, e)| *y += outside * e);
            }
            let s = layer.shared.as_ref().map_or_else(|| vec![0.0; h], |s| shared(&layer, s, x));
            total.extend(y.iter().zip(s).map(|(y, s)| y + s));
            routed.extend(y);
        }
        let far = distance(&routed, &floats(&expected, "output").unwrap()[..tokens * h]);
        assert!(far < 1e-5, "{name}: {far}");
        if let Some(with_shared) = floats(&expected, "output_with_shared") {
            let far = distance(&total, &with_shared[..tokens * h]);
            assert!(far < 1e-5, "{name} with its shared expert: {far}");
        }
    }
}

/// A small case in a directory of its own.
fn copy(name: &str) -> Option<tempfile::TempDir> {
    let from = root()?.join(name);
    let dir = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        let name = file.file_name();
        if name.to_string_lossy().starts_with("model") || name.to_string_lossy().ends_with("config.json") {
            std::fs::copy(file.path(), dir.path().join(name)).unwrap();
        }
    }
    Some(dir)
}

/// Reads every layer there is; only a panic is a failure.
fn survive(dir: &Path) {
    if let Ok(checkpoint) = Checkpoint::open(dir) {
        for &layer in checkpoint.layers() {
            let _ = checkpoint.layer(layer);
        }
    }
}

/// Replaces bytes of a file by a new file (the old one may still be mapped).
fn damage(path: &Path, range: usize, hits: &[(usize, u8)], cut: Option<usize>) {
    let mut bytes = std::fs::read(path).unwrap();
    for &(at, value) in hits {
        let at = at % bytes.len().min(range);
        bytes[at] = value;
    }
    if let Some(cut) = cut {
        bytes.truncate(cut % bytes.len());
    }
    std::fs::remove_file(path).unwrap();
    std::fs::write(path, bytes).unwrap();
}

const SMALL: [&str; 8] = [
    "03_qwen2_moe_bf16_shared",
    "07b_qwen3_moe_ct_fp8_static",
    "11_qwen3_moe_ct_w4a16_asym_g32",
    "13_mixtral_gptq",
    "16_gpt_oss_mxfp4",
    "18b_mixtral_modelopt_nvfp4_own_globals",
    "22_nemotron_h_bf16_relu2",
    "25_qwen3_moe_fp8_block_cut",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_damaged_config_never_panics(
        case in 0..SMALL.len(),
        hits in prop::collection::vec((any::<usize>(), prop::sample::select(b"0123456789-\"{}[],.:xe".to_vec())), 1..4),
        cut in prop::option::weighted(0.1, any::<usize>()),
    ) {
        if let Some(dir) = copy(SMALL[case]) {
            damage(&dir.path().join("config.json"), usize::MAX, &hits, cut);
            survive(dir.path());
        }
    }

    #[test]
    fn a_damaged_index_never_panics(hits in prop::collection::vec((any::<usize>(), any::<u8>()), 1..4)) {
        if let Some(dir) = copy("02_qwen3_moe_bf16_sharded") {
            damage(&dir.path().join("model.safetensors.index.json"), usize::MAX, &hits, None);
            survive(dir.path());
        }
    }

    #[test]
    fn a_damaged_header_never_panics(
        case in 0..SMALL.len(),
        hits in prop::collection::vec((any::<usize>(), any::<u8>()), 0..3),
        digits in prop::collection::vec((any::<usize>(), b'0'..=b'9'), 0..3),
        cut in prop::option::weighted(0.3, any::<usize>()),
    ) {
        if let Some(dir) = copy(SMALL[case]) {
            let file = dir.path().join("model.safetensors");
            damage(&file, 4096, &hits, None);
            damage(&file, 4096, &digits, cut);
            survive(dir.path());
        }
    }

    /// Values of the right kind in the wrong place get further than broken JSON does.
    #[test]
    fn a_config_with_other_values_never_panics(
        case in 0..SMALL.len(),
        at in any::<usize>(),
        value in prop::sample::select(vec!["0", "-1", "1", "3", "7", "1e300", "4294967296", "18446744073709551615", "true",
            "null", "\"silu\"", "\"\"", "[]", "{}", "16777216"]),
    ) {
        if let Some(dir) = copy(SMALL[case]) {
            let path = dir.path().join("config.json");
            let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            fn leaves<'a>(v: &'a mut Value, out: &mut Vec<&'a mut Value>) {
                if v.as_object().is_none_or(serde_json::Map::is_empty) {
                    out.push(v);
                } else if let Value::Object(m) = v {
                    m.values_mut().for_each(|v| leaves(v, out));
                }
            }
            let mut all = Vec::new();
            leaves(&mut config, &mut all);
            let at = at % all.len();
            *all[at] = serde_json::from_str(value).unwrap();
            std::fs::write(&path, config.to_string()).unwrap();
            survive(dir.path());
        }
    }
}
