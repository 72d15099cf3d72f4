#!/usr/bin/env bash
# Runs sixteen callers of Generate on models/emoji that start, cancel and finish
# at random. MINUTES is the duration [5], PRECISION fp32 or int8 [fp32].
set -euo pipefail
cd "$(dirname "$0")/.."
worker=target/release/imagegpt
precision=${PRECISION:-fp32}
port=50155
metrics_port=9195
work=target/soak-generate
rm -rf "$work"
mkdir -p "$work"
"$worker" compile models/emoji --output "$work/model" --precision "$precision" \
    --tasks score,generate >"$work/compile.log"
"$worker" serve --model "$work/model" --execution-provider cpu \
    --listen "127.0.0.1:$port" --metrics-listen "127.0.0.1:$metrics_port" 2>"$work/worker.log" &
pid=$!
trap 'kill "$pid" 2>/dev/null || true' EXIT
scripts/await-ready.sh "$pid" "$metrics_port" "$work/worker.log"
"$PARITY_VENV/bin/python" tests/parity/generate_soak.py --endpoint "127.0.0.1:$port" \
    --metrics "127.0.0.1:$metrics_port" --pid "$pid" --minutes "${MINUTES:-5}"
