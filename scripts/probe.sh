#!/usr/bin/env bash
# Compiles models/emoji with the features of every layer, serves it and fits
# linear probes on the answers; then serves the resulting head, on the model in
# fp32 and in int8.
set -euo pipefail
cd "$(dirname "$0")/.."
worker=target/release/imagegpt
mkdir -p target/probe
log=target/probe/worker.log
layers=$(grep -oE '"n_layer": [0-9]+' models/emoji/config.json | grep -oE '[0-9]+')
pid=
trap '[ -z "$pid" ] || kill "$pid" 2>/dev/null || true' EXIT
for precision in fp32 int8; do
    rm -rf "target/probe/$precision"
    "$worker" compile models/emoji --output "target/probe/$precision" --precision "$precision" \
        --tasks embed --feature-layer "$layers" >"$log"
done
# with_worker PRECISION [FLAG...] -- [ARGUMENT...]: flags go to serve, arguments
# to probe.py.
with_worker() {
    local flags=()
    local model=target/probe/$1
    shift
    while [ "$1" != -- ]; do
        flags+=("$1")
        shift
    done
    shift
    "$worker" serve --model "$model" --execution-provider cpu "${flags[@]}" \
        --listen "127.0.0.1:$PORT" --metrics-listen "127.0.0.1:$METRICS_PORT" 2>"$log" &
    pid=$!
    scripts/await-ready.sh "$pid" "$METRICS_PORT" "$log"
    "$TRAIN_VENV/bin/python" models/train/probe.py --endpoint "127.0.0.1:$PORT" "$@"
    kill "$pid"
    wait "$pid"
    pid=
}
with_worker fp32 --
head=category=models/emoji/category.safetensors
with_worker fp32 --head "$head" -- --check
with_worker int8 --head "$head" -- --check
