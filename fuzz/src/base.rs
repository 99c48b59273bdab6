//! Checkpoints that can be read: one of every format and family, small, so that the fuzzer is quick.

use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

/// H, I and E of every base.
const H: u64 = 64;
const I: u64 = 32;
const E: u64 = 2;
/// Elements of a group, where the format leaves the choice.
const GROUP: u64 = 32;

/// Every base with the directory where this process has it.
pub static BASES: LazyLock<Vec<(Base, PathBuf)>> = LazyLock::new(|| placed(all()));

/// A tensor as a file has it. Its type is a text, so that it may be one that does not exist.
#[derive(Clone)]
pub struct Tensor {
    /// Full name.
    pub name: String,
    /// As in the header.
    pub dtype: String,
    /// As in the header.
    pub shape: Vec<u64>,
    /// Little endian.
    pub data: Vec<u8>,
}

/// A checkpoint.
pub struct Base {
    /// JSON files by name.
    pub configs: Vec<(&'static str, Value)>,
    /// What is in `model.safetensors`.
    pub tensors: Vec<Tensor>,
    /// The names lie in an index, over a file that is not called `model.safetensors`.
    pub sharded: bool,
}

/// Bits of an element.
pub fn bits(dtype: &str) -> u64 {
    match dtype {
        "F64" | "I64" => 64,
        "F32" | "I32" => 32,
        "BF16" | "F16" | "I16" => 16,
        "F4" => 4,
        "F6_E2M3" => 6,
        _ => 8,
    }
}

/// A linear layer of a format: adds the tensors of the module of that name, rows and columns.
type Linear = fn(&mut Base, &str, u64, u64);

impl Base {
    fn new(config: Value, quant: Value) -> Self {
        let mut config = config;
        if !quant.is_null() {
            config["quantization_config"] = quant;
        }
        Self { configs: vec![("config.json", config)], tensors: Vec::new(), sharded: false }
    }

    /// Repeats the bytes over a tensor.
    fn add(&mut self, name: impl Into<String>, dtype: &str, shape: &[u64], pattern: &[u8]) -> &mut Self {
        let size = shape.iter().product::<u64>() * bits(dtype) / 8;
        let data = pattern.iter().copied().cycle().take(size as usize).collect();
        self.tensors.push(Tensor { name: name.into(), dtype: dtype.into(), shape: shape.into(), data });
        self
    }

    fn half(&mut self, name: impl Into<String>, shape: &[u64]) -> &mut Self {
        self.add(name, "BF16", shape, &[0x00, 0x3c, 0x80, 0xbc, 0x40, 0x3c])
    }

    fn float(&mut self, name: impl Into<String>, shape: &[u64]) -> &mut Self {
        self.add(name, "F32", shape, &0.01f32.to_le_bytes())
    }

    /// Experts, router and nothing else, with the names of gate, up and down.
    fn layer(mut self, base: &str, router: &str, names: [&str; 3], linear: Linear) -> Self {
        self.half(format!("{base}{router}.weight"), &[E, H]);
        for e in 0..E {
            self.expert(&format!("{base}experts.{e}."), names, linear);
        }
        self
    }

    fn expert(&mut self, prefix: &str, names: [&str; 3], linear: Linear) {
        for (name, rows, cols) in [(names[0], I, H), (names[1], I, H), (names[2], H, I)] {
            if !name.is_empty() {
                linear(self, &format!("{prefix}{name}"), rows, cols);
            }
        }
    }

    fn write(&self, dir: &Path) {
        for (name, value) in &self.configs {
            std::fs::write(dir.join(name), value.to_string()).expect("room for a config");
        }
        std::fs::write(dir.join(self.file()), self.bytes()).expect("room for tensors");
    }

    /// The name of its safetensors file.
    pub fn file(&self) -> &'static str {
        if self.sharded { "model-00001-of-00001.safetensors" } else { "model.safetensors" }
    }

    fn bytes(&self) -> Vec<u8> {
        crate::tensors::File(self.tensors.clone()).bytes(&crate::tensors::Damage::None)
    }

    /// A shard with an index in place of the single file.
    fn shard(mut self) -> Self {
        self.sharded = true;
        let map: serde_json::Map<_, _> = self.tensors.iter().map(|t| (t.name.clone(), json!(self.file()))).collect();
        self.configs.push(("model.safetensors.index.json", json!({"metadata": {}, "weight_map": map})));
        self
    }

    /// The quantisation in a file of its own.
    fn apart(mut self, name: &'static str, quant: Value) -> Self {
        self.configs.push((name, quant));
        self
    }
}

fn plain(b: &mut Base, m: &str, rows: u64, cols: u64) {
    b.half(format!("{m}.weight"), &[rows, cols]);
}

fn with_bias(b: &mut Base, m: &str, rows: u64, cols: u64) {
    plain(b, m, rows, cols);
    b.half(format!("{m}.bias"), &[rows]);
}

fn codes(b: &mut Base, m: &str, dtype: &str, rows: u64, cols: u64) {
    b.add(format!("{m}.weight"), dtype, &[rows, cols], &[0x38, 0xb0, 0x01, 0x40, 0xc1]);
}

fn fp8_tensor(b: &mut Base, m: &str, rows: u64, cols: u64) {
    codes(b, m, "F8_E4M3", rows, cols);
    b.float(format!("{m}.weight_scale"), &[]).float(format!("{m}.input_scale"), &[1]);
}

fn fp8_block(b: &mut Base, m: &str, rows: u64, cols: u64) {
    codes(b, m, "F8_E4M3", rows, cols);
    b.float(format!("{m}.weight_scale_inv"), &[rows.div_ceil(128), cols.div_ceil(128)]);
}

fn fp8_channel(b: &mut Base, m: &str, rows: u64, cols: u64) {
    codes(b, m, "F8_E4M3", rows, cols);
    b.half(format!("{m}.weight_scale"), &[rows, 1]);
}

fn int8(b: &mut Base, m: &str, rows: u64, cols: u64) {
    codes(b, m, "I8", rows, cols);
    b.float(format!("{m}.weight_scale"), &[rows, 1]);
}

fn packed(b: &mut Base, m: &str, rows: u64, cols: u64) {
    b.add(format!("{m}.weight_packed"), "I32", &[rows, cols / 8], &[0x98, 0x10, 0x7f, 0xe3]);
    b.half(format!("{m}.weight_scale"), &[rows, cols / GROUP]);
    b.add(format!("{m}.weight_zero_point"), "I32", &[rows / 8, cols / GROUP], &[0x98, 0x10, 0x7f]);
    let shape = [rows, cols].iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
    b.add(format!("{m}.weight_shape"), "I64", &[2], &shape);
}

fn nvfp4(b: &mut Base, m: &str, rows: u64, cols: u64) {
    b.add(format!("{m}.weight_packed"), "U8", &[rows, cols / 2], &[0x98, 0x10, 0x7f]);
    b.add(format!("{m}.weight_scale"), "F8_E4M3", &[rows, cols / 16], &[0x38, 0x30]);
    b.float(format!("{m}.weight_global_scale"), &[1]).float(format!("{m}.input_global_scale"), &[1]);
}

fn modelopt_nvfp4(b: &mut Base, m: &str, rows: u64, cols: u64) {
    b.add(format!("{m}.weight"), "U8", &[rows, cols / 2], &[0x98, 0x10, 0x7f]);
    b.add(format!("{m}.weight_scale"), "F8_E4M3", &[rows, cols / 16], &[0x38, 0x30]);
    b.float(format!("{m}.weight_scale_2"), &[]).float(format!("{m}.input_scale"), &[]);
}

fn mxfp4(b: &mut Base, m: &str, rows: u64, cols: u64) {
    b.add(format!("{m}.weight_packed"), "U8", &[rows, cols / 2], &[0x98, 0x10, 0x7f]);
    b.add(format!("{m}.weight_scale"), "U8", &[rows, cols / 32], &[120, 121, 119]);
}

fn mxfp8(b: &mut Base, m: &str, rows: u64, cols: u64) {
    codes(b, m, "F8_E4M3", rows, cols);
    b.add(format!("{m}.weight_scale"), "U8", &[rows, cols / 32], &[120, 121, 119]);
}

fn gptq(b: &mut Base, m: &str, rows: u64, cols: u64) {
    let groups = cols / GROUP;
    b.add(format!("{m}.qweight"), "I32", &[cols / 8, rows], &[0x98, 0x10, 0x7f]);
    b.add(format!("{m}.qzeros"), "I32", &[groups, rows / 8], &[0x77]);
    b.add(format!("{m}.scales"), "F16", &[groups, rows], &[0x00, 0x20]);
    let order = (0..cols as u32).flat_map(|c| (c % groups as u32).to_le_bytes()).collect::<Vec<u8>>();
    b.add(format!("{m}.g_idx"), "I32", &[cols], &order);
}

fn awq(b: &mut Base, m: &str, rows: u64, cols: u64) {
    b.add(format!("{m}.qweight"), "I32", &[cols, rows / 8], &[0x98, 0x10, 0x7f]);
    b.add(format!("{m}.qzeros"), "I32", &[cols / GROUP, rows / 8], &[0x77]);
    b.add(format!("{m}.scales"), "F16", &[cols / GROUP, rows], &[0x00, 0x20]);
}

/// compressed-tensors with one group for all.
fn compressed(format: &str, weights: Value, activations: Value) -> Value {
    let group = json!({"targets": ["Linear"], "weights": weights, "input_activations": activations, "format": format});
    json!({"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"], "sparsity_config": {}, "transform_config": {}})
}

fn args(ty: &str, bits: u64, strategy: &str, group: Value, dynamic: Value) -> Value {
    json!({"type": ty, "num_bits": bits, "strategy": strategy, "group_size": group, "dynamic": dynamic,
        "symmetric": true, "scale_dtype": "torch.uint8", "actorder": null})
}

fn all() -> Vec<Base> {
    let config = |more: Value| {
        let mut c = json!({"model_type": "qwen3_moe", "hidden_act": "silu", "hidden_size": H,
            "moe_intermediate_size": I, "num_experts": E, "num_experts_per_tok": 1, "norm_topk_prob": true,
            "dtype": "bfloat16"});
        for (key, value) in more.as_object().into_iter().flatten() {
            c[key.as_str()] = value.clone();
        }
        c
    };
    let qwen = |quant: Value, linear: Linear| {
        Base::new(config(json!({})), quant).layer(MLP, "gate", ["gate_proj", "up_proj", "down_proj"], linear)
    };
    const MLP: &str = "model.layers.0.mlp.";
    const QWEN: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
    let no = Value::Null;
    let mut all = Vec::new();

    // Formats, in Qwen3's clothes.
    all.push(qwen(no.clone(), plain));
    all.push(qwen(no.clone(), with_bias).shard());
    let fp8 = |more: Value| {
        let mut quant = json!({"quant_method": "fp8", "activation_scheme": "dynamic",
            "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"]});
        for (key, value) in more.as_object().into_iter().flatten() {
            quant[key.as_str()] = value.clone();
        }
        quant
    };
    all.push(qwen(fp8(json!({"weight_block_size": [128, 128]})), fp8_block));
    all.push(qwen(fp8(json!({"activation_scheme": "static"})), fp8_tensor));
    let token = |ty| args(ty, 8, "token", no.clone(), json!(true));
    let channel = |ty| args(ty, 8, "channel", no.clone(), json!(false));
    all.push(qwen(compressed("float-quantized", channel("float"), token("float")), fp8_channel));
    all.push(qwen(compressed("int-quantized", channel("int"), token("int")), int8));
    let mut int4 = args("int", 4, "group", json!(GROUP), json!(false));
    int4["symmetric"] = json!(false);
    all.push(qwen(compressed("pack-quantized", int4, no.clone()), packed));
    let nv = args("float", 4, "tensor_group", json!(16), json!(false));
    let local = args("float", 4, "tensor_group", json!(16), json!("local"));
    all.push(qwen(compressed("nvfp4-pack-quantized", nv, local), nvfp4));
    let mx = |bits| args("float", bits, "group", json!(32), json!(false));
    all.push(qwen(compressed("mxfp4-pack-quantized", mx(4), no.clone()), mxfp4));
    let mx_input = args("float", 8, "group", json!(32), json!(true));
    all.push(qwen(compressed("mxfp8-quantized", mx(8), mx_input), mxfp8));
    let modelopt = |algo| {
        json!({"quant_algo": algo, "ignore": ["lm_head", "model.layers.0.mlp.gate"],
        "producer": {"name": "modelopt"}, "quant_method": "modelopt"})
    };
    all.push(qwen(modelopt("NVFP4"), modelopt_nvfp4));
    let inner = json!({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "MXFP8",
        "exclude_modules": ["lm_head"]}});
    all.push(qwen(no.clone(), mxfp8).apart("hf_quant_config.json", inner));
    let gptq_quant = json!({"bits": 4, "group_size": GROUP, "desc_act": true, "sym": false,
        "checkpoint_format": "gptq", "dynamic": {"-:.*lm_head.*": {}}});
    let mut with_method = gptq_quant.clone();
    with_method["quant_method"] = json!("gptq");
    all.push(qwen(with_method, gptq));
    all.push(qwen(no.clone(), gptq).apart("quantize_config.json", gptq_quant));
    let awq_quant = json!({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm",
        "zero_point": true, "modules_to_not_convert": ["gate"]});
    all.push(qwen(awq_quant, awq));

    // Families.
    let mixtral = config(json!({"model_type": "mixtral", "intermediate_size": I, "num_local_experts": E}));
    all.push(Base::new(mixtral, no.clone()).layer(
        "model.layers.0.block_sparse_moe.",
        "gate",
        ["w1", "w3", "w2"],
        plain,
    ));
    let shared = json!({"model_type": "qwen2_moe", "shared_expert_intermediate_size": I});
    let mut b = Base::new(config(shared), no.clone()).layer(MLP, "gate", QWEN, plain);
    b.expert(&format!("{MLP}shared_expert."), QWEN, plain);
    b.half(format!("{MLP}shared_expert_gate.weight"), &[1, H]);
    all.push(b);
    let mut fused = Base::new(config(json!({"model_type": "qwen3_5_moe"})), no.clone());
    fused.half(format!("{MLP}gate.weight"), &[E, H]);
    fused.half(format!("{MLP}experts.gate_up_proj"), &[E, 2 * I, H]);
    fused.half(format!("{MLP}experts.down_proj"), &[E, H, I]);
    all.push(fused);
    let deepseek = json!({"model_type": "deepseek_v3", "n_routed_experts": E, "n_shared_experts": 1, "n_group": 2,
        "topk_group": 1, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc"});
    let mut b = Base::new(config(deepseek), no.clone()).layer("model.layers.3.mlp.", "gate", QWEN, plain);
    b.expert("model.layers.3.mlp.shared_experts.", QWEN, plain);
    b.float("model.layers.3.mlp.gate.e_score_correction_bias", &[E]);
    all.push(b);
    let text = json!({"model_type": "llama4_text", "hidden_act": "silu", "hidden_size": H, "intermediate_size": I,
        "num_local_experts": E, "num_experts_per_tok": 1});
    let mut b = Base::new(json!({"model_type": "llama4", "text_config": text, "torch_dtype": "bfloat16"}), no.clone());
    let p = "language_model.model.layers.0.feed_forward.";
    b.half(format!("{p}router.weight"), &[E, H]);
    b.half(format!("{p}experts.gate_up_proj"), &[E, H, 2 * I]).half(format!("{p}experts.down_proj"), &[E, I, H]);
    b.expert(&format!("{p}shared_expert."), QWEN, plain);
    all.push(b);
    let oss = |quant: Value| {
        let c = json!({"model_type": "gpt_oss", "hidden_size": H, "intermediate_size": I, "num_local_experts": E,
            "num_experts_per_tok": 1, "swiglu_limit": 7.0});
        let mut b = Base::new(c, quant);
        b.half(format!("{MLP}router.weight"), &[E, H]).half(format!("{MLP}router.bias"), &[E]);
        b.half(format!("{MLP}experts.gate_up_proj_bias"), &[E, 2 * I]);
        b.half(format!("{MLP}experts.down_proj_bias"), &[E, H]);
        b
    };
    let mut b = oss(json!({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.router"]}));
    for (name, rows, cols) in [("gate_up_proj", 2 * I, H), ("down_proj", H, I)] {
        b.add(format!("{MLP}experts.{name}_blocks"), "U8", &[E, rows, cols / 32, 16], &[0x98, 0x10, 0x7f]);
        b.add(format!("{MLP}experts.{name}_scales"), "U8", &[E, rows, cols / 32], &[120, 121]);
    }
    all.push(b);
    let mut b = oss(no.clone());
    b.half(format!("{MLP}experts.gate_up_proj"), &[E, H, 2 * I]).half(format!("{MLP}experts.down_proj"), &[E, I, H]);
    all.push(b);
    let text = json!({"model_type": "gemma4_text", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": H,
        "moe_intermediate_size": I, "num_experts": E, "top_k_experts": 1, "rms_norm_eps": 1e-6});
    let mut b = Base::new(json!({"model_type": "gemma4", "text_config": text}), no.clone());
    let p = "model.language_model.layers.0.";
    b.half(format!("{p}router.proj.weight"), &[E, H]).half(format!("{p}router.scale"), &[H]);
    b.half(format!("{p}router.per_expert_scale"), &[E]);
    b.half(format!("{p}experts.gate_up_proj"), &[E, 2 * I, H]).half(format!("{p}experts.down_proj"), &[E, H, I]);
    all.push(b);
    let nemotron = json!({"model_type": "nemotron_h", "mlp_hidden_act": "relu2", "n_routed_experts": E, "n_group": 1,
        "topk_group": 1, "routed_scaling_factor": 2.5, "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": I});
    let p = "backbone.layers.0.mixer.";
    let mut b = Base::new(config(nemotron), no).layer(p, "gate", ["", "up_proj", "down_proj"], plain);
    b.expert(&format!("{p}shared_experts."), ["", "up_proj", "down_proj"], plain);
    b.float(format!("{p}gate.e_score_correction_bias"), &[E]);
    all.push(b);
    all
}

/// Each base with a directory of its own that holds its files: in memory where the system has a file system there.
/// Every one of them can be read and run, or the fuzzer would start from nowhere.
fn placed(bases: Vec<Base>) -> Vec<(Base, PathBuf)> {
    let memory = Path::new("/dev/shm");
    let root = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() }.join("moe-oracle-fuzz");
    // A fuzzer ends by exiting, so that nothing is dropped: clear up after those that are gone.
    for old in std::fs::read_dir(&root).into_iter().flatten().flatten() {
        if !Path::new("/proc").join(old.file_name()).exists() {
            let _ = std::fs::remove_dir_all(old.path());
        }
    }
    let root = root.join(std::process::id().to_string());
    let place = |(i, base): (usize, Base)| {
        let dir = root.join(i.to_string());
        std::fs::create_dir_all(&dir).expect("room for a directory");
        base.write(&dir);
        if let Err(e) = crate::read_and_run(&dir) {
            panic!("base {i} ({}): {e}", base.configs[0].1["model_type"]);
        }
        (base, dir)
    };
    bases.into_iter().enumerate().map(place).collect()
}
