//! The function between the two GEMMs.

/// The function between the two GEMMs: g is the gate, u the up projection, x the only one where not gated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `g * sigmoid(g) * u`; with a limit L `silu(min(g, L)) * clamp(u, -L, L)`
    Silu {
        /// L
        limit: Option<f32>,
    },
    /// exact gelu (erf) of g, times u
    Gelu,
    /// tanh approximation of gelu of g, times u
    GeluTanh,
    /// `g' = min(g, limit)`, `u' = clamp(u, -limit, limit)`: `g' * sigmoid(alpha * g') * (u' + beta)`. gpt-oss has
    /// 1.702, 1 and 7 with w13's rows interleaved on disk; canonical weights are always uninterleaved.
    SwigluOai {
        /// slope inside the sigmoid
        alpha: f32,
        /// added to u
        beta: f32,
        /// clamp of both
        limit: f32,
    },
    /// `min(silu(g), limit) * clamp(u, -limit, limit)`
    SwigluStep {
        /// clamp of both, 7 in the models that have it
        limit: f32,
    },
    /// `b * tanh(g / b) * sigmoid(g) * (lb * tanh(u / lb) if lb, else u)`
    Situ {
        /// b
        beta: f32,
        /// lb
        linear_beta: Option<f32>,
    },
    /// `max(g, 0)^2 * u`
    Relu2,
    /// `x * sigmoid(x)`
    SiluNoMul,
    /// exact gelu
    GeluNoMul,
    /// tanh approximation of gelu
    GeluTanhNoMul,
    /// `max(x, 0)^2`
    Relu2NoMul,
}

impl Activation {
    /// Plain silu.
    pub const SILU: Self = Activation::Silu { limit: None };
    /// gpt-oss's.
    pub const SWIGLU_OAI: Self = Activation::SwigluOai { alpha: 1.702, beta: 1.0, limit: 7.0 };

    /// One of each kind, with the parameters of the models that have it. The table's rows name them, and say which of
    /// them a kernel computes by a bit each in this order.
    pub const ALL: [Self; 11] = [
        Activation::SILU,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::SWIGLU_OAI,
        Activation::SwigluStep { limit: 7.0 },
        Activation::Situ { beta: 1.0, linear_beta: None },
        Activation::Relu2,
        Activation::SiluNoMul,
        Activation::GeluNoMul,
        Activation::GeluTanhNoMul,
        Activation::Relu2NoMul,
    ];

    /// The names of [`ALL`](Self::ALL).
    pub const NAMES: [&str; Self::ALL.len()] = {
        let mut names = [""; Self::ALL.len()];
        let mut i = 0;
        while i < names.len() {
            names[i] = Self::ALL[i].name();
            i += 1;
        }
        names
    };

    /// The place of its kind in [`ALL`](Self::ALL).
    pub const fn index(self) -> usize {
        match self {
            Activation::Silu { .. } => 0,
            Activation::Gelu => 1,
            Activation::GeluTanh => 2,
            Activation::SwigluOai { .. } => 3,
            Activation::SwigluStep { .. } => 4,
            Activation::Situ { .. } => 5,
            Activation::Relu2 => 6,
            Activation::SiluNoMul => 7,
            Activation::GeluNoMul => 8,
            Activation::GeluTanhNoMul => 9,
            Activation::Relu2NoMul => 10,
        }
    }

    /// The one of [`ALL`](Self::ALL) with this name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|a| a.name() == name)
    }

    /// Whether it takes a gate.
    pub const fn gated(self) -> bool {
        !matches!(
            self,
            Activation::SiluNoMul | Activation::GeluNoMul | Activation::GeluTanhNoMul | Activation::Relu2NoMul
        )
    }

    /// The field's name for it.
    pub const fn name(self) -> &'static str {
        match self {
            Activation::Silu { .. } => "silu",
            Activation::Gelu => "gelu",
            Activation::GeluTanh => "gelu_tanh",
            Activation::SwigluOai { .. } => "swigluoai",
            Activation::SwigluStep { .. } => "swiglustep",
            Activation::Situ { .. } => "situ",
            Activation::Relu2 => "relu2",
            Activation::SiluNoMul => "silu_no_mul",
            Activation::GeluNoMul => "gelu_no_mul",
            Activation::GeluTanhNoMul => "gelu_tanh_no_mul",
            Activation::Relu2NoMul => "relu2_no_mul",
        }
    }

    /// The activation itself for one element, in float32. For ungated ones `gate` is not looked at.
    #[inline(always)]
    pub fn apply(self, gate: f32, up: f32) -> f32 {
        match self {
            Activation::Silu { limit: None } => gate * sigmoid(gate) * up,
            Activation::Silu { limit: Some(l) } => {
                let g = gate.min(l);
                g * sigmoid(g) * up.clamp(-l, l)
            }
            Activation::Gelu => gelu(gate) * up,
            Activation::GeluTanh => gelu_tanh(gate) * up,
            Activation::SwigluOai { alpha, beta, limit } => {
                let g = gate.min(limit);
                g * sigmoid(alpha * g) * (up.clamp(-limit, limit) + beta)
            }
            Activation::SwigluStep { limit } => (gate * sigmoid(gate)).min(limit) * up.clamp(-limit, limit),
            Activation::Situ { beta, linear_beta } => {
                let u = linear_beta.map_or(up, |lb| lb * libm::tanhf(up / lb));
                beta * libm::tanhf(gate / beta) * sigmoid(gate) * u
            }
            Activation::Relu2 => gate.max(0.0) * gate.max(0.0) * up,
            Activation::SiluNoMul => up * sigmoid(up),
            Activation::GeluNoMul => gelu(up),
            Activation::GeluTanhNoMul => gelu_tanh(up),
            Activation::Relu2NoMul => up.max(0.0) * up.max(0.0),
        }
    }

    /// Parameters that make no sense: limits and betas must be positive and finite.
    pub const fn valid(self) -> bool {
        const fn pos(x: f32) -> bool {
            x > 0.0 && x < f32::INFINITY
        }
        match self {
            Activation::Silu { limit: Some(l) } | Activation::SwigluStep { limit: l } => pos(l),
            Activation::SwigluOai { alpha, beta, limit } => pos(limit) && alpha.is_finite() && beta.is_finite(),
            Activation::Situ { beta, linear_beta } => {
                pos(beta)
                    && match linear_beta {
                        Some(b) => pos(b),
                        None => true,
                    }
            }
            _ => true,
        }
    }
}

/// `1 / (1 + e^-x)`
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2))
}

fn gelu_tanh(x: f32) -> f32 {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    0.5 * x * (1.0 + libm::tanhf(SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)))
}
