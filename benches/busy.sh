#!/usr/bin/env bash
# What a busy neighbour costs: one token with two threads, first on an idle machine, then while another process keeps the
# second core busy (Linux; two cores or more). Medians in microseconds and their ratio. Arguments go to `moe-oracle bench`,
# which should name formats (--scheme) and may name a backend; the last line of each table is the same run again, for the
# machine's own unrest.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --locked --release --quiet
folder=$(mktemp -d)
hog=
trap '[ -z "$hog" ] || kill "$hog"; rm -r "$folder"' EXIT

measure() { # file, threads, arguments
  local file=$1 threads=$2
  shift 2
  taskset -c 0,1 target/release/moe-oracle bench --tokens 1 --threads "$threads" --json "$folder/$file" "$@" \
    >"$folder/log" 2>&1 || { cat "$folder/log" >&2; exit 1; }
}

measure idle2 2 "$@"
measure idle1 1 "$@"
taskset -c 1 sh -c 'while :; do :; done' &
hog=$!
measure busy2 2 "$@"
measure busy1 1 "$@"
kill "$hog"
wait "$hog" 2>/dev/null || true
hog=
measure again2 2 "$@"

python3 - "$folder" <<'PY'
import json, sys
runs = {n: json.load(open(f"{sys.argv[1]}/{n}"))["rows"] for n in ("idle2", "busy2", "idle1", "busy1", "again2")}
print(f"{'scheme':<12}{'2 threads idle':>15}{'busy':>9}{'ratio':>7}{'1 thread idle':>15}{'busy':>9}{'2 idle again':>14}")
for rows in zip(*runs.values()):
    idle2, busy2, idle1, busy1, again2 = (r["us"] for r in rows)
    print(f"{rows[0]['scheme']:<12}{idle2:>15.0f}{busy2:>9.0f}{busy2 / idle2:>7.2f}{idle1:>15.0f}{busy1:>9.0f}{again2:>14.0f}")
PY
