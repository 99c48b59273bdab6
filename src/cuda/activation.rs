//! The activation as the kernels take it.

use crate::config;
use bytemuck::{Pod, Zeroable};

/// As in kernels/common/activation.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub(super) struct Activation {
    kind: i32,
    alpha: f32,
    beta: f32,
    limit: f32,
}

impl Activation {
    pub(super) fn of(a: config::Activation) -> Self {
        let limit = f32::INFINITY;
        let plain = Activation { kind: a.index() as i32, alpha: 0.0, beta: 0.0, limit };
        match a {
            config::Activation::Silu { limit: Some(limit) } | config::Activation::SwigluStep { limit } => {
                Activation { limit, ..plain }
            }
            config::Activation::SwigluOai { alpha, beta, limit } => Activation { alpha, beta, limit, ..plain },
            config::Activation::Situ { beta, linear_beta } => {
                Activation { alpha: linear_beta.unwrap_or(0.0), beta, ..plain }
            }
            _ => plain,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Activation as A;

    #[test]
    fn activations_keep_their_parameters() {
        let inf = f32::INFINITY;
        for (a, want) in [
            (A::SILU, (0, 0.0, 0.0, inf)),
            (A::Silu { limit: Some(3.0) }, (0, 0.0, 0.0, 3.0)),
            (A::GeluTanh, (2, 0.0, 0.0, inf)),
            (A::SWIGLU_OAI, (3, 1.702, 1.0, 7.0)),
            (A::SwigluStep { limit: 7.0 }, (4, 0.0, 0.0, 7.0)),
            (A::Situ { beta: 2.0, linear_beta: None }, (5, 0.0, 2.0, inf)),
            (A::Situ { beta: 2.0, linear_beta: Some(1.5) }, (5, 1.5, 2.0, inf)),
            (A::Relu2NoMul, (10, 0.0, 0.0, inf)),
        ] {
            let (kind, alpha, beta, limit) = want;
            assert_eq!(Activation::of(a), Activation { kind, alpha, beta, limit }, "{a:?}");
        }
    }
}
