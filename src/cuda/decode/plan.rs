//! How `cuda_decode` is launched: a pure function of a layer's sizes, the GPU and the number of tokens.

use super::super::pack::{Codes, Format};

/// Tokens of a pair of launches: the columns of a tensor-core product.
pub const TOKENS: usize = 8;
/// More than any of the kernels has of static shared memory.
pub const STATIC_SHARED: usize = 4 << 10;
/// What a multiprocessor spends on every block.
const BLOCK_SHARED: usize = 1 << 10;
/// The kernels' threads allow no more, and for `far` in the first one.
const WARPS: usize = 16;
const FAR_WARPS: usize = 8;

/// What a plan depends on, of a layer.
#[derive(Clone, Copy)]
pub struct Sizes {
    pub format: Format,
    pub topk: usize,
    /// Blocks of 64 columns, and slabs of 16 rows, of gate and up and of down.
    pub first_blocks: usize,
    pub first_slabs: usize,
    pub second_blocks: usize,
    pub second_slabs: usize,
}

/// And of a GPU.
#[derive(Clone, Copy)]
pub struct Limits {
    pub multiprocessors: usize,
    /// Bytes of shared memory that a block may have, static and dynamic together; a multiprocessor has little more.
    pub shared: usize,
    /// Whether blocks can form clusters.
    pub clusters: bool,
}

/// How one of the two kernels is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Of a block.
    pub warps: usize,
    /// Places of a warp's ring.
    pub depth: usize,
    /// Warps that share a unit of work, as a power of two.
    pub split: u32,
    /// Bytes of dynamic shared memory.
    pub shared: usize,
    /// The tokens' rows are in shared memory.
    pub near: bool,
    /// Where clusters share slabs of the output.
    pub sharing: Option<Sharing>,
}

/// How clusters of the second kernel take the output: their blocks share the columns of some slabs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sharing {
    /// Slabs of a cluster.
    pub each: usize,
    /// Its blocks, as a power of two.
    pub parts: u32,
}

impl Shape {
    /// How many units a block has in work at once.
    pub fn groups(&self) -> usize {
        self.warps >> self.split
    }
}

/// Both, for a number of tokens. The order of sums depends on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    pub first: Shape,
    /// Blocks of the first kernel, at most.
    pub first_blocks: usize,
    /// Its blocks' groups take units that are far apart, so that few units come to all multiprocessors; else neighbours.
    pub spread: bool,
    /// When it sends for which of its units a group lets the second kernel start: what that one sends for ahead of time is
    /// to come behind most of what the first one waits for.
    pub release: usize,
    pub second: Shape,
}

/// Where tokens' rows are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A lone token in shared memory.
    One,
    /// Several.
    Near,
    /// Any number, in global memory.
    Far,
}

/// Bytes of a chunk of so many stages of 128 columns.
fn chunk(format: Format, stages: usize) -> usize {
    stages * (2 * format.codes.words() * 512 + 32 * format.scales.registers())
}

/// Stages of a chunk, as kFirstStages of kernels/decode/first.cuh and kSecondStages of second.cuh.
fn first_stages(format: Format, place: Place) -> usize {
    match format.codes {
        Codes::Half => 1,
        _ if place == Place::One => 2 / format.codes.words(),
        _ => 4 / format.codes.words(),
    }
}

fn second_stages(format: Format) -> usize {
    if format.codes.words() == 1 { 2 } else { 1 }
}

/// As `Rows` of kernels/decode/tokens.cuh: barrier, rows off a multiple of 128 bytes, sums of scale groups where codes have
/// an offset or a zero point, stages' units of e4m3.
fn rows(format: Format, blocks: usize, count: usize) -> usize {
    let sums = matches!(format.codes, Codes::U4 | Codes::E4m3) || format.scales.zeros();
    let groups = if sums { format.scales.groups().max(1) } else { 0 };
    16 + count * (blocks * 128 + 64 + blocks.div_ceil(2) * groups * 4)
}

/// As `Digits` of kernels/decode/digits.cuh: three digits a column, off a multiple of 128 bytes; units, sums.
fn digit_rows(format: Format, blocks: usize, count: usize) -> usize {
    let stages = blocks.div_ceil(2);
    count * (3 * (stages * 128 + 16) + stages * (1 + format.scales.groups().max(1)) * 4).next_multiple_of(16)
}

/// Whether a lone token is multiplied as integers: kDigits of kernels/common/format.cuh.
fn has_digits(format: Format) -> bool {
    matches!(format.codes, Codes::U4 | Codes::Int8)
}

/// The first kernel's part of a plan.
struct First {
    shape: Shape,
    blocks: usize,
    spread: bool,
    release: usize,
}

impl Sizes {
    fn first_shared(&self, place: Place, tokens: usize, warps: usize, depth: usize, split: u32) -> usize {
        let ring = depth * (chunk(self.format, first_stages(self.format, place)) + 128 + 16);
        let part = if place == Place::One { 8 } else { 16 };
        let parts = if split == 0 { 0 } else { 2 * warps * 32 * part };
        let rows = match place {
            Place::Far => 0,
            Place::One if has_digits(self.format) => {
                // The token as it came, too.
                rows(self.format, self.first_blocks, 1).next_multiple_of(16)
                    + digit_rows(self.format, self.first_blocks, 1)
            }
            _ => rows(self.format, self.first_blocks, tokens),
        };
        warps * ring + parts + rows
    }

    fn second_shared(&self, place: Place, tokens: usize, warps: usize, depth: usize, split: u32) -> usize {
        let ring = depth * (chunk(self.format, second_stages(self.format)) + 16);
        let pairs = tokens * self.topk;
        let rows = match place {
            Place::Far => 0,
            Place::One if has_digits(self.format) => digit_rows(self.format, self.second_blocks, pairs),
            _ => rows(self.format, self.second_blocks, pairs),
        };
        warps * ring + (warps >> split) * pairs * 64 + rows
    }

    /// The same where clusters share slabs: a job's weights take 16 bytes more, a warp's sums of a token 80.
    fn shared_shared(&self, tokens: usize, warps: usize, depth: usize, sharing: Sharing) -> usize {
        let Sharing { each, parts } = sharing;
        let stages = second_stages(self.format);
        let ring = depth * (chunk(self.format, stages) + 16);
        let pairs = tokens * self.topk;
        let chunks = self.second_blocks.div_ceil(2 * stages).div_ceil(1 << parts);
        let rows = rows(self.format, (chunks * 2 * stages).min(self.second_blocks), pairs);
        let others = ((1 << parts) - 1) * warps * 32 * 4;
        warps * ring + each * pairs * 80 + warps * each * tokens * 80 + others + rows
    }

    /// For `tokens` tokens, whose rows are to be in such a place; none if they do not fit there.
    fn first(&self, gpu: Limits, place: Place, tokens: usize) -> Option<First> {
        let chunks = self.first_blocks.div_ceil(2 * first_stages(self.format, place));
        let units = self.first_slabs * tokens * self.topk;
        let each = units.div_ceil(gpu.multiprocessors);
        let half = self.format.codes == Codes::Half;
        // A lone token's units are few: that many at once, and the more warps to each. Four bits, which take many
        // instructions, want every multiprocessor at its units at once; wider ones longer copies.
        let many = each > 64;
        // Two blocks of long copies, each wholly on one unit, are best where there is room for them.
        let room = |blocks| {
            let split = WARPS.ilog2();
            let shared = self.first_shared(place, tokens, WARPS, 1, split) + STATIC_SHARED + BLOCK_SHARED;
            blocks * shared <= gpu.shared + BLOCK_SHARED
        };
        let whole_blocks = place == Place::Near && half && (many || room(2));
        let long = many && place == Place::Near && self.format.codes.words() == 2;
        let several = place == Place::Near && !half;
        let groups = match each {
            _ if whole_blocks => 1,
            _ if long => 4,
            // A warp to a unit where that is all of a multiprocessor's units, or half of them.
            9..=16 if several => each.next_multiple_of(2).max(12),
            25..=32 if several => 16,
            _ if place != Place::One => 8,
            0..=2 => 2,
            5..=6 if self.format.codes.words() == 1 => 6,
            3..=8 if self.format.codes.words() == 1 => 8,
            3..=8 => 2,
            17.. if self.format.codes == Codes::E2m1 && chunks >= 16 => 8,
            _ => 4,
        };
        let of = |warps: usize, depth: usize, blocks: usize| {
            let split = (warps * blocks / groups).clamp(1, warps).ilog2();
            let needed = self.first_shared(place, tokens, warps, depth, split);
            // So much that no more blocks come to a multiprocessor, but for the batched format's, which are many: where
            // the kernel before still runs, some have room for twice as many, which then take twice as long as others.
            let whole = gpu.shared + BLOCK_SHARED;
            let least = if place == Place::Far { 0 } else { (whole / (blocks + 1)).saturating_sub(BLOCK_SHARED) + 128 };
            let shared = needed.max(least);
            let fits =
                shared + STATIC_SHARED <= gpu.shared && blocks * (shared + STATIC_SHARED + BLOCK_SHARED) <= whole;
            let shape = Shape { warps, depth, split, shared, near: place != Place::Far, sharing: None };
            let blocks = blocks * gpu.multiprocessors;
            let release = (units.div_ceil(blocks * shape.groups()) * 2 / 3).min(2);
            fits.then_some(First { shape, blocks, spread: !many && place != Place::Far, release })
        };
        let wish = if place == Place::Far { FAR_WARPS } else { WARPS };
        let digits = place == Place::One && self.format.codes == Codes::U4;
        // Few units of four bits: more of them on their way.
        let few = self.format.codes.words() == 1 && (3..=8).contains(&each) || digits && each <= 2;
        // Long ones of eight: sums are quick, and two places make the warps stop and go.
        let long_eight = self.format.codes.words() == 2 && each > 16;
        let deep = if place == Place::One && (half || few || long_eight) { 3 } else { 2 };
        // Twice the warps pay for some formats where a lone token's units are long, and so few or so many that none is left
        // over.
        let first_try = match place {
            // A unit to each group, all of it on its way at once, and room for the second kernel's block beside it.
            Place::One if groups == 6 => (12, 4, 1),
            Place::One
                if chunks >= 16 && !digits && (each > 16 && self.format.codes.words() != 2 || each <= 2 && half) =>
            {
                (wish, 2, 2)
            }
            Place::Near if whole_blocks => (wish, 1, if room(2) { 2 } else { 1 }),
            Place::Near if long => (wish, 1, 1),
            // And no more warps: the second kernel's block then has room beside theirs.
            Place::Near if groups > 8 => (groups, 2, 1),
            _ => (wish, deep, 1),
        };
        let rest = [(wish, deep, 1), (wish, 2, 1), (wish, 1, 1), (wish / 2, 2, 1), (wish / 2, 1, 1), (4, 1, 1)];
        std::iter::once(first_try).chain(rest).find_map(|(warps, depth, blocks)| of(warps, depth, blocks))
    }

    fn second(&self, gpu: Limits, place: Place, tokens: usize) -> Option<Shape> {
        let chunks = self.topk * self.second_blocks.div_ceil(2 * second_stages(self.format));
        // Few slabs: a block to each; else two to a block, which read the tokens' rows once; four of a lone token's, where
        // they are short and two would not come to the multiprocessors at once.
        let half = self.format.codes == Codes::Half;
        let few = if half && place != Place::One { 2 * gpu.multiprocessors } else { gpu.multiprocessors };
        let short = place == Place::One && chunks <= WARPS && self.format.codes != Codes::U4;
        let groups = match self.second_slabs {
            n if n <= few => 1,
            n if n > 2 * gpu.multiprocessors && short => 4,
            _ => 2,
        };
        let sharing = self.sharing(gpu, place, tokens, groups);
        if sharing.is_some() {
            return sharing;
        }
        let long = place == Place::One && chunks * groups > 8 * WARPS;
        let deep = if long || half && place != Place::One && groups == 1 { 3 } else { 2 };
        [(WARPS, deep), (WARPS, 2), (WARPS, 1), (WARPS / 2, 2), (WARPS / 2, 1), (4, 1)].into_iter().find_map(
            |(warps, depth)| {
                // 128 threads add up a slab.
                let split = (warps / groups).max(4).ilog2();
                let shared = self.second_shared(place, tokens, warps, depth, split);
                let near = place != Place::Far;
                (shared + STATIC_SHARED <= gpu.shared).then_some(Shape {
                    warps,
                    depth,
                    split,
                    shared,
                    near,
                    sharing: None,
                })
            },
        )
    }

    /// Clusters of two, where a block to one or two slabs leaves multiprocessors idle, or where four-bit codes' rows of several
    /// tokens do not fit beside full rings (wider ones lose nothing by rows in L2). A lone token's only for e2m1.
    fn sharing(&self, gpu: Limits, place: Place, tokens: usize, groups: usize) -> Option<Shape> {
        let parts = 1;
        let words = self.format.codes.words();
        let chunks = self.second_blocks.div_ceil(2 * second_stages(self.format));
        let has_kernel = match place {
            Place::One => self.format.codes == Codes::E2m1,
            Place::Near => words <= 2,
            Place::Far => false,
        };
        if !gpu.clusters || !has_kernel || chunks < 1 << parts {
            return None;
        }
        let idle = groups == 2 && self.second_slabs.div_ceil(groups) * 4 < gpu.multiprocessors * 3;
        let alone = self.second_shared(place, tokens, WARPS, 2, (WARPS / groups).ilog2());
        let crowded = place == Place::Near && words == 1 && alone + STATIC_SHARED > gpu.shared;
        if !idle && !crowded {
            return None;
        }
        let sharing = Sharing { each: (self.second_slabs << parts).div_ceil(gpu.multiprocessors), parts };
        // A thread adds up a result. Rings of one place are worth it where rows in L2 are slowest.
        let least = if self.format.scales.groups() > 4 { 1 } else { 2 };
        let of = |depth| {
            let shared = self.shared_shared(tokens, WARPS, depth, sharing);
            let fits = shared + STATIC_SHARED <= gpu.shared && 16 * sharing.each * tokens <= 32 * WARPS;
            let shape = Shape { warps: WARPS, depth, split: WARPS.ilog2(), shared, near: true, sharing: Some(sharing) };
            fits.then_some(shape)
        };
        (least..=2).rev().find_map(of)
    }
}

impl Plan {
    fn of(first: First, second: Shape) -> Self {
        let First { shape, blocks, spread, release } = first;
        Plan { first: shape, first_blocks: blocks, spread, release, second }
    }

    /// For `tokens` tokens, 1 to 8. None if the GPU has too little shared memory for any.
    pub fn new(s: Sizes, gpu: Limits, tokens: usize) -> Option<Self> {
        let near = if tokens == 1 { Place::One } else { Place::Near };
        let first = s.first(gpu, near, tokens).or_else(|| s.first(gpu, Place::Far, tokens));
        let second = s.second(gpu, near, tokens).or_else(|| s.second(gpu, Place::Far, tokens));
        Some(Plan::of(first?, second?))
    }

    /// For the batched format.
    pub fn batched(s: Sizes, gpu: Limits) -> Option<Self> {
        Some(Plan::of(s.first(gpu, Place::Far, TOKENS)?, s.second(gpu, Place::Far, TOKENS)?))
    }
}

/// Up to how many tokens of a layer these kernels are faster than a grouped GEMM, which gains where tokens share experts
/// (benches/RESULTS.md).
pub fn pays_up_to(codes: Codes, experts: usize, topk: usize) -> usize {
    let (eighths, most) = match codes {
        Codes::Half | Codes::Int8 => (0, 8),
        Codes::E4m3 => (3, 12),
        Codes::E2m1 | Codes::U4 => (4, 16),
    };
    // Tokens of an expert, in eighths.
    (eighths * experts / (8 * topk.max(1))).clamp(8, most)
}
