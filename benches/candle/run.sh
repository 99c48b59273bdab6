#!/usr/bin/env bash
# candle's quantised CPU path and ours (--backend cpu_simd_a8: with int8 activations, as candle has) side by side, with one
# thread and with two. Arguments go to the program.
set -euo pipefail
cd "$(dirname "$0")"
cargo build --locked --release
for threads in 1 2; do
  RAYON_NUM_THREADS=$threads cargo run --locked --release --quiet -- "$@"
done
