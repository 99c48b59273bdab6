use super::*;
use crate::scheme::{Elem, Scheme};
use crate::weights::{ExpertWeights, Scales, WeightElem, WeightMatrix};

const CONFIG: MoeConfig = MoeConfig::new(3, 2, 16, 6);

fn matrix(rows: usize, cols: usize, elem: WeightElem, scales: Scales) -> WeightMatrix {
    let codes = vec![0x11; rows * cols * elem.bits() / 8].into();
    WeightMatrix { rows, cols, elem, codes, scales }
}

fn weights(elem: WeightElem, scales: impl Fn(usize) -> Scales) -> MoeWeights {
    let expert = || ExpertWeights {
        gate: Some(matrix(6, 16, elem, scales(6))),
        up: matrix(6, 16, elem, scales(6)),
        down: matrix(16, 6, elem, scales(16)),
        gate_bias: None,
        up_bias: Some(vec![0.5; 6]),
        down_bias: Some(vec![0.5; 16]),
        input_scale: None,
        down_input_scale: None,
    };
    let experts = (0..3).map(|_| expert()).collect();
    MoeWeights { scheme: Scheme::Fp8, weight_key: None, activation_key: None, experts }
}

#[test]
fn everything_has_its_own_place_in_the_arena() {
    let weights = weights(WeightElem::Quant(Elem::E4m3), |rows| Scales::PerRow(vec![1.0; rows]));
    weights.validate().unwrap();
    let mut arena = Arena::at(1 << 20);
    let experts = Expert::all(&weights, &mut arena).unwrap();
    assert_eq!((experts.len(), arena.pieces().len()), (3, 3 * (3 * 2 + 2)));
    let mut end = 0;
    for (offset, bytes) in arena.pieces() {
        assert!(*offset >= end && offset.is_multiple_of(16) && *offset < end + 16);
        end = offset + bytes.len();
    }
    assert_eq!(end, arena.len());
    assert_eq!(arena.put::<f32>(None), 0);
}

#[test]
fn what_the_kernels_cannot_read_is_refused() {
    let refused = |w: &MoeWeights| Expert::all(w, &mut Arena::at(0)).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(refused(&weights(WeightElem::Quant(Elem::E5m2), |_| Scales::PerTensor(1.0))).contains("experts.0.w1"));
    let mx = |rows: usize| Scales::E8m0(vec![127; rows].into());
    assert!(refused(&weights(WeightElem::Quant(Elem::U8), mx)).contains("U8"));
    for config in [
        MoeConfig { topk: 0, ..CONFIG },
        MoeConfig { experts: 1 << 20, topk: 1 << 10, intermediate: 1 << 24, ..CONFIG },
    ] {
        assert!(layer(&config).is_err(), "{config:?}");
    }
    assert_eq!(layer(&CONFIG).unwrap().topk, 2);
    assert_eq!(layer(&MoeConfig { format: ActivationFormat::Batched, ..CONFIG }).unwrap().topk, 1);
}
