//! What is quantised and how: schemes, quantisation keys, number formats.

mod key;

pub use key::*;
#[doc(inline)]
pub use moe_oracle_simd::number;

/// The seven quantisation schemes, one oracle each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scheme {
    /// bf16 or f16 weights.
    Unquantized,
    /// e4m3 weights with float32 scales.
    Fp8,
    /// e2m1 weights, e4m3 scales per 16, float32 per tensor.
    Nvfp4,
    /// e2m1 weights, e8m0 scales per 32.
    Mxfp4,
    /// e4m3 weights, e8m0 scales per 32.
    Mxfp8,
    /// int8 weights with float32 scales per channel or tensor.
    Int8,
    /// 4- and 8-bit integer weights in groups along K.
    IntWna16,
}

impl Scheme {
    /// All seven, in the order of the brief.
    pub const ALL: [Scheme; 7] =
        [Scheme::Unquantized, Scheme::Fp8, Scheme::Nvfp4, Scheme::Mxfp4, Scheme::Mxfp8, Scheme::Int8, Scheme::IntWna16];

    /// `unquantized`, `fp8`, ...
    pub const fn name(self) -> &'static str {
        match self {
            Scheme::Unquantized => "unquantized",
            Scheme::Fp8 => "fp8",
            Scheme::Nvfp4 => "nvfp4",
            Scheme::Mxfp4 => "mxfp4",
            Scheme::Mxfp8 => "mxfp8",
            Scheme::Int8 => "int8",
            Scheme::IntWna16 => "int_wna16",
        }
    }

    /// The scheme of that name.
    pub fn by_name(name: &str) -> Option<Scheme> {
        Scheme::ALL.into_iter().find(|s| s.name() == name)
    }
}

impl std::fmt::Display for Scheme {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
