//! What a call costs with each tile, to take the cheapest: a model whose constants were measured on an H200
//! (benches/RESULTS.md). Pure functions.
//!
//! A cluster's task reads its rows of an expert's matrix stage by stage. A stage takes as long as its weights need from
//! memory, or, where all tiles of the expert share that, as its products and what they read from L2. Tasks are dealt out in
//! rounds of one to a cluster. Tokens choose experts uniformly: a skewed call has more tiles than this expects, which cost
//! less than too large ones for all other experts would.

use super::plan::{CLUSTER, Kind, SLABS, TILES};
use crate::config::{ActivationFormat, MoeConfig};

/// Bytes of a stage's weights, of a cluster's rows.
const STAGE_BYTES: usize = CLUSTER * SLABS * 2048;
/// What all clusters read from memory together, in bytes a microsecond, by the place in `TILES`: a larger tile leaves the
/// ring fewer stages of weights that are under way.
const READ: [f64; TILES.len()] = [4.34e6, 4.23e6, 4.02e6];
/// A stage whose weights L2 has, in microseconds, and what a token's column adds to a task's results.
const STAGE_US: f64 = 0.251;
const RESULT_US: f64 = 0.001;
/// Microseconds from which on a task is asked for, which takes until it is there.
const ASK_US: f64 = 4.5;
/// What an element of the assignments' rows costs outside the projections.
const ELEMENT_US: f64 = 0.95e-6;
/// As kGranularity in kernels/permute.cu: tokens that a tile's size is a multiple of.
const GRANULARITY: usize = 16;
/// Bytes of weights that several tokens must be expected to read.
fn much(kind: Kind) -> f64 {
    if kind == Kind::Half { 300e6 } else { 600e6 }
}
/// Tokens of a call of `cuda_decode`.
const DECODE_TOKENS: usize = super::super::decode::TOKENS;
/// Tokens of an expert from which on the largest tile is taken unasked.
const MANY: f64 = 4.0 * TILES[TILES.len() - 1] as f64;

impl Kind {
    /// What a token's column adds to a stage, by the place in `TILES`: its products, and of fp8 sums that are added up outside
    /// the tensor cores.
    const fn column_us(self) -> [f64; TILES.len()] {
        match self {
            Kind::Half => [0.0017; TILES.len()],
            Kind::Fp8 => [0.00215, 0.00245, 0.00275],
            // Of fp8 and int8, whose instructions these are: not fitted.
            Kind::Fp8Fast => [0.00215, 0.00185, 0.00185],
            Kind::Fp8Block => [0.00395, 0.00365, 0.00395],
            Kind::Int8 => [0.00185; TILES.len()],
        }
    }

    /// What a call of any size costs besides.
    const fn call_us(self) -> f64 {
        match self {
            Kind::Half => 6.0,
            Kind::Fp8 | Kind::Fp8Fast => 8.0,
            Kind::Fp8Block => 22.0,
            Kind::Int8 => 6.0,
        }
    }
}

/// From how many tokens of a call (or slots of an expert) on these kernels are faster than all others: a rule, for the model
/// knows nothing of those. `cuda_decode` has less to do before it reads weights, but reads those of several tokens slower: it
/// loses where it takes more than one call, or from so many bytes on ([`much`]).
pub fn pays_from(c: &MoeConfig, kind: Kind, bytes_per_expert: usize) -> usize {
    if c.format == ActivationFormat::Batched {
        return 1;
    }
    // How many tokens choose so large a part of the experts; with a chance of one that is zero.
    let part = (much(kind) / (c.local_experts * bytes_per_expert) as f64).min(1.0);
    let chance = c.topk as f64 / c.experts as f64;
    let tokens = ((1.0 - part).ln() / (1.0 - chance).ln()).ceil();
    (tokens as usize).clamp(2, DECODE_TOKENS + 1)
}

/// A projection, as clusters share it.
#[derive(Clone, Copy, Debug)]
pub struct Projection {
    /// Tasks for a tile of tokens.
    pub row_tiles: usize,
    pub stages: usize,
}

/// A layer's part of the model.
#[derive(Clone, Copy, Debug)]
pub struct Layer {
    pub kind: Kind,
    pub projections: [Projection; 2],
    pub local_experts: usize,
    /// That run at a time.
    pub clusters: usize,
    /// Elements of an assignment's rows.
    pub row: usize,
}

/// Which tokens an expert gets: each of so many with this chance.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub tokens: usize,
    pub chance: f64,
}

impl Load {
    /// Calls `f` with numbers of tokens and how likely each is, in parts of the likeliest one's chance; those of less than a
    /// thousandth are left out.
    fn for_each(self, mut f: impl FnMut(usize, f64)) {
        let Self { tokens, chance } = self;
        let likeliest = (((tokens + 1) as f64 * chance) as usize).min(tokens);
        let odds = chance / (1.0 - chance);
        f(likeliest, 1.0);
        let (mut n, mut part) = (likeliest, 1.0);
        while n < tokens && part > 1e-3 {
            part *= (tokens - n) as f64 / (n + 1) as f64 * odds;
            n += 1;
            f(n, part);
        }
        (n, part) = (likeliest, 1.0);
        while n > 0 && part > 1e-3 {
            part *= n as f64 / (tokens - n + 1) as f64 / odds;
            n -= 1;
            f(n, part);
        }
    }
}

impl Layer {
    /// By projection and tile, whether clusters ask for tasks instead of taking them in turn: that shares experts of different
    /// size out evenly (10 % at 256 tokens an expert), but the next task is known late. With the smallest tile all tasks take
    /// the time that their weights need.
    pub fn asks(&self) -> [[bool; TILES.len()]; 2] {
        self.projections.map(|p| {
            let task_us = |tile| p.stages as f64 * self.stage_us(tile, 0.75 * TILES[tile] as f64, 1);
            std::array::from_fn(|tile| tile > 0 && task_us(tile) >= ASK_US)
        })
    }

    /// A stage of so many columns, whose weights so many tiles read.
    fn stage_us(&self, tile: usize, columns: f64, tiles: usize) -> f64 {
        let read = (STAGE_BYTES * self.clusters) as f64 / READ[tile] / tiles as f64;
        read.max(STAGE_US + self.kind.column_us()[tile] * columns)
    }

    /// Microseconds of a call with the tile of this place.
    pub fn call_us(&self, tile: usize, load: Load) -> f64 {
        let assignments = self.local_experts as f64 * load.tokens as f64 * load.chance;
        let both = self.projections.iter().map(|p| self.projection_us(p, tile, load)).sum::<f64>();
        self.kind.call_us() + assignments * self.row as f64 * ELEMENT_US + both
    }

    fn projection_us(&self, p: &Projection, tile: usize, load: Load) -> f64 {
        let (mut all, mut tiles, mut us) = (0.0, 0.0, 0.0);
        load.for_each(|tokens, part| {
            all += part;
            let of = tokens.div_ceil(TILES[tile]);
            if of > 0 {
                let columns = tokens.div_ceil(of).next_multiple_of(GRANULARITY).min(TILES[tile]) as f64;
                let stage = self.stage_us(tile, columns, of);
                tiles += part * of as f64;
                us += part * of as f64 * (p.stages as f64 * stage + RESULT_US * columns);
            }
        });
        if tiles == 0.0 {
            return 0.0;
        }
        let tasks = (self.local_experts * p.row_tiles) as f64 * tiles / all;
        (tasks / self.clusters as f64).ceil() * us / tiles
    }

    /// The place of the cheapest tile.
    fn cheapest(&self, load: Load) -> usize {
        let us = |tile: &usize| self.call_us(*tile, load);
        (0..TILES.len()).min_by(|a, b| us(a).total_cmp(&us(b))).unwrap_or(0)
    }

    /// From how many tokens of a call on each tile is taken, where an expert gets what `load` says of them.
    pub fn tiles_from(&self, load: impl Fn(usize) -> Load) -> [usize; TILES.len()] {
        let mut from = [usize::MAX; TILES.len()];
        from[0] = 0;
        let (mut taken, mut tokens) = (0, 1usize);
        while taken + 1 < TILES.len() {
            let load = load(tokens);
            let many = load.tokens as f64 * load.chance >= MANY;
            let tile = if many { TILES.len() - 1 } else { self.cheapest(load) };
            // Never back to a smaller one.
            if tile > taken {
                from[taken + 1..=tile].fill(tokens);
                taken = tile;
            }
            tokens = tokens.saturating_add((tokens / 16).max(1));
        }
        from
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Kind; 4] = [Kind::Half, Kind::Fp8Block, Kind::Fp8, Kind::Int8];

    struct Model {
        layer: fn(Kind) -> Layer,
        experts: usize,
        topk: usize,
        /// By kind as in `KINDS`, then 256, 1024 and 4096 tokens, then tiles: measured, us.
        us: [[[f64; 3]; 3]; 4],
    }

    fn layer(kind: Kind, experts: usize, hidden: usize, intermediate: usize) -> Layer {
        let projection = |rows: usize, columns: usize| Projection {
            row_tiles: rows.div_ceil(16 * SLABS * CLUSTER),
            stages: (columns * kind.bytes()).div_ceil(128),
        };
        Layer {
            kind,
            projections: [projection(2 * intermediate, hidden), projection(hidden, intermediate)],
            local_experts: experts,
            clusters: 66,
            row: 2 * (hidden + intermediate),
        }
    }

    const MEASURED: [Model; 3] = [
        Model {
            layer: |kind| layer(kind, 128, 2048, 768),
            experts: 128,
            topk: 8,
            us: [
                [[291.5, 291.6, 304.7], [403.3, 342.0, 364.1], [966.7, 763.3, 714.8]],
                [[160.8, 175.8, 173.2], [262.7, 213.3, 238.8], [817.6, 640.0, 589.6]],
                [[158.5, 158.2, 164.3], [231.1, 203.7, 214.3], [650.4, 555.3, 495.9]],
                [[158.2, 158.7, 159.7], [232.2, 200.4, 208.1], [613.6, 485.2, 452.9]],
            ],
        },
        Model {
            layer: |kind| layer(kind, 256, 7168, 256),
            experts: 256,
            topk: 8,
            us: [
                [[706.5, 712.6, 753.2], [803.7, 806.2, 837.2], [1828.7, 1446.5, 1304.8]],
                [[383.1, 395.9, 414.9], [481.6, 492.7, 515.4], [1308.6, 1086.8, 997.3]],
                [[375.1, 389.2, 398.1], [465.8, 470.4, 486.5], [1145.4, 969.5, 887.1]],
                [[375.4, 386.0, 399.2], [465.2, 470.0, 480.3], [1112.9, 941.4, 840.6]],
            ],
        },
        Model {
            layer: |kind| layer(kind, 8, 4096, 14336),
            experts: 8,
            topk: 2,
            us: [
                [[809.7, 689.5, 733.9], [2035.5, 1639.4, 1361.6], [7200.4, 5227.5, 4504.3]],
                [[538.4, 440.3, 462.5], [1565.8, 1205.0, 1073.7], [5522.2, 4179.4, 3648.4]],
                [[450.6, 387.9, 418.7], [1263.7, 986.0, 858.6], [4313.8, 3332.9, 2961.9]],
                [[426.2, 377.7, 392.2], [1082.0, 884.1, 728.5], [3758.3, 2860.3, 2409.5]],
            ],
        },
    ];

    /// Of a call's tokens, each chooses so many of the experts.
    fn uniform(experts: usize, topk: usize) -> impl Fn(usize) -> Load {
        move |tokens| Load { tokens, chance: topk as f64 / experts as f64 }
    }

    #[test]
    fn the_model_is_near_what_was_measured_and_takes_the_best_tile() {
        for m in &MEASURED {
            for (kind, by_tokens) in KINDS.into_iter().zip(m.us) {
                let layer = (m.layer)(kind);
                let from = layer.tiles_from(uniform(m.experts, m.topk));
                for (tokens, measured) in [256, 1024, 4096].into_iter().zip(by_tokens) {
                    let load = uniform(m.experts, m.topk)(tokens);
                    for (tile, us) in measured.into_iter().enumerate() {
                        let off = layer.call_us(tile, load) / us;
                        assert!((0.88..1.15).contains(&off), "{layer:?} {tokens} {}: {off} of {us}", TILES[tile]);
                    }
                    let taken = from.iter().rposition(|f| *f <= tokens).unwrap();
                    let best = measured.into_iter().fold(f64::MAX, f64::min);
                    assert!(measured[taken] < 1.035 * best, "{layer:?} {tokens}: {from:?} {measured:?}");
                }
            }
        }
    }

    #[test]
    fn these_kernels_pay_where_they_were_faster() {
        // Measured, us, both families: where the quotient is beyond 5 %, the rule has to agree.
        let layers = [
            (128, 8, 2048, 768, 1, [(4, 43.2, 50.0), (8, 73.0, 74.3), (9, 89.5, 81.1)].as_slice()),
            (128, 8, 2048, 768, 2, &[(4, 73.9, 74.9), (8, 128.3, 119.8), (9, 153.3, 132.8)]),
            (128, 4, 2880, 2880, 1, &[(2, 59.2, 69.8), (4, 106.9, 116.6), (8, 193.6, 201.5), (9, 224.0, 216.6)]),
            (256, 8, 7168, 256, 1, &[(4, 52.6, 62.8), (8, 100.0, 97.6), (9, 117.0, 109.5)]),
            (256, 8, 7168, 256, 2, &[(4, 92.1, 89.8), (8, 162.8, 153.8), (9, 188.6, 173.7)]),
            (8, 2, 4096, 14336, 1, &[(1, 92.4, 103.4), (2, 183.5, 164.2), (3, 188.3, 180.2), (6, 289.9, 280.0)]),
            (8, 2, 4096, 14336, 2, &[(1, 173.4, 174.7), (2, 308.9, 299.1), (3, 353.2, 324.6), (7, 578.6, 564.5)]),
        ];
        for (experts, topk, hidden, intermediate, bytes, measured) in layers {
            let kind = if bytes == 2 { Kind::Half } else { Kind::Fp8Block };
            let config = MoeConfig::new(experts, topk, hidden, intermediate);
            let from = pays_from(&config, kind, 3 * hidden * intermediate * bytes);
            for &(tokens, decode, wgmma) in measured {
                let quotient: f64 = wgmma / decode;
                assert!((0.95..1.05).contains(&quotient) || (tokens >= from) == (quotient < 1.0), "{tokens}: {from}");
            }
        }
        let c = MoeConfig::new(128, 8, 2048, 768);
        let batched = MoeConfig { format: ActivationFormat::Batched, ..c };
        let of = |c: &MoeConfig, bytes| pays_from(c, Kind::Fp8, bytes);
        assert_eq!((of(&batched, 1 << 20), of(&c, 1), of(&c, 1 << 40)), (1, 9, 2));
        assert_eq!(of(&MoeConfig::new(4, 4, 64, 64), 1 << 40), 2);
        assert_eq!(of(&MoeConfig { local_experts: 16, ..c }, 5 << 20), 9);
    }

    #[test]
    fn long_tasks_of_different_size_are_asked_for() {
        // As measured: faster, or as fast, where true; slower where false.
        let of = |kind, hidden, intermediate| layer(kind, 128, hidden, intermediate).asks();
        let (qwen3, deepseek) = ([false, true, true], [false; 3]);
        assert_eq!(of(Kind::Half, 2048, 768), [qwen3, qwen3]);
        assert_eq!(of(Kind::Fp8Block, 2048, 768), [qwen3, [false, false, true]]);
        assert_eq!(of(Kind::Int8, 7168, 256), [qwen3, deepseek]);
        assert_eq!(of(Kind::Half, 7168, 256)[1], deepseek);
    }

    #[test]
    fn experts_tokens_are_distributed_binomially() {
        for (tokens, chance) in [(1, 0.25), (7, 0.9), (300, 0.0625), (4096, 0.03125), (40, 1.0), (0, 0.5)] {
            let (mut all, mut mean, mut square) = (0.0, 0.0, 0.0);
            Load { tokens, chance }.for_each(|n, part| {
                assert!(n <= tokens);
                (all, mean, square) = (all + part, mean + part * n as f64, square + part * (n * n) as f64);
            });
            (mean, square) = (mean / all, square / all);
            let (want, spread) = (tokens as f64 * chance, tokens as f64 * chance * (1.0 - chance));
            assert!((mean - want).abs() < 0.02 * spread.sqrt() + 1e-9, "{tokens} {chance}: {mean} {want}");
            assert!((square - mean * mean - spread).abs() < 0.03 * spread + 1e-9, "{tokens} {chance}");
        }
    }

    #[test]
    fn one_task_more_than_clusters_is_a_round_more() {
        let one = layer(Kind::Half, 1, 4096, 64);
        let of = |row_tiles: usize| Projection { row_tiles, stages: 64 };
        let load = Load { tokens: 64, chance: 1.0 };
        let us = |row_tiles| one.projection_us(&of(row_tiles), 0, load);
        assert_eq!(us(1), us(66));
        assert_eq!(us(67), 2.0 * us(66));
    }

    #[test]
    fn tiles_grow_with_the_tokens_of_an_expert() {
        for (experts, topk) in [(8, 2), (128, 8), (256, 8), (512, 10), (32, 32)] {
            for kind in KINDS {
                let layer = layer(kind, experts, 2880, 1024);
                let from = layer.tiles_from(uniform(experts, topk));
                assert!(from[0] == 0 && from.is_sorted(), "{from:?}");
                let mean = |tokens: usize| (tokens * topk) as f64 / experts as f64;
                assert!((30.0..=128.0).contains(&mean(from[1])), "{experts} {kind:?} {from:?}");
                assert!((80.0..=300.0).contains(&mean(from[2])), "{experts} {kind:?} {from:?}");
            }
        }
        // A lone expert's rows are too few for all clusters, unless its tokens are divided.
        let from = layer(Kind::Half, 1, 2880, 1024).tiles_from(uniform(1, 1));
        assert!(from[1] > 128 && from.is_sorted(), "{from:?}");
        // A part of the experts is a part of the tasks, not of an expert's tokens.
        let part = Layer { local_experts: 16, ..layer(Kind::Fp8, 128, 2048, 768) };
        let from = part.tiles_from(uniform(128, 8));
        assert!((600..1600).contains(&from[1]) && (1300..3000).contains(&from[2]), "{from:?}");
    }

    #[test]
    fn the_kernel_has_the_same_number() {
        let source = include_str!("../../../kernels/permute.cu");
        assert!(source.contains(&format!("kGranularity = {GRANULARITY};")));
    }
}
