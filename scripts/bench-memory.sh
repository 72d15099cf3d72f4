#!/usr/bin/env bash
# Measures the memory of a worker that serves all tasks of imagegpt-small's
# architecture (random weights, fp32), after its warm-up at batch size 1, as the
# kernel reports it: pages of files (weights, libraries), each counted once
# however often it is mapped, and the worker's own pages (activations, tables,
# threads).
set -euo pipefail
cd "$(dirname "$0")/.."
work=target/bench-graphs
[ -d "$work/small" ] || "$PARITY_VENV/bin/python" tests/parity/card_recipe.py --random-small "$work/small"
rm -rf "$work/all"
target/release/imagegpt compile "$work/small" --output "$work/all" >/dev/null
measure() {
    target/release/imagegpt serve --model "$1" --execution-provider cpu --max-batch-size 1 \
        --generate-slots "$3" \
        --listen 127.0.0.1:50163 --metrics-listen 127.0.0.1:9193 2>"$work/memory.log" &
    local pid=$!
    scripts/await-ready.sh "$pid" 9193 "$work/memory.log"
    awk -v name="$2" '/^Pss_File/ { file = $2 } /^Pss_Anon/ { anon = $2 }
        END { printf "%s: %d MB of files, %d MB of its own\n", name, file / 1000, anon / 1000 }' \
        "/proc/$pid/smaps_rollup"
    kill "$pid"
    wait "$pid"
}
measure tests/data/models/micro "a micro model" 0
measure "$work/all" "imagegpt-small without generation" 0
measure "$work/all" "imagegpt-small with one image at a time" 1
measure "$work/all" "imagegpt-small with eight" 8
echo "weights.bin: $(($(stat -c %s "$work/all/weights.bin") / 1000000)) MB"
