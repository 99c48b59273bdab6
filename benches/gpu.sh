#!/usr/bin/env bash
# Tests and tables on a machine that has the GPU but no cargo.
#
#   benches/gpu.sh pack FOLDER [CHECKPOINTS] [ANCHORS]   here: builds, strips and copies what the others need
#   FOLDER/gpu.sh test                                   there: every GPU test
#   FOLDER/gpu.sh sanitize                               there: memcheck, racecheck and initcheck over the shorter ones
#   FOLDER/gpu.sh bench OUT [OPTIONS OF bench]           there: every preset of the anchors, as text and JSON in OUT
set -euo pipefail
tests=(cuda_runtime cuda_routing cuda_quantize cuda_emulation cuda_decode cuda_mma cuda_mma_int8 cuda_wgmma)
presets=(qwen3-30b-a3b deepseek-v3-tp8 gpt-oss-120b mixtral-8x7b)

pack() {
  local to
  mkdir -p "$1"
  to=$(cd "$1" && pwd)
  [ -z "${2:-}" ] || cp -r "$2" "$to/checkpoints"
  [ -z "${3:-}" ] || cp "$3" "$to/anchors.json"
  cp "$0" "$to/gpu.sh"
  cd "$(dirname "$0")/.."
  cargo build --locked --release --features cuda
  cp target/release/moe-oracle "$to"
  local names=()
  for name in "${tests[@]}" checkpoints; do names+=(--test "$name"); done
  # Lines like: Executable tests/NAME.rs (target/release/deps/NAME-0123456789abcdef)
  cargo test --locked --release --features cuda --no-run "${names[@]}" 2>&1 | tee /dev/stderr |
    sed -n 's/.*Executable tests\/\(.*\)\.rs (\(.*\))/\1 \2/p' |
    while read -r name file; do cp "$file" "$to/test_$name"; done
  strip "$to"/moe-oracle "$to"/test_*
}

there() { cd "$(dirname "$0")"; }

case "${1:-}" in
  pack) shift; pack "$@" ;;
  test)
    there
    status=0
    for name in "${tests[@]}"; do "./test_$name" --test-threads 8 || status=1; done
    MOE_ORACLE_BIN=$PWD/moe-oracle MOE_ORACLE_CHECKPOINTS=$PWD/checkpoints ./test_checkpoints gpu || status=1
    exit $status
    ;;
  sanitize)
    there
    for tool in memcheck racecheck initcheck; do
      for name in cuda_quantize cuda_decode cuda_mma cuda_mma_int8 cuda_wgmma; do
        # It takes copies whose arrival is asynchronous for unordered (RESULTS.md, "Correctness there").
        [ "$tool $name" != "racecheck cuda_mma" ] || continue
        echo "== $tool $name"
        compute-sanitizer --tool "$tool" --error-exitcode 1 "./test_$name" \
          a_token_may few_tokens the_batched each_number many_slots expert_parallel codes_and_scales rows_are
      done
    done
    ;;
  bench)
    out=$(mkdir -p "$2" && cd "$2" && pwd)
    shift 2
    there
    for preset in "${presets[@]}"; do
      ./moe-oracle bench --device cuda --preset "$preset" --scheme all --tokens 1,4,16,64,256,1024,4096 \
        --anchors anchors.json --json "$out/$preset.json" "$@" | tee "$out/$preset.txt" || true
    done
    ;;
  *) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
