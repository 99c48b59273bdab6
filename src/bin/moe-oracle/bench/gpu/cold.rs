//! Keeping the weights cold. A model's other layers push this layer's weights out of the cache between two calls; calls of
//! one layer in a row would find some of them there and look faster than memory.

use std::collections::HashSet;

/// How many caches' worth of weights one replay reads, and a layer's copies hold together.
const CACHES: usize = 4;
/// The most calls of a replay, and the most tokens of all of them: beyond that a graph takes longer to record than to
/// be measured.
const MAX_CALLS: usize = 1024;
const MAX_TOKENS: usize = 1 << 16;

/// Copies of a layer that together are [`CACHES`] times the cache; 1 where the layer is.
pub fn copies(layer_bytes: usize, cache: usize) -> usize {
    (CACHES * cache).div_ceil(layer_bytes.max(1)).clamp(1, MAX_CALLS)
}

/// Whether a replay needs no more calls.
pub fn enough(calls: usize, tokens: usize, least: usize, bytes: usize, cache: usize) -> bool {
    calls >= least && (bytes >= CACHES * cache || calls >= MAX_CALLS || calls * tokens >= MAX_TOKENS)
}

/// The experts that one call reads, of one copy of the layer.
pub struct Reads {
    /// The copy.
    pub copy: usize,
    /// Its experts.
    pub experts: Vec<usize>,
}

/// The share of reads that can be hits: fewer bytes than the cache holds were read since that expert's last read. The
/// calls repeat for ever. Inside a call the order is unknown; half of it lies before a read, on average.
pub fn warm_share(calls: &[Reads], expert_bytes: usize, cache: usize) -> f64 {
    let (mut warm, mut all) = (0, 0);
    for (at, call) in calls.iter().enumerate() {
        all += call.experts.len();
        let mut missing: HashSet<usize> = call.experts.iter().copied().collect();
        let mut between: HashSet<(usize, usize)> = HashSet::new();
        // From the call before to this very call in the last replay.
        for back in 1..=calls.len() {
            let earlier = &calls[(at + calls.len() - back) % calls.len()];
            let ends = call.experts.len() + earlier.experts.len();
            if (2 * between.len() + ends) * expert_bytes < 2 * cache && earlier.copy == call.copy {
                warm += earlier.experts.iter().filter(|e| missing.remove(e)).count();
            }
            between.extend(earlier.experts.iter().map(|e| (earlier.copy, *e)));
            if missing.is_empty() || between.len() * expert_bytes >= cache {
                break;
            }
        }
    }
    warm as f64 / all.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calls(of: &[(usize, &[usize])]) -> Vec<Reads> {
        of.iter().map(|(copy, experts)| Reads { copy: *copy, experts: experts.to_vec() }).collect()
    }

    #[test]
    fn small_layers_are_copied_until_they_are_four_caches() {
        assert_eq!(copies(400, 100), 1);
        assert_eq!(copies(399, 100), 2);
        assert_eq!(copies(90, 100), 5);
        assert_eq!(copies(0, 100), 400);
        assert_eq!(copies(1, 1 << 40), MAX_CALLS);
    }

    #[test]
    fn calls_are_added_until_they_read_four_caches() {
        assert!(!enough(5, 1, 6, 1 << 30, 100), "the asked number is the least");
        assert!(!enough(6, 1, 6, 399, 100));
        assert!(enough(6, 1, 6, 400, 100));
        assert!(enough(MAX_CALLS, 1, 6, 1, 100) && enough(16, 4096, 6, 1, 100), "but not for ever");
        assert!(!enough(5, MAX_TOKENS, 6, 1, 100));
    }

    #[test]
    fn a_read_is_warm_where_little_was_read_since_the_last_one() {
        // Two calls in turns over the same two experts: everything fits.
        let same = calls(&[(0, &[0, 1]), (0, &[0, 1])]);
        assert_eq!(warm_share(&same, 10, 30), 1.0);
        // 20 bytes lie between two reads of an expert: as much as the cache.
        assert_eq!(warm_share(&same, 10, 20), 0.0);
        // Other copies are other memory; with them, 40 bytes lie between.
        let rotated = calls(&[(0, &[0, 1]), (1, &[0, 1])]);
        assert_eq!(warm_share(&rotated, 10, 30), 0.0);
        assert_eq!(warm_share(&rotated, 10, 41), 1.0);
        // Expert 7 comes back at once (20 bytes), the others after a round of 40 or more.
        let partly = calls(&[(0, &[7, 1]), (0, &[7, 2]), (0, &[3, 4])]);
        assert_eq!(warm_share(&partly, 10, 25), 1.0 / 6.0);
        assert_eq!(warm_share(&[], 10, 20), 0.0);
    }

    #[test]
    fn one_call_over_and_over_is_warm_where_it_fits() {
        let one = calls(&[(0, &[0, 1, 2])]);
        assert_eq!(warm_share(&one, 10, 31), 1.0);
        assert_eq!(warm_share(&one, 10, 29), 0.0);
    }
}
