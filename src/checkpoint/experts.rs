//! Finding the layers and putting one together: experts in whichever layout the family has, router, shared expert.

use super::family::{Family, Model};
use super::file::{FLOATS, Tensor, Tensors};
use super::quant::{self, Format, Kind, QuantConfig};
use super::{CheckpointError, MoeLayer, RouterNorm, RouterWeights, SharedExpert};
use crate::weights::{ExpertWeights, MoeWeights, Scales, WeightMatrix};
use bytes::Bytes;
use safetensors::Dtype;
use std::collections::BTreeMap;

/// The layers that have experts, each with the beginning of its tensors' names up to `experts.`. A layer with only a
/// router, as other layers of a partial checkpoint may be, does not count.
pub(super) fn find_layers(tensors: &Tensors) -> Result<BTreeMap<usize, String>, CheckpointError> {
    let mut layers: BTreeMap<usize, String> = BTreeMap::new();
    for name in tensors.names() {
        // Draft layers for multi-token prediction that have a stack, and so a numbering, of their own.
        if name.split('.').any(|s| s == "mtp") {
            continue;
        }
        let Some(experts) = name.find(".experts.") else { continue };
        let base = &name[..=experts];
        let mut parts = base.split('.');
        let Some(index) = parts.find(|s| *s == "layers").and_then(|_| parts.next()).and_then(|n| n.parse().ok()) else {
            continue;
        };
        match layers.get(&index) {
            Some(other) if other != base => {
                return Err(CheckpointError::tensor(name, format!("is a second layer {index} beside {other}")));
            }
            Some(_) => {}
            None => {
                layers.insert(index, base.to_owned());
            }
        }
    }
    Ok(layers)
}

/// What a layer is read from.
pub(super) struct Reader<'a> {
    /// What the config says.
    pub model: &'a Model,
    /// What is quantised.
    pub quant: &'a QuantConfig,
    /// The files.
    pub tensors: &'a Tensors,
    /// What the layer's names begin with; ends with a point.
    pub base: &'a str,
}

impl<'a> Reader<'a> {
    /// Everything about the layer.
    pub fn layer(&self, index: usize) -> Result<MoeLayer, CheckpointError> {
        let mut config = self.model.config;
        let (weights, producer) = self.experts()?;
        config.bias = weights.experts[0].down_bias.is_some();
        Ok(MoeLayer {
            index,
            family: self.model.model_type.clone(),
            producer,
            config,
            weights,
            router: self.router()?,
            shared: self.shared()?,
        })
    }

    fn gated(&self) -> bool {
        self.model.config.activation.gated()
    }

    /// Names of gate (w1), up (w3) and down (w2).
    fn projections(&self) -> [&'static str; 3] {
        match self.model.family {
            Family::Mixtral => ["w1", "w3", "w2"],
            _ => ["gate_proj", "up_proj", "down_proj"],
        }
    }

    fn experts(&self) -> Result<(MoeWeights, String), CheckpointError> {
        let count = self.model.config.experts;
        let prefix = format!("{}experts.", self.base);
        let mut fused = false;
        for name in self.tensors.under(&prefix) {
            let first = name[prefix.len()..].split('.').next().unwrap_or_default();
            match first.parse::<usize>() {
                Ok(e) if e >= count => {
                    return Err(CheckpointError::tensor(name, format!("is beyond the config's {count} experts")));
                }
                Ok(_) => {}
                Err(_) => fused = true,
            }
        }
        if fused {
            return self.fused(&prefix);
        }
        let of = |e: usize, p: &str| format!("{prefix}{e}.{p}");
        let [w1, w3, w2] = self.projections();
        let format = self.quant.format(&of(0, w3));
        let mut experts = Vec::new();
        for e in 0..count {
            for p in [w1, w3, w2].into_iter().skip(usize::from(!self.gated())) {
                self.same_format(format, &of(e, p))?;
            }
            let i = self.model.config.intermediate;
            let names = [of(e, w1), of(e, w3), of(e, w2)];
            experts.push(self.expert(&names, i, format)?);
        }
        let weights = self.finish(experts, format, &|e, p| of(e, p))?;
        Ok((weights, format.producer.clone()))
    }

    fn same_format(&self, format: &Format, module: &str) -> Result<(), CheckpointError> {
        if std::ptr::eq(self.quant.format(module), format) {
            return Ok(());
        }
        Err(CheckpointError::Unsupported(format!(
            "{module} is quantised in another way than the layer's first expert ({})",
            format.producer
        )))
    }

    /// One expert from its three linear layers.
    fn expert(&self, names: &[String; 3], i: usize, format: &Format) -> Result<ExpertWeights, CheckpointError> {
        let h = self.model.config.hidden;
        let linear = |name: &str, rows, cols| quant::read_linear(self.tensors, name, rows, cols, format);
        let bias = |name: &str, len: usize| {
            let t = self.tensors.find(&format!("{name}.bias"));
            t.map(|t| t.expect(&FLOATS, &[len])?.floats()).transpose()
        };
        let [w1, w3, w2] = names;
        let gate = if self.gated() {
            Some(linear(w1, i, h)?)
        } else if self.tensors.under(&format!("{w1}.")).next().is_some() {
            return Err(CheckpointError::tensor(w1, "is there, but the activation has no gate"));
        } else {
            None
        };
        let (up, down) = (linear(w3, i, h)?, linear(w2, h, i)?);
        // Gate and up see the same input: the larger scale loses nothing.
        let input_scale = match (gate.as_ref().and_then(|g| g.input_scale), up.input_scale) {
            (Some(a), Some(b)) => Some(a.max(b)),
            (_, b) => b,
        };
        let gate_bias = if gate.is_some() { bias(w1, i)? } else { None };
        Ok(ExpertWeights {
            gate_bias,
            up_bias: bias(w3, i)?,
            down_bias: bias(w2, h)?,
            gate: gate.map(|g| g.matrix),
            up: up.matrix,
            down: down.matrix,
            input_scale,
            down_input_scale: down.input_scale,
        })
    }

    /// The last checks. `name` is the module of an expert's projection.
    fn finish(
        &self,
        experts: Vec<ExpertWeights>,
        format: &Format,
        name: &dyn Fn(usize, &str) -> String,
    ) -> Result<MoeWeights, CheckpointError> {
        let Format { scheme, weight_key, activation_key, .. } = *format;
        // A bias belongs to every expert and every projection, or to none.
        let has = |x: &ExpertWeights| {
            [
                x.gate_bias.is_some() || x.gate.is_none() && x.up_bias.is_some(),
                x.up_bias.is_some(),
                x.down_bias.is_some(),
            ]
        };
        let biased = experts.first().is_some_and(|x| x.down_bias.is_some());
        for (e, x) in experts.iter().enumerate() {
            if let Some(p) = has(x).iter().position(|&b| b != biased) {
                let module = name(e, self.projections()[p]);
                let problem = if biased { "is not in the file" } else { "is there, but other experts have none" };
                return Err(CheckpointError::tensor(&format!("{module}.bias"), problem));
            }
        }
        let weights = MoeWeights { scheme, weight_key, activation_key, experts };
        weights.validate().map_err(|error| {
            let mut parts = error.tensor.split('.').skip(1);
            let e = parts.next().and_then(|e| e.parse().ok());
            let p = parts.next().and_then(|p| ["1", "3", "2"].iter().position(|n| p[1..] == **n));
            match (e, p) {
                (Some(e), Some(p)) => CheckpointError::tensor(&name(e, self.projections()[p]), error.problem),
                _ => CheckpointError::tensor(&error.tensor, error.problem),
            }
        })?;
        Ok(weights)
    }

    /// All experts in one tensor per projection.
    fn fused(&self, prefix: &str) -> Result<(MoeWeights, String), CheckpointError> {
        let c = &self.model.config;
        let (n, h, i) = (c.experts, c.hidden, c.intermediate);
        let first = if self.gated() { "gate_up_proj" } else { "up_proj" };
        let (first, down) = (format!("{prefix}{first}"), format!("{prefix}down_proj"));
        let format = self.quant.format(&first);
        self.same_format(format, &down)?;
        let oss = self.model.family == Family::GptOss;
        let width = if self.gated() { 2 * i } else { i };
        let mut experts = Vec::new();
        let weights_only = |gate, up, down| ExpertWeights {
            gate,
            up,
            down,
            gate_bias: None,
            up_bias: None,
            down_bias: None,
            input_scale: None,
            down_input_scale: None,
        };
        match format.kind {
            Kind::GptOss if oss => {
                let gate_up = quant::gpt_oss(self.tensors, &first, n, width, h)?;
                let down = quant::gpt_oss(self.tensors, &down, n, h, i)?;
                for e in 0..n {
                    let (gate, up) = (gate_up.expert(e, 0, 2), gate_up.expert(e, 1, 2));
                    experts.push(weights_only(Some(gate), up, down.expert(e, 0, 1)));
                }
            }
            Kind::Plain => {
                // Llama 4 and gpt-oss store what a matrix product from the left takes: [E, K, N].
                let transposed = oss || self.model.family == Family::Llama4;
                let gate_up = Fused::new(self.tensors.get(&first)?, n, width, h, transposed)?;
                let down = Fused::new(self.tensors.get(&down)?, n, h, i, transposed)?;
                for e in 0..n {
                    let (gate, up) = match (self.gated(), oss) {
                        (false, _) => (None, gate_up.expert(e, 0, 1, i)),
                        (true, true) => (Some(gate_up.expert(e, 0, 2, i)), gate_up.expert(e, 1, 2, i)),
                        (true, false) => (Some(gate_up.expert(e, 0, 1, i)), gate_up.expert(e, i, 1, i)),
                    };
                    experts.push(weights_only(gate, up, down.expert(e, 0, 1, h)));
                }
            }
            _ => {
                let what = format!("experts fused into one tensor ({first}) as {}", format.producer);
                return Err(CheckpointError::Unsupported(what));
            }
        }
        if oss {
            let read = |name: &str, len: usize| {
                let t = self.tensors.get(&format!("{name}_bias"))?;
                t.expect(&FLOATS, &[n, len])?.floats()
            };
            let (gate_up, down) = (read(&first, width)?, read(&down, h)?);
            for (e, x) in experts.iter_mut().enumerate() {
                let both = &gate_up[e * width..(e + 1) * width];
                x.gate_bias = Some(both.iter().copied().step_by(2).collect());
                x.up_bias = Some(both.iter().copied().skip(1).step_by(2).collect());
                x.down_bias = Some(down[e * h..(e + 1) * h].to_vec());
            }
        } else if let Some(t) = self.tensors.find(&format!("{first}_bias")) {
            return Err(t.error("is there, but biases of fused experts are known of gpt_oss only"));
        }
        let name = |e: usize, p: &str| format!("{} (expert {e})", if p == "down_proj" { &down } else { &first });
        Ok((self.finish(experts, format, &name)?, format.producer.clone()))
    }

    fn router(&self) -> Result<RouterWeights, CheckpointError> {
        let (n, h) = (self.model.config.experts, self.model.config.hidden);
        let base = self.base;
        let floats = |name: &str, shape: &[usize]| self.tensors.get(name)?.expect(&FLOATS, shape)?.floats();
        let (router, weight) = match self.model.family {
            Family::GptOss | Family::Llama4 => ("router", "router.weight"),
            Family::Gemma4 => ("router", "router.proj.weight"),
            _ => ("gate", "gate.weight"),
        };
        let optional = |wanted: bool, last: &str, shape: &[usize]| {
            if wanted { floats(&format!("{base}{router}.{last}"), shape).map(Some) } else { Ok(None) }
        };
        let f = self.model.family;
        let corrected = self.model.config.routing.method == crate::config::RoutingMethod::DeepSeekV3;
        let prefix = format!("{base}{router}.");
        let unknown = |name: &&str| match &name[prefix.len()..] {
            "bias" => f != Family::GptOss,
            "e_score_correction_bias" => !corrected,
            "proj.weight" | "scale" | "per_expert_scale" => f != Family::Gemma4,
            "weight" => f == Family::Gemma4,
            _ => true,
        };
        // What is not read would be missing from the answer without a word.
        if let Some(name) = self.tensors.under(&prefix).find(unknown) {
            let problem = format!("is not part of the router that {} has by its config", self.model.model_type);
            return Err(CheckpointError::tensor(name, problem));
        }
        let scale = optional(f == Family::Gemma4, "scale", &[h])?;
        Ok(RouterWeights {
            weight: floats(&format!("{base}{weight}"), &[n, h])?,
            bias: optional(f == Family::GptOss, "bias", &[n])?,
            correction_bias: optional(corrected, "e_score_correction_bias", &[n])?,
            input_norm: scale.zip(self.model.router_eps).map(|(scale, eps)| RouterNorm {
                eps,
                scale,
                factor: (h as f32).sqrt().recip(),
            }),
            expert_scale: optional(f == Family::Gemma4, "per_expert_scale", &[n])?,
        })
    }

    fn shared(&self) -> Result<Option<SharedExpert>, CheckpointError> {
        let module = match self.model.family {
            Family::Qwen | Family::Llama4 => "shared_expert",
            _ => "shared_experts",
        };
        let prefix = format!("{}{module}.", self.base);
        let Some(i) = self.model.shared else {
            // Not looking at it would give a wrong answer without a word.
            return match self.tensors.under(&prefix).next() {
                Some(name) => Err(CheckpointError::tensor(name, "is there, but the config has no shared expert")),
                None => Ok(None),
            };
        };
        let names = self.projections().map(|p| format!("{prefix}{p}"));
        let format = self.quant.format(&names[1]);
        for name in &names[usize::from(!self.gated())..] {
            self.same_format(format, name)?;
        }
        let expert = self.expert(&names, i, format)?;
        let weights = self.finish(vec![expert], format, &|_, p| format!("{prefix}{p}"))?;
        let gate = if self.model.shared_gate {
            let t = self.tensors.get(&format!("{}shared_expert_gate.weight", self.base))?;
            Some(t.expect(&FLOATS, &[1, self.model.config.hidden])?.floats()?)
        } else {
            None
        };
        Ok(Some(SharedExpert { weights, gate }))
    }
}

/// A 16-bit tensor of all experts: `[E, rows, cols]`, or `[E, cols, rows]` where transposed.
struct Fused<'a> {
    tensor: &'a Tensor,
    rows: usize,
    cols: usize,
    transposed: bool,
}

impl<'a> Fused<'a> {
    fn new(
        tensor: &'a Tensor,
        experts: usize,
        rows: usize,
        cols: usize,
        transposed: bool,
    ) -> Result<Self, CheckpointError> {
        let shape = if transposed { [experts, cols, rows] } else { [experts, rows, cols] };
        tensor.expect(&[Dtype::BF16, Dtype::F16], &shape)?;
        Ok(Self { tensor, rows, cols, transposed })
    }

    /// `count` rows of one expert from `first` on, `step` apart; mapped where they lie together.
    fn expert(&self, e: usize, first: usize, step: usize, count: usize) -> WeightMatrix {
        let (rows, cols) = (self.rows, self.cols);
        let all = self.tensor.data.slice(2 * e * rows * cols..2 * (e + 1) * rows * cols);
        let codes = if !self.transposed && step == 1 {
            all.slice(2 * first * cols..2 * (first + count) * cols)
        } else {
            let mut out = Vec::with_capacity(2 * count * cols);
            for r in (0..count).map(|r| first + r * step) {
                for c in 0..cols {
                    let at = 2 * if self.transposed { c * rows + r } else { r * cols + c };
                    out.extend_from_slice(&all[at..at + 2]);
                }
            }
            Bytes::from(out)
        };
        WeightMatrix { rows: count, cols, elem: quant::half_elem(self.tensor), codes, scales: Scales::None }
    }
}
