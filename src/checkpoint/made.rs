//! Tests of what the shared checkpoints do not hold, on tiny ones made here.

use super::{Checkpoint, CheckpointError, MoeLayer};
use crate::config::RoutingMethod;
use crate::scheme::{self, Scheme};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Tensors to be written.
#[derive(Default)]
struct Made(BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>);

const H: usize = 32;
const I: usize = 16;
const E: usize = 2;

impl Made {
    fn raw(&mut self, name: &str, dtype: Dtype, shape: &[usize], data: Vec<u8>) -> &mut Self {
        self.0.insert(name.into(), (dtype, shape.to_vec(), data));
        self
    }

    /// bf16 values that count up, so that each tells its place.
    fn counted(&mut self, name: &str, shape: &[usize]) -> &mut Self {
        let n = shape.iter().product::<usize>();
        let data = (0..n).flat_map(|i| half::bf16::from_f32((i % 251) as f32).to_le_bytes()).collect();
        self.raw(name, Dtype::BF16, shape, data)
    }

    fn words(&mut self, name: &str, shape: &[usize], word: u32) -> &mut Self {
        let n = shape.iter().product::<usize>();
        self.raw(name, Dtype::I32, shape, word.to_le_bytes().repeat(n))
    }

    fn ones(&mut self, name: &str, shape: &[usize]) -> &mut Self {
        let n = shape.iter().product::<usize>();
        self.raw(name, Dtype::F16, shape, half::f16::ONE.to_le_bytes().repeat(n))
    }

    fn write(&self, path: &Path) {
        let views = self.0.iter().map(|(k, (t, s, d))| (k.clone(), TensorView::new(*t, s.clone(), d).unwrap()));
        std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    fn read(&self, config: Value) -> Result<MoeLayer, CheckpointError> {
        let dir = tempfile::tempdir().unwrap();
        self.write(&dir.path().join("model.safetensors"));
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        Checkpoint::open(dir.path())?.layer(0)
    }
}

const P: &str = "model.layers.0.mlp.";

fn qwen() -> Value {
    json!({"model_type": "qwen3_moe", "hidden_act": "silu", "hidden_size": H, "moe_intermediate_size": I,
        "num_experts": E, "num_experts_per_tok": 1, "norm_topk_prob": true})
}

fn with(mut config: Value, key: &str, value: Value) -> Value {
    config[key] = value;
    config
}

/// A router and each expert's projections through `linear(tensors, module, rows, cols)`.
fn per_expert(linear: impl Fn(&mut Made, &str, usize, usize)) -> Made {
    let mut m = Made::default();
    m.counted(&format!("{P}gate.weight"), &[E, H]);
    for e in 0..E {
        for (p, rows, cols) in [("gate", I, H), ("up", I, H), ("down", H, I)] {
            linear(&mut m, &format!("{P}experts.{e}.{p}_proj"), rows, cols);
        }
    }
    m
}

fn plain() -> Made {
    per_expert(|m, name, rows, cols| {
        m.counted(&format!("{name}.weight"), &[rows, cols]);
    })
}

fn refused(made: &Made, config: Value, part: &str) {
    let error = made.read(config).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains(part), "{error:?} without {part:?}");
}

#[test]
fn an_absent_norm_topk_prob_is_false_for_qwen3_moe() {
    let mut config = qwen();
    config.as_object_mut().unwrap().remove("norm_topk_prob");
    assert_eq!(plain().read(config.clone()).unwrap().config.routing.method, RoutingMethod::Default);
    let next = with(config, "model_type", json!("qwen3_next"));
    assert_eq!(plain().read(next).unwrap().config.routing.method, RoutingMethod::RenormalizeNaive);
}

#[test]
fn fused_experts_are_cut_into_gate_and_up() {
    let mut m = Made::default();
    m.counted(&format!("{P}gate.weight"), &[E, H]);
    m.counted(&format!("{P}experts.gate_up_proj"), &[E, 2 * I, H]);
    m.counted(&format!("{P}experts.down_proj"), &[E, H, I]);
    let layer = m.read(qwen()).unwrap();
    let e = &layer.weights.experts[1];
    let at = |i: usize| (i % 251) as f32;
    assert_eq!(e.gate.as_ref().unwrap().value(3, 5), at(2 * I * H + 3 * H + 5));
    assert_eq!(e.up.value(3, 5), at(2 * I * H + (I + 3) * H + 5));
    assert_eq!(e.down.value(7, 2), at(H * I + 7 * I + 2));
}

#[test]
fn gpt_oss_in_bf16_is_transposed_and_interleaved() {
    let mut m = Made::default();
    m.counted(&format!("{P}router.weight"), &[E, H]).counted(&format!("{P}router.bias"), &[E]);
    m.counted(&format!("{P}experts.gate_up_proj"), &[E, H, 2 * I]);
    m.counted(&format!("{P}experts.gate_up_proj_bias"), &[E, 2 * I]);
    m.counted(&format!("{P}experts.down_proj"), &[E, I, H]).counted(&format!("{P}experts.down_proj_bias"), &[E, H]);
    let config = json!({"model_type": "gpt_oss", "hidden_size": H, "intermediate_size": I, "num_local_experts": E,
        "num_experts_per_tok": 1});
    let layer = m.read(config).unwrap();
    let e = &layer.weights.experts[0];
    assert_eq!(e.gate.as_ref().unwrap().value(1, 2), (2 * 2 * I + 2) as f32);
    assert_eq!(e.up.value(1, 2), (2 * 2 * I + 3) as f32);
    assert_eq!(e.down.value(1, 2), (2 * H + 1) as f32);
    assert_eq!((e.gate_bias.as_ref().unwrap()[2], e.up_bias.as_ref().unwrap()[2]), (4.0, 5.0));
    assert!(layer.config.bias && layer.config.activation == crate::config::Activation::SWIGLU_OAI);
}

fn gptq_made(bits: usize, zeros: u32) -> Made {
    let pack = 32 / bits;
    per_expert(move |m, name, rows, cols| {
        m.words(&format!("{name}.qweight"), &[cols / pack, rows], 0x7654_3210);
        m.words(&format!("{name}.qzeros"), &[1, rows / pack], zeros);
        m.ones(&format!("{name}.scales"), &[1, rows]);
    })
}

fn gptq_config(bits: usize, sym: bool, version: &str) -> Value {
    let quant = json!({"quant_method": "gptq", "bits": bits, "group_size": -1, "sym": sym, "desc_act": false,
        "checkpoint_format": version});
    with(qwen(), "quantization_config", quant)
}

#[test]
fn gptq_zero_points_wrap_in_version_one_only() {
    for (bits, stored, version, zero) in [
        (4, 0xffff_ffff, "gptq", 0.0),
        (4, 0xffff_ffff, "gptq_v2", 15.0),
        (4, 0x3333_3333, "gptq", 4.0),
        (8, 0xffff_ffff, "gptq", 0.0),
        (8, 0x8080_8080, "gptq_v2", 128.0),
    ] {
        let layer = gptq_made(bits, stored).read(gptq_config(bits, false, version)).unwrap();
        let first = if bits == 4 { [0.0, 1.0, 2.0] } else { [16.0, 50.0, 84.0] };
        let up = &layer.weights.experts[1].up;
        assert_eq!([0, 1, 2].map(|c| up.value(5, c)), first.map(|v| v - zero), "{bits} {stored:x} {version}");
        let key = if bits == 4 { scheme::INT4_STATIC_ASYM } else { scheme::INT8_STATIC_ASYM };
        assert_eq!(layer.weights.weight_key, Some(key));
    }
    let symmetric = gptq_made(8, 0x7f7f_7f7f).read(gptq_config(8, true, "gptq")).unwrap();
    assert_eq!(symmetric.weights.weight_key, Some(scheme::INT8_STATIC));
    refused(&gptq_made(4, 0), gptq_config(4, true, "gptq"), "experts.0.gate_proj.qzeros holds zero point 1");
    refused(&gptq_made(4, 0), gptq_config(4, true, "marlin"), "checkpoint_format \"marlin\"");
    refused(&gptq_made(4, 0), gptq_config(3, true, "gptq"), "bits 3");
}

#[test]
fn the_second_files_are_read_where_the_config_is_silent() {
    let dir = tempfile::tempdir().unwrap();
    gptq_made(4, 0x7777_7777).write(&dir.path().join("model.safetensors"));
    std::fs::write(dir.path().join("config.json"), qwen().to_string()).unwrap();
    let quant = json!({"bits": 4, "group_size": -1, "sym": true, "desc_act": false});
    std::fs::write(dir.path().join("quantize_config.json"), quant.to_string()).unwrap();
    assert_eq!(Checkpoint::open(dir.path()).unwrap().layer(0).unwrap().producer, "gptq");
    let quant = json!({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "MXFP8"}});
    std::fs::write(dir.path().join("hf_quant_config.json"), quant.to_string()).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap().layer(0).unwrap_err().to_string();
    assert!(error.contains("gate_proj.weight is not in the file"), "{error}");
}

fn fp8_made() -> Made {
    per_expert(|m, name, rows, cols| {
        m.raw(&format!("{name}.weight"), Dtype::F8_E4M3, &[rows, cols], vec![0x38; rows * cols]);
        m.raw(&format!("{name}.weight_scale"), Dtype::F32, &[], 2f32.to_le_bytes().to_vec());
        m.raw(&format!("{name}.input_scale"), Dtype::F32, &[1], 3f32.to_le_bytes().to_vec());
    })
}

fn fp8_config(ignored: &[&str]) -> Value {
    let quant = json!({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ignored});
    with(qwen(), "quantization_config", quant)
}

#[test]
fn an_ignored_shared_expert_keeps_its_own_scheme() {
    let mut m = fp8_made();
    for (p, rows, cols) in [("gate", 8, H), ("up", 8, H), ("down", H, 8)] {
        m.counted(&format!("{P}shared_expert.{p}_proj.weight"), &[rows, cols]);
    }
    m.counted(&format!("{P}shared_expert_gate.weight"), &[1, H]);
    let config = with(fp8_config(&["re:.*shared_expert\\..*"]), "model_type", json!("qwen2_moe"));
    let config = with(config, "shared_expert_intermediate_size", json!(8));
    let layer = m.read(config.clone()).unwrap();
    let shared = layer.shared.unwrap();
    assert_eq!((layer.weights.scheme, shared.weights.scheme), (Scheme::Fp8, Scheme::Unquantized));
    assert_eq!(shared.weights.intermediate(), 8);
    assert_eq!(layer.weights.experts[0].input_scale, Some(3.0));
    refused(&m, with(config.clone(), "quantization_config", fp8_config(&[])["quantization_config"].clone()), "is BF16");
    refused(&m, with(config, "shared_expert_intermediate_size", json!(0)), "no shared expert");
}

#[test]
fn config_and_tensors_must_agree_on_what_is_quantised() {
    refused(&fp8_made(), qwen(), "experts.0.gate_proj.weight is F8_E4M3");
    refused(&fp8_made(), fp8_config(&["model.layers.0.mlp.experts"]), "is F8_E4M3, expected BF16 or F16");
    refused(&fp8_made(), fp8_config(&["experts.1.up_proj"]), "experts.1.up_proj is quantised in another way");
    let mut m = plain();
    m.ones(&format!("{P}experts.0.up_proj.weight_scale"), &[]);
    refused(&m, qwen(), "experts.0.up_proj.weight_scale is there");
    let mut m = fp8_made();
    m.0.remove(&format!("{P}experts.1.down_proj.input_scale"));
    refused(&m, fp8_config(&[]), "experts.1.down_proj.input_scale is not in the file");
    m.raw(&format!("{P}experts.1.down_proj.input_scale"), Dtype::F32, &[1], vec![0; 4]);
    refused(&m, fp8_config(&[]), "experts.1.down_proj.input_scale is 0");
    let mut m = fp8_made();
    m.0.get_mut(&format!("{P}experts.1.up_proj.weight")).unwrap().2[40] = 0x7f;
    refused(&m, fp8_config(&[]), "experts.1.up_proj holds a NaN");
}

#[test]
fn wrong_counts_and_names_are_refused() {
    refused(&plain(), with(qwen(), "num_experts", json!(E - 1)), "experts.1.down_proj.weight is beyond");
    refused(&plain(), with(qwen(), "num_experts", json!(E + 1)), "experts.2.gate_proj.weight is not in the file");
    refused(&plain(), with(qwen(), "num_local_experts", json!(7)), "num_experts is 2, but num_local_experts is 7");
    refused(&plain(), with(qwen(), "model_type", json!("gpt2")), "model_type \"gpt2\"");
    refused(&plain(), with(qwen(), "hidden_act", json!("mish")), "hidden_act \"mish\"");
    refused(&plain(), with(qwen(), "hidden_size", json!(1u64 << 60)), "hidden_size");
    let mut m = plain();
    m.0.retain(|k, _| !k.contains("experts"));
    assert!(matches!(m.read(qwen()), Err(CheckpointError::NoSuchLayer(0))));
}

#[test]
fn deepseek_v2_is_read_where_its_routing_can_be_said() {
    let config = json!({"model_type": "deepseek_v2", "hidden_act": "silu", "hidden_size": H, "moe_intermediate_size": I,
        "n_routed_experts": E, "num_experts_per_tok": 1, "norm_topk_prob": false, "routed_scaling_factor": 16.0,
        "scoring_func": "softmax", "topk_method": "greedy", "n_group": 1, "topk_group": 1});
    let routing = plain().read(config.clone()).unwrap().config.routing;
    assert_eq!((routing.method, routing.scaling), (RoutingMethod::Default, 16.0));
    let grouped = with(with(config.clone(), "topk_method", json!("group_limited_greedy")), "n_group", json!(2));
    refused(&plain(), grouped, "scoring_func \"softmax\"");
    refused(&plain(), with(config.clone(), "scoring_func", json!("tanh")), "scoring_func \"tanh\"");
    refused(&plain(), with(config.clone(), "model_type", json!("deepseek_v3")), "scoring_func \"softmax\"");
    let mut corrected = plain();
    corrected.counted(&format!("{P}gate.e_score_correction_bias"), &[E]);
    refused(&corrected, config, "gate.e_score_correction_bias is not part");
}

#[test]
fn an_index_does_not_lead_out_of_its_directory() {
    let outer = tempfile::tempdir().unwrap();
    plain().write(&outer.path().join("x.safetensors"));
    let dir = outer.path().join("inner");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("config.json"), qwen().to_string()).unwrap();
    let absolute = outer.path().join("x.safetensors");
    for file in ["../x.safetensors", "..", ".", "", "./../x.safetensors", absolute.to_str().unwrap()] {
        let map: BTreeMap<_, _> = plain().0.into_keys().map(|k| (k, file)).collect();
        let index = json!({"weight_map": map}).to_string();
        std::fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
        let error = Checkpoint::open(&dir).unwrap_err().to_string();
        assert!(error.contains("is not a plain file name"), "{error}");
    }
}

fn packed_config(bits: usize, strategy: Value, symmetric: bool) -> Value {
    let mut weights = json!({"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": false});
    weights.as_object_mut().unwrap().extend(strategy.as_object().unwrap().clone());
    let group = json!({"targets": ["Linear"], "weights": weights, "input_activations": null});
    let quant = json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["re:.*gate$"],
        "config_groups": {"group_0": group}});
    with(qwen(), "quantization_config", quant)
}

fn packed_made(bits: usize, group: usize, zeros: Option<u32>) -> Made {
    let pack = 32 / bits;
    per_expert(move |m, name, rows, cols| {
        let groups = cols.div_ceil(group);
        m.words(&format!("{name}.weight_packed"), &[rows, cols / pack], 0x7654_3210);
        m.ones(&format!("{name}.weight_scale"), &[rows, groups]);
        let shape = [rows as i64, cols as i64].iter().flat_map(|v| v.to_le_bytes()).collect();
        m.raw(&format!("{name}.weight_shape"), Dtype::I64, &[2], shape);
        if let Some(word) = zeros {
            m.words(&format!("{name}.weight_zero_point"), &[rows / pack, groups], word);
        }
    })
}

#[test]
fn compressed_integers_per_channel_and_with_zero_points() {
    let channel = json!({"strategy": "channel", "group_size": null});
    let groups = json!({"strategy": "group", "group_size": 8});
    let layer = packed_made(8, H, None).read(packed_config(8, channel.clone(), true)).unwrap();
    assert_eq!(layer.weights.weight_key, Some(scheme::INT8_STATIC));
    assert_eq!([0, 1].map(|c| layer.weights.experts[0].down.value(3, c)), [16.0 - 128.0, 50.0 - 128.0]);
    // The zero point of row r lies in nibble or byte r of the word.
    let layer = packed_made(4, 8, Some(0xfedc_ba98)).read(packed_config(4, groups.clone(), false)).unwrap();
    assert_eq!(layer.weights.weight_key, Some(scheme::INT4_STATIC_ASYM));
    assert_eq!(layer.weights.experts[1].up.value(10, 9), 1.0 - 10.0);
    let layer = packed_made(8, H, Some(0x0403_0201)).read(packed_config(8, channel.clone(), false)).unwrap();
    assert_eq!(layer.weights.experts[1].up.value(6, 1), 50.0 - 3.0);

    refused(&packed_made(8, H, None), packed_config(8, channel.clone(), false), "weight_zero_point is not in the file");
    refused(&packed_made(8, H, Some(0)), packed_config(8, channel.clone(), true), "says symmetric");
    let mut m = packed_made(8, H, None);
    let shape = [I as i64, H as i64 + 1].iter().flat_map(|v| v.to_le_bytes()).collect();
    m.raw(&format!("{P}experts.1.up_proj.weight_shape"), Dtype::I64, &[2], shape);
    refused(&m, packed_config(8, channel, true), "experts.1.up_proj.weight_shape is [16, 33], expected [16, 32]");
    let mut spun = packed_config(4, groups, true);
    spun["quantization_config"]["transform_config"] = json!({"config_groups": {}});
    refused(&packed_made(4, 8, None), spun, "transform_config");
}

#[test]
fn a_bare_infinity_in_the_config_is_no_obstacle() {
    let dir = tempfile::tempdir().unwrap();
    plain().write(&dir.path().join("model.safetensors"));
    let text = with(qwen(), "time_step_limit", json!(["x"])).to_string().replace("\"x\"", "0.0, Infinity");
    assert!(serde_json::from_str::<Value>(&text).is_err());
    std::fs::write(dir.path().join("config.json"), text).unwrap();
    Checkpoint::open(dir.path()).unwrap().layer(0).unwrap();
}
